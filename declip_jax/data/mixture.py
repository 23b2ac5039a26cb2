"""Several sources that are read as one."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from declip_jax.data.hangs import Key, key_of
from declip_jax.data.sources import BadSample, Example, Source, read_example
from declip_jax.extras import grain
from declip_jax.spelling import counted

_TRIED = 100  # samples of a source without classes, in which few may have captions

Position = tuple[int, int]  # number of the source, index in it


@dataclass(frozen=True)
class Mixture:
  """Sources that are read as one, and the captions of their examples.

  Attributes:
    sources: the sources to read.
    weights: one positive weight per source; the sources are interleaved in exact proportion.
    needs_caption: whether examples without a caption are bad; a recipe without texts can use them.
    templates: captions for examples that have a class and no caption, with {} for the class name.
    field: the field of `config.data` that has the weights, for error messages.

  Raises:
    ValueError: a source is empty, or there is not one positive weight per source.
  """

  sources: tuple[Source, ...]
  weights: tuple[float, ...] = (1.0,)
  needs_caption: bool = True
  templates: tuple[str, ...] = ()
  field: str = "mixture"

  def __post_init__(self) -> None:
    if len(self.sources) != len(self.weights) or any(weight <= 0 for weight in self.weights):
      raise ValueError(
        f"config.data.{self.field}={self.weights}: expected a positive weight for each of "
        f"{counted(len(self.sources), 'source')}"
      )
    for source in self.sources:
      if not len(source):
        raise ValueError(f"{source.name} has no usable sample; skipped: {source.skipped or 'none'}")

  def positions(self, seed: int) -> "grain.MapDataset":
    """Endless pairs of source and index; each epoch of a source is a new permutation of all of it."""
    # Every seed is explicit, since the seeds that grain derives change with the order of operations. Seeds are hashes,
    # since grain increments them with each epoch: with adjacent seeds, sources or runs would share permutations.
    streams = [
      grain.MapDataset.range(len(source)).shuffle(seed=hashed(seed, number)).repeat().map(partial(_pair, number))
      for number, source in enumerate(self.sources)
    ]
    return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights=list(self.weights))

  def read(self, position: Position) -> Example:
    """Reads the example at a position, with a caption if one is needed.

    Raises:
      BadSample: the example cannot be used; the message names it.
      MemoryError, KeyboardInterrupt, SystemExit: see `bad_sample`.
    """
    source = self.sources[position[0]]
    example = read_example(source, position[1])
    if example["captions"]:
      return example
    if self.templates and source.classnames and example["label"] >= 0:
      name = source.classnames[example["label"]]
      return {**example, "captions": tuple(template.format(name) for template in self.templates)}
    if self.needs_caption:
      raise BadSample("no caption", f"{example['id']}: no caption")
    return example

  def name(self, position: Position) -> str:
    """The name of an example before it is read."""
    return f"{self.sources[position[0]].name}: sample {position[1]}"

  def key(self, position: Position) -> Key:
    """The key of an example, see `key_of`."""
    return key_of(self.sources[position[0]], position[1])

  def replacement(self, position: Position, rng: np.random.Generator) -> Position:
    """Draws a position of the same source to use instead of a bad one.

    It is drawn from the whole source: bad examples are often adjacent, as in a lost shard, and the first good one after
    them would otherwise be used once for each of them.
    """
    return position[0], int(rng.integers(len(self.sources[position[0]])))

  def repeats(self, batch_size: int) -> list[str]:
    """Returns a message for each source with fewer examples than its share of a batch."""
    found = []
    for source, weight in zip(self.sources, self.weights, strict=True):
      share = batch_size * weight / sum(self.weights)
      if len(source) < share:
        found.append(
          f"{source.name} has {counted(len(source), 'sample')} for {share:,.4g} positions in each batch: a batch "
          "contains some of them repeatedly, which contrastive terms treat as different; lower batch_size"
        )
    return found

  def check_captions(self) -> None:
    """Rejects sources without captions, if captions are needed and no templates make them of the names of classes.

    Raises:
      ValueError: the message names the first such source.
    """
    for source in self.sources if self.needs_caption else ():
      if source.classnames and not self.templates and not has_captions(source):
        raise ValueError(
          f"{source.name} has classes but no captions: set config.data.templates, such as ('a photo of a {{}}.',)"
        )
      if not source.classnames and not has_captions(source, _TRIED):
        raise ValueError(
          f"{source.name} has no captions: found none in {counted(min(_TRIED, len(source)), 'sample')} tried"
        )

  def check_classes(self, num_classes: int, classnames: tuple[str, ...]) -> None:
    """Rejects sources whose class names are not those of the classifier, in the same order.

    Sources without class names are not checked.

    Raises:
      ValueError: the message names the source, and the numbers of classes or the first name that differs.
    """
    for source in self.sources:
      names = tuple(source.classnames)
      if names and len(names) != num_classes:
        raise ValueError(
          f"{source.name} has {counted(len(names), 'class name')}, but config.model.heads.num_classes={num_classes}: "
          "set it to 0, and config.model.heads.classnames to (), to take those of the source"
        )
      if names and classnames and names != classnames:
        at, name = next((i, name) for i, name in enumerate(names) if name != classnames[i])
        raise ValueError(
          f"class {at} is {name!r} in {source.name}, but {classnames[at]!r} in config.model.heads.classnames: labels "
          "are numbers in this order"
        )


def has_captions(source: Source, tries: int = 8) -> bool:
  """Whether one of a few examples has a caption, or none of them can be read."""
  read = 0
  for index in sorted({len(source) * number // tries for number in range(tries)}):
    try:
      if read_example(source, index)["captions"]:
        return True
      read += 1
    except BadSample:
      continue
  return not read


def _pair(number: int, index: int) -> Position:
  return number, index


def hashed(*numbers: int) -> int:
  """Mixes numbers into 32 random-looking bits."""
  return int(np.random.SeedSequence(numbers).generate_state(1)[0])
