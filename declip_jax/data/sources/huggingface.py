"""Data sets of Hugging Face's `datasets`: memory-mapped from a folder, or an object in a notebook.

When a remote folder (gs://, s3://) is opened, the files of the split are copied once for all processes of the machine,
see `copies.folder`, so they must fit on the disk. (`datasets` itself makes one copy per process, and maps whole tables,
so files cannot be copied one by one when they are needed.)
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
import json
import os
import re
from typing import Any, NamedTuple

from absl import logging
import numpy as np

from declip_jax.data.sources import lists, values
from declip_jax.data.sources.base import BadSample, Example, Marks, Named, bad_sample
from declip_jax.data.storage import copies, files, indexes, remote
from declip_jax.data.storage.reach import NotAllowedError, Reach
from declip_jax.extras import datasets

_THREADS = 8  # for copying remote files
_PROBED = 20  # images to read at random until one of them exists
_ROLES = ("image", "caption", "label", "labels", "group", *lists.REACH)
_LOCATION = re.compile(r"(.+?)(?::([\w.-]+))?")


class _Columns(NamedTuple):
  """The columns in use; `labels` is one that lists classes, or one per class."""

  image: str
  captions: tuple[str, ...]
  label: str | None
  labels: tuple[str, ...] = ()
  groups: tuple[str, ...] = ()


class HuggingFace(Named):
  """A data set as a `Source`; make it with `open_huggingface` or `from_huggingface`.

  Args:
    name: the name for messages.
    dataset: a `datasets.Dataset` of the columns in use.
    columns: these columns.
    reach: where the paths of images may lead.
    location: the location that opened the data set, for pickles; None if there is none.
  """

  def __init__(self, name: str, dataset: Any, columns: _Columns, reach: Reach, location: str | None):
    super().__init__(name)
    self._dataset, self._columns, self._reach, self._location = dataset, columns, reach, location

  @cached_property
  def _labels(self) -> tuple[dict[str, int], tuple[str, ...]]:
    """The numbers of labels that are texts, and the names of the classes."""
    column = self._columns.label
    if column is None or not _is_text(self._dataset.features[column]):
      return {}, tuple(getattr(self._dataset.features.get(column), "names", None) or ())
    return _numbered(self._dataset.unique(column), column, self.name)

  @property
  def classnames(self) -> tuple[str, ...]:
    """The names of the label's classes, if it is a ClassLabel or a text; those of several labels."""
    several = self._columns.labels
    names = _listed_names(self._dataset.features[several[0]]) if len(several) == 1 else ()
    return names or several or self._labels[1]

  @cached_property
  def _groups(self) -> dict[str, dict[str, int]]:
    """The numbers of groups that are texts, by column."""
    texts = [column for column in self._columns.groups if _is_text(self._dataset.features[column])]
    return {column: _numbered(self._dataset.unique(column), column, self.name)[0] for column in texts}

  @cached_property
  def stamp(self) -> str:
    """Changes with the data: the fingerprint of `datasets`, stored with the files.

    If images are paths, it also changes with the files of up to `lists.STAMPED` images, see `lists.size_and_time`.
    """
    found, column = [], self._columns.image
    for number, index in enumerate(lists.probes(len(self), lists.STAMPED)):
      value = self._dataset[index][column]
      path = None if isinstance(value, dict) and value.get("bytes") is not None else _path(value)
      found.append(path and lists.size_and_time(self._reach, path, "/"))
      if number == _PROBED and not any(found):  # the data set has the images themselves: reading many takes time
        break
    return f"{self._dataset._fingerprint}-{indexes.digest(found)}" if any(found) else self._dataset._fingerprint

  def __len__(self) -> int:
    return len(self._dataset)

  def __getitem__(self, index: int) -> Example:
    """Reads one example.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      BadSample: its image is missing or cannot be read, or it has neither caption nor label.
    """
    self._check(index, "example")
    record, columns = self._dataset[int(index)], self._columns
    place = f"{self.name}, example {index}"
    try:
      captions = tuple(text for column in columns.captions for text in values.captions_of(record[column]))
      label = values.label_of(record[columns.label], columns.label) if columns.label else None
      marks = self._marks(record)
    except BadSample as error:
      raise BadSample(error.kind, f"{place}: {error}") from error
    if columns.captions and not captions and label is None and not columns.labels:
      raise BadSample("no caption", f"{place}: no caption in {', '.join(columns.captions)}")
    number = -1 if label is None else self._labels[0].get(str(label), label)
    image = _image(record[columns.image], self._reach, place)
    return {**Example(image=image, captions=captions, label=int(number), id=place), **marks}

  def _marks(self, record: Mapping[str, Any]) -> Marks:
    columns, marks = self._columns, Marks()
    if columns.labels:
      listed = len(columns.labels) == 1 and _listed_names(self._dataset.features[columns.labels[0]])
      present = set(record[columns.labels[0]] or ()) if listed else ()
      found = (
        [1 if number in present else -1 for number in range(len(listed))]
        if listed
        else [values.presence_of(record[column], column) for column in columns.labels]
      )
      marks["labels"] = np.array(found, np.int8)
    if columns.groups:
      groups = {column: values.label_of(record[column], column) for column in columns.groups}
      marks["groups"] = {
        column: -1 if group is None else int(self._groups.get(column, {}).get(str(group), group))
        for column, group in groups.items()
      }
    return marks

  def __reduce__(self) -> tuple[Any, ...]:
    if self._location is not None:
      # A pickle of the data set would list all its files and classes.
      return _reopen, (self._location,), {"stamp": self.stamp}
    return HuggingFace, (self.name, self._dataset, self._columns, self._reach, None)


