"""Lists of images as sources: tables, COCO files, YFCC lists and folders are converted once to the same kind of index.

An entry of a list is the path of an image, its captions and its label. The index of a list is a file of rows (see
`rows` and `indexes.find_or_build`), built by streaming and memory-mapped afterwards: building costs about 20 us per
entry, opening the list again only compares its checksums, and neither a process nor a pickle contains anything that
grows with the list.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
import difflib
import errno
from functools import cached_property, partial
import itertools
import os
from pathlib import Path
import random
import re
import time
from typing import Any, NamedTuple

from absl import logging
import numpy as np

from declip_jax.data.sources.base import BadSample, Example, Marks, Named, bad_sample
from declip_jax.data.storage import files, indexes, layouts, remote, rows
from declip_jax.data.storage.bounded import LONGEST
from declip_jax.data.storage.reach import NotAllowedError, Reach
from declip_jax.reporting import progress
from declip_jax.spelling import did_you_mean

IMAGE_NAMES = ("image", "filename", "file_name", "filepath", "file_path", "file", "path", "img", "img_path", "img_name")
IMAGE_NAMES += ("image_path", "image_name", "image_file", "image_filename", "image_filepath")
IMAGE_NAMES += ("jpg", "jpeg", "png", "webp")
CAPTION_NAMES = ("caption", "captions", "text", "texts", "txt", "title", "sentence", "sentences", "description")
CAPTION_NAMES += ("alt_text", "alt", "comment", "prompt")
LABEL_NAMES = ("label", "labels", "class", "class_id", "class_index", "target", "category", "category_id")

REACH = Reach._fields  # the options of a spec for where paths in the data may lead

_BELOW = Reach()
_FORMAT = 10  # part of the name of an index: raise it when its columns, or the rules by which a list is read, change
_PROBED = 100  # random images to try until one can be read
STAMPED = 1000  # images, at random, whose size and time are part of the stamp
_PATIENCE = 20.0  # seconds to try them
_LOOKED_IN = 100  # folders in which to look for an image that is missing
_LOGGED = 5  # skipped samples to name in the log; all of them are counted
MAX_CLASSES = 100_000  # more labels than this are not classes, but numbers or names of samples
# A path may contain a ?, as a glob character.
_QUERY = re.compile(r"(.*?)(?:\?([a-z_]+=.*))?", re.DOTALL)


class Entry(NamedTuple):
  """A sample as a list describes it.

  Attributes:
    file: number of the file of the list that has the entry.
    record: position in that file, for messages: a line or an id; -1 if `path` identifies the entry.
    path: path of the image, absolute, a URL or relative to a root; None if the other fields determine it.
    image: the encoded image, if the list contains it.
    captions: captions, stripped and not empty.
    label: a whole number, also as text, or the name of a class; None or a negative number for no label.
    label_name: the name of that class if `label` is a number.
    labels: for data with several labels per image, 1, 0 or -1 for each class, see `Example`; else empty.
    groups: whole numbers or names, one per grouping; None for no group.
  """

  file: int
  record: int
  path: str | None
  image: bytes | None = None
  captions: Sequence[str] = ()
  label: int | str | None = None
  label_name: str | None = None
  labels: Sequence[int] = ()
  groups: Sequence[int | str | None] = ()


class MarkNames(NamedTuple):
  """What a list has besides images, captions and one label.

  Attributes:
    labels: names of the classes of `Entry.labels`.
    groups: names of the groupings of `Entry.groups`.
  """

  labels: Sequence[str] = ()
  groups: Sequence[str] = ()


NO_MARKS = MarkNames()


class ListSource(Named):
  """A list as a `Source`. Reads an image from the path of its entry; subclasses may override that.

  Args:
    name: the spec that opened the list.
    index: the index, see `index_list`.
    reach: the root that paths of images are relative to, by default the folder of the list's file, and what else they
      may lead to.
  """

  def __init__(self, name: str, index: Path, reach: Reach = _BELOW):
    super().__init__(name)
    self._index, self._reach = index, reach

  @cached_property
  def _rows(self) -> rows.Rows:
    try:
      return rows.Rows(indexes.contents(self._index))
    except ValueError as error:
      damage = f"{self.name}: its index {self._index} is damaged: {one_line(error)}"
      raise ValueError(f"{damage}; delete it to build it again") from None

  @property
  def _about(self) -> dict[str, Any]:
    return self._rows.about

  @cached_property
  def _first_label(self) -> int:
    """The number of class 0 in the list, see `layouts.first_label`."""
    from_list = self._about["classnames"] or self._about.get("several")
    return 0 if from_list else layouts.first_label(self._about["files"][0], self._about["labels"])

  @cached_property
  def classnames(self) -> tuple[str, ...]:
    """Names from the list; else line i of classnames.txt, see `layouts.find`, for class i; else empty.

    If that file and the list both number the classes from 1, class 0 is number 1.
    """
    if several := self._about.get("several"):
      return tuple(several)
    if not self._about["labels"]:
      return ()
    return tuple(self._about["classnames"]) or layouts.classnames(self._about["files"][0])

  @cached_property
  def templates(self) -> tuple[str, ...]:
    """Prompt templates next to the data, see `layouts.templates`; empty without that file."""
    return layouts.templates(self._about["files"][0])

  @property
  def skipped(self) -> dict[str, int]:
    """Numbers of samples with an invalid entry or without a caption, by kind, counted when the list was indexed."""
    return dict(self._about["skipped"])

  @cached_property
  def stamp(self) -> str:
    """Changes with the list, the names of classes, and local files of up to `STAMPED` samples, see `size_and_time`.

    Asking for the files of all samples would take minutes on a network file system.
    """
    entries = map(self.entry, probes(len(self), STAMPED))
    found = [size_and_time(self._reach, path, self._folder(entry)) for entry in entries for path in self._paths(entry)]
    return f"{self._index.stem}-{indexes.digest([found, self.classnames])}"

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Example:
    """Reads one sample.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      BadSample: its image cannot be read.
    """
    self._check(index)
    entry = self.entry(index)
    name = self._about["files"][entry.file].rpartition("/")[2]
    place = entry.path if entry.record < 0 else f"{name}:{entry.record}"
    try:
      image = self._image(entry) if entry.image is None else entry.image
      example = Example(image=image, captions=self._captions(entry), label=entry.label, id=place)
      return {**example, **self._marks(entry)}
    except NotAllowedError as error:
      raise BadSample("not allowed", f"{place}: {error}") from error
    except ValueError as error:
      if isinstance(error, BadSample):
        raise bad_sample(error, place) from error
      raise BadSample("missing file", f"{place}: {error}") from error  # a kind of URL that is not supported
    except BaseException as error:
      raise bad_sample(error, place) from error

  def entry(self, index: int) -> Entry:
    """Returns entry `index` of the list, with the number of its class as label, -1 for none."""
    file, record, path, image, captions, label, *marks = self._rows[int(index)]
    path = None if path is None else path.decode("utf-8", "surrogateescape")
    name = self._about["labels"][label] - self._first_label if label >= 0 else -1
    labels, groups = marks or ((), ())
    return Entry(file, record, path, image, captions, name, None, labels, groups)

  def _marks(self, entry: Entry) -> Marks:
    marks = Marks(labels=np.array(entry.labels, np.int8)) if entry.labels else Marks()
    if entry.groups:
      known = zip(self._about["groups"].items(), entry.groups, strict=True)
      marks["groups"] = {name: numbers[group] if group >= 0 else -1 for (name, numbers), group in known}
    return marks

  def _image(self, entry: Entry) -> bytes:
    return files.read(self._reach.resolve(entry.path or "", self._folder(entry)))

  def _paths(self, entry: Entry) -> Sequence[str]:
    """Paths of the files that are read for an entry, as it names them."""
    return [entry.path] if entry.path and entry.image is None else []

  def _captions(self, entry: Entry) -> tuple[str, ...]:
    return tuple(entry.captions)

  def _folder(self, entry: Entry) -> str:
    """The root, by default the folder of the file that has the entry."""
    return self._reach.root or folder_of(self._about["files"][entry.file])

  def __getstate__(self) -> dict[str, Any]:
    return {"name": self.name, "_index": self._index, "_reach": self._reach, "stamp": self.stamp}


def index_list(
  name: str,
  paths: Sequence[str],
  stamp: Any,
  read_entries: Callable[[], Iterable[Entry | BadSample]],
  classnames: Callable[[], Sequence[str]] = tuple,
  marks: MarkNames = NO_MARKS,
) -> Path:
  """Returns the index of a list and builds it if it does not exist.

  Entries with the same image and label become one sample with all their captions, at the place of the first.

  Args:
    name: the spec of the list, for messages.
    paths: the files of the list, numbered by `Entry.file`.
    stamp: everything else that the entries depend on, as JSON.
    read_entries: yields the entries in order, and a `BadSample` for each one that cannot be used.
    classnames: returns the names of the classes if the list has them, in the order of their numbers, once all entries
      have been read.
    marks: what the entries have besides.

  Raises:
    ValueError: there is no usable entry, or the labels are not classes.
    OSError: the index cannot be stored.
  """
  build = partial(_build, name=name, paths=paths, read_entries=read_entries, classnames=classnames, marks=marks)
  return indexes.find_or_build([_FORMAT, list(paths), stamp], paths[0].rstrip("/"), build, ".rows")


def checked(source: ListSource) -> ListSource:
  """Returns the source if one of its images can be read: its first one, or one of `_PROBED` others.

  Raises:
    FileNotFoundError: none of them can be read; the message says what helps.
    OSError: none of them can be read, since a disk, a mount or a network fails.
    ValueError: classnames.txt lacks a line for a class, or it is unclear which line belongs to it.
  """
  classes = len(source.classnames)
  labels = [label - source._first_label for label in source._about["labels"]]
  if classes and max(labels, default=-1) >= classes:
    hint = "; labels count from 0, and so do the names" if (min(labels), max(labels)) == (1, classes) else ""
    raise ValueError(f"{source.name}: label {max(labels)}, but only {classes} class names{hint}")
  for remark in layouts.remarks_on(source.classnames):
    logging.warning("%s: %s", source.name, remark)
  started, errors = time.monotonic(), list[tuple[int, BadSample]]()
  for index in dict.fromkeys([0, *probes(len(source), _PROBED)]):
    try:
      source[index]
      return source
    except BadSample as error:
      errors.append((index, error))
    if time.monotonic() - started > _PATIENCE:
      break
  index, first = errors[0]
  entry = source.entry(index)
  given = source._reach.root is not None
  help = missing_advice(entry.path or "", source._folder(entry), given) if first.kind == "missing file" else ""
  tried = f"no readable image among {len(errors)} tried: {first}"
  if first.kind == "read error":
    raise OSError(errno.EIO, f"{source.name}: {tried}")
  raise FileNotFoundError(f"{source.name}: {tried}" + (f"; {help}" if help else ""))


def missing_advice(path: str, root: str, given: bool, *, search: bool = True) -> str:
  """Advice for a missing image: whether another root helps depends on its path in the list; empty for URLs.

  Args:
    path: the path in the list.
    root: the root that it is relative to.
    given: whether the spec has this root.
    search: whether to look for the image in the folders around the root.
  """
  if remote.is_url(path):
    return ""
  rewrite = f"another root does not change that; write the paths in the list relative to {root}"
  if path.startswith(("/", "file://")):
    return f"the path is absolute, and {rewrite}"
  if re.match(r"[A-Za-z]:[\\/]", path) or ("\\" in path and "/" not in path):
    return f"the path is one of Windows, and {rewrite}, with /"
  if path.startswith("~"):
    return f"~ in a list is not the home folder, and {rewrite}"
  if search and not remote.is_url(root):
    for folder in [folder_of(root), *_folders_in(root), *_folders_in(folder_of(root))]:
      if os.path.isfile(os.path.join(folder, path)):
        return f"it is in {folder}: give ?root={folder}"
  if given and not remote.is_url(root) and not os.path.isdir(root):
    return f"root={root} is not a folder"
  if given:
    return f"root={root} is not the folder that the paths in the list are relative to"
  return "give the folder of the images as ?root=FOLDER"


def _folders_in(folder: str) -> list[str]:
  try:
    with os.scandir(folder) as entries:
      return [entry.path for entry in itertools.islice(entries, _LOOKED_IN) if files.is_folder(entry)]
  except OSError:
    return []


def size_and_time(reach: Reach, path: str, folder: str) -> tuple[int, int] | None:
  """Size in bytes and time of change in ns of a file; None if there is none, and for URLs, to avoid requests."""
  if remote.is_url(path) or remote.is_url(folder):
    return None
  try:
    stat = os.stat(reach.resolve(path, folder))
  except (OSError, ValueError):
    return None
  return stat.st_size, stat.st_mtime_ns


def probes(count: int, number: int) -> list[int]:
  """Up to `number` positions of `range(count)`, at random: samples at equal distances may be missing together."""
  return random.Random(0).sample(range(count), min(number, count))


def parse(location: str, legal: Sequence[str], form: str = "PLACE") -> tuple[str, dict[str, str]]:
  """Splits PLACE?name=value&name=value.

  Args:
    location: the text to split.
    legal: the allowed names.
    form: the form of a place, for messages.

  Raises:
    ValueError: the place is empty, or a name is not one of `legal`.
  """
  match = _QUERY.fullmatch(location)
  assert match  # it matches every text
  place, query = match.groups()
  # No decoding: a path or the name of a column may contain + and %.
  wanted = dict(choice.split("=", 1) for choice in re.split(r"&(?=[a-z_]+=)", query or "") if choice)
  if remote.scheme(place) in ("http", "https"):  # whose own query may follow, such as ?download=true
    others = {name: wanted.pop(name) for name in [*wanted] if not difflib.get_close_matches(name, legal)}
    place += "?" * bool(others) + "&".join(f"{name}={value}" for name, value in others.items())
  if not place or not wanted.keys() <= set(legal):
    expected = "&".join(f"{name}=.." for name in legal)
    raise ValueError(f"bad location {location!r}: expected {form}" + (f", then any of ?{expected}" if legal else ""))
  return place, wanted


def choose(
  role: str, wanted: str | None, columns: Sequence[str], names: Sequence[str], place: str, *, several: bool = False
) -> tuple[str, ...]:
  """Chooses the columns of a role: wanted ones, else the one with the usual name, else the only one with a known name.

  Where there may be several, those whose names differ only by a number at the end are chosen together.

  Args:
    role: "image", "caption" or "label".
    wanted: a column, or several joined by commas; "" means none; None means a choice by name.
    columns: all columns.
    names: known names of columns with this role, the usual one first.
    place: the file, for messages.
    several: whether there may be more than one column.

  Returns:
    The columns, none if no name matches.

  Raises:
    ValueError: a wanted column does not exist, or several match.
  """
  if wanted is not None:
    chosen = [wanted] if wanted in columns or not several else wanted.split(",")
    for column in chosen if wanted else []:
      if column not in columns:
        hint = did_you_mean(column, columns)
        raise ValueError(f"{place}: no column {column!r} for the {role}; the columns are {list(columns)}{hint}")
    return tuple(chosen) if wanted else ()
  plain = {column: _plain(column, numbered=several) for column in columns}
  likely = [column for column in plain if plain[column] in names]
  chosen = [column for column in likely if plain[column] == names[0]] or likely
  if len({plain[column] for column in chosen}) > 1 or (len(chosen) > 1 and not several):
    join = f" or join them with ?{role}={','.join(likely[:2])}" if several else ""
    raise ValueError(f"{place}: the {role} could be any of {likely}; choose one with ?{role}={likely[0]}{join}")
  return tuple(chosen)


def folder_of(path: str) -> str:
  """The folder of a file."""
  return path.rpartition("/")[0] or "/"


def absolute(folder: str) -> str:
  """The absolute path of a folder, or its URL, without a trailing slash."""
  if remote.is_url(folder):
    return folder.rstrip("/")
  return os.path.abspath(os.path.expanduser(folder.removeprefix("file://"))).rstrip("/")


def one_line(error: Exception) -> str:
  """The message of an error on one line; Arrow's have several."""
  return " ".join(str(error).split())


