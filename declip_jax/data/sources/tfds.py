"""Data sets prepared by TensorFlow Datasets (ArrayRecord, Parquet or TFRecord), read without TensorFlow.

TFRecord files, TFDS's default, are indexed when a split is first opened, and are read in place. Other files of a remote
folder (gs://, s3://) are copied once for all processes of the machine, see `copies.folder`: the description of the data
set and Parquet files, which are read as a whole, when the data set is opened, an ArrayRecord file when a record of it
is first needed. A shuffled stream soon has copied all files of its split.

The files of a data set name the classes of its features, and TFDS imports the module of any class that it does not
know, which would run code that the data choose. Here only classes that exist already are used: those of TFDS, and those
of modules that the program has imported itself. Files outside of the folder are not read.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
import contextlib
import errno
from functools import cached_property
import json
import os
from pathlib import Path
import re
import threading
from typing import Any, NamedTuple

import numpy as np

from declip_jax.data.sources import lists
from declip_jax.data.sources.base import BadSample, Example, Named, bad_sample
from declip_jax.data.sources.derived_labels import DERIVED
from declip_jax.data.sources.tfrecord import Records, find_records
from declip_jax.data.storage import copies, files, indexes, patterns, remote, texts
from declip_jax.data.storage.reach import Reach
from declip_jax.extras import import_package
from declip_jax.extras import tensorflow_datasets as tfds
from declip_jax.spelling import did_you_mean

_KINDS = ("array_record", "parquet", "tfrecord")  # of files, of which the first that exists is used
_ROLES = ("image", "caption", "label", "group")
_FORM = "NAME:SPLIT or FOLDER:SPLIT"
_THREADS = 8  # for copying remote files
# NAME, NAME:VERSION or a folder; then splits such as train[10%:60%]+test, whose slices have colons of their own.
_PART = r"[A-Za-z][\w-]*+(?:\[[^]]*+\])?"
_LOCATION = re.compile(rf"(.+?):({_PART}(?:\+{_PART})*+)")
_GUARD = threading.RLock()
_SHARD = re.compile(r".*-\d{5,}-of-\d{5,}(\.\w+)?")  # all other files are small and describe the data set


class _Fields(NamedTuple):
  """Paths of the features in use, such as "captions/text" for a text within a sequence; None for none.

  Attributes:
    image, caption, label: the features.
    derived: the label of `DERIVED` that is used instead of `label`; empty for none.
    groups: the features that group images.
  """

  image: str
  caption: str | None
  label: str | None
  derived: str = ""
  groups: tuple[str, ...] = ()


class Tfds(Named):
  """A split of a prepared data set as a `Source`; make it with `open_tfds`."""

  def __init__(self, name: str, directory: "_Directory", split: str, fields: _Fields):
    super().__init__(name)
    self._directory, self._split, self._fields = directory, split, fields
    self._tfrecords: Records | None = None  # once they are found; other kinds of files are read by TFDS

  @cached_property
  def _records(self) -> Any:
    """Opened by every process from files alone, so that workers need not know the class that prepared them."""
    with _known_features():
      return self._open()

  def _open(self) -> Any:
    builder = tfds.builder_from_directory(self._directory.path)
    kind = next(kind for kind in _KINDS if kind in _formats(builder))
    if builder.info.file_format.value != kind:
      builder = tfds.builder_from_directory(self._directory.path, file_format=kind)
    shards = builder.info.splits[self._split].file_instructions
    for shard in shards:
      Reach().resolve(os.fspath(shard.filename), self._directory.path)
    if kind == "parquet":
      if any(shard.take < shard.examples_in_shard for shard in shards):  # TFDS would read all of those files
        raise ValueError(f"{self.name}: Parquet needs whole splits, not {self._split!r}; use heldout: for a subset")
      self._directory.fetch([shard.basename() for shard in shards])
    images = [path for path, feature in _leaves(builder.info.features) if isinstance(feature, tfds.features.Image)]
    decoders = {path: tfds.decode.SkipDecoding() for path in images if "/" not in path}
    if kind == "tfrecord":
      return self._open_tfrecords(builder.info, decoders)
    return builder.as_data_source(self._split, decoders=decoders)

  def _open_tfrecords(self, info: Any, decoders: Mapping[str, Any]) -> Any:
    """The source of TFDS, which has none for TFRecord files, with records that we read."""
    shards = info.splits[self._split].file_instructions
    parts = [_Part(self._directory.locate(shard.basename()), shard.skip, shard.take) for shard in shards]
    if self._tfrecords is None:
      self._tfrecords = find_records(list(dict.fromkeys(part.path for part in parts)), self.name)
    opened = import_package("tensorflow_datasets.core.data_sources.base").BaseDataSource(info, self._split, decoders)
    opened.data_source = _Parts(self._tfrecords, parts)
    return opened

  @cached_property
  def _shards(self) -> tuple[list[str], list[int]]:
    """Names of the split's files, and the number of its records in each file and all before it."""
    shards = self._records.dataset_info.splits[self._split].file_instructions
    return [shard.basename() for shard in shards], np.cumsum([shard.take for shard in shards]).tolist()

  @property
  def stamp(self) -> str:
    """Changes with any file in the folder."""
    return self._directory.stamp

  @cached_property
  def classnames(self) -> tuple[str, ...]:
    """Names of the label's classes; the numbers 0, 1, ... if TFDS has none."""
    derived = DERIVED.get(self._fields.derived)
    if derived and derived.classnames:
      return derived.classnames
    path = derived.features[0] if derived else self._fields.label
    feature = self._records.dataset_info.features[path] if path else None
    return tuple(getattr(feature, "feature", feature).names) if feature else ()

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    """Reads one record.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      BadSample: the record is damaged, or its remote file cannot be copied or read.
    """
    self._check(index, "record")
    fields, (names, ends) = self._fields, self._shards
    try:
      if self._tfrecords is None:
        self._directory.fetch([names[bisect_right(ends, index)]])
    except OSError as error:
      raise bad_sample(error, f"{self.name}: record {index}") from error
    try:
      record = self._records[index]
    except BadSample as error:
      raise BadSample(error.kind, f"{self.name}: record {index}: {error}") from error
    except (RuntimeError, ValueError) as error:  # array_record's and protobuf's
      raise BadSample("damaged record", f"{self.name}: record {index}: {error}") from error
    place = f"{self._records.dataset_info.full_name}/{self._split}:{index}"
    example = Example(
      image=record[fields.image],
      captions=_captions(_at(record, fields.caption), place) if fields.caption else (),
      label=int(record[fields.label]) if fields.label else -1,
      id=place,
    )
    if fields.groups:
      example["groups"] = {path: int(record[path]) for path in fields.groups}
    return self._derived(example, record) if fields.derived else example

  def _derived(self, example: Example, record: Mapping[str, Any]) -> Example:
    """The example with its derived label."""
    derived = DERIVED[self._fields.derived]
    try:
      label = derived.derive([_at(record, path) for path in derived.features], len(self.classnames))
    except BadSample as error:
      raise BadSample(error.kind, f"{example['id']}: {error}") from None
    image = derived.pixels(example["image"]) if derived.pixels else example["image"]
    if isinstance(label, int):
      return {**example, "image": image, "label": label}
    return {**example, "image": image, "labels": label}

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in vars(self).items() if key not in ("_records", "_shards", "classnames")}


