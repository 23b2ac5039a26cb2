"""Tables of image paths and captions: CSV, TSV, JSON and Parquet.

| file | records |
|---|---|
| .csv .tsv .psv .txt | lines after a first line that names the columns; separated by comma, tab, semicolon or pipe |
| .jsonl .ndjson .json | one object per line, or one array of objects |
| .parquet .pq | rows |

All but Parquet may be compressed as .gz. Text is UTF-8, UTF-16 with a byte order mark, or in the given `encoding`. A
byte that is invalid there is an error and not just a skipped line, since it means that the whole table is in another
encoding. A line that does not parse, or has more than 2^19 characters, is skipped and counted, with its number in the
log, and reading continues on the next line: an unbalanced quote is plain text and does not swallow the lines after it.

DeCLIP's metadata (its data/datasets/clip_dataset.py) have this form: JSON lines with `filename`, `caption`, a text or a
list, and `label` and `label_name` for evaluation, with paths relative to a folder. DeCLIP uses only the first caption
of a list and skips captions with CJK characters; here all captions count.
"""

import codecs
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
import contextlib
import csv
from functools import partial
import gzip
import itertools
import json
import re
from typing import Any, BinaryIO, NamedTuple
import zlib

from absl import logging
import pyarrow as pa
import pyarrow.parquet as pq

from declip_jax.data.sources import lists
from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.lists import Entry
from declip_jax.data.storage import files, patterns, texts
from declip_jax.data.storage.bounded import Lines, json_decoder, parse_json, short

_LABEL_TEXTS = ("label_name", "class_name", "classname", "category_name")
_ROLES = ("image", "caption", "label", "label_name", "encoding", "root")
_SEPARATORS = ",\t;|"
_LONGEST_HEADER = 2**16
_QUOTED_LINES = 100  # lines that one quoted field may span
_PEEKED = 100  # objects to read for their keys, since not all objects need all keys
_CHUNK = 2**20
_LONGEST = 2**19  # characters of a line or an object; a hundred lines are in memory
_LONGEST_SKIPPED = 2**24  # characters of an element of an array that is nested too deeply
_JSON_MARKS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)
_PARQUET_ROWS = 256  # per batch, which is in memory, images included

# A line number, and its fields by column or an error message.
_Record = tuple[int, Mapping[str, Any] | str]


class _Columns(NamedTuple):
  """The columns in use."""

  image: str
  captions: tuple[str, ...]
  label: str | None
  label_name: str | None


def open_table(location: str) -> lists.ListSource:
  """Opens "PATTERN", or "PATTERN?image=COLUMN&caption=COLUMN,COLUMN&label=COLUMN&label_name=COLUMN&root=FOLDER".

  All of these are optional, as is `encoding`, such as "&encoding=latin-1".

  Columns that are not given are recognised by their names, such as "filepath" and "title", and the choice is logged;
  "caption=" or "label=" means none. Captions are a text, a list of texts, which may be JSON in a text, or several
  columns; all that are not blank count. Consecutive lines with the same image and label are one sample with all their
  captions, as in the tables of Flickr8k and Flickr30k. Labels are whole numbers, or names of classes, which are
  numbered alphabetically; numbers are named by a column such as "label_name", or else by classnames.txt next to the
  table. A negative number means no label.

  Parquet may contain the images themselves, as bytes or as {bytes, path} like Hugging Face's. They are copied into the
  index once, which doubles the disk space, because reading a single row of Parquet takes tens of ms.

  Args:
    location: the files, as in `patterns.expand`. Paths of images are relative to `root`, by default the folder of their
      table; a path may be a URL.

  Raises:
    FileNotFoundError: the table does not exist, or its images are not found.
    ValueError: a column is missing or ambiguous, the kind of file is unknown, a file is damaged or in another encoding,
      or no line is usable.
  """
  name = f"table:{location}"
  place, wanted = lists.parse(location, _ROLES)
  paths = patterns.expand(place)

  def read_entries() -> Iterator[Entry | BadSample]:
    for number, path in enumerate(paths):
      yield from _merged(_entries(number, path, wanted))

  chosen = {role: column for role, column in wanted.items() if role != "root"}
  index = lists.index_list(name, paths, ["table", chosen, files.stamps(paths)], read_entries)
  return lists.checked(lists.ListSource(name, index, lists.root_of(wanted)))


