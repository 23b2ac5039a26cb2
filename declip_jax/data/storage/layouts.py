"""Conventions of data sets on disk: names of splits, classnames.txt next to the data or above its split, and others."""

import ast
from collections import Counter
from collections.abc import Sequence
import re

from declip_jax.data.storage import files, texts

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"  # as CLIP_benchmark calls it
NSHARDS = "nshards.txt"
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
_KEYED = re.compile(r"(.+?)(?<!\s)(?:\s*[:=,\t]\s*|(?<=\d)\s+)(.+)")  # "FOLDER: NAME", or "n01440764 NAME"
_NUMBERED = re.compile(r"(\d{1,9})(?:\s*[:=,\t]\s*|[.)]?\s+)(.+)")  # "0: NAME", "1. NAME"
_LONGEST = 2**22  # characters of a dictionary of names
_REMEDY = "give each folder one line, such as FOLDER: NAME, or delete the file"
_AROUND = {
  "set",
  "split",
  "data",
  "images",
  "img",
}  # words next to that of a split in the name of a folder, as in "training_set"


def split_of(name: str) -> str:
  """The split that a file or folder is part of, by a word of its name: train, validation or test; else empty."""
  return next((_SPLITS[word] for word in _words(name) if word in _SPLITS), "")


def is_split(folder: str) -> bool:
  """Whether a folder is named like a split, such as "train", "val2017" or "test_set"."""
  words = set(_words(folder))
  return not words.isdisjoint(_SPLITS) and words <= {*_SPLITS, *_AROUND}


def find(path: str, name: str) -> str | None:
  """The path of the file NAME next to the file at `path`, or, if they are in the folder of a split, above it."""
  folder = path.rpartition("/")[0]
  above, _, last = folder.rpartition("/")
  places = [f"{folder}/{name}"] + ([f"{above}/{name}"] if is_split(last) else [])
  return next(filter(files.exists, places), None)


def captions_by_line(path: str) -> bool:
  """Whether each line of a text is a caption, as in CLIP_benchmark's shards for retrieval, with the file at `path`."""
  if (kind := find(path, "dataset_type.txt")) is None:
    return files.exists(files.beside(path, NSHARDS))
  return texts.decode(files.read(kind), kind).strip() == "retrieval"


def clip_benchmark(path: str) -> str:
  """The location ROOT?split=SPLIT of the file at `path` if it is a shard of CLIP_benchmark's layout, else empty."""
  folder = path.rpartition("/")[0]
  root, _, split = folder.rpartition("/")
  return f"{root}?split={split}" if files.exists(f"{folder}/{NSHARDS}") else ""


def classnames(path: str) -> tuple[str, ...]:
  """The names of classes in classnames.txt, see `names_in`; empty without that file.

  Args:
    path: a file of the data; classnames.txt is next to it, or above the folder of its split.
  """
  return () if (place := find(path, CLASSNAMES)) is None else names_in(place)


def templates(path: str) -> tuple[str, ...]:
  """Prompt templates, with `{}` for the name of a class: the lines of `TEMPLATES`; empty without that file.

  Args:
    path: a file of the data; the file is next to it, or above the folder of its split.
  """
  return () if (place := find(path, TEMPLATES)) is None else templates_in(place)


def templates_in(place: str) -> tuple[str, ...]:
  """The templates in a file, in which `{c}` means `{}`; empty if the file does not exist."""
  return tuple(text.replace("{c}", "{}") for text in lines_in(place) if text)


def names_in(place: str) -> tuple[str, ...]:
  """The class names in a file, with the quotes around whole names removed; empty if the file does not exist.

  | lines | name of class i |
  |---|---|
  | each with its number, 0 to n-1 or 1 to n, such as "0: tench", "1 tench" | that of the i-th number |
  | one dictionary with such numbers, {0: "tench", ...}, as JSON or Python write it | the same |
  | others | line i, blank or not, but for blank lines at the end |
  """
  lines = lines_in(place)
  return tuple(map(_unquoted, _numbered(lines).values() or lines))


def first_label(path: str, labels: Sequence[int]) -> int:
  """The label of the first name in classnames.txt: 1 if both its lines and the labels are numbered from 1, else 0.

  Args:
    path: a file of the data, see `classnames`.
    labels: the distinct labels of the data.

  Raises:
    ValueError: its lines have the numbers 1 to n, but neither 0 nor n is a label, so that either could be meant.
  """
  if min(labels, default=0) == 0 or (place := find(path, CLASSNAMES)) is None:
    return 0
  numbers = _numbered(lines_in(place))
  if min(numbers, default=0) == 0:
    return 0
  if max(numbers) not in labels:
    meant = f"its lines are numbered 1 to {max(numbers)}, but the labels are {min(labels)} to {max(labels)}"
    raise ValueError(f"{place}: {meant}, and could be numbered from 0 or 1; number its lines from 0, like labels")
  return 1


def lines_in(place: str) -> tuple[str, ...]:
  """The stripped lines of a file, without trailing blank lines; empty if the file does not exist."""
  if not files.exists(place):
    return ()
  found = texts.lines(texts.decode(files.read(place), place))
  while found and not found[-1]:
    found.pop()
  return tuple(found)