class _Part(NamedTuple):
  """Consecutive records of a TFRecord file: its path, the number of records before them, and their number."""

  path: str
  skip: int
  take: int


class _Parts:
  """The records of a split in TFRecord files, as TFDS reads them; their data are not parsed."""

  def __init__(self, records: Records, parts: list[_Part]):
    self._records, self._parts = records, parts
    self._ends = np.cumsum([part.take for part in parts]).tolist()
    starts = [0, *records.ends]
    ranges = {path: (starts[number], starts[number + 1]) for number, path in enumerate(records.paths)}
    self._ranges = [ranges[part.path] for part in parts]

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> bytes:
    """Reads a record; raises BadSample if it is damaged or its file ends before it."""
    number = bisect_right(self._ends, index)
    part, (start, stop) = self._parts[number], self._ranges[number]
    position = start + part.skip + part.take - (self._ends[number] - index)
    if position >= stop:
      raise BadSample("damaged record", f"{part.path} is cut off or damaged before it")
    return self._records.read(position)[0]


class _Directory:
  """The folder of a prepared data set, with local copies if it is remote.

  Attributes:
    stamp: changes with any file in the folder.
  """

  def __init__(self, place: str):
    self._place, self._index = place, None
    names = [name for name in patterns.names(place) if not name.startswith(".")]
    stamps = dict(zip(names, files.stamps([f"{place}/{name}" for name in names]), strict=True))
    self.stamp = indexes.digest(stamps)
    if remote.is_url(place):
      about = json.dumps(stamps)
      self._index = indexes.find_or_build(
        ["tfds", place, self.stamp], place, lambda path: path.write_text(about), ".json"
      )

  @cached_property
  def _stamps(self) -> dict[str, files.Stamp]:
    return {name: (size, state) for name, (size, state) in json.loads(bytes(indexes.contents(self._index))).items()}

  @cached_property
  def path(self) -> str:
    """Its own path, or that of the folder of copies, in which shards may be missing."""
    if self._index is None:
      return self._place
    self.fetch([name for name in self._stamps if not _SHARD.fullmatch(name)])
    return os.fspath(self._folder)

  @cached_property
  def _folder(self) -> Path:
    return copies.folder(self._place, self._stamps)

  def locate(self, name: str) -> str:
    """The path or URL of a file of the data set, not of its copy."""
    return f"{self._place}/{name}"

  def fetch(self, names: list[str]) -> None:
    """Copies files that are remote and have no copy yet."""
    if self._index is None:
      return
    if unknown := next((name for name in names if name not in self._stamps), None):
      raise FileNotFoundError(errno.ENOENT, "no such file when the data set was opened", f"{self._place}/{unknown}")
    missing = [name for name in names if not (self._folder / name).is_file()]
    if missing:
      urls, stamps = [f"{self._place}/{name}" for name in missing], [self._stamps[name] for name in missing]
      with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(copies.fetch, urls, stamps, [self._folder / name for name in missing]))

  def __getstate__(self) -> dict[str, Any]:
    return {"_place": self._place, "_index": self._index, "stamp": self.stamp}


