"""ArrayRecord files, for data that are read many times: those of `declip_jax.data.convert`, and those of others.

A record of `declip_jax.data.convert` is a msgpack map of the fields of `Example`: `image` (encoded, bytes), `captions`
(list of str), `label` (int, -1 for none), `id` (str, where the sample came from originally), and where the source has
them `labels` (list of int) and `groups` (map of int). Its files have one record per group and no compression, since
images are compressed already: reading a record of an open file is one disk access, and a damaged record does not affect
others. Other files have tf.train.Example messages, see `tf_example`.

A record of more than `files.MAX_BYTES` is rejected; but files from elsewhere may be compressed, and the library limits
no record before it is decompressed: a small file can fill the memory, so do not open files that you do not trust.
Opening a file reads about 1 MiB from its end, so a process keeps half its descriptors' worth of files open (`ulimit
-n`), at least 128; with more files than that, most reads open one first.

The library that reads them opens local files only. A process that first needs a record of a remote file (gs://, s3://)
makes a copy for all processes of the machine, see `copies.folder`. A shuffled stream soon has copied all files, so the
set must fit on the disk. For larger sets use a WebDataset, which is read remotely. To count the records when such a set
is first opened, the last 512 KiB of each file are transferred, or 2 MiB, 8 MiB, ... if it has more than about 20,000
records, or, of the first file, if its last record is longer.
"""

from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import contextlib
from functools import cached_property, lru_cache, partial
import json
from pathlib import Path
import resource
import tempfile
from typing import Any, NamedTuple, TypeVar

from absl import logging
import msgpack
import numpy as np

from declip_jax.data.sources import lists, tf_example
from declip_jax.data.sources.base import BadSample, Example, OfFiles, bad_sample
from declip_jax.data.storage import copies, files, indexes, patterns, remote, tf_examples
from declip_jax.extras import array_record_module
from declip_jax.spelling import counted

WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access
_READER_BUFFER = 2**15  # bytes
_REQUIRED = {"image": "bytes", "captions": "list", "label": "int", "id": "str"}  # fields of a record, and their types
_OPTIONAL = {"labels": "list", "groups": "dict"}
_INDEX_FORMAT = 4
_THREADS = 32
_TAIL = 2**19  # bytes of a remote file to search first for its footer: the last 64 KiB, and 20 per record

T = TypeVar("T")


