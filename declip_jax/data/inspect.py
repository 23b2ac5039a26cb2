"""Describes a data set: python -m declip_jax.data.inspect DATA --sheet samples.png

  DATA    a path, pattern, folder or URL, or KIND:LOCATION

Reads a fixed random subset of the samples and prints image formats and sizes, captions and their lengths, classes, and
bad samples with their names. The kind of a plain path is detected: shards, tables, annotations, folders. The first
line printed is the spec to train with; other splits are named, and not read. The last line is a command that trains on
the data, if they have captions. Fails if every sample is bad.
"""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
import math
import os
import re
import shlex
from typing import NamedTuple

from absl import flags
import numpy as np
from PIL import Image

from declip_jax import command_line
from declip_jax.data import images, records
from declip_jax.data.guess import guesses
from declip_jax.data.recipes import RECIPES
from declip_jax.data.sources import BadSample, Source, open_source
from declip_jax.data.storage import files, jobs
from declip_jax.data.text.tokenizer import Tokenizer
from declip_jax.reporting import pictures
from declip_jax.spelling import counted

_THREADS = 8
_NAMED = 3  # bad samples of each kind to name
_CLASSES = 8  # classes to name
_TILES, _BAD_TILES, _SIDE = 24, 4, 224  # samples on the sheet, bad ones of them, and the longer side of its images
_OTHERS = ("labels", "groups")  # fields for evaluations


class _Named(NamedTuple):
  """What captions may name and views may change.

  Attributes:
    words: the words that name it.
    share: share of the captions above which views that change it do harm.
    fields: fields of `config.data` that are 0 for views that do not change it.
  """

  words: re.Pattern[str]
  share: float
  fields: tuple[str, ...]


_COLOURS = (
  r"(black|white|gr[ae]y|red|green|blue|yellow|orange|purple|violet|pink|brown|beige|navy|turquoise|teal|maroon"
)
_COLOURS += r"|magenta|cyan|gold(en)?|silver|khaki)"
# By the names of `Recipe.altered`.
_NAMED_BY_CAPTIONS = {
  "colours": _Named(re.compile(rf"\b{_COLOURS}\b", re.I), 0.1, ("jitter_probability", "grayscale_probability")),
  "sides": _Named(re.compile(r"\b(left|right)\b", re.I), 0.01, ("flip_probability",)),
}


class Sample(NamedTuple):
  """The properties of one sample.

  Attributes:
    index: position in the source.
    format: image format, such as "JPEG", or "pixels".
    width: width in pixels.
    height: height in pixels.
    size: size of the encoded image in bytes, 0 for pixels.
    captions: captions, unchanged.
    tokens: number of tokens of each caption, with start and end of text.
    label: class, -1 for none.
    others: names of its other fields, "labels" and "groups".
  """

  index: int
  format: str
  width: int
  height: int
  size: int
  captions: tuple[str, ...]
  tokens: tuple[int, ...]
  label: int
  others: tuple[str, ...]


def read_samples(
  source: Source, num_samples: int, max_pixels: int = images.MAX_PIXELS
) -> tuple[list[Sample], list[BadSample]]:
  """Reads and decodes a fixed random subset of a source, or all of it; returns good and bad samples."""
  rng = np.random.default_rng(0)
  indices = rng.choice(len(source), size=min(num_samples, len(source)), replace=False)
  pool = ThreadPoolExecutor(_THREADS)
  try:
    with jobs.hold_interrupts():  # Ctrl-C within `submit` may leave a lock of the pool locked forever
      futures = [pool.submit(_read_sample, source, index, max_pixels) for index in sorted(indices.tolist())]
    found = [future.result() for future in futures]
  finally:
    pool.shutdown(cancel_futures=True)
  return [one for one in found if isinstance(one, Sample)], [one for one in found if isinstance(one, BadSample)]


def _read_sample(source: Source, index: int, max_pixels: int) -> Sample | BadSample:
  try:
    example, pixels = records.read(source, index, max_pixels)
  except BadSample as error:
    return error
  image, (height, width, _) = example["image"], pixels.shape
  tokenizer = Tokenizer(77)  # `encode` does not cut texts off, whatever their length
  tokens = tuple(len(tokenizer.encode(caption)) + 2 for caption in example["captions"])
  shape = (
    (images.format_of(image), width, height, len(image)) if isinstance(image, bytes) else ("pixels", width, height, 0)
  )
  others = tuple(name for name in _OTHERS if name in example)
  return Sample(index, *shape, example["captions"], tokens, example["label"], others)


