"""Tables of image paths and captions: CSV, TSV, JSON and Parquet.

| file | records |
|---|---|
| .csv .tsv .psv .txt | lines after a first line that names the columns; separated by comma, tab, semicolon or pipe |
| .jsonl .ndjson .json | one object per line, or one array of objects |
| .parquet .pq | rows |

All but Parquet may be compressed with gzip. Of several files, those that are cut off or damaged are named in the log
and count once each; their records before the damage remain. Text is UTF-8, UTF-16 with a byte order mark, or in the
given `encoding`. A byte that is invalid there is an error and not just a skipped line, since it means that the whole
table is in another encoding; but where each line is a JSON object, only its line is skipped.

A line that does not parse, or has more than 2^19 characters, is skipped and counted, with its number in the log, and
reading continues on the next line. A quoted field may span lines. If one of these is a record of its own, the quotes
are plain text: if one caption begins with a quote and a later one ends with a quote, such as 27", the lines between
them are not lost.

A table names files, and nothing in it is trusted; `reach` describes which files it may name.

DeCLIP's metadata (its data/datasets/clip_dataset.py) have this form: JSON lines with `filename`, `caption`, a text or a
list, and `label` and `label_name` for evaluation, with paths relative to a folder. DeCLIP uses only the first caption
of a list and skips captions with CJK characters; here all captions count.
"""

import codecs
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
import contextlib
import csv
from functools import partial
import gzip
import itertools
import json
import re
import shlex
from typing import Any, BinaryIO, NamedTuple
import zlib

from absl import logging

from declip_jax.data.sources import lists, values
from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.lists import Entry
from declip_jax.data.storage import files, patterns, remote, texts
from declip_jax.data.storage.bounded import JSON_MARKS, LONGEST, Lines, json_decoder, parse_json, short
from declip_jax.data.storage.parquet import Parquet
from declip_jax.data.storage.reach import NotAllowedError, Reach
from declip_jax.spelling import counted

_URL_NAMES = ("url", "image_url", "img_url", "photo_url", "downloadurl")  # of images, if no other column has them
_LABEL_TEXTS = ("label_name", "class_name", "classname", "category_name")
_ROLES = ("image", "caption", "label", "label_name", "labels", "group", "names", "encoding", *lists.REACH)
_SEPARATORS = ",\t;|"
_LONGEST_HEADER = 2**16
_QUOTED_LINES = 100  # lines that one quoted field may span
_BLANK_LINES = 2**16  # in a row; a gzip of 1 kB may have a million of them
_TOO_MANY_BLANK = f"more than {_BLANK_LINES:,} blank lines in a row, the rest is not read"
_PEEKED = 100  # records to read for the keys of objects, since not all need all keys, and for the kind of labels
_SCORES = (
  0.8  # share of these whose labels are not classes above which the column contains something else, such as scores
)
_CHUNK = 2**20
_LONGEST_SKIPPED = 2**24  # characters of an element of an array that is nested too deeply
_DOWNLOAD = ("--output_format", "webdataset", "--image_size", "256", "--resize_mode", "keep_ratio")
_DOWNLOAD += ("--resize_only_if_bigger", "True")  # options of img2dataset, as in docs/reproduce.md
_ARCHIVES = ("zip", "7z", "rar", "tar", "tgz", "bz2", "xz", "zst")
_INVALID = re.compile("[\udc80-\udcff]")  # a byte that cannot be decoded, with errors="surrogateescape"
_HERE = re.compile(r"(?:\./+)*")  # "./1.jpg" and "1.jpg" are one image
_GROUPED = re.compile(r"(?:^|\s)\d{1,3},\d{3}(?!\d)")  # digits of a number
_GZIP = b"\x1f\x8b"
_DISGUISED = {
  b"pk\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as .csv",
  b"\xd0\xcf\x11\xe0": "a spreadsheet; save it as .csv",
  b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it, or compress it with gzip",
  b"bzh": "compressed with bzip2; decompress it, or compress it with gzip",
  b"\xfd7zxz": "compressed with xz; decompress it, or compress it with gzip",
  b"par1": "Parquet; its name should end with .parquet",
  b"<!doctype": "a web page; give the address of the file itself",
  b"<html": "a web page; give the address of the file itself",
  b"version https://git-lfs": "a pointer of Git LFS; get the file itself with git lfs pull",
}

