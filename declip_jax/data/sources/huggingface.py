"""Data sets of Hugging Face's `datasets`: memory-mapped from a folder, or an object in a notebook.

When a remote folder (gs://, s3://) is opened, the files of the split are copied once for all processes of the machine,
see `copies.folder`, so they must fit on the disk. (`datasets` itself makes one copy per process, and maps whole tables,
so files cannot be copied one by one when they are needed.)
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import json
import os
import re
from typing import Any, NamedTuple

from absl import logging

from declip_jax.data.sources import lists
from declip_jax.data.sources.base import BadSample, Example
from declip_jax.data.sources.values import captions_of
from declip_jax.data.storage import copies, files, remote

_THREADS = 8  # for copying remote files
_ROLES = ("image", "caption", "label")
_LOCATION = re.compile(r"(.+?)(?::([\w.-]+))?")


class _Columns(NamedTuple):
  """The columns in use."""

  image: str
  captions: tuple[str, ...]
  label: str | None


class HuggingFace:
  """A data set as a `Source`; make it with `open_huggingface` or `from_huggingface`."""

  def __init__(self, name: str, dataset: Any, columns: _Columns, location: str | None):
    self.name = name
    self._dataset, self._columns, self._location = dataset, columns, location

  @property
  def classnames(self) -> tuple[str, ...]:
    """The names of the label's classes, if it is a ClassLabel."""
    return tuple(getattr(self._dataset.features.get(self._columns.label), "names", None) or ())

  @property
  def stamp(self) -> str:
    """Changes with the data: the fingerprint of `datasets`, stored with the files."""
    return self._dataset._fingerprint

  @property
  def skipped(self) -> dict[str, int]:
    return {}  # samples are not checked in advance

  @property
  def left_out(self) -> dict[str, int]:
    return {}

  def __len__(self) -> int:
    return len(self._dataset)

  def __getitem__(self, index: int) -> Example:
    """Reads one example.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      BadSample: its image is missing.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name}: no example {index}, there are {len(self)}")
    record, columns = self._dataset[int(index)], self._columns
    label = record[columns.label] if columns.label else None
    place = f"{self.name}, example {index}"
    return Example(
      image=_image(record[columns.image], place),
      captions=tuple(text for column in columns.captions for text in captions_of(record[column])),
      label=-1 if label is None else label,
      id=place,
    )

  def __reduce__(self) -> tuple[Callable[..., "HuggingFace"], tuple[Any, ...]]:
    if self._location is not None:
      return open_huggingface, (self._location,)  # a pickle of the data set would list all its files and classes
    return HuggingFace, (self.name, self._dataset, self._columns, None)

  def __repr__(self) -> str:
    return f"HuggingFace({self.name!r})"


def open_huggingface(location: str) -> HuggingFace:
  """Opens a folder of `dataset.save_to_disk`: "PATH", "PATH:SPLIT" or "PATH:SPLIT?image=..&caption=..&label=..".

  Columns are chosen as in `from_huggingface`. Nothing is downloaded from the hub; PATH may be a URL.

  Raises:
    FileNotFoundError: there is no saved data set.
    OSError: a remote file cannot be copied.
    ValueError: the split or a column is unknown, the choice of one is ambiguous, or `datasets` is not installed.
  """
  place, wanted = lists.parse(location, _ROLES, "PATH or PATH:SPLIT")
  path, split = _LOCATION.fullmatch(place).groups()
  datasets, name = _import_datasets(), f"huggingface:{location}"
  try:
    found = _load_url(path.rstrip("/"), split) if remote.is_url(path) else datasets.load_from_disk(lists.absolute(path))
  except FileNotFoundError as error:
    hint = f'datasets.load_dataset("NAME").save_to_disk({path!r})'
    raise FileNotFoundError(f"{name}: {error}; to save one there, run {hint}") from error
  splits = found if isinstance(found, datasets.DatasetDict) else {None: found}
  if split is None and len(splits) == 1:
    (split,) = splits
  if split not in splits:
    has = "no splits; open PATH" if None in splits else f"the splits {list(splits)}; open PATH:SPLIT with one of them"
    raise ValueError(f"{name}: no split {split!r}; the data set has {has}")
  dataset, columns = _prepare(name, splits[split], wanted)
  return HuggingFace(name, dataset, columns, location)


def _load_url(url: str, split: str | None) -> Any:
  """Loads the data set in a remote folder; in a `DatasetDict` only the wanted split is loaded, the others are None."""
  datasets = _import_datasets()
  if not files.exists(f"{url}/dataset_dict.json"):
    return _load_copy(url)
  splits = json.loads(files.read(f"{url}/dataset_dict.json"))["splits"]
  wanted = splits if len(splits) == 1 else [split]
  return datasets.DatasetDict({name: _load_copy(f"{url}/{name}") if name in wanted else None for name in splits})


def _load_copy(url: str) -> Any:
  state = json.loads(files.read(f"{url}/state.json"))
  names = ["state.json", "dataset_info.json", *(file["filename"] for file in state["_data_files"])]
  stamps = dict(zip(names, files.stamps([f"{url}/{name}" for name in names]), strict=True))
  folder = copies.folder(url, stamps)
  with ThreadPoolExecutor(_THREADS) as pool:
    list(pool.map(lambda name: copies.fetch(f"{url}/{name}", stamps[name], folder / name), names))
  return _import_datasets().load_from_disk(os.fspath(folder))


def from_huggingface(
  dataset: Any, *, image: str | None = None, caption: str | None = None, label: str | None = None, name: str = "dataset"
) -> HuggingFace:
  """Makes a source from a `datasets.Dataset`, such as `datasets.load_dataset(NAME, split="train")`.

  It pickles like the data set: to a few kB if the data are in files, with all data if they are in memory.

  Args:
    dataset: a data set with random access, not streaming.
    image: column of images or bytes; by default the one with a name such as "image".
    caption: column of texts or lists of texts, or several columns joined by commas; by default the one with a name such
      as "caption" or "text"; "" means none.
    label: column of labels; by default the only class label, or a whole number with a name such as "label"; "" means
      none.
    name: name for messages.

  Raises:
    ValueError: not such a data set, a column is unknown, the choice of one is ambiguous, or `datasets` is not
      installed.
  """
  given = {"image": image, "caption": caption, "label": label}
  prepared, columns = _prepare(name, dataset, {role: column for role, column in given.items() if column is not None})
  return HuggingFace(name, prepared, columns, None)


def _import_datasets() -> Any:
  try:
    import datasets
  except ImportError as error:
    raise ValueError(f"{error}: data sets of Hugging Face need pip install 'declip_jax[huggingface]'") from error
  return datasets


def _prepare(name: str, dataset: Any, wanted: dict[str, str]) -> tuple[Any, _Columns]:
  """Returns the data set with only the columns in use, and these columns; images remain encoded."""
  datasets = _import_datasets()
  if not isinstance(dataset, datasets.Dataset):
    hint = "choose a split, such as dataset['train']" if isinstance(dataset, dict) else "load it without streaming"
    raise ValueError(f"{name}: expected a datasets.Dataset, got a {type(dataset).__name__}; {hint}")
  columns = _choose(name, dataset.features, wanted)
  logging.info("%s: %s", name, columns)
  used = [column for column in (columns.image, *columns.captions, columns.label) if column]
  prepared = dataset.with_format(None).select_columns(used)
  if isinstance(dataset.features[columns.image], datasets.Image):
    prepared = prepared.cast_column(columns.image, datasets.Image(decode=False))
  return prepared, columns


def _choose(name: str, features: dict[str, Any], wanted: dict[str, str]) -> _Columns:
  datasets = _import_datasets()

  def columns(kinds: tuple[type, ...], *dtypes: str) -> list[str]:
    """Names of the columns of these kinds, or of plain values of these types."""
    return [
      column
      for column, feature in features.items()
      if isinstance(feature, kinds) or (isinstance(feature, datasets.Value) and feature.dtype in dtypes)
    ]

  pictures, classes = columns((datasets.Image,)), columns((datasets.ClassLabel,))
  numbers = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
  files_or_images = columns((datasets.Image,), "binary", "large_binary")
  images = _pick("image", wanted, files_or_images, lists.IMAGE_NAMES, pictures, name)
  labels = _pick("label", wanted, columns((datasets.ClassLabel,), *numbers), lists.LABEL_NAMES, classes, name)
  texts = [column for column, feature in features.items() if _is_text(feature)]
  captions = lists.choose("caption", wanted.get("caption"), texts, lists.CAPTION_NAMES, name, several=True)
  if not images or not (captions or labels or wanted.get("caption") == ""):
    missing = "caption or label" if images else "image"
    raise ValueError(f"{name}: which column is the {missing}? Choose with ?image=COLUMN from {dict(features)}")
  return _Columns(images[0], captions, labels[0] if labels else None)


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


def _is_text(feature: Any) -> bool:
  inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
  return getattr(inner, "dtype", None) in ("string", "large_string")


def _image(value: Any, place: str) -> bytes:
  path = value.get("path") if isinstance(value, dict) else None
  data = value.get("bytes") if isinstance(value, dict) else value
  if data is None and path is None:
    raise BadSample("missing file", f"{place}: no image")
  try:
    return files.read(path) if data is None else data
  except (OSError, ValueError) as error:
    raise BadSample("missing file", f"{place}: {error}") from error