def describe(source: Source, good: list[Sample], bad: list[BadSample]) -> str:
  """Returns a text of about 15 lines about the samples that `read_samples` returned."""
  captions = [caption for sample in good for caption in sample.captions]
  tokens = [count for sample in good for count in sample.tokens]
  labels = Counter(sample.label for sample in good if sample.label >= 0)
  seen = len(good) + len(bad)
  lines = [("samples", f"{len(source):,}, {seen:,} of them tried")]
  lines += [("skipped", f"{count:,}: {kind}") for kind, count in sorted(source.skipped.items())]
  if source.left_out:
    lines.append(("left out", f"{counted(sum(source.left_out.values()), 'file')}: {files.in_words(source.left_out)}"))
  lines.append(("fields", ", ".join(_fields(good)) or "none"))
  if good:
    formats = Counter(sample.format for sample in good).most_common()
    lines += [
      ("images", ", ".join(f"{count:,} {name}" for name, count in formats)),
      ("  width", _range(sample.width for sample in good)),
      ("  height", _range(sample.height for sample in good)),
      ("  bytes", _range(sample.size for sample in good if sample.size)),
      ("captions", _range(len(sample.captions) for sample in good) + " per sample"),
    ]
  if captions:
    architecture, context = _proposed()
    too_long = np.mean(np.array(tokens) > context)
    lines += [
      ("  characters", _range(map(len, captions))),
      ("  tokens", f"{_range(tokens)}; {architecture} cuts off {too_long:.1%} of the captions, after {context}"),
      *_altered(captions),
    ]
  if source.classnames or labels:
    names, more = source.classnames[:_CLASSES], len(source.classnames) > _CLASSES
    lines.append(("classes", f"{counted(len(source.classnames), 'name')}: {', '.join(names)}{' ...' * more}"))
    lines.append(("  seen", f"{len(labels):,}, {_range(labels.values())} per class" if labels else "none"))
  lines.append(("bad", f"{len(bad):,} of {seen:,} ({len(bad) / max(seen, 1):.1%})"))
  from declip_jax.config import MAX_BAD  # on demand, as in `_proposed`

  if len(bad) > MAX_BAD * seen:
    remedy = "repair them, or set --config.data.max_bad" if good else "repair them"
    lines.append(("", f"training stops if more than {MAX_BAD:.0%} are bad: {remedy}"))
  for kind, count in sorted(Counter(error.kind for error in bad).items()):
    lines.append((f"  {count:,}", kind))
    lines += [("", f"  {error}") for error in [error for error in bad if error.kind == kind][:_NAMED]]
  return "\n".join([source.name, *(f"{name:<13}{text}" for name, text in lines)])


def _altered(captions: list[str]) -> list[tuple[str, str]]:
  """Advice on views that would change what captions name."""
  lines = []
  for name, about in _NAMED_BY_CAPTIONS.items():
    share = np.mean([bool(about.words.search(caption)) for caption in captions])
    if share < about.share:
      continue
    recipes = ", ".join(recipe for recipe, own in RECIPES.items() if name in own.altered)
    unchanged = " ".join(f"--config.data.{field}=0.0" for field in about.fields)
    lines += [
      (f"  {name}", f"named in {share:.1%}, but changed by the image views of {recipes};"),
      ("", f"to leave them as they are: {unchanged}"),
    ]
  return lines


def _fields(good: list[Sample]) -> list[str]:
  """The fields of samples, with the share of samples that have them if not all do."""
  counts = {
    "image": len(good),
    "captions": sum(bool(sample.captions) for sample in good),
    "label": sum(sample.label >= 0 for sample in good),
    **{name: sum(name in sample.others for sample in good) for name in _OTHERS},
  }
  return [
    name if count == len(good) else f"{name} ({count / len(good):.1%})" for name, count in counts.items() if count
  ]


def _range(values: Iterable[float]) -> str:
  array = np.array(list(values))
  return f"{array.min():,} to {array.max():,}, median {np.median(array):,.0f}" if array.size else "none"