# A line number, and its fields by column or an error message.
_Record = tuple[int, Mapping[str, Any] | str]


class DamagedFileError(ValueError):
  """A table is cut off, or its compression or its pages are damaged."""


class Table(NamedTuple):
  """An open table.

  Attributes:
    columns: names of the columns, in order; a name may occur several times.
    read: yields the records of given columns, pairs of a line number and the fields by name or an error message. Lines
      count from 1, including the line of names; rows of Parquet and elements of an array count from 0. Of several
      columns with one name the field is a list.
    classnames: names of classes by column, as far as the file has them.
  """

  columns: list[str]
  read: Callable[[Iterable[str]], Iterator[_Record]]
  classnames: Mapping[str, list[str]]


class _Columns(NamedTuple):
  """The columns in use."""

  image: str
  captions: tuple[str, ...]
  label: str | None
  label_name: str | None
  labels: tuple[str, ...]
  groups: tuple[str, ...]


def open_table(location: str) -> lists.ListSource:
  """Opens "PATTERN", or "PATTERN?image=COLUMN&caption=COLUMN,COLUMN&label=COLUMN&label_name=COLUMN&root=FOLDER".

  All of these are optional, as are `labels`, `group`, `names`, `encoding` and `allow`, such as "&encoding=latin-1".

  Columns that are not given are recognised by their names, such as "filepath" and "title", and the choice is logged;
  "caption=" or "label=" means none. A text without a first line of names is read with "?names=image,caption", the names
  of its columns in order. Captions are a text, a list of texts, which may be written in a text as JSON or Python write
  it, or several columns, which may have the same name or be numbered, as caption_0 and caption_1; all that are not
  missing count. Lines with the same image and label, wherever they are, are one sample with all their captions, at the
  place of the first, as in the tables of Flickr8k and Flickr30k. Labels are whole numbers, or names of classes, which
  are numbered alphabetically; numbers are named by a column such as "label_name", by Parquet files that Hugging Face's
  datasets wrote, or else by classnames.txt next to the table. A negative number means no label. A column that is called
  "label" but has scores or lists is not used, unless it is given. Blank fields are missing,
  as are those that say nan, NULL, None or \\N.

  "&labels=COLUMN,COLUMN" names a column per class, for images with several labels: 1 for present, 0 for absent; -1 and
  missing fields do not count. "&group=COLUMN,COLUMN" names columns that group images, for evaluations: whole numbers,
  or names, which are numbered alphabetically.

  Parquet may contain the images themselves, as bytes or as {bytes, path} like Hugging Face's. They are copied into the
  index once, which doubles the disk space, because reading a single row of Parquet takes tens of ms.

  Args:
    location: the files, as in `patterns.expand`. Paths of images are relative to `root`, by default the folder of their
      table, and lead to files below it; for other files and URLs see `reach`.

  Raises:
    FileNotFoundError: the table does not exist, or its images are not found.
    ValueError: a column is missing or ambiguous, the kind of file is unknown, all files are damaged, one is in another
      encoding, no line is usable, or the images are on web servers that the spec does not allow.
  """
  name = f"table:{location}"
  place, wanted = lists.parse(location, _ROLES)
  reach, paths, classnames = Reach.of(wanted), patterns.expand(place), _Classnames()

  def read_entries() -> Iterator[Entry | BadSample]:
    damages: list[DamagedFileError] = []
    for number, path in enumerate(paths):
      yield from _merged(_before_damage(_entries(number, paths, wanted, classnames, reach), damages), path)
    if len(damages) == len(paths):
      raise damages[0]

  chosen = {role: column for role, column in wanted.items() if role not in lists.REACH}
  marks = lists.MarkNames(_named(wanted, "labels"), _named(wanted, "group"))
  stamp = ["table", chosen, files.stamps(paths)]
  index = lists.index_list(name, paths, stamp, read_entries, classnames.get, marks)
  return lists.checked(lists.ListSource(name, index, reach))