def open_tfds(location: str) -> Tfds:
  """Opens a split: "NAME:SPLIT", as in "cifar10:train[:90%]", or "FOLDER:SPLIT" for a folder with a dataset_info.json.

  The image is the only image feature, the label the only class label, the captions the only text or sequence of texts
  with a name such as "caption" or "title". If there are several, the one called "image", "label" or "caption" is
  used; or choose as in "cifar100:train?label=coarse_label". "caption=" or "label=" means none. A label of `DERIVED`,
  such as "clevr/count_all", follows from other features. "&group=FEATURE,FEATURE" names features that group images,
  class labels or whole numbers. Data sets are not downloaded or prepared; FOLDER may be a URL.

  Raises:
    FileNotFoundError: the data set is not prepared, or in files of another kind; the message says how to prepare it.
    ValueError: the location, the name, the split or a feature is unknown, the choice of a feature is ambiguous, a
      subset of a split is in Parquet files, or the data set needs a class or file from elsewhere.
  """
  place, wanted = lists.parse(location, _ROLES, _FORM)
  match = _LOCATION.fullmatch(place)
  if not match:
    raise ValueError(f"bad location {location!r}: expected {_FORM}")
  with _known_features():
    directory, features = _find(match[1])
  source = Tfds(f"tfds:{location}", directory, match[2], _fields(features, wanted, location))
  len(source)  # so that an unknown split fails here and not in a worker
  return source


def _find(where: str) -> tuple[_Directory, Mapping[str, Any]]:
  """Returns the folder of a prepared data set, and its features."""
  folder = where.startswith(("/", ".", "~")) or "://" in where
  line = "import tensorflow_datasets as tfds; tfds.builder({!r}, file_format='array_record').download_and_prepare()"
  hint = "prepare it with\n  " + line.format("NAME" if folder else where)
  try:
    directory = _Directory(lists.absolute(where)) if folder else None
    builder = tfds.builder_from_directory(directory.path) if directory else tfds.builder(where)
  except tfds.core.DatasetNotFoundError:
    raise ValueError(f"TFDS has no data set {where!r}; write a folder as a path, such as ./{where}") from None
  except OSError as error:
    raise FileNotFoundError(f"{where} is not the folder of a prepared version: {error}; {hint}") from error
  if not builder.info.splits:
    raise FileNotFoundError(f"{where} is not prepared in {builder.data_dir}; {hint}")
  if _formats(builder).isdisjoint(_KINDS):
    raise FileNotFoundError(f"{where} has only the formats {', '.join(_formats(builder))}; move it away and {hint}")
  return directory or _Directory(os.fspath(builder.data_dir)), builder.info.features