def draw(source: Source, good: list[Sample], bad: list[BadSample], path: str | os.PathLike[str]) -> None:
  """Writes a contact sheet of up to 24 samples with classes and captions, of which up to 4 are bad, as PNG.

  Raises:
    OSError: the file cannot be written.
    ValueError: there is no good sample.
  """
  if not good:
    raise ValueError(f"{source.name} has no good sample to draw")
  room = _TILES - min(_BAD_TILES, len(bad))
  shown = [good[number] for number in np.linspace(0, len(good) - 1, min(room, len(good)), dtype=int)]
  tiles = [
    pictures.Tile(
      _thumbnail(images.decode(source[sample.index]["image"], images.LARGEST_LIMIT)),
      _class_name(source, sample.label),
      next(iter(sample.captions), ""),
    )
    for sample in shown
  ]
  tiles += [pictures.Tile(None, error.kind, str(error)) for error in bad[:_BAD_TILES]]
  seen = len(good) + len(bad)
  title = f"{source.name}: {counted(len(source), 'sample')}, {seen:,} of them tried, {len(bad):,} of these bad"
  pictures.plot_tiles(title, tiles, path)


def _class_name(source: Source, label: int) -> str:
  """The name of a class, its number if it has no name, and "" for none."""
  if label < 0:
    return ""
  return source.classnames[label] if label < len(source.classnames) else f"class {label}"


def _thumbnail(pixels: images.Pixels) -> images.Pixels:
  """Scales the image so that its longer side has `_SIDE` pixels."""
  image = Image.fromarray(pixels)
  scale = _SIDE / max(image.size)
  return np.asarray(image.resize([max(1, round(scale * side)) for side in image.size]))


def training_command(data: str, bad: float = 0.0) -> str:
  """The command that trains on the captions of the data at a path on this machine, or that writes a config for that.

  The config has to be written if the path has a comma, which would end the argument. `bad` is the share of bad samples;
  if it is above `config.MAX_BAD`, a command that trains allows for the next multiple of 5 % after 5 % more.
  """
  from declip_jax.config import MAX_BAD  # on demand, as in `_proposed`

  if "," in data:
    return f"python -m declip_jax.new my_config.py --data {shlex.quote(data)}"
  config = shlex.quote(f"pretrain:method=declip,architecture={_proposed()[0]},data={data}")
  allowed = f" --config.data.max_bad={min(math.ceil(20 * bad + 1) / 20, 1):g}" if bad > MAX_BAD else ""
  return f"python -m declip_jax.train --config={config}{allowed} --workdir runs/mine"


def _proposed() -> tuple[str, int]:
  """The architecture that is proposed for this machine, and how many tokens of a text it sees."""
  from declip_jax.architectures import ARCHITECTURES  # on demand: reading data does not need JAX
  from declip_jax.planning.architecture import suggested

  architecture = suggested()
  return architecture, ARCHITECTURES[architecture].text.context_length


def _command(arguments: list[str]) -> None:
  first, *others = guesses(arguments[0])
  source = open_source(first)
  good, bad = read_samples(source, flags.FLAGS.samples, flags.FLAGS.max_pixels)
  print(describe(source, good, bad))
  for other in others:
    print(f"{'not read':<13}{other}")
  if not good:
    raise ValueError(f"{source.name}: no usable sample among {len(bad):,} tried; the first: {bad[0]}")
  if sheet := flags.FLAGS.sheet:
    draw(source, good, bad, sheet)
    print(f"{'sheet':<13}{sheet}")
  if any(sample.captions for sample in good):
    print(f"{'train':<13}{training_command(arguments[0], len(bad) / (len(good) + len(bad)))}")


def main() -> None:
  """Runs the command."""
  flags.DEFINE_integer("samples", 1000, "Number of samples to read.", lower_bound=1)
  flags.DEFINE_string("sheet", None, "PNG file to write, a contact sheet of up to 24 samples.")
  flags.DEFINE_integer(
    "max_pixels", images.MAX_PIXELS, "Largest number of pixels of an image.", 1, images.LARGEST_LIMIT
  )
  command_line.run(_command, __doc__, positional=("DATA",))


if __name__ == "__main__":
  main()