class _Classnames:
  """The names of classes that the files of a table have."""

  def __init__(self) -> None:
    self._names: list[str] = []
    self._path = ""

  def add(self, names: list[str], path: str) -> None:
    if self._path and names != self._names:
      raise ValueError(f"{path} and {self._path} have other names of classes; open each as a separate source")
    self._names, self._path = names, path

  def get(self) -> list[str]:
    return self._names


@contextlib.contextmanager
def read_table(
  path: str, names: Iterable[str], encoding: str | None = None, header: Sequence[str] = ()
) -> Iterator[Table]:
  """Opens one table, as a context manager.

  Args:
    path: the file; its suffix determines its kind.
    names: expected names of columns, in lower case; they help to recognise the separator.
    encoding: encoding of the text, by default UTF-8, or UTF-16 if it starts with a byte order mark.
    header: names of the columns of a text whose first line does not name them.

  Raises:
    ValueError: the kind of file is unknown, its contents do not match its kind, it is in another encoding, or it is
      damaged; the last two may be raised within the context.
  """
  kind = re.sub(r"\.gz$", "", remote.without_query(path).lower()).rpartition(".")[2]
  if kind not in ("parquet", "pq", "csv", "tsv", "psv", "txt", "jsonl", "ndjson", "json"):
    remedy = "; unpack it first" if kind in _ARCHIVES else ""
    raise ValueError(f"{path}: expected a table, .csv, .tsv, .psv, .txt, .jsonl, .ndjson, .json or .parquet{remedy}")
  if header and (kind in ("parquet", "pq") or "json" in kind):
    raise ValueError(f"{path}: names={','.join(header)}, but only lines of text lack names")
  with files.open_stream(path) as stream, _naming(path):
    if kind in ("parquet", "pq"):
      yield _read_parquet(stream)
    else:
      with _text(_unzipped(stream, path), path, encoding, "json" in kind) as text:
        try:
          read = _read_json(text, path) if "json" in kind else _read_lines(text, path, set(names), header)
          columns, records = read
          yield Table(columns, lambda _: records, {})
        except UnicodeDecodeError:
          raise _undecodable(path, text.encoding) from None


def _entries(
  number: int, paths: Sequence[str], wanted: Mapping[str, str], classnames: _Classnames, reach: Reach
) -> Iterator[Entry | BadSample]:
  """Yields the entries of table `number`.

  Raises:
    ValueError: see `open_table`.
  """
  path = paths[number]
  given = [name.lower() for role in ("image", "caption", "label") for name in wanted.get(role, "").split(",")]
  expected = [*lists.IMAGE_NAMES, *lists.CAPTION_NAMES, *lists.LABEL_NAMES, *given]
  header = [name.strip() for name in wanted["names"].split(",")] if wanted.get("names") else []
  with read_table(path, expected, wanted.get("encoding"), header) as table:
    chosen = _choose(table.columns, wanted, path)
    several = (*chosen.labels, *chosen.groups)
    needed = [
      column for column in (chosen.image, *chosen.captions, chosen.label, chosen.label_name, *several) if column
    ]
    records = table.read(needed)
    head = list(itertools.islice(records, _PEEKED))
    _check_urls(head, chosen, path, paths, reach)
    if chosen.label and chosen.captions and "label" not in wanted and (score := _score(head, chosen.label)):
      logging.warning("%s: %r has no labels, such as %s; it is not used", path, chosen.label, score)
      chosen = chosen._replace(label=None, label_name=None)
    logging.info("%s: %s", path, chosen)
    if chosen.label in table.classnames and not chosen.label_name:
      classnames.add(table.classnames[chosen.label], path)
    for line, fields in itertools.chain(head, records):
      try:
        yield _entry(number, line, fields, chosen)
      except BadSample as error:
        yield BadSample(error.kind, f"{path}:{line}: {error}")


