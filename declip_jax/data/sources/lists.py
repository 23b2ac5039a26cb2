"""Lists of images as sources: tables, COCO files, YFCC lists and folders are converted once to the same kind of index.

An entry of a list is the path of an image, its captions and its label. The index of a list is an Arrow IPC file (see
`indexes.find_or_build`), built by streaming and memory-mapped afterwards: building costs about 20 us per entry, opening
the list again reads nothing of it, and neither a process nor a pickle contains anything that grows with the list. All
record batches have the same number of entries, so that a division finds entry i; what is known only at the end is
stored as JSON in the metadata of a last, empty batch.
"""

import codecs
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
import itertools
import json
import os
from pathlib import Path
import re
import sys
import time
from typing import Any, NamedTuple

from absl import logging
import pyarrow as pa

from declip_jax.data.sources.base import BadSample, Example
from declip_jax.data.storage import files, indexes, remote

IMAGE_NAMES = ("image", "filename", "file_name", "filepath", "file_path", "file", "path", "img", "img_path", "img_name")
IMAGE_NAMES += (
  "image_path",
  "image_name",
  "image_file",
  "image_filename",
  "image_filepath",
  "jpg",
  "jpeg",
  "png",
  "webp",
)
CAPTION_NAMES = ("caption", "captions", "text", "texts", "txt", "title", "sentence", "sentences", "description")
CAPTION_NAMES += ("alt_text", "alt", "comment", "prompt")
LABEL_NAMES = ("label", "labels", "class", "class_id", "class_index", "target", "category", "category_id")

_FORMAT = 2  # part of the name of an index: raise it when its columns, or the rules of any list for its rows, change
_BATCH = 4096  # rows; the builder holds one batch
_BATCH_WITH_IMAGES = 64
_LOGGED = 5  # of the samples left out; all of them are counted
_SILENCE = 10.0  # seconds between two reports of how far an index is
_MOST_CLASSES = 100_000  # more are no classes, but the numbers or names of samples
_SCHEMA = pa.schema(
  [
    ("file", pa.int32()),
    ("record", pa.int64()),
    ("path", pa.binary()),  # names of files need not be UTF-8
    ("image", pa.binary()),
    ("captions", pa.list_(pa.string())),
    ("label", pa.int64()),  # numbered as they appear
  ]
)
# A path may have a ? in it, as a glob character.
_QUERY = re.compile(r"(.*?)(?:\?([a-z_]+=.*))?", re.DOTALL)


class Entry(NamedTuple):
  """A sample as a list describes it.

  Attributes:
    file: which file of the list it stands in.
    record: where in that file, for messages: a line or an id; -1 if `path` says it.
    path: of the image, absolute, a URL or relative to a root; None if the rest tells where it is.
    image: the encoded file, if the list holds it.
    captions: stripped, none of them empty.
    label: a whole number, also as text, or the name of a class; None or a negative number for none.
    label_name: the name of that class, where the label is a number.
  """

  file: int
  record: int
  path: str | None
  image: bytes | None = None
  captions: Sequence[str] = ()
  label: int | str | None = None
  label_name: str | None = None


