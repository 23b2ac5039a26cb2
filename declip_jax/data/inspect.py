"""Says what is in a data set: python -m declip_jax.data.inspect PATH_OR_SPEC --sheet samples.png

Looks at a random part of the samples, always the same one: image formats and sizes, captions and their lengths,
classes, and samples that cannot be used, with their places. A bare path is recognised: shards, tables, annotations,
folders. The first line that it prints is the spec to train with.
"""

import argparse
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
import io
import itertools
import json
import os
import re
import sys
from typing import NamedTuple

from jaxtyping import UInt8
import numpy as np
from PIL import Image

from declip_jax.data import images
from declip_jax.data.convert import holding_interrupts, read
from declip_jax.data.sources import SOURCES, BadSample, Source, open_source
from declip_jax.data.storage import files, patterns, remote
from declip_jax.data.text.tokenizer import Tokenizer

_THREADS = 8
_NAMED = 3  # bad samples of each kind that are named
_CLASSES = 8  # that are named
_COLUMNS, _ROWS, _SIDE = 6, 4, 224  # of the sheet; pixels of a picture's longer side
_CONTEXT = 77  # tokens, with start and end of text

_TABLES = (".csv", ".tsv", ".psv", ".jsonl", ".ndjson", ".parquet", ".pq")
_TABLES += tuple(f"{suffix}.gz" for suffix in (*_TABLES, ".json"))
_WALKED = 1000  # folders in which images are looked for
_NUMBERED = re.compile(r"-\d{5}-of-\d{5}$")  # as TFDS ends the names of its files


class Sample(NamedTuple):
  """What is told of one sample.

  Attributes:
    index: in the source.
    format: of the image, such as "JPEG", or "pixels".
    width: in pixels.
    height: in pixels.
    size: of the encoded image, in bytes.
    captions: as they are.
    tokens: of each caption, with start and end of text.
    label: the class, -1 for none.
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
  """The spec of the data set at a path or URL; a spec is returned as it is.

  | what is there | source |
  |---|---|
  | .tar | webdataset |
  | .array_record | arrayrecord; tfds with a dataset_info.json beside it |
  | .csv .tsv .psv .jsonl .ndjson .parquet .pq, also .gz; a .json that is a list | table |
  | another .json | coco |
  | a folder that TFDS prepared, or Hugging Face's datasets saved | tfds, huggingface |
  | a folder of tars, ArrayRecord files or tables | the first of them that is there, as a pattern |
  | a folder with images, at any depth | folder |

  Raises:
    FileNotFoundError: there is nothing.
    ValueError: nothing that is recognised; the message says what was found.
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
      raise ValueError(f"{path}: no kind {kind!r} of source nor such a file; kinds are {', '.join(SOURCES)}") from None
    raise
  kinds = {_kind(file) for file in found}
  if len(kinds) > 1 or kinds <= {None, "image"}:
    raise ValueError(f"{path}: {_unknown(found)}")
  (kind,) = kinds
  if kind == "tfds":
    return _guess_folder(os.path.dirname(found[0]))
  return f"{kind}:{path}"


def _kind(path: str) -> str | None:
  """The kind of source that reads a file, "image" for an image."""
  name = _NUMBERED.sub("", path.lower())
  if name.endswith(".array_record"):
    return "tfds" if files.exists(files.beside(path, "dataset_info.json")) else "arrayrecord"
  if name.endswith(".json"):
    return "table" if files.read(path, 0, 64).lstrip().startswith(b"[") else "coco"
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
  below = (name for _, _, inside in itertools.islice(os.walk(place), _WALKED) for name in inside)
  if any(name.lower().endswith(files.IMAGE_SUFFIXES) for name in (names if remote.is_url(folder) else below)):
    return f"folder:{folder}"
  annotations = [name for name in names if name.endswith(".json")]
  if len(annotations) == 1:
    return guess(f"{folder}/{annotations[0]}")
  folders = [] if remote.is_url(folder) else [f"{entry.name}/" for entry in os.scandir(place) if entry.is_dir()]
  raise ValueError(f"{folder}: {_unknown([*names, *folders])}")


def _split(path: str) -> str:
  """The split to look at, of those that TFDS or Hugging Face list in a file.

  Raises:
    ValueError: it is no such file.
  """
  try:
    splits = json.loads(files.read(path))["splits"]
    names = [split if isinstance(split, str) else split["name"] for split in splits]
  except (ValueError, LookupError, TypeError):
    names = []
  if not names:
    raise ValueError(f"{path} is of no prepared data set, or lists no splits")
  return "train" if "train" in names else names[0]


