"""TFRecord files of tf.train.Example messages with random access, without TensorFlow.

The index has the bytes of each record, see `shard_indexes`. To find them, the length of each record is read; its data
are not. They are compared with their checksum when the record is read, with one request. Files that are compressed as a
whole have no random access, and have to be decompressed first.
"""

from array import array
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from absl import logging
from jaxtyping import Int64
import numpy as np

from declip_jax.data.sources import lists, tf_example
from declip_jax.data.sources.base import BadSample, Example, OfFiles, bad_sample
from declip_jax.data.storage import files, indexes, layouts, patterns, shard_indexes, tfrecords
from declip_jax.spelling import counted

_FORMAT = ["tfrecord", 1]  # of the index


class TFRecord(OfFiles):
  """Files of records as a `Source`; make it with `open_tfrecord`.

  Args:
    name: the spec that opened the source.
    records: the records.
    keys: the features in use.
  """

  def __init__(self, name: str, records: "Records", keys: tf_example.Keys):
    super().__init__(name)
    self._records, self._keys = records, keys

  @cached_property
  def stamp(self) -> str:
    """Changes with the files and with the names of classes."""
    return f"{self._records.stamp}-{indexes.digest(self.classnames)}"

  @property
  def _first_file(self) -> str:
    return self._records.paths[0]

  @property
  def skipped(self) -> dict[str, int]:
    """The number of damaged files; their records before the damage remain."""
    return self._records.skipped

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    """Reads one record.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      BadSample: the record is damaged or too large, its file is missing, or its features are not those of the source.
    """
    self._check(index, "record")
    message, place = self._records.read(index)
    return tf_example.read(message, self._keys, self.classnames, place)

  def __getstate__(self) -> dict[str, Any]:
    return {"name": self.name, "_records": self._records, "_keys": self._keys, "stamp": self.stamp}


class Records:
  """The records of TFRecord files, by number; pickles as the path of its index.

  Args:
    index: the index, see `find_records`.
  """

  def __init__(self, index: Path):
    self._index = index

  @cached_property
  def _opened(self) -> tuple[Int64[np.ndarray, "n 3"], dict[str, Any]]:
    return shard_indexes.read(self._index)

  @property
  def stamp(self) -> str:
    """Changes with the files."""
    return self._index.stem

  @property
  def paths(self) -> list[str]:
    """The files."""
    return self._opened[1]["files"]

  @property
  def skipped(self) -> dict[str, int]:
    """The number of damaged files, as a kind of `BAD`."""
    return dict(self._opened[1]["skipped"])

  @cached_property
  def ends(self) -> list[int]:
    """The number of records in each file and all files before it."""
    return np.cumsum(self._opened[1]["counts"]).tolist()

  def __len__(self) -> int:
    return len(self._opened[0])

  def read(self, index: int) -> tuple[bytes, str]:
    """The data of a record, and its name for messages.

    Raises:
      BadSample: the record is damaged or too large, or its file cannot be read.
    """
    file, start, stop = self._opened[0][index].tolist()
    path = self.paths[file]
    place = f"{path.rpartition('/')[2]}, record at byte {start}"
    try:
      return tfrecords.read(path, start, stop), place
    except ValueError as error:
      raise BadSample("damaged record", f"{path}, record at byte {start}: {error}") from error
    except OSError as error:
      raise bad_sample(error, f"{path}, record at byte {start}") from error

  def __getstate__(self) -> dict[str, Any]:
    return {"_index": self._index}


def open_tfrecord(location: str) -> TFRecord:
  """Opens "PATTERN", or "PATTERN?image=KEY&caption=KEY,KEY&label=KEY"; the first time, the records are indexed.

  Features that are not given are recognised by their names in the first records, such as "image" or "jpg" and
  "caption", and the choice is logged; "caption=" or "label=" means none. Captions are a text or a list of texts. Labels
  are whole numbers from 0, -1 for none, or names of classes in classnames.txt. If a file is cut off or damaged, its
  records before the damage remain, and it is named in the log and counted once.

  Args:
    location: the files, as in `patterns.expand`: `/data/cc12m/*.tfrecord`, `gs://bucket/train-*`. The folder of the
      first file may contain a classnames.txt.

  Raises:
    FileNotFoundError: a pattern matches no file.
    ValueError: no file has a record, the records are not tf.train.Example messages, or a feature is missing, ambiguous
      or of another type.
  """
  name = f"tfrecord:{location}"
  place, wanted = lists.parse(location, tf_example.ROLES)
  paths = patterns.expand(place)
  records = find_records(paths, name)
  kinds = tf_example.kinds_of(_first(records, name), name)
  source = TFRecord(name, records, tf_example.choose(kinds, wanted, layouts.classnames(paths[0]), name))
  logging.info("%s: %s", name, source._keys)
  for remark in layouts.remarks_on(source.classnames):
    logging.warning("%s: %s", name, remark)
  return source


def _first(records: Records, name: str) -> list[bytes]:
  """Some of the first records that can be read."""
  found, errors = [], []
  for index in range(min(len(records), tf_example.PROBED)):
    try:
      found.append(records.read(index)[0])
    except BadSample as error:
      errors.append(error)
  if not found:
    raise ValueError(f"{name}: no readable record among the first {len(errors)}: {errors[0]}")
  return found


def find_records(paths: list[str], name: str) -> Records:
  """Returns the records of files, and indexes them if they have no index.

  Args:
    paths: paths or URLs of the files.
    name: the source, for messages.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: no file has a record.
  """
  return Records(shard_indexes.find_or_build(paths, _FORMAT, _scan, partial(_summary, paths=paths, name=name), name))


def _scan(path: str, size: int) -> tuple[Int64[np.ndarray, "m 2"], str]:
  """The spans of the records in a file, and the damage that ends it early."""
  found, damage = array("q"), ""
  with files.open_stream(path) as file:
    try:
      for span in tfrecords.spans(file, size):
        found.extend(span)
    except ValueError as error:
      damage = f"{path}, {error}"
  return np.frombuffer(found, np.int64).reshape(-1, 2), damage


def _summary(scans: list[list[Any]], paths: list[str], name: str) -> dict[str, Any]:
  damaged = [(count, damage) for count, damage in scans if damage]
  for count, damage in damaged:
    logging.warning("%s; the records before it are used: %d", damage, count)
  if not any(count for count, _ in scans):
    reason = f"; {damaged[0][1]}" if damaged else ""
    raise ValueError(f"{name}: no record in {counted(len(paths), 'file')}{reason}")
  return {
    "files": paths,
    "counts": [count for count, _ in scans],
    "skipped": {"damaged record": len(damaged)} if damaged else {},
  }