def _before_damage(
  records: Iterable[Entry | BadSample], damages: list[DamagedFileError]
) -> Iterator[Entry | BadSample]:
  """Yields the entries of a table up to damage, which counts as one bad record and is added to `damages`."""
  try:
    yield from records
  except DamagedFileError as error:
    logging.warning("%s; its records before the damage remain", error)
    damages.append(error)
    yield BadSample("damaged record", str(error))


def _check_urls(records: Sequence[_Record], chosen: _Columns, path: str, paths: Sequence[str], reach: Reach) -> None:
  """Rejects a table whose images are on web servers, unless the spec allows them.

  Args:
    records: the first records.
    chosen: the columns in use.
    path: the table.
    paths: all tables of the source.
    reach: what the spec allows.

  Raises:
    ValueError: they are; the message has a command that downloads them.
  """
  images = [fields.get(chosen.image) for _, fields in records if not isinstance(fields, str)]
  urls = [image for image in images if isinstance(image, str) and remote.scheme(image) in ("http", "https")]
  if not urls or 2 * len(urls) < len(images):
    return
  try:
    reach.resolve(urls[0].strip(), lists.folder_of(path))
  except NotAllowedError as error:
    name, _, kind = remote.without_query(path).rpartition("/")[2].partition(".")
    command = ["img2dataset", "--url_list", path if len(paths) == 1 else lists.folder_of(path), "--input_format", kind]
    command += ["--url_col", chosen.image]
    command += ["--caption_col", chosen.captions[0]] if chosen.captions else []
    command += [*_DOWNLOAD, "--output_folder", f"{name}_images"]
    remedy = (
      f"download them with {shlex.join(command)} (pip install img2dataset), and open webdataset:{name}_images/*.tar"
    )
    raise ValueError(f"{path}: column {chosen.image!r} has URLs of images; {remedy}; {error}") from None
  except OSError:  # the name of the server cannot be resolved now
    return


def _score(records: Sequence[_Record], column: str) -> str | None:
  """An example of what a column has instead of labels, if nearly all of its fields are something else."""
  fields = [named.get(column) for _, named in records if not isinstance(named, str)]
  present, others = [field for field in fields if not values.is_missing(field)], []
  for field in present:
    try:
      values.label_of(field, column)
    except BadSample:
      others.append(field)
  return short(others[0]) if others and len(others) > _SCORES * len(present) else None


def _choose(columns: list[str], wanted: Mapping[str, str], path: str) -> _Columns:
  """Chooses the columns."""
  found = lists.choose("image", wanted.get("image"), columns, lists.IMAGE_NAMES, path)
  (image, *_) = found or lists.choose("image", wanted.get("image"), columns, _URL_NAMES, path) or [""]
  captions = lists.choose("caption", wanted.get("caption"), columns, lists.CAPTION_NAMES, path, several=True)
  names = lists.choose("label_name", wanted.get("label_name"), columns, _LABEL_TEXTS, path)
  labels = lists.choose("label", wanted.get("label"), columns, lists.LABEL_NAMES, path)
  if not labels and "label" not in wanted:
    labels, names = names, ()
  several, groups = (_existing(columns, role, _named(wanted, role), path) for role in ("labels", "group"))
  if several and "label" not in wanted:
    labels, names = (), ()
  if not image or not (captions or labels or several or wanted.get("caption") == ""):
    missing = "caption or label" if image else "image"
    raise ValueError(
      f"{path}: which column is the {missing}? The columns are {columns}; add ?image=COLUMN&caption=COLUMN to the "
      f"path, or, {_naming_columns(columns)}"
    )
  for column in (image, *labels, *names, *several, *groups):
    if columns.count(column) > 1:
      raise ValueError(f"{path}: {columns.count(column)} columns are called {column!r}; only captions may be")
  label_name = names[0] if names and labels and names != labels else None
  return _Columns(image, captions, labels[0] if labels else None, label_name, several, groups)