def _unknown(names: Iterable[str]) -> str:
  suffixes = Counter("folders" if name.endswith("/") else os.path.splitext(name)[1] or "no suffix" for name in names)
  found = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(6)) or "nothing"
  return f"no data set is recognised, there is {found}; give KIND:LOCATION, where KIND is one of {', '.join(SOURCES)}"


def look(source: Source, samples: int) -> tuple[list[Sample], list[BadSample]]:
  """Reads and decodes that many samples, drawn at random but always the same, or all; and those that are bad."""
  rng = np.random.default_rng(0)
  indices = rng.choice(len(source), size=min(samples, len(source)), replace=False)
  pool = ThreadPoolExecutor(_THREADS)
  try:
    with holding_interrupts():  # one that meets `submit` may leave a lock of the pool's closed for ever
      futures = [pool.submit(_look, source, index) for index in sorted(indices.tolist())]
    found = [future.result() for future in futures]
  finally:
    pool.shutdown(cancel_futures=True)
  return [one for one in found if isinstance(one, Sample)], [one for one in found if isinstance(one, BadSample)]


def _look(source: Source, index: int) -> Sample | BadSample:
  try:
    example, pixels = read(source, index)
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
  """A few lines of text on what `look` saw."""
  captions = [caption for sample in good for caption in sample.captions]
  tokens = [count for sample in good for count in sample.tokens]
  labels = Counter(sample.label for sample in good if sample.label >= 0)
  seen = len(good) + len(bad)
  rows = [("samples", f"{len(source):,}, of which {seen:,} were looked at")]
  rows += [("left out", f"{count:,}: {kind}") for kind, count in sorted(source.skipped.items())]
  rows.append(("fields", ", ".join(_fields(good)) or "none"))
  if good:
    formats = Counter(sample.format for sample in good).most_common()
    rows += [
      ("images", ", ".join(f"{count:,} {name}" for name, count in formats)),
      ("  width", _range(sample.width for sample in good)),
      ("  height", _range(sample.height for sample in good)),
      ("  bytes", _range(sample.size for sample in good if sample.size)),
      ("captions", _range(len(sample.captions) for sample in good) + " a sample"),
    ]
  if captions:
    too_long = np.mean(np.array(tokens) > _CONTEXT)
    rows += [
      ("  characters", _range(map(len, captions))),
      ("  tokens", f"{_range(tokens)}; {too_long:.1%} of the captions have more than {_CONTEXT}, the rest is cut off"),
    ]
  if source.classnames or labels:
    names, more = source.classnames[:_CLASSES], len(source.classnames) > _CLASSES
    rows.append(("classes", f"{len(source.classnames):,} names: {', '.join(names)}{' ...' * more}"))
    rows.append(("  seen", f"{len(labels):,}, {_range(labels.values())} times each" if labels else "none"))
  rows.append(("bad", f"{len(bad):,} of {seen:,} ({len(bad) / max(seen, 1):.1%})"))
  for kind, count in sorted(Counter(error.kind for error in bad).items()):
    rows.append((f"  {count:,}", kind))
    rows += [("", f"  {error}") for error in [error for error in bad if error.kind == kind][:_NAMED]]
  return "\n".join([source.name, *(f"{name:<13}{text}" for name, text in rows)])


def _fields(good: list[Sample]) -> list[str]:
  """What samples have, and how many where not all do."""
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
  """Writes a contact sheet, a PNG: up to 24 of the samples that `look` found good, with a caption or the class.

  Raises:
    OSError: it cannot be written.
    ValueError: there is no good sample.
  """
  from declip_jax.reporting import pictures  # matplotlib takes a second, which only this needs

  if not good:
    raise ValueError(f"{source.name}: no sample to draw")
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
  """The whole image in the middle of a white square."""
  image = Image.fromarray(pixels)
  scale = _SIDE / max(image.size)
  image = image.resize([max(1, round(scale * side)) for side in image.size])
  square = Image.new("RGB", (_SIDE, _SIDE), "white")
  square.paste(image, ((_SIDE - image.width) // 2, (_SIDE - image.height) // 2))
  return np.asarray(square)


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m declip_jax.data.inspect",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("data", metavar="PATH_OR_SPEC", help="file, pattern, folder, URL, or KIND:LOCATION")
  parser.add_argument("--samples", type=int, default=1000, help="how many to look at (default: 1000)")
  parser.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet of up to 24 samples")
  given = parser.parse_args(arguments)
  if given.samples < 1:
    parser.error(f"--samples={given.samples}: expected at least 1")
  try:
    source = open_source(guess(given.data))
    good, bad = look(source, given.samples)
    print(describe(source, good, bad))
    if given.sheet:
      draw(source, good, given.sheet)
      print(f"{'sheet':<13}{given.sheet}")
  except (ValueError, OSError, ImportError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