def _plain(column: str, numbered: bool = False) -> str:
  """The name of a column in lower case with _ for spaces; without a number at its end if `numbered`."""
  plain = re.sub(r"[\s-]+", "_", column.strip().lower())
  return re.sub(r"(?<=[^\W\d_])[_.]?\d+$", "", plain) if numbered else plain


def _build(
  path: Path,
  name: str,
  paths: Sequence[str],
  read_entries: Callable[[], Iterable[Entry | BadSample]],
  classnames: Callable[[], Sequence[str]],
  marks: MarkNames,
) -> None:
  """Writes the index of a list."""
  logging.info("indexing %s, once", name)
  skipped, first_bad = Counter[str](), list[BadSample]()
  numbers: dict[int | str, int] = {}  # of labels, in order of appearance
  names: dict[int | str, str] = {}
  groups: list[dict[int | str, int]] = [{} for _ in marks.groups]  # the same for each grouping
  keys = array("Q")  # of images with their labels
  usable = _usable(read_entries(), skipped, first_bad)
  first = next(usable, None)
  if first is None:
    if not first_bad:
      raise ValueError(f"{name}: no usable sample: the list has no entry")
    counts = ", ".join(f"{count:,}: {kind}" for kind, count in skipped.items())
    raise ValueError(f"{name}: no usable sample; skipped {counts}; the first: {first_bad[0]}")

  def numbered() -> Iterator[rows.Row]:
    for entry in progress.track(itertools.chain([first], usable), f"indexing {name}", unit="samples"):
      row = (*_encoded(entry), _number(entry, numbers, names))
      row += (entry.labels, [*map(_group, entry.groups, groups)]) if any(marks) else ()
      if len(numbers) > MAX_CLASSES:
        few = ", ".join(map(repr, list(numbers)[:3]))
        limit = f"{name}: more than {MAX_CLASSES:,} distinct labels ({few}, ...)"
        raise ValueError(f"{limit}: not class labels? Pass ?label= to ignore them")
      if entry.record >= 0 and (entry.path or entry.image):
        keys.append(_key(row, folder_of(paths[entry.file])))
      yield row

  def about() -> dict[str, Any]:
    labels, found = number_classes(numbers, names, classnames())
    grouped = {name: number_classes(known, {}, ())[0] for name, known in zip(marks.groups, groups, strict=True)}
    several = {"several": [*marks.labels], "groups": grouped} if any(marks) else {}
    return {"files": paths, "skipped": skipped, "labels": labels, "classnames": found, **several}

  count = rows.write(path, numbered(), about)
  if len(keys) == count and _has_repeats(keys):
    apart = path.with_name(f"{path.name}.apart")
    path.replace(apart)
    try:
      joined = count - (count := rows.write(path, _joined(apart, keys, name, paths, skipped), about))
    finally:
      apart.unlink(missing_ok=True)
    logging.info("%s: joined %d lines with earlier ones of the same image", name, joined)
  logging.info("%s: %d samples, %d skipped %s", name, count, skipped.total(), dict(skipped))