def classnames_of_folders(path: str, folders: Sequence[str]) -> tuple[str, ...]:
  """The names that classnames.txt gives to folders that are classes; their own names without that file.

  | lines | name of a folder |
  |---|---|
  | the names of the folders, in any order and case | its line |
  | "FOLDER NAME" for each folder | the NAME in its line |
  | others, and folders with the numbers 0 to n-1 or 1 to n | the name of its number, see `names_in` |
  | others | its name in alphabetical order of the folders |

  Args:
    path: a path in the folder of the folders.
    folders: their names, in alphabetical order.

  Raises:
    ValueError: there is not one name for each folder, or which one it is remains unclear.
  """
  if (place := find(path, CLASSNAMES)) is None:
    return tuple(folders)
  lines = lines_in(place)
  if len(lines) == len(folders) and (found := _by_name(folders, lines)):
    return tuple(map(_unquoted, found))
  names = names_in(place)
  if len(names) != len(folders):
    has = "1 line" if len(names) == 1 else f"{len(names)} lines"
    there = "is 1 folder" if len(folders) == 1 else f"are {len(folders)} folders"
    raise ValueError(f"{place} has {has}, but there {there} of classes; {_REMEDY}")
  if blank := [number for number, name in enumerate(names, 1) if not name]:
    raise ValueError(f"{place}: line {blank[0]} is blank, but each folder needs a name; {_REMEDY}")
  return _by_name(folders, names) or _by_number(folders, names, place) or _by_order(folders, names, place)


def remarks_on(names: Sequence[str]) -> list[str]:
  """Returns a remark on names that several classes have."""
  equal = [f"{name!r}" for name, count in Counter(names).items() if name and count > 1]
  few = ", ".join(equal[:5]) + (f" and {len(equal) - 5} more" if len(equal) > 5 else "")
  return [f"several classes are named {few}: zero-shot classification cannot distinguish them"] if equal else []


def _numbered(lines: Sequence[str]) -> dict[int, str]:
  """The names in the lines of a file by their numbers, 0 to n-1 or 1 to n in this order; none if it has no numbers."""
  return _of_dictionary(lines) or _of_numbered(lines)


def _of_numbered(lines: Sequence[str]) -> dict[int, str]:
  """The names in lines that have the numbers 0 to n-1 or 1 to n, in their order; none if some are others or equal."""
  found = [match.groups() for match in map(_NUMBERED.fullmatch, filter(None, lines)) if match]
  names = {int(number): name for number, name in found}
  first = min(names, default=0)
  if not 1 < len(lines) - lines.count("") == len(names) == len(set(names.values())) or first not in (0, 1):
    return {}
  return dict(sorted(names.items())) if max(names) - first == len(names) - 1 else {}


def _of_dictionary(lines: Sequence[str]) -> dict[int, str]:
  """The names in a text that is a dictionary from numbers to names; none for others."""
  text = "\n".join(lines)
  if not (text.startswith("{") and text.endswith("}")) or len(text) > _LONGEST:
    return {}
  try:
    numbered = ast.literal_eval(text)
    return _of_numbered([f"{int(number)}: {name}" for number, name in numbered.items() if isinstance(name, str)])
  except (ArithmeticError, AttributeError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
    return {}


def _unquoted(name: str) -> str:
  inner = name[1:-1].replace('""', "")
  return name[1:-1].replace('""', '"') if name[:1] == name[-1:] == '"' and inner and '"' not in inner else name


def _by_name(folders: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
  """The names in lines that contain the name of their folder, alone or before another name; else none."""
  found = {_plain(name): name for name in names}
  if len(found) == len(folders) and found.keys() == set(map(_plain, folders)):
    return tuple(found[_plain(folder)] for folder in folders)
  keyed = dict(match.groups() for match in map(_KEYED.fullmatch, names) if match)
  return tuple(keyed[folder] for folder in folders) if keyed.keys() == set(folders) else ()


def _by_number(folders: Sequence[str], names: Sequence[str], place: str) -> tuple[str, ...]:
  numbers = _numbers(folders)
  first = min(numbers, default=0)
  if numbers and first in (0, 1) and sorted(numbers) == [*range(first, first + len(folders))]:
    return tuple(names[number - first] for number in numbers)
  if numbers != sorted(numbers):
    orders = f"in the order of their numbers ({folders[numbers.index(first)]} first) or of the alphabet"
    raise ValueError(f"{place}: its lines could name the folders {orders} ({folders[0]} first); {_REMEDY}")
  return ()


def _by_order(folders: Sequence[str], names: Sequence[str], place: str) -> tuple[str, ...]:
  owners = {_plain(folder): folder for folder in folders}
  for number, (name, folder) in enumerate(zip(names, folders, strict=True), 1):
    if owners.get(_plain(name), folder) != folder:
      raise ValueError(f"{place}: line {number}, {name!r}, would name the folder {folder!r}; {_REMEDY}")
  return tuple(names)


def _numbers(folders: Sequence[str]) -> list[int]:
  """The numbers at the start of all names, or at their end after the same text; else none."""
  for pattern in (r"()(\d+).*", r"(.*(?<!\d)|)(\d+)"):
    found = [match.groups() for match in map(re.compile(pattern).fullmatch, folders) if match]
    if len(found) == len(folders) > 1 and len({text for text, _ in found}) == 1:
      return [int(number) for _, number in found]
  return []


def _plain(name: str) -> str:
  return " ".join(re.split(r"[\s_-]+", name.casefold()))


def _words(name: str) -> list[str]:
  return re.findall(r"[a-z]+", name.lower())
