"""Which source reads the data at a path: the spec of a path, pattern, folder or URL."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import fnmatch
import glob
import itertools
import json
import os
import re

from declip_jax.data.sources import SOURCES, lists
from declip_jax.data.sources.folder import has_captions
from declip_jax.data.sources.table import read_table
from declip_jax.data.storage import files, layouts, patterns, remote
from declip_jax.reporting.progress import message
from declip_jax.spelling import did_you_mean

_TABLES = (".csv", ".tsv", ".psv", ".jsonl", ".ndjson", ".parquet", ".pq")
_TABLES += tuple(f"{suffix}.gz" for suffix in (*_TABLES, ".json"))
_ARCHIVES = (".zip", ".7z", ".rar", ".bz2", ".xz", ".zst")  # the source says that a table has to be unpacked
_TEXTS = (".txt", ".json")  # tables if their contents are those of a table
_OTHER_IMAGES = (".heic", ".heif", ".jxl", ".svg", ".psd", ".tga", ".dng", ".cr2", ".nef", ".arw")
_MOST_TEXTS = 10  # files with such suffixes in a folder; more are captions
_SHARDS = {
  "arrayrecord": (".array_record",),
  "tfrecord": (".tfrecord", ".tfrecords", ".tfrec"),
  "webdataset": (".tar",),
}  # suffixes, after which there may be a number, see `_NUMBERED`
_OF_TFDS = ("arrayrecord", "tfrecord")  # where its description is next to them
_COLUMNS = {*lists.IMAGE_NAMES, *lists.CAPTION_NAMES, *lists.LABEL_NAMES}
_PEEKED = 100  # records of a table
_PROBED = 10  # images of a table to search for
_WALKED, _WALKED_REMOTE = 1000, 20  # folders to search
_OPTIONS = re.compile(r"(.*?)(?:\?([a-z_]+=.*))?", re.DOTALL)  # as in `lists.parse`
_TESTED = ("test", "validation", "", "train")  # splits, the best to evaluate on first
_OF_SOURCES = ("heldout", "kept", "border")  # kinds of source that are part of another one
_PATTERN = re.compile(r"[*?{\[].*")  # from where on the name of a file is a pattern
_COCO = re.compile(r"captions_(.+)\.json")  # "captions_train2017.json" has the captions of the images in "train2017"
_NUMBERED = re.compile(r"-\d{5}-of-\d{5}$")  # end of the names of TFDS's files


def guess(path: str) -> str:
  """Returns the spec of the data set at a path or URL, the first of `guesses`."""
  return guesses(path)[0]


def guess_test(path: str) -> str:
  """Returns the spec of the data at a path or URL to evaluate on: of several splits test, or else validation."""
  found = guesses(path)
  parts = [re.split("[/:?&=]", spec) for spec in found]
  common = set(parts[0]).intersection(*parts[1:])

  def rank(own: Sequence[str]) -> int:
    splits = [layouts.split_of(part) for part in own if part not in common]
    return _TESTED.index(next(filter(None, reversed(splits)), ""))

  return found[min(range(len(found)), key=lambda number: rank(parts[number]))]


def read_as(path: str, flag: str, guess: Callable[[str], str] = guess) -> str:
  """The spec of the data that an argument of a command names; printed if it is another text than the argument.

  Args:
    path: what the user has typed.
    flag: the argument, for the message.
    guess: `guess` or `guess_test`.

  Raises:
    FileNotFoundError, ValueError: see `guesses`; the message names the argument.
  """
  try:
    spec = guess(path)
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{flag}: {error}") from None
  except ValueError as error:
    raise ValueError(f"{flag}: {error}") from None
  if spec != path:
    message(f"{flag} {path} is read as {spec}")
  return spec


def short_name(spec: str) -> str:
  """A name for the data of a spec: that of the file or folder, or of the folder and its split, such as "pets/test".

  A spec without a path is its own name.
  """
  kind, _, location = spec.partition(":")
  if kind in _OF_SOURCES:
    return f"{kind}/{short_name(location.partition(':')[2])}"
  folders = _OPTIONS.fullmatch(location)[1].partition("::")[0].split("/")
  names = [_PATTERN.sub("", name).strip("-_.") for name in folders[-3:]]
  names = [name.partition(".")[0] for name in names if name.partition(".")[0]]
  if kind == "scenes" or len(folders) == 1 or not names:
    return spec
  return "/".join(names[-2:] if layouts.is_split(names[-1]) else names[-1:])


def guesses(path: str) -> list[str]:
  """Returns the specs of the data at a path or URL, one per split with training first; a spec is returned unchanged.

  | found | source |
  |---|---|
  | .tar | webdataset |
  | a folder of tars with an nshards.txt | clip_benchmark |
  | .array_record .tfrecord .tfrecords .tfrec | arrayrecord, tfrecord; tfds if a dataset_info.json is next to it |
  | .csv .tsv .psv .jsonl .ndjson .parquet .pq, also .gz | table |
  | a .txt whose first line names columns; a .json that is a list | table |
  | another .json | coco |
  | a folder prepared by TFDS, or saved by Hugging Face's datasets | tfds, huggingface |
  | a folder of ArrayRecord or TFRecord files, tars or tables | the first of these kinds that exists, as a pattern |
  | a folder with captions_*.json, or with "annotations" that has them | coco |
  | a folder with folders of splits, such as train and test | what is in those folders |
  | a folder with images, at any depth | folder |
  | a folder with tars or tables at any depth | as a pattern, or one per split |
  | a repository in the cache of the Hugging Face hub | what is in its snapshot of the branch main |

  Tables whose images are elsewhere get a `root`. They come after a folder of images with captions if their images are
  not found. What follows a ?, as in "pairs.csv?root=/images", becomes part of each spec.

  Raises:
    FileNotFoundError: nothing exists at the path, and its suffix does not determine the kind.
    ValueError: no data set was recognised; the message lists what was found.
  """
  kind, _, location = path.partition(":")
  if kind in SOURCES and location and not location.startswith("//"):
    return [path]
  place, query = _OPTIONS.fullmatch(path).groups()
  is_web = remote.scheme(path) in ("http", "https")  # whose addresses have queries of their own
  if query and not is_web and not (not remote.is_url(path) and os.path.exists(files.local_path(path))):
    return [_with_options(spec, query) for spec in guesses(place)]
  local = path.removeprefix("file://")
  if not remote.is_url(path) and os.path.isdir(os.path.expanduser(local)):
    return _in_folder(local.rstrip("/") or "/")
  try:
    found = patterns.expand(path)
  except FileNotFoundError:
    if remote.is_url(path) and (patterns.names(path) or patterns.folders(path)):
      return _in_folder(path.rstrip("/"))
    if re.match(r"\w+:(?!//)", path):
      legal = f"expected one of {', '.join(SOURCES)}{did_you_mean(kind, SOURCES)}"
      raise ValueError(f"{path}: {kind!r} is not a kind of source; {legal}") from None
    if (kind := _kind_of_suffix(path)) in (None, "image"):
      raise
    return [f"{kind}:{path}"]  # it may exist on another machine; `open_source` reports a missing file
  kinds = {_kind(file) for file in found}
  if len(kinds) > 1 or kinds <= {None, "image"}:
    raise ValueError(f"{path}: {_unknown(found)}")
  (kind,) = kinds
  if kind == "tfds":
    return _in_folder(os.path.dirname(found[0]))
  return [f"{kind}:{path}{_query(_root(found[0])) if kind == 'table' else ''}"]


def _with_options(spec: str, query: str) -> str:
  """A spec with these options, which replace those of the same names."""
  place, own = _OPTIONS.fullmatch(spec).groups()
  given = {option.partition("=")[0] for option in query.split("&")}
  rest = [option for option in (own or "").split("&") if option and option.partition("=")[0] not in given]
  return f"{place}?{'&'.join([query, *rest])}"


def _kind(path: str) -> str | None:
  """The kind of source that reads a file, "image" for an image, None if unknown."""
  name = remote.without_query(path).lower()
  kind = _kind_of_suffix(name)
  if kind in _OF_TFDS and files.exists(files.beside(path, "dataset_info.json")):
    return "tfds"
  if name.endswith(".json"):
    return "table" if files.read(path, 0, 64).lstrip().startswith(b"[") else "coco"
  if name.endswith(".txt"):
    return "table" if _images(path) else None
  return kind


def _kind_of_suffix(path: str) -> str | None:
  name = remote.without_query(path).lower()
  packed = tuple(f"{suffix}{archive}" for suffix in _TABLES for archive in _ARCHIVES)
  kinds = {**_SHARDS, "table": (*_TABLES, *packed), "image": files.IMAGE_SUFFIXES}
  return next((kind for kind, suffixes in kinds.items() if _NUMBERED.sub("", name).endswith(suffixes)), None)


def _in_folder(folder: str) -> list[str]:
  """The specs of the data in a folder."""
  place = os.path.expanduser(folder)
  names = _visible(folder)
  if "state.json" in names:
    return [f"huggingface:{folder}"]
  if not names and (snapshot := _snapshot(folder)):
    return _in_folder(snapshot)
  for name, kind in (("dataset_dict.json", "huggingface"), ("dataset_info.json", "tfds")):
    if name in names:
      return [f"{kind}:{folder}:{split}" for split in _splits(f"{place}/{name}")]
  if layouts.NSHARDS in names:
    return [f"clip_benchmark:{layouts.clip_benchmark(f'{lists.absolute(folder)}/{layouts.NSHARDS}')}"]
  for kind, suffixes in _SHARDS.items():
    if alike := [name for name in names if _NUMBERED.sub("", name.lower()).endswith(suffixes)]:
      return [f"{kind}:{_location(folder, group, names)}" for group in _groups(alike)]
  specs, found = _of_tables(folder, names)
  if found:
    return specs
  return (
    _coco(folder, names) or _in_splits(folder, names) or _below(folder, names, specs) or _annotations(folder, names)
  )


def _of_tables(folder: str, names: list[str]) -> tuple[list[str], bool]:
  """The specs of the tables in a folder, and whether the images of the first are found."""
  place = os.path.expanduser(folder)
  tables = _groups(_tables(place, names))
  roots = [_root(f"{place}/{group[0]}") for group in tables]
  specs = [f"table:{_location(folder, group, names)}" for group in tables]
  specs = [spec + _query(root) for spec, root in zip(specs, roots, strict=True)]
  return specs, bool(roots) and roots[0] is not None


def _coco(folder: str, names: list[str]) -> list[str]:
  """The specs of COCO's captions in a folder or its "annotations", of the splits whose images are there."""
  folders = patterns.folders(folder)
  places = [(folder, names)]
  if "annotations" in folders:
    places.append((f"{folder}/annotations", _visible(f"{folder}/annotations")))
  images = {*folders, *(patterns.folders(f"{folder}/images") if "images" in folders else ())}
  found = [(place, name) for place, inside in places for name in inside if _COCO.fullmatch(name)]
  here = [(place, name) for place, name in found if _COCO.fullmatch(name)[1] in images]  # others may be elsewhere
  found = sorted(here or found, key=lambda path: (_order(layouts.split_of(path[1])), path))
  return [f"coco:{place}/{name}" for place, name in found]