@contextlib.contextmanager
def read_table(
  path: str, names: Iterable[str], encoding: str | None = None
) -> Iterator[tuple[list[str], Callable[[Iterable[str]], Iterator[_Record]]]]:
  """Opens one table, as a context manager.

  Args:
    path: the file; its suffix determines its kind.
    names: expected names of columns, in lower case; they help to recognise the separator.
    encoding: encoding of the text, by default UTF-8, or UTF-16 if it starts with a byte order mark.

  Returns:
    The columns, and a function that yields the records of given columns: pairs of a line number, counted from 1
    including the line of column names, and the fields or an error message. Rows of Parquet and elements of an array
    count from 0.

  Raises:
    ValueError: the kind of file is unknown, its contents do not match its kind, it is in another encoding, or it is
      damaged; the last two may be raised within the context.
  """
  kind = re.sub(r"\.gz$", "", path.lower()).rpartition(".")[2]
  if kind not in ("parquet", "pq", "csv", "tsv", "psv", "txt", "jsonl", "ndjson", "json"):
    raise ValueError(f"{path}: expected a table, .csv, .tsv, .psv, .txt, .jsonl, .ndjson, .json or .parquet")
  with files.open_stream(path) as stream, _naming(path):
    if kind in ("parquet", "pq"):
      yield _read_parquet(stream)
    else:
      with _text(_unzipped(stream, path), path, encoding) as text:
        try:
          columns, records = _read_json(text, path) if "json" in kind else _read_lines(text, path, set(names))
          yield columns, lambda _: records
        except UnicodeDecodeError:
          raise _undecodable(path, text.encoding) from None


def _entries(number: int, path: str, wanted: Mapping[str, str]) -> Iterator[Entry | BadSample]:
  """Yields the entries of one table."""
  given = [name.lower() for role in ("image", "caption", "label") for name in wanted.get(role, "").split(",")]
  expected = [*lists.IMAGE_NAMES, *lists.CAPTION_NAMES, *lists.LABEL_NAMES, *given]
  with read_table(path, expected, wanted.get("encoding")) as (columns, read):
    chosen = _choose(columns, wanted, path)
    logging.info("%s: %s", path, chosen)
    needed = [column for column in (chosen.image, *chosen.captions, chosen.label, chosen.label_name) if column]
    for line, fields in read(needed):
      try:
        yield _entry(number, line, fields, chosen)
      except BadSample as error:
        yield BadSample(error.kind, f"{path}:{line}: {error}")


def _choose(columns: list[str], wanted: Mapping[str, str], path: str) -> _Columns:
  """Chooses the columns."""
  (image, *_) = lists.choose("image", wanted.get("image"), columns, lists.IMAGE_NAMES, path) or [""]
  captions = lists.choose("caption", wanted.get("caption"), columns, lists.CAPTION_NAMES, path, several=True)
  names = lists.choose("label_name", wanted.get("label_name"), columns, _LABEL_TEXTS, path)
  labels = lists.choose("label", wanted.get("label"), columns, lists.LABEL_NAMES, path)
  if not labels and "label" not in wanted:
    labels, names = names, ()
  if not image or not (captions or labels or wanted.get("caption") == ""):
    missing = "caption or label" if image else "image"
    raise ValueError(
      f"{path}: which column is the {missing}? The columns are {columns}; choose with ?image=COLUMN&caption=COLUMN. "
      "Text needs a first line that names the columns"
    )
  label_name = names[0] if names and labels and names != labels else None
  return _Columns(image, captions, labels[0] if labels else None, label_name)


def _entry(number: int, line: int, fields: Mapping[str, Any] | str, columns: _Columns) -> Entry:
  """Makes an entry from a record; raises BadSample if the record is wrong."""
  if isinstance(fields, str):
    raise BadSample("damaged record", fields)
  path, image = _image(fields.get(columns.image), columns.image)
  captions = [text for column in columns.captions for text in captions_of(fields.get(column))]
  label = _label(fields.get(columns.label), columns.label) if columns.label else None
  if columns.captions and not captions and label is None:
    raise BadSample("no caption", f"no caption in {', '.join(columns.captions)}")
  name = fields.get(columns.label_name) if columns.label_name else None
  return Entry(number, line, path, image, captions, label, None if name is None else str(name).strip())


def _image(value: Any, column: str) -> tuple[str | None, bytes | None]:
  """Returns path and bytes of an image, one of them None."""
  if isinstance(value, Mapping) and value.keys() >= {"bytes", "path"}:  # the image of Hugging Face's datasets
    value = value["path"] if value["bytes"] is None else value["bytes"]
  if isinstance(value, bytes):
    return None, value
  if not isinstance(value, str) or not value.strip():
    raise BadSample("damaged record", f"expected a path for the image in {column!r}, got {_short(value)}")
  return value.strip(), None