def _named(wanted: Mapping[str, str], role: str) -> tuple[str, ...]:
  """The columns that the location names for a role, joined by commas."""
  return tuple(name.strip() for name in wanted[role].split(",")) if wanted.get(role) else ()


def _existing(columns: Sequence[str], role: str, names: tuple[str, ...], path: str) -> tuple[str, ...]:
  if unknown := [name for name in names if name not in columns]:
    raise ValueError(f"{path}: no column {unknown[0]!r} for {role}; the columns are {list(columns)}")
  return names


def _entry(number: int, line: int, fields: Mapping[str, Any] | str, columns: _Columns) -> Entry:
  """Makes an entry from a record; raises BadSample if the record is wrong."""
  if isinstance(fields, str):
    raise BadSample("damaged record", fields)
  path, image = _image(fields.get(columns.image), columns.image)
  captions = [text for column in columns.captions for text in values.captions_of(fields.get(column))]
  label = values.label_of(fields.get(columns.label), columns.label) if columns.label else None
  labels = [values.presence_of(fields.get(column), column) for column in columns.labels]
  groups = [values.label_of(fields.get(column), column) for column in columns.groups]
  if columns.captions and not captions and label is None and not labels:
    raise BadSample("no caption", f"no caption in {', '.join(columns.captions)}")
  if sum(map(len, captions)) > LONGEST:
    raise BadSample("damaged record", f"captions of more than {LONGEST:,} characters")
  name = fields.get(columns.label_name) if columns.label_name else None
  label_name = None if values.is_missing(name) else str(name).strip()
  return Entry(number, line, path, image, captions, label, label_name, labels, groups)


def _image(value: Any, column: str) -> tuple[str | None, bytes | None]:
  """Returns path and bytes of an image, one of them None."""
  if (
    not isinstance(value, str) and isinstance(value, Mapping) and value.keys() >= {"bytes", "path"}
  ):  # the image of Hugging Face's datasets
    value = value["path"] if value["bytes"] is None else value["bytes"]
  if isinstance(value, bytes):
    if len(value) > files.MAX_BYTES:
      raise BadSample("too large", f"{len(value):,} bytes in {column!r}, expected at most {files.MAX_BYTES:,}")
    return None, value
  if not isinstance(value, str) or values.is_missing(value) or len(value) > LONGEST:
    raise BadSample("damaged record", f"expected a path for the image in {column!r}, got {short(value)}")
  value = value.strip()
  value = value[_HERE.match(value).end() :] or value
  if "#" not in value:
    return value, None
  path, _, number = value.rpartition("#")  # NAME.jpg#0 and so on are the captions of Flickr8k and Flickr30k
  numbered = number.isdecimal() and path.lower().endswith(files.IMAGE_SUFFIXES)
  return path if numbered else value, None


def _merged(records: Iterable[Entry | BadSample], path: str) -> Iterator[Entry | BadSample]:
  """Joins the captions of consecutive entries with the same image and label; the index joins those of others."""
  last: Entry | None = None
  length = 0  # characters of its captions
  for entry in records:
    if isinstance(entry, BadSample):
      yield entry
    elif last and (entry.path, entry.image, entry.label) == (last.path, last.image, last.label):
      length += sum(map(len, entry.captions))
      if length > LONGEST:
        limit = f"the captions of its image have more than {LONGEST:,} characters"
        yield BadSample("damaged record", f"{path}:{entry.record}: {limit}")
      else:
        last.captions.extend(entry.captions)
    else:
      if last:
        yield last
      last, length = entry, sum(map(len, entry.captions))
  if last:
    yield last


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
  """Turns the errors of `Parquet` and gzip for a damaged file into one line with the file's name."""
  try:
    yield
  except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
    if (
      isinstance(error, OSError) and error.errno is not None
    ):  # of the system; errors of gzip and `Parquet` have no number
      raise
    raise DamagedFileError(f"{path}: cannot be read: {lists.one_line(error)}") from None