def open_huggingface(location: str) -> HuggingFace:
  """Opens a folder of `dataset.save_to_disk`: "PATH", "PATH:SPLIT" or "PATH:SPLIT?image=..&caption=..&label=..".

  Columns are chosen as in `from_huggingface`. "&labels=COLUMN" names a column that lists classes, or several, one per
  class, with 1 for present and 0 for absent, for images with several labels; "&group=COLUMN,COLUMN" columns that group
  images, whole numbers or names. Nothing is downloaded from the hub; PATH may be a URL. If images are
  paths, they lead to files below PATH, or below `root`, as in "&root=/data/images"; for others see `reach`.

  Raises:
    FileNotFoundError: there is no saved data set, or none of its images is found.
    OSError: a remote file cannot be copied.
    ValueError: the split or a column is unknown, the choice of one is ambiguous, a file of the data set is elsewhere,
      there is no example.
    ModuleNotFoundError: `datasets` is not installed.
  """
  source, errors = _reopen(location), list[tuple[int, BadSample]]()
  for index in dict.fromkeys([0, *lists.probes(len(source), _PROBED)]) if len(source) else ():
    try:
      source[index]
      return source
    except BadSample as error:
      if error.kind not in ("missing file", "not allowed"):
        return source
      errors.append((index, error))
  if not errors:
    raise ValueError(f"{source.name}: the data set has no example")
  index, first = errors[0]
  path = _path(source._dataset[index][source._columns.image])
  given = "root" in lists.parse(location, _ROLES, "PATH or PATH:SPLIT")[1]
  advice = lists.missing_advice(path, str(source._reach.root), given) if path and first.kind == "missing file" else ""
  raise FileNotFoundError(f"no readable image among {len(errors)} tried: {first}" + (f"; {advice}" if advice else ""))


def _reopen(location: str) -> HuggingFace:
  """Opens a folder without looking for its images."""
  place, wanted = lists.parse(location, _ROLES, "PATH or PATH:SPLIT")
  path, split = _LOCATION.fullmatch(place).groups()
  name, folder = f"huggingface:{location}", lists.absolute(path)
  reach = Reach.of(wanted)
  beside = reach._replace(root=folder)
  try:
    found = _load_url(folder, split, beside) if remote.is_url(folder) else datasets.load_from_disk(folder)
  except FileNotFoundError as error:
    save = f'datasets.load_dataset("NAME").save_to_disk({path!r})'
    hint = "python -m declip_jax.data.inspect prints the spec of a folder of Parquet"
    raise FileNotFoundError(f"{name}: {error}; to save one there, run {save}; {hint}") from error
  splits = found if isinstance(found, datasets.DatasetDict) else {None: found}
  if split is None and len(splits) == 1:
    (split,) = splits
  if split not in splits:
    has = "no splits; open PATH" if None in splits else f"the splits {list(splits)}; open PATH:SPLIT with one of them"
    raise ValueError(f"{name}: no split {split!r}; the data set has {has}")
  for file in [] if remote.is_url(folder) else splits[split].cache_files:
    beside.resolve(file["filename"], folder)
  dataset, columns = _prepare(name, splits[split], wanted)
  return HuggingFace(name, dataset, columns, beside if reach.root is None else reach, location)