def captions_of(value: Any) -> list[str]:
  """Returns the stripped texts that are not blank, from a text, a list of texts, a JSON list in a text, or None."""
  if isinstance(value, str) and value.lstrip().startswith('["'):
    try:
      value = json.loads(value)
    except ValueError:  # a text that merely looks like a list
      value = [value]
  texts = [value] if isinstance(value, str) else value or ()
  if not isinstance(texts, list | tuple) or not all(isinstance(text, str | None) for text in texts):
    raise BadSample("damaged record", f"expected a caption or a list of captions, got {_short(value)}")
  return [text.strip() for text in texts if text and text.strip()]


def _label(value: Any, column: str) -> int | str | None:
  """Returns a label, a number, a name or None; pandas writes whole numbers as 3.0 if some are missing."""
  if isinstance(value, str):
    value = re.sub(r"^(-?\d+)\.0+$", r"\1", value.strip())
    if not value or re.fullmatch(r"-\d+", value):
      return None
    if not re.fullmatch(r"-?\d*\.\d+", value):
      return value
  elif value is None or value != value:
    return None
  elif isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
    return int(value)
  raise BadSample(
    "damaged record", f"expected a whole number or a name for the label in {column!r}, got {_short(value)}"
  )


def _merged(records: Iterable[Entry | BadSample]) -> Iterator[Entry | BadSample]:
  """Joins the captions of consecutive entries with the same image and label."""
  last: Entry | None = None
  for entry in records:
    if isinstance(entry, BadSample):
      yield entry
    elif last and entry.path is not None and (entry.path, entry.label) == (last.path, last.label):
      last.captions.extend(entry.captions)
    else:
      if last:
        yield last
      last = entry
  if last:
    yield last


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
  """Turns the errors of Arrow and gzip for a damaged file into one line with the file's name."""
  try:
    yield
  except (pa.ArrowException, EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
    if isinstance(error, OSError) and error.errno is not None:  # of the system; errors of Arrow and gzip have no number
      raise
    raise ValueError(f"{path}: cannot be read: {lists.one_line(error)}") from None


def _unzipped(stream: BinaryIO, path: str) -> BinaryIO:
  return gzip.GzipFile(fileobj=stream) if path.lower().endswith(".gz") else stream


def _text(stream: BinaryIO, path: str, encoding: str | None) -> Lines:
  start = stream.read(texts.START)
  stream.seek(0)
  try:
    return Lines(stream, encoding or texts.encoding_of(start), _LONGEST)
  except LookupError as error:
    raise ValueError(f"{path}: {error}") from None


def _undecodable(path: str, encoding: str) -> ValueError:
  """Returns an error with the place where a text is not in its encoding, which the wrapper's error lacks."""
  decoder, line, before = codecs.getincrementaldecoder(encoding)(), 1, 0
  with files.open_stream(path) as stream:
    pieces = iter(partial(_unzipped(stream, path).read, _CHUNK), b"")
    for piece in itertools.chain(pieces, [b""]):
      before += len(piece)
      try:
        line += decoder.decode(piece, final=not piece).count("\n")
      except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        place = before - len(error.object) + error.start
        found = f"byte {place} of the file, {error.object[error.start]:#04x}, is not {encoding.removesuffix('-sig')}"
        return ValueError(f"{path}:{line}: {found}; convert the file, or name its encoding as in ?encoding=latin-1")
  return ValueError(f"{path}: not {encoding}")


def _read_lines(text: Lines, path: str, names: Set[str]) -> tuple[list[str], Iterator[_Record]]:
  """Reads a table with one record per line."""
  header = text.readline(_LONGEST_HEADER).rstrip("\r\n")
  if not header.strip() or "\r" in header:
    raise ValueError(
      f"{path}: its first line does not name columns, or its lines do not end with \\n: {_short(header)}"
    )
  headers = {separator: _split(header, separator) for separator in _SEPARATORS}
  # The separator with the most known names, then the one with the most columns.
  separator = max(headers, key=lambda sep: (len(names & set(map(str.lower, headers[sep]))), len(headers[sep])))
  return headers[separator], _lines(text, headers[separator], separator)


def _split(header: str, separator: str) -> list[str]:
  return [field.strip() for field in next(csv.reader([header], delimiter=separator, skipinitialspace=True))]


def _lines(text: Lines, columns: list[str], separator: str) -> Iterator[_Record]:
  """Splits lines into fields; if a line and those that its quotes span are no record, its quotes are plain text."""
  ahead: deque[str] = deque()
  number = 1
  while line := ahead.popleft() if ahead else text.readline():
    number += 1
    if not line.strip():
      continue
    if len(line) > text.longest:
      yield number, _too_long(line, text)
      continue
    fields, more = line.rstrip("\r\n").split(separator), 0
    if '"' in line:
      ahead.extend(itertools.islice(text, max(0, _QUOTED_LINES - len(ahead))))
      quoted, used = _quoted([line, *ahead], separator)
      if len(quoted) == len(columns):
        fields, more = quoted, used - 1
    if len(fields) == len(columns):
      yield number, dict(zip(columns, fields, strict=True))
    else:
      yield number, f"{len(fields)} fields, but {len(columns)} columns: {_short(line)}"
    for _ in range(more):
      ahead.popleft()
    number += more


def _quoted(lines: list[str], separator: str) -> tuple[list[str], int]:
  """The fields of the first quoted record and its number of lines; no fields if the quotes are invalid."""
  reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
  try:
    return next(reader), reader.line_num
  except csv.Error:
    return [], 1


def _read_json(text: Lines, path: str) -> tuple[list[str], Iterator[_Record]]:
  """Objects, one a line or in an array."""
  read = _array if text.read(_CHUNK).lstrip().startswith("[") else _objects
  columns, problem = {}, "it is empty"
  for _, fields in itertools.islice(read(text), _PEEKED):
    if isinstance(fields, str):
      problem = fields
    else:
      columns |= dict.fromkeys(fields)
  if not columns:
    raise ValueError(f"{path}: neither one JSON object per line nor an array of objects: {problem}")
  return list(columns), read(text)


def _objects(text: Lines) -> Iterator[_Record]:
  text.seek(0)
  for number, line in enumerate(text, start=1):
    if len(line) > text.longest:
      yield number, _too_long(line, text)
    elif line.strip():
      try:
        yield number, _mapping(parse_json(line))
      except ValueError as error:
        yield number, f"bad JSON: {error}: {_short(line)}"


def _array(text: Lines) -> Iterator[_Record]:
  """Yields the elements of an array without reading the whole file at once."""
  text.seek(0)
  buffer, number, decoder = text.read(_CHUNK).lstrip()[1:], 0, json_decoder()
  position, gap = 0, re.compile(r"[\s,]*")
  while True:
    position = gap.match(buffer, position).end()
    try:
      if buffer.startswith("]", position):
        return
      value, position = decoder.raw_decode(buffer, position)
      yield number, _mapping(value)
    except RecursionError:
      buffer, position = _after_element(text, buffer, position)
      yield number, "nested too deeply" + (", the rest is not read" if not buffer else "")
      if not buffer:
        return
    except ValueError as error:
      chunk = text.read(_CHUNK)
      if not chunk or len(buffer) - position > text.longest:
        yield number, f"bad JSON, the rest is not read: {error}"
        return
      buffer, position = buffer[position:] + chunk, 0
      continue
    number += 1


def _after_element(text: Lines, buffer: str, position: int) -> tuple[str, int]:
  """A piece of an array, and the position in it where the object or list ends that starts at `position`.

  The piece is empty if the file ends before that, or if the element is longer than `_LONGEST_SKIPPED`.
  """
  depth, quoted, skipped = 0, False, 0
  while buffer and skipped < _LONGEST_SKIPPED:
    buffer += text.read(1) if buffer.endswith("\\") else ""
    for mark in _JSON_MARKS.finditer(buffer, position):
      if mark[0] == '"':
        quoted = not quoted
      elif not quoted and mark[0] in "[{":
        depth += 1
      elif not quoted and mark[0] in "]}":
        depth -= 1
        if not depth:
          return buffer, mark.end()
    skipped += len(buffer) - position
    buffer, position = text.read(_CHUNK), 0
  return "", 0


def _too_long(line: str, text: Lines) -> str:
  return f"more than {text.longest:,} characters: {_short(line[:100])}"


def _mapping(value: Any) -> Mapping[str, Any] | str:
  return value if isinstance(value, dict) else f"expected a JSON object, got {_short(value)}"


def _read_parquet(stream: BinaryIO) -> tuple[list[str], Callable[[Iterable[str]], Iterator[_Record]]]:
  table = pq.ParquetFile(stream)

  def read(columns: Iterable[str]) -> Iterator[_Record]:
    batches = table.iter_batches(_PARQUET_ROWS, columns=list(columns))
    yield from enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches))

  return list(table.schema_arrow.names), read


def _short(value: Any) -> str:
  return short(value)
