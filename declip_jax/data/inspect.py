"""Describes a data set: python -m declip_jax.data.inspect DATA --sheet samples.png

  DATA    a path, pattern, folder or URL, or KIND:LOCATION

Reads a fixed random subset of the samples and prints image formats and sizes, captions and their lengths, classes, and
bad samples with their names. The kind of a plain path is detected: shards, tables, annotations, folders. The first
line printed is the spec to train with.
"""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
import io
import itertools
import json
import os
import re
from typing import NamedTuple

from absl import flags
from jaxtyping import UInt8
import numpy as np
from PIL import Image

from declip_jax import command_line
from declip_jax.data import images, records
from declip_jax.data.sources import SOURCES, BadSample, Source, open_source
from declip_jax.data.storage import files, jobs, patterns, remote
from declip_jax.data.text.tokenizer import Tokenizer

_THREADS = 8
_NAMED = 3  # bad samples of each kind to name
_CLASSES = 8  # classes to name
_COLUMNS, _ROWS, _SIDE = 6, 4, 224  # of the sheet, and the longer side of its images in pixels
_CONTEXT = 77  # tokens, with start and end of text

_TABLES = (".csv", ".tsv", ".psv", ".jsonl", ".ndjson", ".parquet", ".pq")
_TABLES += tuple(f"{suffix}.gz" for suffix in (*_TABLES, ".json"))
_WALKED = 1000  # folders to search for images
_NUMBERED = re.compile(r"-\d{5}-of-\d{5}$")  # ends the names of TFDS's files


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
  """

  index: int
  format: str
  width: int
  height: int
  size: int
  captions: tuple[str, ...]
  tokens: tuple[int, ...]
  label: int


def guess(path: str) -> str:
  """Returns the spec of the data set at a path or URL; a spec is returned unchanged.

  | found | source |
  |---|---|
  | .tar | webdataset |
  | .array_record | arrayrecord; tfds if a dataset_info.json is next to it |
  | .csv .tsv .psv .jsonl .ndjson .parquet .pq, also .gz; a .json that is a list | table |
  | another .json | coco |
  | a folder prepared by TFDS, or saved by Hugging Face's datasets | tfds, huggingface |
  | a folder of ArrayRecord files, tars or tables | the first of these kinds that exists, as a pattern |
  | a folder with images, at any depth | folder |

  Raises:
    FileNotFoundError: nothing exists at the path, and its suffix does not determine the kind.
    ValueError: no data set was recognised; the message lists what was found.
  """
  kind, _, location = path.partition(":")
  if kind in SOURCES and location and not location.startswith("//"):
    return path
  local = path.removeprefix("file://")
  if not remote.is_url(path) and os.path.isdir(os.path.expanduser(local)):
    return _guess_folder(local.rstrip("/") or "/")
  try:
    found = patterns.expand(path)
  except FileNotFoundError:
    if remote.is_url(path) and patterns.names(path):
      return _guess_folder(path.rstrip("/"))
    if re.match(r"\w+:(?!//)", path):
      raise ValueError(f"{path}: {kind!r} is not a kind of source; expected one of {', '.join(SOURCES)}") from None
    if (kind := _kind_of_suffix(path)) in (None, "image"):
      raise
    return f"{kind}:{path}"  # may exist on another machine; `open_source` reports a missing file
  kinds = {_kind(file) for file in found}
  if len(kinds) > 1 or kinds <= {None, "image"}:
    raise ValueError(f"{path}: {_unknown(found)}")
  (kind,) = kinds
  if kind == "tfds":
    return _guess_folder(os.path.dirname(found[0]))
  return f"{kind}:{path}"


def _kind(path: str) -> str | None:
  """The kind of source that reads a file, "image" for an image, None if unknown."""
  name = _NUMBERED.sub("", path.lower())
  if name.endswith(".array_record"):
    return "tfds" if files.exists(files.beside(path, "dataset_info.json")) else "arrayrecord"
  if name.endswith(".json"):
    return "table" if files.read(path, 0, 64).lstrip().startswith(b"[") else "coco"
  return _kind_of_suffix(name)


def _kind_of_suffix(path: str) -> str | None:
  name = remote.without_query(path).lower()
  kinds = {"webdataset": (".tar",), "table": _TABLES, "image": files.IMAGE_SUFFIXES}
  return next((kind for kind, suffixes in kinds.items() if name.endswith(suffixes)), None)


def _guess_folder(folder: str) -> str:
  place = os.path.expanduser(folder)
  names = patterns.names(place)
  if "state.json" in names:
    return f"huggingface:{folder}"
  for name, kind in (("dataset_dict.json", "huggingface"), ("dataset_info.json", "tfds")):
    if name in names:
      return f"{kind}:{folder}:{_split(f'{place}/{name}')}"
  for suffixes in ((".array_record",), (".tar",), _TABLES):
    alike = Counter(suffix for suffix in suffixes for name in names if name.lower().endswith(suffix))
    if alike:
      return guess(f"{folder}/*{alike.most_common(1)[0][0]}")
  nested = (name for _, _, inside in itertools.islice(os.walk(place), _WALKED) for name in inside)
  if any(name.lower().endswith(files.IMAGE_SUFFIXES) for name in (names if remote.is_url(folder) else nested)):
    return f"folder:{folder}"
  annotations = [name for name in names if name.endswith(".json")]
  if len(annotations) == 1:
    return guess(f"{folder}/{annotations[0]}")
  folders = [] if remote.is_url(folder) else [f"{entry.name}/" for entry in os.scandir(place) if entry.is_dir()]
  raise ValueError(f"{folder}: {_unknown([*names, *folders])}")


def _split(path: str) -> str:
  """Chooses a split, "train" or else the first, from a file in which TFDS or Hugging Face lists them.

  Raises:
    ValueError: the file lists no splits.
  """
  try:
    splits = json.loads(files.read(path))["splits"]
    names = [split if isinstance(split, str) else split["name"] for split in splits]
  except (ValueError, LookupError, TypeError):
    names = []
  if not names:
    raise ValueError(f"{path} lists no splits: not a prepared data set?")
  return "train" if "train" in names else names[0]


def _unknown(names: Iterable[str]) -> str:
  names = list(names)
  counts = files.suffixes(name for name in names if not name.endswith("/"))
  found = files.in_words(counts + Counter(folders=len(names) - counts.total())) or "nothing"
  return f"not recognised as a data set, found {found}; give KIND:LOCATION, where KIND is one of {', '.join(SOURCES)}"


def read_samples(source: Source, num_samples: int) -> tuple[list[Sample], list[BadSample]]:
  """Reads and decodes a fixed random subset of a source, or all of it; returns good and bad samples."""
  rng = np.random.default_rng(0)
  indices = rng.choice(len(source), size=min(num_samples, len(source)), replace=False)
  pool = ThreadPoolExecutor(_THREADS)
  try:
    with jobs.hold_interrupts():  # Ctrl-C within `submit` may leave a lock of the pool locked for ever
      futures = [pool.submit(_read_sample, source, index) for index in sorted(indices.tolist())]
    found = [future.result() for future in futures]
  finally:
    pool.shutdown(cancel_futures=True)
  return [one for one in found if isinstance(one, Sample)], [one for one in found if isinstance(one, BadSample)]


def _read_sample(source: Source, index: int) -> Sample | BadSample:
  try:
    example, pixels = records.read(source, index)
  except BadSample as error:
    return error
  image, (height, width, _) = example["image"], pixels.shape
  tokenizer = Tokenizer(_CONTEXT)
  tokens = tuple(len(tokenizer.encode(caption)) + 2 for caption in example["captions"])
  shape = (_format(image), width, height, len(image)) if isinstance(image, bytes) else ("pixels", width, height, 0)
  return Sample(index, *shape, example["captions"], tokens, example["label"])


def _format(image: bytes) -> str:
  try:
    with Image.open(io.BytesIO(image)) as opened:
      return opened.format or "unknown"
  except (OSError, ValueError):
    return "unknown"


def describe(source: Source, good: list[Sample], bad: list[BadSample]) -> str:
  """Returns a text of some 15 lines about the samples that `read_samples` returned."""
  captions = [caption for sample in good for caption in sample.captions]
  tokens = [count for sample in good for count in sample.tokens]
  labels = Counter(sample.label for sample in good if sample.label >= 0)
  seen = len(good) + len(bad)
  lines = [("samples", f"{len(source):,}, of which {seen:,} were read")]
  lines += [("skipped", f"{count:,}: {kind}") for kind, count in sorted(source.skipped.items())]
  if source.left_out:
    lines.append(("left out", f"{sum(source.left_out.values()):,} files: {files.in_words(source.left_out)}"))
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
    too_long = np.mean(np.array(tokens) > _CONTEXT)
    lines += [
      ("  characters", _range(map(len, captions))),
      ("  tokens", f"{_range(tokens)}; {too_long:.1%} of the captions have more than {_CONTEXT} and are cut off"),
    ]
  if source.classnames or labels:
    names, more = source.classnames[:_CLASSES], len(source.classnames) > _CLASSES
    lines.append(("classes", f"{len(source.classnames):,} names: {', '.join(names)}{' ...' * more}"))
    lines.append(("  seen", f"{len(labels):,}, {_range(labels.values())} times each" if labels else "none"))
  lines.append(("bad", f"{len(bad):,} of {seen:,} ({len(bad) / max(seen, 1):.1%})"))
  for kind, count in sorted(Counter(error.kind for error in bad).items()):
    lines.append((f"  {count:,}", kind))
    lines += [("", f"  {error}") for error in [error for error in bad if error.kind == kind][:_NAMED]]
  return "\n".join([source.name, *(f"{name:<13}{text}" for name, text in lines)])


def _fields(good: list[Sample]) -> list[str]:
  """The fields of samples, with the share of samples that have them if not all do."""
  counts = {
    "image": len(good),
    "captions": sum(bool(sample.captions) for sample in good),
    "label": sum(sample.label >= 0 for sample in good),
  }
  return [
    name if count == len(good) else f"{name} ({count / len(good):.1%})" for name, count in counts.items() if count
  ]


def _range(values: Iterable[float]) -> str:
  array = np.array(list(values))
  return f"{array.min():,} to {array.max():,}, median {np.median(array):,.0f}" if array.size else "none"


def draw(source: Source, good: list[Sample], path: str | os.PathLike[str]) -> None:
  """Writes a contact sheet of up to 24 good samples, each with a caption or the class, as PNG.

  Raises:
    OSError: the file cannot be written.
    ValueError: there is no good sample.
  """
  from declip_jax.reporting import pictures  # importing matplotlib takes a second, and only this needs it

  if not good:
    raise ValueError(f"{source.name} has no good sample to draw")
  shown = [good[number] for number in np.linspace(0, len(good) - 1, min(_COLUMNS * _ROWS, len(good)), dtype=int)]
  rows = -(-len(shown) // _COLUMNS)
  tiles = np.full((rows * _COLUMNS, _SIDE, _SIDE, 3), 255, np.uint8)
  texts = [""] * len(tiles)
  for number, sample in enumerate(shown):
    tiles[number] = _thumbnail(images.decode(source[sample.index]["image"]))
    name = source.classnames[sample.label] if 0 <= sample.label < len(source.classnames) else f"class {sample.label}"
    texts[number] = sample.captions[0] if sample.captions else name if sample.label >= 0 else ""
  columns = [str(number + 1) for number in range(_COLUMNS)]
  grid = tiles.reshape(rows, _COLUMNS, _SIDE, _SIDE, 3)
  lines = [texts[row * _COLUMNS : (row + 1) * _COLUMNS] for row in range(rows)]
  pictures.plot_views(grid, lines, path, view_names=columns, text_names=columns)


def _thumbnail(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
  """Scales the whole image into the middle of a white square."""
  image = Image.fromarray(pixels)
  scale = _SIDE / max(image.size)
  image = image.resize([max(1, round(scale * side)) for side in image.size])
  square = Image.new("RGB", (_SIDE, _SIDE), "white")
  square.paste(image, ((_SIDE - image.width) // 2, (_SIDE - image.height) // 2))
  return np.asarray(square)


def _command(arguments: list[str]) -> None:
  source = open_source(guess(arguments[0]))
  good, bad = read_samples(source, flags.FLAGS.samples)
  print(describe(source, good, bad))
  if sheet := flags.FLAGS.sheet:
    draw(source, good, sheet)
    print(f"{'sheet':<13}{sheet}")


def main() -> None:
  """Runs the command."""
  flags.DEFINE_integer("samples", 1000, "Number of samples to read.", lower_bound=1)
  flags.DEFINE_string("sheet", None, "PNG file to write, a contact sheet of up to 24 samples.")
  command_line.run(_command, __doc__, positional=("DATA",))


if __name__ == "__main__":
  main()