def _unzipped(stream: BinaryIO, path: str) -> BinaryIO:
  start = stream.read(len(_GZIP))
  stream.seek(0)
  named = remote.without_query(path).lower().endswith(".gz")
  if start == _GZIP and not named:
    logging.warning("%s is compressed with gzip, although its name lacks .gz", path)
  return gzip.GzipFile(fileobj=stream) if named or start == _GZIP else stream


def _text(stream: BinaryIO, path: str, encoding: str | None, is_json: bool) -> Lines:
  start = stream.read(texts.START)
  stream.seek(0)
  for magic, kind in _DISGUISED.items():
    if start.lower().startswith(magic):
      raise ValueError(f"{path}: not a text table, but {kind}")
  try:
    encoding = _past_mark(encoding, start) if encoding else texts.encoding_of(start)
    has_objects = is_json and start.decode(encoding, "ignore").lstrip().startswith("{")
    return Lines(stream, encoding, LONGEST, "surrogateescape" if has_objects else "strict")
  except LookupError as error:
    raise ValueError(f"{path}: {error}") from None


def _past_mark(encoding: str, start: bytes) -> str:
  """The given encoding, in a form that skips the byte order mark if there may be one."""
  name, marked = codecs.lookup(encoding).name, texts.encoding_of(start)
  if name == "utf-8":
    return "utf-8-sig"
  return marked if name in (f"{marked}-le", f"{marked}-be") else encoding


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
        return ValueError(
          f"{path}:{line}: {found}; convert the file, or name its encoding, as in table:{path}?encoding=latin-1"
        )
  return ValueError(f"{path}: not {encoding}")


def _read_lines(text: Lines, path: str, names: Set[str], header: Sequence[str]) -> tuple[list[str], Iterator[_Record]]:
  """Reads a table with one record per line; `header` has the names of the columns if no line has them."""
  first = text.readline(_LONGEST_HEADER)
  if not first:
    raise ValueError(
      f"{path} is empty: expected a line with the names of the columns, such as image,caption, and a line per sample"
    )
  first = first.rstrip("\r\n")
  try:
    headers = {separator: _split(first, separator) for separator in _SEPARATORS}
  except csv.Error as error:  # control characters, or a field without end
    raise ValueError(f"{path}:1 is not a line of a table: {short(first)}") from error
  if header:
    separator = max(headers, key=lambda sep: (len(headers[sep]) == len(header), *_likelihood(headers[sep], names)))
    if len(headers[separator]) != len(header):
      found = f"{counted(len(headers[separator]), 'field')}: {short(first)}"
      raise ValueError(f"{path}: {counted(len(header), 'name')}, {list(header)}, but {found}")
    text.seek(0)
    return list(header), _lines(text, header, separator, 0)
  if not first.strip() or "\r" in first:
    raise ValueError(f"{path}: its first line does not name columns, or its lines do not end with \\n: {short(first)}")
  separator = max(headers, key=lambda sep: _likelihood(headers[sep], names))
  columns = headers[separator]
  if any(map(_names_image, columns)):
    raise ValueError(f"{path}: its first line is a record, {short(columns)}; {_naming_columns(columns)}")
  return columns, _lines(text, columns, separator, 1)


def _split(header: str, separator: str) -> list[str]:
  return [field.strip() for field in next(csv.reader([header], delimiter=separator, skipinitialspace=True))]


def _likelihood(fields: Sequence[str], names: Set[str]) -> tuple[int, bool, int]:
  """How likely it is that a line has these fields, for comparisons: by known names, then by images, then by number."""
  return len(names & set(map(str.lower, fields))), any(map(_names_image, fields)), len(fields)


