"""Data sets that TensorFlow Datasets prepared for random access (ArrayRecord or Parquet), read without TensorFlow."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
import os
import re
from typing import Any, NamedTuple

from declip_jax.data.sources import rows
from declip_jax.data.sources.base import BadSample, Example

_FORM = "NAME:SPLIT or FOLDER:SPLIT"
# NAME, NAME:VERSION or a folder; then splits such as train[10%:60%]+test, whose slices have colons of their own.
_LOCATION = re.compile(r"(.+?):((?:\+?[A-Za-z][\w-]*(?:\[[^]]*\])?)+)")


class _Fields(NamedTuple):
  """Paths of the features that play a part, "captions/text" for a text within a sequence; None for none."""

  image: str
  caption: str | None
  label: str | None


class Tfds:
  """A split of a prepared data set as a `Source`; make it with `open_tfds`."""

  def __init__(self, name: str, directory: str, split: str, fields: _Fields):
    self.name = name
    self._directory, self._split, self._fields = directory, split, fields

  @cached_property
  def _records(self) -> Any:
    """Opened anew in every process, from files alone: the worker need not know the class that prepared them."""
    import tensorflow_datasets as tfds  # slow, so not for those who read something else

    builder = tfds.builder_from_directory(self._directory)
    images = [path for path, feature in _leaves(builder.info.features) if isinstance(feature, tfds.features.Image)]
    decoders = {path: tfds.decode.SkipDecoding() for path in images if "/" not in path}
    return builder.as_data_source(self._split, decoders=decoders)

  @property
  def classnames(self) -> tuple[str, ...]:
    return tuple(self._records.dataset_info.features[self._fields.label].names) if self._fields.label else ()

  @property
  def skipped(self) -> dict[str, int]:
    return {}  # its features are typed: no record lacks one

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    """Reads one record.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      BadSample: the record is damaged.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name}: no record {index}, there are {len(self)}")
    fields = self._fields
    try:
      record = self._records[index]
    except (RuntimeError, ValueError) as error:  # of array_record, of protobuf
      raise BadSample("damaged record", f"{self.name}: record {index}: {error}") from error
    return Example(
      image=record[fields.image],
      captions=_captions(_at(record, fields.caption)) if fields.caption else (),
      label=int(record[fields.label]) if fields.label else -1,
      id=f"{self._records.dataset_info.full_name}/{self._split}:{index}",
    )

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in vars(self).items() if key != "_records"}

  def __repr__(self) -> str:
    return f"Tfds({self.name!r})"


def open_tfds(location: str) -> Tfds:
  """Opens a split: "NAME:SPLIT", as in "cifar10:train[:90%]", or "FOLDER:SPLIT" for a folder with a dataset_info.json.

  The image is the one image feature, the label the one class label, the captions the one text or sequence of texts with
  a name such as "caption" or "title". Of several, the one that is called just "image", "label" or "caption" is taken,
  or say which: "cifar100:train?label=coarse_label"; "caption=" or "label=" is for none. Nothing is ever downloaded.

  Raises:
    FileNotFoundError: the data set is not prepared, or not for random access; the message says how to prepare it.
    ValueError: the location, the name, the split or a feature is unknown, or the choice of a feature is not clear.
  """
  place, wanted = rows.parse(location, _Fields._fields, _FORM)
  match = _LOCATION.fullmatch(place)
  if not match:
    raise ValueError(f"bad location {location!r}: expected {_FORM}")
  builder = _builder(match[1])
  source = Tfds(f"tfds:{location}", str(builder.data_dir), match[2], _fields(builder.info.features, wanted, location))
  len(source)  # an unknown split fails here and not in a worker
  return source


def _builder(where: str) -> Any:
  """The builder of a data set that is prepared for random access."""
  import tensorflow_datasets as tfds

  folder = where.startswith(("/", ".", "~")) or "://" in where
  line = "import tensorflow_datasets as tfds; tfds.builder({!r}, file_format='array_record').download_and_prepare()"
  hint = "prepare it with\n  " + line.format("NAME" if folder else where)
  try:
    builder = tfds.builder_from_directory(os.path.expanduser(where)) if folder else tfds.builder(where)
  except tfds.core.DatasetNotFoundError:
    raise ValueError(f"TFDS has no data set {where!r}; a folder is written with its path, as ./{where}") from None
  except OSError as error:
    raise FileNotFoundError(f"{where} is not the folder of a prepared version: {error}; {hint}") from error
  if not builder.info.splits:
    raise FileNotFoundError(f"{where} is not prepared in {builder.data_dir}; {hint}")
  formats = {kind.value for kind in builder.info.available_file_formats()}
  if formats.isdisjoint({"array_record", "parquet"}):
    raise FileNotFoundError(f"{builder.data_dir} holds only {', '.join(formats)}; move it away and {hint}")
  return builder


def _fields(features: Mapping[str, Any], wanted: Mapping[str, str], place: str) -> _Fields:
  """Decides which feature plays which part."""
  import tensorflow_datasets as tfds

  leaves = sorted(_leaves(features))  # their order differs between code and files
  images = [path for path, feature in leaves if isinstance(feature, tfds.features.Image) and "/" not in path]
  labels = [path for path, feature in leaves if isinstance(feature, tfds.features.ClassLabel) and "/" not in path]
  texts = [path for path, feature in leaves if isinstance(getattr(feature, "feature", feature), tfds.features.Text)]
  likely = [path for path in texts if not set(rows.CAPTION_NAMES).isdisjoint(path.split("/"))]
  image = _choose("image", wanted, images, images, place)
  fields = _Fields(
    image, _choose("caption", wanted, texts, likely, place), _choose("label", wanted, labels, labels, place)
  )
  if not image or not (fields.caption or fields.label or wanted.get("caption") == ""):
    raise ValueError(
      f"{place}: no image, or neither caption nor label, in {[path for path, _ in leaves]}; texts: {texts}"
    )
  return fields


def _choose(role: str, wanted: Mapping[str, str], legal: list[str], likely: list[str], place: str) -> str | None:
  if wanted.get(role) and wanted[role] not in legal:
    raise ValueError(f"{place}: no {role} {wanted[role]!r}, choose from {legal}")
  if role in wanted or role in likely:
    return wanted.get(role, role) or None
  if len(likely) > 1:
    raise ValueError(f"{place}: the {role} may be any of {likely}; choose one with ?{role}={likely[0]}")
  return likely[0] if likely else None


def _leaves(features: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Paths and features, through dicts and sequences of dicts."""
  for name, feature in features.items():
    inner = getattr(feature, "feature", feature)
    if hasattr(inner, "items"):
      yield from _leaves(inner, f"{prefix}{name}/")
    else:
      yield prefix + name, feature


def _at(record: Any, path: str) -> Any:
  for part in path.split("/"):
    record = record[part]
  return record


def _captions(value: bytes | Iterable[bytes]) -> tuple[str, ...]:
  texts = [value] if isinstance(value, bytes) else value
  stripped = (text.decode("utf-8", "replace").strip() for text in texts)
  return tuple(filter(None, stripped))
