"""Several sources read as one."""

from dataclasses import dataclass
from functools import partial

import grain
import numpy as np

from declip_jax.data.sources import BadSample, Example, Source

Place = tuple[int, int]  # number of the source, index in it


@dataclass(frozen=True)
class Mixture:
  """Sources that are read as one, and how their examples get captions.

  Attributes:
    sources: what to read.
    weights: positive, one for each: they are interleaved in exact proportion.
    needs_caption: whether an example without a caption is passed over; a recipe without text can take it.
    templates: captions for examples that have a class and no caption, with {} for the name of the class.
    field: of `config.data`, where the weights stand, for error messages.
  """

  sources: tuple[Source, ...]
  weights: tuple[float, ...] = (1.0,)
  needs_caption: bool = True
  templates: tuple[str, ...] = ()
  field: str = "mixture"

  def __post_init__(self) -> None:
    if len(self.sources) != len(self.weights) or any(weight <= 0 for weight in self.weights):
      raise ValueError(
        f"config.data.{self.field}={self.weights}: give a positive weight for each of {len(self.sources)} sources"
      )
    for source in self.sources:
      if not len(source):
        raise ValueError(f"{source.name} has no usable sample; left out: {source.skipped or 'none'}")

  def places(self, seed: int) -> grain.MapDataset:
    """Endless pairs of source and index: each pass over a source is another permutation of all of it."""
    # Seeds are given one by one: those that grain derives change with the order of operations. They are hashes, for
    # grain counts a seed up with each pass: with neighbouring seeds, sources or runs would go through the same orders.
    parts = [
      grain.MapDataset.range(len(source)).shuffle(seed=hashed(seed, number)).repeat().map(partial(_pair, number))
      for number, source in enumerate(self.sources)
    ]
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=list(self.weights))

  def read(self, place: Place) -> Example:
    """The example of a place, with a caption if one is needed.

    Raises:
      BadSample: it cannot be used; the message names it.
    """
    source = self.sources[place[0]]
    try:
      example = source[place[1]]
    except OSError as error:
      raise BadSample("missing file", f"{source.name}: example {place[1]}: {error}") from error
    if any(caption.strip() for caption in example["captions"]):
      return example
    if self.templates and source.classnames and example["label"] >= 0:
      name = source.classnames[example["label"]]
      return {**example, "captions": tuple(template.format(name) for template in self.templates)}
    if self.needs_caption:
      raise BadSample("no caption", f"{example['id']}: no caption")
    return example

  def another(self, place: Place, rng: np.random.Generator) -> Place:
    """A place of the same source to take for one that cannot be used.

    Anywhere in it: bad samples lie side by side, as those of a lost shard do, and the first good one behind them would
    come as often as they are many.
    """
    return place[0], int(rng.integers(len(self.sources[place[0]])))

  def check_captions(self) -> None:
    """Refuses a source of classes that has no captions, where they are needed and no templates make them.

    Raises:
      ValueError: names the source.
    """
    for source in self.sources if self.needs_caption and not self.templates else ():
      if source.classnames and not _captioned(source):
        raise ValueError(
          f"{source.name} has classes and no captions: give config.data.templates, such as ('a photo of a {{}}.',)"
        )


def _captioned(source: Source) -> bool:
  """Whether one of a few examples has a caption."""
  for index in sorted({len(source) * part // 8 for part in range(8)}):
    try:
      if any(caption.strip() for caption in source[index]["captions"]):
        return True
    except (BadSample, OSError):
      continue
  return False


def _pair(number: int, index: int) -> Place:
  return number, index


def hashed(*numbers: int) -> int:
  """32 bits that look random."""
  return int(np.random.SeedSequence(numbers).generate_state(1)[0])