def _tables(folder: str, names: list[str]) -> list[str]:
  """The names of the tables in a folder with the most frequent suffix; else of files whose contents are tables."""
  suffixes = Counter(suffix for suffix in _TABLES for name in names if name.lower().endswith(suffix))
  if suffixes:
    return [name for name in names if name.lower().endswith(suffixes.most_common(1)[0][0])]
  texts = [name for name in names if name.lower().endswith(_TEXTS)]
  tables = [name for name in texts if len(texts) <= _MOST_TEXTS and _kind(f"{folder}/{name}") == "table"]
  return [name for name in tables if _images(f"{folder}/{name}") is not None and _root(f"{folder}/{name}") is not None]


def _groups(names: Sequence[str]) -> list[list[str]]:
  """Names by split, those of training first, then those without a split."""
  groups: dict[str, list[str]] = {}
  for name in names:
    groups.setdefault(layouts.split_of(name), []).append(name)
  return [groups[split] for split in sorted(groups, key=_order)]


def _order(split: str) -> tuple[bool, str]:
  return split != "train", split


def _location(folder: str, group: list[str], names: list[str]) -> str:
  """A pattern that matches a group of files and no other of `names`, or their paths if there is none."""
  start = re.match(r"[\w-]*[a-zA-Z](?![a-zA-Z])|", os.path.commonprefix(group))
  for prefix in ("", start[0] if start else ""):
    ends = [f"{prefix}*{suffix}" for suffix in _spellings(group)]
    matched = [name for name in names if any(fnmatch.fnmatchcase(name, end) for end in ends)]
    if matched == group and not group[0].lower().endswith(_TEXTS):
      return "::".join(f"{folder}/{end}" for end in ends)
  return "::".join(f"{folder}/{name}" for name in group)


