"""ArrayRecord files as `declip_jax.data.convert` writes them, for data that are read many times.

A record is a msgpack map of the fields of `Example`: `image` (an encoded file, bytes), `captions` (list of str),
`label` (int, -1 for none), `id` (str, where the sample came from before). Files have one record in a group and no
compression, for images are compressed already: to read a record of an open file is one access to the disk, and a
damaged one costs no other. To open a file is a read of about 1 MiB from its end, so a process keeps as many open as
half its descriptors (`ulimit -n`), 128 at least; where there are more files than that, most reads open one first.

The library that reads them opens local files only. Of a file behind a URL (gs://, s3://), a process that first needs a
record of it makes a copy for all processes of the machine, see `copies.folder`: a shuffled stream soon has copied all
files, so the disk must hold the set. For larger ones choose a WebDataset, which is read where it lies. To count the
records, when such a set is first opened, 512 KiB from the end of each file are transferred, or 2 MiB, or 8 MiB, ...
where the file has more than about 20,000 records.
"""

from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
import json
from pathlib import Path
import resource
import tempfile
from typing import Any, NamedTuple

from array_record.python import array_record_module
import msgpack
import numpy as np

from declip_jax.data.sources.base import BadSample, Example
from declip_jax.data.storage import copies, files, indexes, patterns, remote

WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access
_READER_BUFFER = 2**15  # bytes
_INDEX_FORMAT = 2
_THREADS = 32
_TAIL = 2**19  # bytes of a file behind a URL in which its footer is looked for first: the last 64 KiB, and 20 a record


def _most_readers() -> int:
  """How many files a process keeps open, of all its sources."""
  limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
  return 2**16 if limit == resource.RLIM_INFINITY else max(limit // 2, 128)


class _Files(NamedTuple):
  """Paths, their stamps, and how many records there are in each and all those before it."""

  paths: list[str]
  stamps: list[files.Stamp]
  ends: list[int]


class ArrayRecord:
  """Files of records as a `Source`; make it with `open_arrayrecord`."""

  def __init__(self, name: str, index: Path):
    self.name = name
    self._index = index

  @cached_property
  def _files(self) -> _Files:
    try:
      about = json.loads(self._index.read_text())
      return _Files(about["files"], list(map(tuple, about["stamps"])), np.cumsum(about["counts"]).tolist())
    except (ValueError, LookupError, TypeError) as error:
      raise ValueError(f"{self._index}: a damaged index ({error}): delete it, and it is built anew") from error

  @property
  def stamp(self) -> str:
    """Changes when the files do."""
    return self._index.stem

  @cached_property
  def classnames(self) -> tuple[str, ...]:
    """Line i of classnames.txt beside the first file is class i; empty without that file."""
    return files.classnames(self._files.paths[0])

  @property
  def skipped(self) -> dict[str, int]:
    return {}  # the conversion left out what could not be used

  def __len__(self) -> int:
    return self._files.ends[-1]

  def __getitem__(self, index: int) -> Example:
    """Reads one record.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      BadSample: the record is damaged, or its file is gone.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name}: no record {index}, there are {len(self)}")
    paths, stamps, ends = self._files
    file = bisect_right(ends, index)
    position = index - (ends[file - 1] if file else 0)
    place = f"{paths[file]}, record {position}"
    try:
      reader = _reader(paths[file], stamps[file])
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
    location: the files, as in `patterns.expand`: `/data/cc12m/*.array_record`, `gs://bucket/cc12m/*.array_record`. The
      folder of the first file may contain a classnames.txt.

  Raises:
    FileNotFoundError: a pattern matches no file.
    ValueError: a file is cut off, or no ArrayRecord file; or there is no record.
  """
  paths = patterns.expand(location)
  stamps = files.stamps(paths)
  stamp = [_INDEX_FORMAT, list(zip(paths, stamps, strict=True))]
  build = partial(_build, paths=paths, stamps=stamps)
  source = ArrayRecord(f"arrayrecord:{location}", indexes.find_or_build(stamp, paths[0], build, ".json"))
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
def _reader(path: str, stamp: files.Stamp) -> Any:
  """An open file, of the state that its stamp tells, for all sources and threads of this process."""
  return open_reader(copies.local_copy(path, stamp))


def _build(path: Path, paths: list[str], stamps: list[files.Stamp]) -> None:
  with ThreadPoolExecutor(min(_THREADS, len(paths))) as pool:
    counts = list(pool.map(_count, paths, stamps))
  path.write_text(json.dumps({"files": paths, "stamps": stamps, "counts": counts}))


def _count(path: str, stamp: files.Stamp) -> int:
  return _count_at_end(path, stamp[0]) if remote.is_url(path) else open_reader(path).num_records()


def _count_at_end(url: str, size: int) -> int:
  """Records of a file behind a URL. Its footer is read from a file of the same size that has nothing but the end."""
  length = min(_TAIL, size)
  while True:
    with tempfile.NamedTemporaryFile() as file:
      file.truncate(size)  # takes no room
      file.seek(size - length)
      file.write(files.read(url, size - length, length))
      file.flush()
      try:
        return open_reader(file.name).num_records()
      except ValueError as error:
        if length == size:
          raise ValueError(str(error).replace(file.name, url)) from None
    length = min(4 * length, size)


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