def _names_image(field: str) -> bool:
  """Whether a field is a URL or the path of an image."""
  plain = re.sub(r"#\d+$", "", field.strip(' "'))
  return remote.is_url(plain) or plain.lower().endswith(files.IMAGE_SUFFIXES)


def _naming_columns(fields: Sequence[str]) -> str:
  """Explains how to name the columns of a text, from the fields of its first line."""
  image = next((number for number, field in enumerate(fields) if _names_image(field)), 0)
  caption = max(
    (number for number in range(len(fields)) if number != image), key=lambda number: len(fields[number]), default=0
  )
  known = {caption: "caption", image: "image"}
  names = ",".join(known.get(number, f"column{number + 1}") for number in range(len(fields)))
  return f"without a line of names, name the columns in their order, as in ?names={names}"


def _lines(text: Lines, columns: Sequence[str], separator: str, number: int) -> Iterator[_Record]:
  """Splits lines into fields, after `number` lines.

  A quoted field may span lines. The quotes are plain text if these lines together have more or fewer fields than there
  are columns, or if one of the lines is a record of its own, see `_is_record`: then one caption begins with a quote,
  and a later one ends with another. Where the record names an image, only lines that name one can be records.
  """
  ahead: deque[str] = deque()
  last: list[str] = []
  by_name = dict if len(set(columns)) == len(columns) else _by_name
  blank = 0
  while line := ahead.popleft() if ahead else text.readline():
    number += 1
    blank = 0 if line.strip() else blank + 1
    if blank > _BLANK_LINES:
      yield number, _TOO_MANY_BLANK
      return
    if blank:
      continue
    if len(line) > text.longest:
      yield number, _too_long(line, text)
      continue
    fields, more = line.rstrip("\r\n").split(separator), 0
    if '"' in line:
      known = last or (fields if len(fields) == len(columns) else [])
      record = _quoted([line], separator, len(columns), known)
      if record is None:
        ahead.extend(itertools.islice(text, max(0, _QUOTED_LINES - len(ahead))))
        record = _quoted([line, *ahead], separator, len(columns), known)
      fields, more = record or (fields, 0)
    if len(fields) == len(columns):
      last = fields
      yield number, by_name(zip(columns, fields, strict=True))
    else:
      yield number, f"{counted(len(fields), 'field')}, but {counted(len(columns), 'column')}: {short(line)}"
    for _ in range(more):
      ahead.popleft()
    number += more