def _key(row: rows.Row, folder: str) -> int:
  """64 bits that depend on the image and the label of a row, for this process."""
  _, _, path, image, _, label, *_ = row
  relative = path is not None and not path.startswith(b"/") and b"://" not in path
  return hash((folder if relative else "", path, image, label)) % 2**64


def _has_repeats(keys: array) -> bool:
  ordered = np.sort(np.frombuffer(keys, np.uint64))
  return bool((ordered[1:] == ordered[:-1]).any())


def _joined(path: Path, keys: array, name: str, paths: Sequence[str], skipped: Counter[str]) -> Iterator[rows.Row]:
  """Rows of an index; those of the same image and label are joined at the place of the first.

  A row is skipped, and counted in `skipped`, if the captions of its image would then be longer than `LONGEST`.
  """
  apart = rows.Rows(memoryview(np.memmap(path, np.uint8, "r")))
  order = np.argsort(np.frombuffer(keys, np.uint64), kind="stable")
  ordered = np.frombuffer(keys, np.uint64)[order]
  starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
  ends = np.append(starts[1:], len(order))
  with progress.Bar(f"joining captions of {name}", len(order), "samples") as bar:
    for group in np.argsort(order[starts], kind="stable"):
      found: dict[Any, list[Any]] = {}  # more than one only if different images have the same key
      lengths = Counter[Any]()  # characters of their captions
      for position in order[starts[group] : ends[group]].tolist():
        row = apart[position]
        image = (row[2], row[3], row[5])
        length = sum(map(len, row[4]))
        if image in found and lengths[image] + length > LONGEST:
          error = f"{paths[row[0]]}:{row[1]}: the captions of its image have more than {LONGEST:,} characters"
          _count(BadSample("damaged record", error), skipped)
        else:
          lengths[image] += length
          known = found.setdefault(image, row)
          if known is not row:
            known[4] += row[4]
        bar.update()
      yield from map(tuple, found.values())