def _spellings(names: Iterable[str]) -> list[str]:
  """The suffixes of data in names, in their spelling there, with -* for numbers after them."""
  known, found = (*itertools.chain(*_SHARDS.values()), *_TABLES, *_TEXTS), set()
  for name in names:
    plain = _NUMBERED.sub("", name)
    after = "-*" if plain != name else ""
    found |= {plain[-len(suffix) :] + after for suffix in known if plain.lower().endswith(suffix)}
  return sorted(found)


def _images(path: str) -> list[str] | None:
  """Paths of images in a table, none if it contains the images; None if it is not a table of images."""
  try:
    with read_table(path, _COLUMNS) as table:
      (image,) = lists.choose("image", None, table.columns, lists.IMAGE_NAMES, path) or [None]
      captions = lists.choose("caption", None, table.columns, lists.CAPTION_NAMES, path, several=True)
      if image is None or not (captions or lists.choose("label", None, table.columns, lists.LABEL_NAMES, path)):
        return None
      records = [fields for _, fields in itertools.islice(table.read([image]), _PEEKED) if not isinstance(fields, str)]
  except (ValueError, OSError):
    return None
  return [value.strip() for value in (fields.get(image) for fields in records) if isinstance(value, str)]


def _root(table: str) -> str | None:
  """The folder that the paths in a table are relative to, empty for that of the table; None if it is not found."""
  if remote.is_url(table):
    return ""
  images = _images(table)
  if not images or any("://" in image for image in images):
    return None if images is None else ""
  folder = os.path.dirname(table)
  below = (path for path, _ in _walk(folder or "."))
  for root in (folder, *itertools.islice(below, 1, None), os.path.dirname(os.path.abspath(folder))):
    if any(os.path.isfile(os.path.join(root, image)) for image in images[:_PROBED]):
      return "" if root == folder else root
  return None