def _load_url(url: str, split: str | None, reach: Reach) -> Any:
  """Loads the data set in a remote folder; in a `DatasetDict` only the wanted split is loaded, the others are None."""
  if not files.exists(f"{url}/dataset_dict.json"):
    return _load_copy(url, reach)
  splits = json.loads(files.read(f"{url}/dataset_dict.json"))["splits"]
  wanted = splits if len(splits) == 1 else [split]
  parts = {name: _load_copy(reach.resolve(name, url), reach) if name in wanted else None for name in splits}
  return datasets.DatasetDict(parts)


def _load_copy(url: str, reach: Reach) -> Any:
  state = json.loads(files.read(f"{url}/state.json"))
  names = ["state.json", "dataset_info.json", *(file["filename"] for file in state["_data_files"])]
  for name in names:
    reach._replace(root=url).resolve(name, url)  # so that no copy is written outside of its folder
  stamps = dict(zip(names, files.stamps([f"{url}/{name}" for name in names]), strict=True))
  folder = copies.folder(url, stamps)
  with ThreadPoolExecutor(_THREADS) as pool:
    list(pool.map(lambda name: copies.fetch(f"{url}/{name}", stamps[name], folder / name), names))
  return datasets.load_from_disk(os.fspath(folder))


def from_huggingface(
  dataset: Any, *, image: str | None = None, caption: str | None = None, label: str | None = None, name: str = "dataset"
) -> HuggingFace:
  """Makes a source from a `datasets.Dataset`, such as `datasets.load_dataset(NAME, split="train")`.

  It pickles like the data set: to a few kB if the data are in files, with all data if they are in memory.

  Args:
    dataset: a data set with random access, not streaming.
    image: column of images or bytes, or of paths if there is none of these; by default the one with a name such as
      "image". The paths of an object at hand are trusted: they may lead to any file of this machine, but to no URL.
    caption: column of texts, lists of texts or lists of objects with a text, or several columns joined by commas; by
      default the one with a name such as "caption" or "text", or several numbered ones such as "caption_0"; "" means
      none.
    label: column of labels; by default the only class label, or a whole number or text with a name such as "label";
      texts are classes in alphabetical order; "" means none.
    name: name for messages.

  Raises:
    ValueError: not such a data set, a column is unknown, or the choice of one is ambiguous.
    ModuleNotFoundError: `datasets` is not installed.
  """
  given = {"image": image, "caption": caption, "label": label}
  prepared, columns = _prepare(name, dataset, {role: column for role, column in given.items() if column is not None})
  return HuggingFace(name, prepared, columns, Reach(os.getcwd(), frozenset({"outside"})), None)


def _prepare(name: str, dataset: Any, wanted: dict[str, str]) -> tuple[Any, _Columns]:
  """Returns the data set with only the columns in use, and these columns; images remain encoded."""
  if not isinstance(dataset, datasets.Dataset):
    hint = "choose a split, such as dataset['train']" if isinstance(dataset, dict) else "load it without streaming"
    raise ValueError(f"{name}: expected a datasets.Dataset, got a {type(dataset).__name__}; {hint}")
  columns = _choose(name, dataset.features, wanted)
  logging.info("%s: %s", name, columns)
  several = (*columns.labels, *columns.groups)
  used = [column for column in (columns.image, *columns.captions, columns.label, *several) if column]
  prepared = dataset.with_format(None).select_columns(used)
  if isinstance(dataset.features[columns.image], datasets.Image):
    prepared = prepared.cast_column(columns.image, datasets.Image(decode=False))
  return prepared, columns