def _count(error: BadSample, skipped: Counter[str]) -> None:
  skipped[error.kind] += 1
  if skipped.total() <= _LOGGED:
    logging.warning("skipped: %s", error)


def _usable(entries: Iterable[Entry | BadSample], skipped: Counter[str], first_bad: list[BadSample]) -> Iterator[Entry]:
  """Yields the entries that can be stored; counts the others, logs some and keeps the first of them."""
  for entry in entries:
    error = entry if isinstance(entry, BadSample) else _defect(entry)
    if error is None:
      yield entry
      continue
    _count(error, skipped)
    first_bad.extend([error] if not first_bad else [])


def _defect(entry: Entry) -> BadSample | None:
  try:
    (entry.path or "").encode("utf-8", "surrogateescape")
  except UnicodeEncodeError as error:  # a lone surrogate, which JSON can express
    return BadSample("damaged record", f"record {entry.record}: bad path {entry.path!r}: {error}")
  if any("\0" in text for text in (entry.path or "", *entry.captions)):
    return BadSample("damaged record", f"record {entry.record}: a NUL byte in {entry.path!r} or its captions")
  if sum(map(len, entry.captions)) > LONGEST:
    return BadSample("damaged record", f"record {entry.record}: captions of more than {LONGEST:,} characters")
  return None