def _query(root: str | None) -> str:
  return f"?root={root}" if root else ""


def _in_splits(folder: str, names: list[str]) -> list[str]:
  """The specs of the data in folders of splits, such as train and test; none if other folders have images."""
  folders = patterns.folders(folder)
  splits = [name for name in folders if layouts.is_split(name)]
  others = [f"{folder}/{name}" for name in folders if name not in splits]
  if not splits or _has_images(names):
    return []
  if len(splits) == 1 and any(_has_images(found) for other in others for _, found in _walk(other)):
    return []
  specs = []
  for name in sorted(splits, key=lambda name: _order(layouts.split_of(name))):
    with contextlib.suppress(ValueError):
      specs.append(_in_folder(f"{folder}/{name}")[0])
  return specs


def _below(folder: str, names: list[str], tables: list[str]) -> list[str]:
  """The spec of images at any depth, else of tables or shards at any depth.

  Without captions next to the images, tables come first: those in the folder, unless they name no images and there are
  folders of classes, or those below it that name images.
  """
  if tables and _images(f"{os.path.expanduser(folder)}/{_tables(folder, names)[0]}") is None and _has_classes(folder):
    tables = []
  places: dict[str, list[tuple[str, list[str]]]] = {}
  above: list[str] = []
  for path, names in _walk(folder):
    if path != folder and not above and not remote.is_url(folder):
      specs, found = _of_tables(path, names)
      above = specs if found and not _has_classes(folder) else []
    if _has_images(names):
      return [f"folder:{folder}"] if has_captions(names) else tables or above or [f"folder:{folder}"]
    for kind, suffixes in (*_SHARDS.items(), ("table", _TABLES)):
      if alike := [name for name in names if _NUMBERED.sub("", name.lower()).endswith(suffixes)]:
        places.setdefault(kind, []).append((path, alike))
  if tables or not places:
    return tables
  kind = min(places, key=[*_SHARDS, "table"].index)
  if len(places[kind]) == 1:
    return _in_folder(places[kind][0][0])
  by_split: dict[str, list[str]] = {}
  for path, alike in places[kind]:
    within = [layouts.split_of(name) for name in path.removeprefix(folder).split("/")]
    for group in _groups(alike):
      split = layouts.split_of(group[0]) or next(filter(None, within), "")
      by_split.setdefault(split, []).append(_location(path, group, alike))
  if by_split.keys() - {""}:
    return [f"{kind}:" + "::".join(by_split[split]) for split in sorted(by_split, key=_order)]
  levels = {path.count("/") - folder.count("/") for path, _ in places[kind]}
  stars = "/".join("*" * levels.pop()) if len(levels) == 1 else "**"
  is_literal = not glob.has_magic(folder) and "{" not in folder
  folders = [f"{folder}/{stars}"] if is_literal else [path for path, _ in places[kind]]
  suffixes = _spellings(name for _, names in places[kind] for name in names)
  return [f"{kind}:" + "::".join(f"{place}/*{suffix}" for place in folders for suffix in suffixes)]