def _choose(name: str, features: dict[str, Any], wanted: dict[str, str]) -> _Columns:

  def columns(kinds: tuple[type, ...], *dtypes: str) -> list[str]:
    """Names of the columns of these kinds, or of plain values of these types."""
    return [
      column
      for column, feature in features.items()
      if isinstance(feature, kinds) or (isinstance(feature, datasets.Value) and feature.dtype in dtypes)
    ]

  pictures, classes = columns((datasets.Image,)), columns((datasets.ClassLabel,))
  numbers = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
  texts = columns((), "string", "large_string")
  encoded = columns((datasets.Image,), "binary", "large_binary") or texts
  images = _pick("image", wanted, encoded, lists.IMAGE_NAMES, pictures, name)
  labels = _pick("label", wanted, columns((datasets.ClassLabel,), *numbers) or texts, lists.LABEL_NAMES, classes, name)
  captioned = [column for column, feature in features.items() if _has_texts(feature)]
  captions = lists.choose("caption", wanted.get("caption"), captioned, lists.CAPTION_NAMES, name, several=True)
  marked = [_existing(features, role, wanted.get(role, ""), name) for role in ("labels", "group")]
  if marked[0] and "label" not in wanted:
    labels = ()
  if not images or not (captions or labels or marked[0] or wanted.get("caption") == ""):
    missing = "caption or label" if images else "image"
    several = next(
      (column for column, feature in features.items() if isinstance(_inner(feature), datasets.Image)), None
    )
    hint = f"; {several!r} has lists of images: keep one of each with dataset.map" if several and not images else ""
    raise ValueError(f"{name}: which column is the {missing}? Choose with ?image=COLUMN from {dict(features)}{hint}")
  return _Columns(images[0], captions, labels[0] if labels else None, *marked)


def _existing(features: dict[str, Any], role: str, wanted: str, place: str) -> tuple[str, ...]:
  """The columns that are named for a role, joined by commas."""
  names = tuple(name.strip() for name in wanted.split(",")) if wanted else ()
  if unknown := [name for name in names if name not in features]:
    raise ValueError(f"{place}: no column {unknown[0]!r} for {role}; the columns are {list(features)}")
  return names


def _listed_names(feature: Any) -> tuple[str, ...]:
  """The names of classes of a column that lists them; empty for another column."""
  inner = _inner(feature)
  return tuple(getattr(inner, "names", None) or ()) if inner is not feature else ()


def _pick(
  role: str, wanted: dict[str, str], legal: Sequence[str], names: Sequence[str], typed: Sequence[str], place: str
) -> Sequence[str]:
  """The column with a known name, or else the only one with the type."""
  chosen = lists.choose(role, wanted.get(role), legal, names, place)
  if chosen or role in wanted:
    return chosen
  if len(typed) > 1:
    raise ValueError(f"{place}: the {role} could be any of {list(typed)}; choose one with ?{role}={typed[0]}")
  return typed


def _inner(feature: Any) -> Any:
  """The feature of the elements of a list; the feature itself if it is not a list."""
  return feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)


def _is_text(feature: Any) -> bool:
  return getattr(feature, "dtype", None) in ("string", "large_string")


def _has_texts(feature: Any) -> bool:
  """Whether a feature is a text, an object with one, or a list of these."""
  inner = _inner(feature)
  found = [inner.get(key) for key in values.TEXT_KEYS] if isinstance(inner, dict) else [inner]
  return any(_is_text(_inner(one)) for one in found)


def _numbered(labels: Sequence[Any], column: str, place: str) -> tuple[dict[str, int], tuple[str, ...]]:
  """The numbers of labels that are texts, and the names of the classes."""
  known: list[str] = []
  for label in labels:
    try:
      value = values.label_of(label, column)
      known += [] if value is None else [str(value)]
    except BadSample:  # so are the examples that have it
      continue
  known = list(dict.fromkeys(known))
  if len(known) > lists.MAX_CLASSES:
    raise ValueError(
      f"{place}: {len(known):,} distinct labels in {column!r}: not class labels? Pass ?label= to ignore them"
    )
  numbers, names = lists.number_classes(dict(zip(known, range(len(known)), strict=True)), {}, ())
  return dict(zip(known, numbers, strict=True)), tuple(names)


def _path(value: Any) -> str | None:
  """The path of an image, if its field has one."""
  path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
  return None if values.is_missing(path) else path


def _image(value: Any, reach: Reach, place: str) -> bytes:
  data = value.get("bytes") if isinstance(value, dict) else value
  if isinstance(data, bytes):
    return data
  if (path := _path(value)) is None:
    raise BadSample("missing file", f"{place}: no image")
  try:
    return files.read(reach.resolve(path, "/"))
  except NotAllowedError as error:
    raise BadSample("not allowed", f"{place}: {error}") from error
  except OSError as error:
    raise bad_sample(error, place) from error
  except ValueError as error:  # a kind of URL that is not supported
    raise BadSample("missing file", f"{place}: {error}") from error