def _most_readers() -> int:
  """The number of files that a process keeps open, over all its sources."""
  limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
  return 2**16 if limit == resource.RLIM_INFINITY else max(limit // 2, 128)


class _Files(NamedTuple):
  """The files.

  Attributes:
    paths: their paths.
    stamps: their stamps.
    ends: numbers of records in each file and all files before it.
    damaged: the number of damaged files.
    kinds: the features of some records and their kinds, see `tf_example.kinds_of`; None for records of
      `declip_jax.data.convert`.
  """

  paths: list[str]
  stamps: list[files.Stamp]
  ends: list[int]
  damaged: int
  kinds: dict[str, str] | None


class ArrayRecord(OfFiles):
  """Files of records as a `Source`; make it with `open_arrayrecord`."""

  def __init__(self, name: str, index: Path):
    super().__init__(name)
    self._index = index
    self._keys: tf_example.Keys | None = None

  @cached_property
  def _files(self) -> _Files:
    try:
      about = json.loads(bytes(indexes.contents(self._index)))
      ends = np.cumsum(about["counts"]).tolist()
      return _Files(about["files"], list(map(tuple, about["stamps"])), ends, about["damaged"], about["kinds"])
    except (ValueError, LookupError, TypeError) as error:
      raise ValueError(f"{self._index}: damaged index ({error}); delete it to build it again") from error

  @cached_property
  def stamp(self) -> str:
    """Changes with the files and with the names of classes."""
    return f"{self._index.stem}-{indexes.digest(self.classnames)}"

  @property
  def _first_file(self) -> str:
    return self._files.paths[0]

  @property
  def skipped(self) -> dict[str, int]:
    """The number of damaged files; the conversion skipped bad samples."""
    return {"damaged record": self._files.damaged} if self._files.damaged else {}

  def __len__(self) -> int:
    return self._files.ends[-1]

  def __getitem__(self, index: int) -> Example:
    """Reads one record.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      BadSample: the record is damaged, too large or of another kind, or its file is missing.
    """
    self._check(index, "record")
    paths, stamps, ends, *_ = self._files
    file = bisect_right(ends, index)
    position = index - (ends[file - 1] if file else 0)
    place = f"{paths[file]}, record {position}"
    try:
      reader = _reader(paths[file], stamps[file])
    except ValueError as error:
      raise BadSample("missing file", f"{place}: {error}") from error
    except OSError as error:
      raise bad_sample(error, place) from error
    try:
      record = reader.read([position])[0]
      if len(record) > files.MAX_BYTES:
        raise BadSample("too large", f"{place}: {len(record):,} bytes, expected at most {files.MAX_BYTES:,}")
      if self._keys:
        return tf_example.read(record, self._keys, self.classnames, place)
      example = _unpack(record)
    except BadSample:
      raise
    except (ValueError, TypeError, LookupError, RuntimeError) as error:  # array_record's, msgpack's and ours
      raise BadSample("damaged record", f"{place}: {error}") from error
    if len(self.classnames) <= example["label"] and self.classnames:
      classes = f"-1 to {len(self.classnames) - 1}, the last line of classnames.txt"
      raise BadSample("no label", f"{place}: class {example['label']}, expected {classes}")
    return example

  def __getstate__(self) -> dict[str, Any]:
    return {"name": self.name, "_index": self._index, "_keys": self._keys, "stamp": self.stamp}


def open_arrayrecord(location: str) -> ArrayRecord:
  """Opens "PATTERN", or "PATTERN?image=KEY&caption=KEY,KEY&label=KEY"; counts the records the first time.

  A file that is cut off or not an ArrayRecord file is passed over, named in the log and counted in `skipped`.

  Args:
    location: the files, as in `patterns.expand`: `/data/cc12m/*.array_record`, `gs://bucket/cc12m/*.array_record`. The
      folder of the first file may contain a classnames.txt. Features of tf.train.Example messages that are not given
      are recognised by their names, see `tf_example`.

  Raises:
    FileNotFoundError: a pattern matches no file.
    ValueError: all files are cut off or not ArrayRecord files, there is no record, a feature is missing, ambiguous or
      of another kind, or one is given for records of `declip_jax.data.convert`.
  """
  place, wanted = lists.parse(location, tf_example.ROLES)
  paths = patterns.expand(place)
  stamps = files.stamps(paths)
  stamp = [_INDEX_FORMAT, list(zip(paths, stamps, strict=True))]
  build = partial(_build, paths=paths, stamps=stamps)
  source = ArrayRecord(f"arrayrecord:{location}", indexes.find_or_build(stamp, paths[0], build, ".json"))
  if not len(source):
    raise ValueError(f"{source.name}: no record in {counted(len(paths), 'file')}")
  if (kinds := source._files.kinds) is not None:
    source._keys = tf_example.choose(kinds, wanted, source.classnames, source.name)
    logging.info("%s: %s", source.name, source._keys)
  elif wanted:
    raise ValueError(f"{source.name}: its records are those of data.convert, which have no features to choose from")
  return source


def pack(example: Example) -> bytes:
  """Returns the record of an example whose image is encoded."""
  # Broken captions contain halves of surrogate pairs, which UTF-8 cannot encode.
  captions = [caption.encode(errors="replace").decode() for caption in example["captions"]]
  place = example["id"].encode(errors="replace").decode()
  fields = {"image": example["image"], "captions": captions, "label": int(example["label"]), "id": place}
  if "labels" in example:
    fields["labels"] = example["labels"].tolist()
  if "groups" in example:
    fields["groups"] = dict(example["groups"])
  return msgpack.packb(fields)


def open_reader(path: str) -> Any:
  """Opens a file for random access; thread-safe.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: the file is cut off or not an ArrayRecord file.
  """
  files.stamp(path)  # the reader does not distinguish a missing file from a bad one
  reader = array_record_module.ArrayRecordReader(path, _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)
  if not reader.ok():
    raise ValueError(f"{path}: not a complete ArrayRecord file: cut off, damaged at its end or of another format")
  return reader


@lru_cache(_most_readers())
def _reader(path: str, stamp: files.Stamp) -> Any:
  """An open file, in the version of the stamp, shared by all sources and threads of this process."""
  return open_reader(copies.local_copy(path, stamp))


def _build(path: Path, paths: list[str], stamps: list[files.Stamp]) -> None:
  with ThreadPoolExecutor(min(_THREADS, len(paths))) as pool:
    counts = list(pool.map(_count_or_error, paths, stamps))
  errors = [count for count in counts if isinstance(count, ValueError)]
  if len(errors) == len(paths):
    raise errors[0]
  for error in errors:
    logging.warning("%s; it is passed over", error)
  numbers = [0 if isinstance(count, ValueError) else count for count in counts]
  about = {"files": paths, "stamps": stamps, "counts": numbers, "damaged": len(errors), "kinds": None}
  if first := next((file for file in zip(paths, stamps, numbers, strict=True) if file[-1]), None):
    about["kinds"] = _kinds(*first)
  path.write_text(json.dumps(about))


def _kinds(path: str, stamp: files.Stamp, count: int) -> dict[str, str] | None:
  """The kinds of the features in the first records of a file, or, of a remote file, in its last record."""
  try:
    if remote.is_url(path):
      records = _at_end(path, stamp[0], lambda reader: reader.read([count - 1]))
    else:
      records = _readable(open_reader(path), min(count, tf_example.PROBED))
    return tf_example.kinds_of(records, path) if records and records[0].startswith(tf_examples.START) else None
  except ValueError as error:
    logging.warning("%s: %s", path, error)
    return None


def _readable(reader: Any, count: int) -> list[bytes]:
  """The first records that can be read."""
  found = []
  for position in range(count):
    with contextlib.suppress(ValueError, RuntimeError):
      found += reader.read([position])
  return found


def _count_or_error(path: str, stamp: files.Stamp) -> int | ValueError:
  try:
    return _count(path, stamp)
  except ValueError as error:
    return error


def _count(path: str, stamp: files.Stamp) -> int:
  if not remote.is_url(path):
    return open_reader(path).num_records()
  return _at_end(path, stamp[0], lambda reader: reader.num_records())


def _at_end(url: str, size: int, read: Callable[[Any], T]) -> T:
  """What is read from a remote file, of which a sparse local file has as much of the end as is needed."""
  length = min(_TAIL, size)
  while True:
    with tempfile.NamedTemporaryFile() as file:
      file.truncate(size)  # takes no space
      file.seek(size - length)
      file.write(files.read(url, size - length, length, limit=length))
      file.flush()
      try:
        return read(open_reader(file.name))
      except (ValueError, RuntimeError, IndexError) as error:
        if length == size:
          raise ValueError(str(error).replace(file.name, url)) from None
    length = min(4 * length, size)


def _unpack(record: bytes) -> Example:
  """Returns the example of a record.

  Raises:
    ValueError: the record does not have the fields of `Example`.
  """
  fields = msgpack.unpackb(record)
  found = {name: type(value).__name__ for name, value in fields.items()} if isinstance(fields, dict) else fields
  optional = {name: kind for name, kind in _OPTIONAL.items() if isinstance(fields, dict) and name in fields}
  if found != {**_REQUIRED, **optional} or fields["label"] < -1:
    raise ValueError(f"not a record of declip_jax.data.convert: {str(found)[:200]}")
  if not all(isinstance(caption, str) for caption in fields["captions"]):
    raise ValueError("a caption is not a text")
  if "labels" in fields:
    fields["labels"] = np.array(fields["labels"], np.int8)
  return Example(**{**fields, "captions": tuple(fields["captions"])})