def _snapshot(folder: str) -> str | None:
  """The snapshot of the branch main in a folder of the hub's cache, or the only one; None if it is another folder.

  Raises:
    ValueError: there are several snapshots, and none of them is that of main.
  """
  if not {"refs", "snapshots"} <= {*patterns.folders(folder)}:
    return None
  found = patterns.folders(f"{folder}/snapshots")
  with contextlib.suppress(OSError):
    commit = files.read(f"{folder}/refs/main", limit=100).decode(errors="replace").strip()
    found = [commit] if commit in found else found
  if len(found) != 1:
    raise ValueError(f"{folder}: {len(found)} snapshots, none of the branch main; choose one: {', '.join(found)}")
  return f"{folder}/snapshots/{found[0]}"


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
  """Yields a folder and those below it that are not hidden, and the names of their files, up to a number of folders."""
  pending = [folder]
  for _ in range(_WALKED_REMOTE if remote.is_url(folder) else _WALKED):
    if not pending:
      return
    path = pending.pop()
    yield path, _visible(path)
    pending += [f"{path}/{name}" for name in reversed(patterns.folders(path))]


def _visible(folder: str) -> list[str]:
  return [name for name in patterns.names(folder) if not name.startswith(".")]


def _has_classes(folder: str) -> bool:
  """Whether at least two folders have images directly in them."""
  classes = (name for name in patterns.folders(folder) if _has_images(_visible(f"{folder}/{name}")))
  return len([*itertools.islice(classes, 2)]) == 2


def _has_images(names: Iterable[str]) -> bool:
  return any(name.lower().endswith(files.IMAGE_SUFFIXES) for name in names)


def _annotations(folder: str, names: list[str]) -> list[str]:
  """The specs of the only .json in a folder.

  Raises:
    ValueError: there is not exactly one, so the folder is not recognised.
  """
  annotations = [name for name in names if name.lower().endswith(".json")]
  if len(annotations) == 1:
    return guesses(f"{folder}/{annotations[0]}")
  raise ValueError(f"{folder}: {_unknown([*names, *(f'{name}/' for name in patterns.folders(folder))])}")


def _splits(path: str) -> list[str]:
  """The splits in a file in which TFDS or Hugging Face lists them, "train" first.

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
  return sorted(names, key=lambda name: name != "train")


def _unknown(names: Iterable[str]) -> str:
  names = list(names)
  counts = files.suffixes(name for name in names if not name.endswith("/"))
  found = files.in_words(counts + Counter(folders=len(names) - counts.total())) or "nothing"
  if others := {suffix for suffix in counts if suffix.lower() in _OTHER_IMAGES}:
    return f"found {found}; {', '.join(sorted(others))} is not read: convert these images, such as to .jpg"
  return f"not recognised as a data set, found {found}; give KIND:LOCATION, where KIND is one of {', '.join(SOURCES)}"