@contextlib.contextmanager
def _known_features() -> Iterator[None]:
  """Keeps TFDS from importing the modules of classes that files name; for its own calls within the context."""
  FeatureConnector = import_package("tensorflow_datasets.core.features.feature").FeatureConnector

  def known_class(cls: type, name: str) -> type:
    known, classes = {}, [FeatureConnector]
    while classes:
      classes += (found := classes.pop()).__subclasses__()
      known[f"{found.__module__}.{found.__name__}"] = found
    if name not in known:
      remedy = "if you trust it, import its module and open the data set in the same program"
      raise ValueError(f"its features name the class {name}, which is not one of TFDS; {remedy}")
    return known[name]

  with _GUARD:
    importing = FeatureConnector.__dict__["cls_from_name"]
    FeatureConnector.cls_from_name = classmethod(known_class)
    try:
      yield
    finally:
      FeatureConnector.cls_from_name = importing


def _formats(builder: Any) -> set[str]:
  return {kind.value for kind in builder.info.available_file_formats()}


def _fields(features: Mapping[str, Any], wanted: Mapping[str, str], place: str) -> _Fields:
  """Chooses the features."""
  leaves = sorted(_leaves(features))  # their order in code differs from that in files
  images = [path for path, feature in leaves if isinstance(feature, tfds.features.Image) and "/" not in path]
  labels = [path for path, feature in leaves if isinstance(feature, tfds.features.ClassLabel) and "/" not in path]
  texts = [path for path, feature in leaves if _has_texts(feature)]
  likely = [path for path in texts if not set(lists.CAPTION_NAMES).isdisjoint(path.split("/"))]
  image = _choose("image", wanted, images, images, place)
  caption = _choose("caption", wanted, texts, likely, place)
  possible = [name for name, of in DERIVED.items() if set(of.features) <= {path for path, _ in leaves}]
  derived = wanted.get("label", "") if "/" in wanted.get("label", "") else ""
  if derived and derived not in possible:
    problem = f"needs {', '.join(DERIVED[derived].features)}" if derived in DERIVED else "is not known"
    hint = did_you_mean(derived, DERIVED)
    raise ValueError(f"{place}: label {derived!r} {problem}; possible are {[*possible, *labels]}{hint}")
  label = None if derived else _choose("label", wanted, labels, labels, place)
  fields = _Fields(image, caption, label, derived, _groups(dict(leaves), wanted.get("group", ""), place))
  if not image or not (fields.caption or fields.label or derived or wanted.get("caption") == ""):
    raise ValueError(
      f"{place}: no image, or neither caption nor label, in {[path for path, _ in leaves]}; texts: {texts}"
    )
  return fields


def _groups(features: Mapping[str, Any], wanted: str, place: str) -> tuple[str, ...]:
  """The features that group images, class labels and whole numbers."""
  whole = [path for path, feature in features.items() if "/" not in path and _is_whole(feature)]
  chosen = tuple(name.strip() for name in wanted.split(",")) if wanted else ()
  if unknown := [name for name in chosen if name not in whole]:
    raise ValueError(f"{place}: no group {unknown[0]!r}, choose from {whole}{did_you_mean(unknown[0], whole)}")
  return chosen


def _has_texts(feature: Any) -> bool:
  """Whether a feature is a text or a list of texts, including plain strings, which data sets declare as tensors."""
  inner = getattr(feature, "feature", feature)
  return inner.np_dtype == np.object_ and len(inner.shape) <= (inner is feature)


def _is_whole(feature: Any) -> bool:
  dtype = getattr(feature, "np_dtype", None)
  return feature.shape == () and dtype is not None and np.issubdtype(dtype, np.integer)


def _choose(role: str, wanted: Mapping[str, str], legal: list[str], likely: list[str], place: str) -> str | None:
  if wanted.get(role) and wanted[role] not in legal:
    raise ValueError(f"{place}: no {role} {wanted[role]!r}, choose from {legal}")
  if role in wanted or role in likely:
    return wanted.get(role, role) or None
  if len(likely) > 1:
    raise ValueError(f"{place}: the {role} could be any of {likely}; choose one with ?{role}={likely[0]}")
  return likely[0] if likely else None


def _leaves(features: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields paths and features, through dicts and sequences of dicts."""
  for name, feature in features.items():
    inner = getattr(feature, "feature", feature)
    if hasattr(inner, "items"):
      yield from _leaves(inner, f"{prefix}{name}/")
    else:
      yield prefix + name, feature


def _at(record: Any, path: str) -> Any:
  for name in path.split("/"):
    record = record[name]
  return record


def _captions(value: bytes | Iterable[bytes], place: str) -> tuple[str, ...]:
  stripped = (texts.decode(text, place).strip() for text in ([value] if isinstance(value, bytes) else value))
  return tuple(filter(None, stripped))