def _by_name(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
  """Fields by name, in a list if several have the same name."""
  pairs = list(fields)
  named = dict(pairs)
  if len(named) < len(pairs):
    fields_of: dict[str, list[Any]] = {}
    for name, field in pairs:
      fields_of.setdefault(name, []).append(field)
    named = {name: same if len(same) > 1 else same[0] for name, same in fields_of.items()}
  return named


def _quoted(lines: Sequence[str], separator: str, width: int, last: Sequence[str]) -> tuple[list[str], int] | None:
  """The fields of the first record and the number of lines after the first that it spans, if its quotes are valid."""
  forms = [lines]  # a quote within quotes is written twice, or after a backslash
  if '\\"' in lines[0]:
    forms.append([line.replace('\\"', '""') for line in lines])
  found = []
  for form in forms:
    reader = csv.reader(form, delimiter=separator, skipinitialspace=True, strict=True)
    try:
      fields, more = next(reader), reader.line_num - 1
    except csv.Error:
      continue
    others = lines[1 : more + 1]
    if others and not _is_whole(lines[0], others[-1], separator, width):
      others = others[:-1]  # it has the fields after the text, and looks like a record of its own
    if any(map(_names_image, fields)):  # then every record does
      others = [other for other in others if any(map(_names_image, other.rstrip("\r\n").split(separator)))]
    if len(fields) == width and not any(_is_record(other, separator, width, last) for other in others):
      found.append((fields, more))
  return min(found, key=lambda record: record[1], default=None)


def _is_whole(opening: str, closing: str, separator: str, width: int) -> bool:
  """Whether the line that opens a quote may be a record: it has all fields, and an image if the closing one has."""
  fields, others = (line.rstrip("\r\n").split(separator) for line in (opening, closing))
  return len(fields) >= width and (any(map(_names_image, fields)) or not any(map(_names_image, others)))


def _is_record(line: str, separator: str, width: int, last: Sequence[str]) -> bool:
  """Whether a line is a record of its own and not part of a text: it has `width` fields, like those of the last record.

  If the last record names images, one of these columns must name one. If it has numbers, one of these columns may have
  one, unless a comma may group its digits, as in "1,000 people"; otherwise no field may be blank or begin with a space,
  as after a comma within a text, unless it is so in the last record, and no comma may group digits.
  """
  fields = line.rstrip("\r\n").split(separator)
  if len(fields) != width:
    return False
  pairs = [*zip(fields, last or [""] * width, strict=True)]
  images = [_names_image(field) for field, known in pairs if _names_image(known)]
  if images or any(map(_names_image, fields)):
    return any(images) or not images
  grouped = [separator == "," and bool(_GROUPED.search(",".join(fields[i : i + 2]))) for i in range(width)]
  if any(
    _is_number(field) and _is_number(known) and not group for (field, known), group in zip(pairs, grouped, strict=True)
  ):
    return True
  is_text = any((not field.strip() and known.strip()) or field[:1] == " " != known[:1] for field, known in pairs)
  return not (is_text or any(grouped) or not any(map(str.strip, fields)))


def _is_number(field: str) -> bool:
  return bool(re.fullmatch(r"-?\d+(\.\d+)?", field.strip(' "')))


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
  blank = 0
  for number, line in enumerate(text, start=1):
    blank = 0 if line.strip() else blank + 1
    if blank > _BLANK_LINES:
      yield number, _TOO_MANY_BLANK
      return
    if len(line) > text.longest:
      yield number, _too_long(line, text)
    elif invalid := _INVALID.search(line):
      remedy = "convert the line, or name the encoding of the file, as in ?encoding=latin-1"
      yield (
        number,
        f"{ord(invalid[0]) & 0xFF:#04x} is not {text.encoding.removesuffix('-sig')}; {remedy}: {short(line)}",
      )
    elif line.strip():
      try:
        yield number, _mapping(parse_json(line, _by_name))
      except ValueError as error:
        yield number, f"bad JSON: {error}: {short(line)}"


def _array(text: Lines) -> Iterator[_Record]:
  """Yields the elements of an array without reading the whole file at once."""
  text.seek(0)
  buffer, number, decoder = text.read(_CHUNK).lstrip()[1:], 0, json_decoder(_by_name)
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
    for mark in JSON_MARKS.finditer(buffer, position):
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
  return f"more than {text.longest:,} characters: {short(line[:100])}"


def _mapping(value: Any) -> Mapping[str, Any] | str:
  return value if isinstance(value, dict) else f"expected a JSON object, got {short(value)}"


def _read_parquet(stream: BinaryIO) -> Table:
  table = Parquet(stream)

  def read(columns: Iterable[str]) -> Iterator[_Record]:
    for number, row in enumerate(table.rows([*dict.fromkeys(columns)])):
      yield number, row if isinstance(row, str) else _by_name(row)

  return Table(list(table.schema.names), read, _classnames_in(table.schema.metadata or {}))


def _classnames_in(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
  """Names of classes by column, from the features that Hugging Face's datasets store in a schema."""
  try:
    features = json.loads(metadata[b"huggingface"])["info"]["features"].items()
    found = {column: feature["names"] for column, feature in features if feature.get("_type") == "ClassLabel"}
  except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
    return {}
  return {column: names for column, names in found.items() if all(isinstance(name, str) for name in names)}