def _encoded(entry: Entry) -> tuple[int, int, bytes | None, bytes | None, list[str]]:
  path = None if entry.path is None else entry.path.encode("utf-8", "surrogateescape")
  captions = [text.encode("utf-8", "replace").decode() for text in entry.captions]
  return entry.file, entry.record, path, entry.image, captions


def _group(group: int | str | None, numbers: dict[int | str, int]) -> int:
  """The number of a group, in order of appearance, -1 for none."""
  if group is None or (isinstance(group, int) and group < 0):
    return -1
  return numbers.setdefault(group, len(numbers))


def _number(entry: Entry, numbers: dict[int | str, int], names: dict[int | str, str]) -> int:
  """The number of an entry's label, in order of appearance, -1 for no label."""
  label = entry.label
  if label is None or (isinstance(label, int) and label < 0):
    return -1
  if entry.label_name and label not in names:
    names[label] = entry.label_name
  return numbers.setdefault(label, len(numbers))


def number_classes(
  numbers: dict[int | str, int], names: dict[int | str, str], known: Sequence[str]
) -> tuple[list[int], list[str]]:
  """Labels in order of appearance, and class names; numbers remain as they are, names are numbered alphabetically.

  Args:
    numbers: the labels by order of appearance.
    names: the names of numbered labels, as far as records have them.
    known: the names of all classes, if the list has them in one place.

  Raises:
    ValueError: a number is too large to be that of a class with a name.
  """
  if all(isinstance(label, int) or label.isdecimal() for label in numbers):
    labels = [int(label) for label in numbers]
    if known and not names:
      return labels, list(known)
    if names and max(labels) >= MAX_CLASSES:
      raise ValueError(f"label {max(labels)} has a name, but classes are numbered from 0 to at most {MAX_CLASSES - 1}")
    named = {int(label): name for label, name in names.items()}
    return labels, [named.get(label, "") for label in range(max(labels) + 1)] if named else []
  classnames = sorted(set(map(str, numbers)))
  order = {name: label for label, name in enumerate(classnames)}
  return [order[str(label)] for label in numbers], classnames