class ListSource:
  """The rows of a list as a `Source`. Reads an image from the path of its row; lists that differ override that.

  Args:
    name: the spec that opened it.
    index: of `index_list`.
    root: what paths of images are relative to; None for the folder of the file in which a row stands.
  """

  def __init__(self, name: str, index: Path, root: str | None = None):
    self.name = name
    self._index, self._root = index, root

  @cached_property
  def _batches(self) -> pa.ipc.RecordBatchFileReader:
    try:
      return pa.ipc.open_file(pa.memory_map(str(self._index)))
    except (pa.ArrowException, OSError) as error:
      if isinstance(error, OSError) and error.errno is not None:  # of the system; those of Arrow have none
        raise
      damage = f"{self.name}: its index {self._index} is damaged: {one_line(error)}"
      raise ValueError(f"{damage}; delete it, and the next to open the list builds it anew") from None

  @cached_property
  def _about(self) -> dict[str, Any]:
    last = self._batches.get_batch_with_custom_metadata(self._batches.num_record_batches - 1)
    return json.loads(last.custom_metadata[b"about"])

  @cached_property
  def classnames(self) -> tuple[str, ...]:
    """As the list gives them; else from classnames.txt beside it, line i for class i; else empty."""
    if not self._about["labels"]:
      return ()
    return tuple(self._about["classnames"]) or files.classnames(self._about["files"][0])

  @property
  def skipped(self) -> dict[str, int]:
    """Samples that the list describes wrongly or without a caption, counted when it was indexed."""
    return dict(self._about["skipped"])

  @property
  def stamp(self) -> str:
    """Changes when the list does."""
    return self._index.stem

  def __len__(self) -> int:
    return self._about["count"]

  def __getitem__(self, index: int) -> Example:
    """Reads one sample.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      BadSample: its image cannot be read.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name}: no sample {index}, there are {len(self)}")
    row = self.row(index)
    name = self._about["files"][row.file].rpartition("/")[2]
    place = row.path if row.record < 0 else f"{name}:{row.record}"
    try:
      image = self._image(row) if row.image is None else row.image
      return Example(image=image, captions=self._captions(row), label=row.label, id=place)
    except BadSample as error:
      raise BadSample(error.kind, f"{place}: {error}") from error
    except (OSError, ValueError) as error:  # a ValueError for a URL of a kind that nothing here can read
      raise BadSample("missing file", f"{place}: {error}") from error

  def row(self, index: int) -> Entry:
    """What the list has at `index`, with -1 for no label."""
    number, position = divmod(int(index), self._about["batch"])
    batch = self._batches.get_batch(number)
    file, record, path, image, captions, label = (column[position].as_py() for column in batch.columns)
    path = None if path is None else path.decode("utf-8", "surrogateescape")
    return Entry(file, record, path, image, captions, self._about["labels"][label] if label >= 0 else -1)

  def _image(self, row: Entry) -> bytes:
    return files.read(self._at(row, row.path))

  def _captions(self, row: Entry) -> tuple[str, ...]:
    return tuple(row.captions)

  def _at(self, row: Entry, path: str) -> str:
    """A path of a row with its root."""
    root = folder_of(self._about["files"][row.file]) if self._root is None else self._root
    return path if path.startswith("/") or "://" in path else f"{root}/{path}"

  def __getstate__(self) -> dict[str, Any]:
    return {"name": self.name, "_index": self._index, "_root": self._root}

  def __repr__(self) -> str:
    return f"{type(self).__name__}({self.name!r})"


def index_list(name: str, paths: Sequence[str], stamp: Any, rows: Callable[[], Iterable[Entry | BadSample]]) -> Path:
  """The index of a list, built if there is none.

  Args:
    name: the spec of the list, for messages.
    paths: the files of the list, which `Entry.file` counts.
    stamp: JSON of all that the rows depend on besides `paths`.
    rows: gives the rows, in order, with a `BadSample` for each that cannot be used.

  Raises:
    ValueError: there is no usable row, or the labels are no classes.
    OSError: no place for the index.
  """
  build = partial(_build, name=name, paths=paths, rows=rows)
  return indexes.find_or_build([_FORMAT, list(paths), stamp], paths[0].rstrip("/"), build, ".arrow")


def probed(source: ListSource) -> ListSource:
  """The source, if an image of it can be read: the first, the middle or the last.

  Raises:
    FileNotFoundError: none of them can.
    ValueError: classnames.txt has not a line for each class.
  """
  most = max(source._about["labels"], default=-1)
  if source.classnames and most >= len(source.classnames):
    raise ValueError(f"{source.name}: label {most}, but only {len(source.classnames)} class names")
  errors = []
  for index in sorted({0, len(source) // 2, len(source) - 1}):
    try:
      source[index]
      return source
    except BadSample as error:
      errors.append(error)
  tried = f"{len(errors)} images tried, none can be read, such as {errors[0]}"
  raise FileNotFoundError(f"{source.name}: {tried}; ?root=FOLDER says where they are")


def parse(location: str, legal: Sequence[str], form: str = "PLACE") -> tuple[str, dict[str, str]]:
  """Splits PLACE?name=value&name=value; `form` is what a place looks like, for messages.

  Raises:
    ValueError: the place is empty, or a name is not one of `legal`.
  """
  place, query = _QUERY.fullmatch(location).groups()
  # As it stands: a path or the name of a column may have + and % in it.
  wanted = dict(choice.split("=", 1) for choice in re.split(r"&(?=[a-z_]+=)", query or "") if choice)
  if not place or not wanted.keys() <= set(legal):
    expected = "&".join(f"{name}=.." for name in legal)
    raise ValueError(f"bad location {location!r}: expected {form}" + (f", then any of ?{expected}" if legal else ""))
  return place, wanted


def choose(
  role: str, wanted: str | None, columns: Sequence[str], names: Sequence[str], place: str, *, several: bool = False
) -> tuple[str, ...]:
  """Decides which columns play a part: those wanted, else the one called just so, else the only one with such a name.

  Args:
    role: "image", "caption" or "label".
    wanted: a column, or several joined by commas; "" for none; None leaves the choice to their names.
    columns: all there are.
    names: that columns of this role have; the first is the plainest.
    place: for messages.
    several: whether there may be more than one.

  Returns:
    The columns, none if no name fits.

  Raises:
    ValueError: one that is wanted is not there, or more than one would fit.
  """
  if wanted is not None:
    chosen = [wanted] if wanted in columns or not several else wanted.split(",")
    for column in chosen if wanted else []:
      if column not in columns:
        raise ValueError(f"{place}: no column {column!r} for the {role}, there are {list(columns)}")
    return tuple(chosen) if wanted else ()
  likely = [column for column in columns if _plain(column) in names]
  exact = [column for column in likely if _plain(column) == names[0]]
  if len(likely) > 1 and not exact:
    join = f" or use them together with ?{role}={','.join(likely[:2])}" if several else ""
    raise ValueError(f"{place}: the {role} may be any of {likely}; choose one with ?{role}={likely[0]}{join}")
  return tuple(exact[:1] or likely)


def folder_of(path: str) -> str:
  """The folder that a file lies in."""
  return path.rpartition("/")[0] or "/"


def absolute(folder: str) -> str:
  """A folder's absolute path, or its URL, without a slash at its end."""
  if remote.is_url(folder):
    return folder.rstrip("/")
  return os.path.abspath(os.path.expanduser(folder.removeprefix("file://"))).rstrip("/")


