"""ArrayRecord files as `declip_jax.data.convert` writes them, for data that are read many times.

A record is a msgpack map of the fields of `Example`: `image` (an encoded file, bytes), `captions` (list of str),
`label` (int, -1 for none), `id` (str, where the sample came from before). Files have one record in a group and no
compression, for images are compressed already: to read a record of an open file is one access to the disk, and a
damaged one costs no other. To open a file is a read of about 1 MiB from its end, so a process keeps as many open as
half its descriptors (`ulimit -n`), 128 at least; where there are more files than that, most reads open one first.
"""

from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
import json
from pathlib import Path
import resource
from typing import Any

from array_record.python import array_record_module
import msgpack
import numpy as np

from declip_jax.data import files
from declip_jax.data.sources.base import BadSample, Example

WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access
_READER_BUFFER = 2**15  # bytes
_INDEX_FORMAT = 1
_THREADS = 32


def _most_readers() -> int:
  """How many files a process keeps open, of all its sources."""
  limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
  return 2**16 if limit == resource.RLIM_INFINITY else max(limit // 2, 128)


class ArrayRecord:
  """Files of records as a `Source`; make it with `open_arrayrecord`."""

  def __init__(self, name: str, index: Path):
    self.name = name
    self._index = index

  @cached_property
  def _files(self) -> tuple[list[str], list[int]]:
    """Paths, and how many records there are in each and all those before it."""
    try:
      about = json.loads(self._index.read_text())
      return about["files"], np.cumsum(about["counts"]).tolist()
    except (ValueError, LookupError, TypeError) as error:
      raise ValueError(f"{self._index}: a damaged index ({error}): delete it, and it is built anew") from error

  @property
  def stamp(self) -> str:
    """Changes when the files do."""
    return self._index.stem

  @cached_property
  def classnames(self) -> tuple[str, ...]:
    """Line i of classnames.txt beside the first file is class i; empty without that file."""
    return files.classnames(self._files[0][0])

  @property
  def skipped(self) -> dict[str, int]:
    return {}  # the conversion left out what could not be used

  def __len__(self) -> int:
    return self._files[1][-1]

  def __getitem__(self, index: int) -> Example:
    """Reads one record.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      BadSample: the record is damaged, or its file is gone.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name}: no record {index}, there are {len(self)}")
    paths, ends = self._files
    file = bisect_right(ends, index)
    position = index - (ends[file - 1] if file else 0)
    place = f"{paths[file]}, record {position}"
    try:
      reader = _reader(paths[file], self.stamp)
    except (ValueError, OSError) as error:
      raise BadSample("missing file", f"{place}: {error}") from error
    try:
      example = _unpack(reader.read([position])[0])
    except (ValueError, TypeError, LookupError, RuntimeError) as error:  # of array_record, of msgpack, and ours
      raise BadSample("damaged record", f"{place}: {error}") from error
    if len(self.classnames) <= example["label"] and self.classnames:
      classes = f"-1 to {len(self.classnames) - 1}, the last line of classnames.txt"
      raise BadSample("damaged record", f"{place}: class {example['label']}, expected {classes}")
    return example

  def __getstate__(self) -> dict[str, Any]:
    return {"name": self.name, "_index": self._index}

  def __repr__(self) -> str:
    return f"ArrayRecord({self.name!r})"


def open_arrayrecord(location: str) -> ArrayRecord:
  """Opens a set of files, and counts their records first, from their footers, if it meets them for the first time.

  Args:
    location: as `files.expand` reads it: `/data/cc12m/*.array_record`. The folder of the first file may have a
      classnames.txt.

  Raises:
    FileNotFoundError: a pattern matches no file.
    ValueError: behind a URL, cut off, or no ArrayRecord file; or there is no record.
  """
  if any(map(files.is_url, location.split("::"))):
    raise ValueError(
      f"arrayrecord:{location}: ArrayRecord files are read from local disks only: mount the bucket, as with gcsfuse, "
      "and give the path"
    )
  paths = files.expand(location)
  stamp = [_INDEX_FORMAT, [(path, files.stamp(path)) for path in paths]]
  source = ArrayRecord(f"arrayrecord:{location}", files.index(stamp, paths[0], partial(_build, paths=paths), ".json"))
  if not len(source):
    raise ValueError(f"arrayrecord:{location}: no record in {len(paths)} files")
  return source


def pack(example: Example) -> bytes:
  """The record of an example whose image is an encoded file."""
  # Halves of surrogate pairs, which broken captions contain, have no UTF-8.
  captions = [caption.encode(errors="replace").decode() for caption in example["captions"]]
  place = example["id"].encode(errors="replace").decode()
  return msgpack.packb({"image": example["image"], "captions": captions, "label": int(example["label"]), "id": place})


def open_reader(path: str) -> Any:
  """Opens a file for random access; thread-safe.

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it is no ArrayRecord file, or was cut off.
  """
  files.stamp(path)  # the reader does not tell a missing file from a bad one
  reader = array_record_module.ArrayRecordReader(path, _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)
  if not reader.ok():
    raise ValueError(f"{path}: no complete ArrayRecord file: cut off, damaged at its end or of another format")
  return reader


@lru_cache(_most_readers())
def _reader(path: str, stamp: str) -> Any:
  """An open file, of the state that a stamp tells, for all sources and threads of this process."""
  return open_reader(path)


def _build(path: Path, paths: list[str]) -> None:
  with ThreadPoolExecutor(min(_THREADS, len(paths))) as pool:
    counts = list(pool.map(_count, paths))
  path.write_text(json.dumps({"files": paths, "counts": counts}))


def _count(path: str) -> int:
  return open_reader(path).num_records()


def _unpack(record: bytes) -> Example:
  """The example of a record.

  Raises:
    ValueError: it is no such map.
  """
  fields = msgpack.unpackb(record)
  found = {name: type(value).__name__ for name, value in fields.items()} if isinstance(fields, dict) else fields
  if found != {"image": "bytes", "captions": "list", "label": "int", "id": "str"} or fields["label"] < -1:
    raise ValueError(f"no record of declip_jax.data.convert: {str(found)[:200]}")
  if not all(isinstance(caption, str) for caption in fields["captions"]):
    raise ValueError("a caption is no text")
  return Example(**{**fields, "captions": tuple(fields["captions"])})