def encoding_of(start: bytes) -> str:
  """The encoding of a text, by its first two bytes: UTF-16 with a byte order mark, else UTF-8."""
  return "utf-16" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def one_line(error: Exception) -> str:
  """What an error says; Arrow says it in several lines."""
  return " ".join(str(error).split())


def root_of(wanted: Mapping[str, str]) -> str | None:
  """The root that a query gives; None if it gives none."""
  return absolute(wanted["root"]) if wanted.get("root") else None


def _plain(column: str) -> str:
  return re.sub(r"[\s-]+", "_", column.strip().lower())


def _build(path: Path, name: str, paths: Sequence[str], rows: Callable[[], Iterable[Entry | BadSample]]) -> None:
  """Writes the index of a list."""
  logging.info("indexing %s, once", name)
  skipped: Counter[str] = Counter()
  numbers: dict[int | str, int] = {}  # of labels, as they appear
  names: dict[int | str, str] = {}
  count, usable, reported = 0, _usable(rows(), skipped), time.monotonic()
  first = next(usable, None)
  if first is None:
    raise ValueError(f"{name}: no usable sample, skipped {dict(skipped)}")
  size = _BATCH if first.image is None else _BATCH_WITH_IMAGES
  usable = itertools.chain([first], usable)
  with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
    while batch := list(itertools.islice(usable, size)):
      writer.write_batch(_batch([(*_encoded(row), _number(row, numbers, names)) for row in batch]))
      count += len(batch)
      if time.monotonic() - reported >= _SILENCE:
        reported = time.monotonic()
        print(f"indexing {name}, once: {count} samples so far", file=sys.stderr, flush=True)
      if len(numbers) > _MOST_CLASSES:
        few = ", ".join(map(repr, list(numbers)[:3]))
        raise ValueError(f"{name}: over {_MOST_CLASSES} labels ({few}, ...) are no classes; choose none with ?label=")
    labels, classnames = _classes(numbers, names)
    about = {"files": paths, "count": count, "batch": size, "skipped": skipped}
    about |= {"labels": labels, "classnames": classnames}
    writer.write_batch(_batch([]), custom_metadata={"about": json.dumps(about)})
  logging.info("%s: %d samples, %d left out %s", name, count, skipped.total(), dict(skipped))


def _usable(rows: Iterable[Entry | BadSample], skipped: Counter[str]) -> Iterator[Entry]:
  """The rows that can be stored; counts the others and logs the first of them."""
  for row in rows:
    error = row if isinstance(row, BadSample) else _unstorable(row)
    if error is None:
      yield row
      continue
    skipped[error.kind] += 1
    if skipped.total() <= _LOGGED:
      logging.warning("left out: %s", error)


def _unstorable(row: Entry) -> BadSample | None:
  try:
    (row.path or "").encode("utf-8", "surrogateescape")
  except UnicodeEncodeError as error:  # a lone surrogate, as JSON can express it
    return BadSample("damaged record", f"record {row.record}: bad path {row.path!r}: {error}")
  if any("\0" in text for text in (row.path or "", *row.captions)):
    return BadSample("damaged record", f"record {row.record}: a NUL byte in {row.path!r} or its captions")
  return None


def _encoded(row: Entry) -> tuple[int, int, bytes | None, bytes | None, list[str]]:
  path = None if row.path is None else row.path.encode("utf-8", "surrogateescape")
  return row.file, row.record, path, row.image, [text.encode("utf-8", "replace").decode() for text in row.captions]


def _batch(rows: Sequence[tuple[Any, ...]]) -> pa.RecordBatch:
  columns = zip(*rows, strict=True) if rows else [()] * len(_SCHEMA)
  arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
  return pa.record_batch(arrays, schema=_SCHEMA)


def _number(row: Entry, numbers: dict[int | str, int], names: dict[int | str, str]) -> int:
  """The number of a row's label among those that appeared so far, -1 for no label."""
  label = row.label
  if label is None or (isinstance(label, int) and label < 0):
    return -1
  if row.label_name and label not in names:
    names[label] = row.label_name
  return numbers.setdefault(label, len(numbers))


def _classes(numbers: dict[int | str, int], names: dict[int | str, str]) -> tuple[list[int], list[str]]:
  """Labels in order of appearance, and class names: numbers stay what they are, names are numbered alphabetically."""
  if all(isinstance(label, int) or label.isdecimal() for label in numbers):
    labels = [int(label) for label in numbers]
    if names and max(labels) >= _MOST_CLASSES:
      raise ValueError(f"the label {max(labels)} has a name, but classes are numbered 0, 1, ... below {_MOST_CLASSES}")
    named = {int(label): name for label, name in names.items()}
    return labels, [named.get(label, "") for label in range(max(labels) + 1)] if named else []
  classnames = sorted(set(map(str, numbers)))
  order = {name: label for label, name in enumerate(classnames)}
  return [order[str(label)] for label in numbers], classnames
