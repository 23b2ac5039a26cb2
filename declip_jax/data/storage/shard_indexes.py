"""Indexes of the samples in shards: one span of bytes for each sample, found once, so that any of them can be read.

The index of a set of shards is one memory-mapped .npy file of spans `[n 3]`, int64 of (shard, start, stop), see
`indexes.find_or_build`; what else is known about the shards follows as JSON. Its name depends on the paths, sizes and
times of change of the shards, so it is never older than they are, and any number of processes and hosts can share it.
One file for the whole set rather than one per shard means one mapping per worker and one path per pickle, however many
shards there are.

Large sets are scanned by one process per core. The results of groups of 16 shards are kept next to the index, so that
an interrupted build continues when the set is opened again within a day, and hosts that share the folder share the
work. They are deleted once the index exists.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import errno
from functools import partial
import json
from pathlib import Path
import shutil
from typing import Any

from jaxtyping import Int64
import numpy as np

from declip_jax.data.storage import files, indexes, jobs
from declip_jax.reporting import progress

_GROUP = 16  # shards per job; as many threads scan them, which hides the latency of disks and servers
_ALONE = 2**32  # bytes of shards, some seconds of work; for more it is faster to start other processes

# From the path and the size in bytes of a shard to the spans of its samples, `[m 2]` int64, and values that are JSON.
Scan = Callable[[str, int], tuple[Any, ...]]
# From what was found in all shards, with numbers of samples in place of their spans, to the JSON of the index.
Summary = Callable[[list[list[Any]]], dict[str, Any]]


def find_or_build(shards: Sequence[str], version: Any, scan: Scan, summarize: Summary, location: str) -> Path:
  """Returns the index of shards, and builds it if it does not exist.

  Args:
    shards: paths or URLs of the shards.
    version: format of the index and rules of `scan`, as JSON: another version gets another index.
    scan: finds the samples of a shard; it is pickled if other processes help.
    summarize: makes the JSON of the index.
    location: for messages.

  Raises:
    FileNotFoundError: a shard is missing.
    ValueError: whatever `summarize` raises; then there is no index.
  """
  stamps = files.stamps(shards)
  stamp = [version, list(zip(shards, stamps, strict=True))]
  numbered = [(number, path, size) for number, (path, (size, _)) in enumerate(zip(shards, stamps, strict=True))]
  build = partial(_build, key=indexes.key(stamp), shards=numbered, scan=scan, summarize=summarize, location=location)
  index = indexes.find_or_build(stamp, shards[0], build, ".npy")
  shutil.rmtree(_pieces_folder(index.parent, index.stem), ignore_errors=True)
  return index


def read(index: Path) -> tuple[Int64[np.ndarray, "n 3"], dict[str, Any]]:
  """The spans of an index, mapped but without the slow indexing of np.memmap, and its JSON.

  Raises:
    ValueError: the index is damaged.
  """
  try:
    spans = np.load(index, mmap_mode="r")
    rest = indexes.contents(index)[spans.offset + spans.nbytes :]
    return np.asarray(spans), json.loads(bytes(rest))
  except (ValueError, EOFError) as error:
    raise ValueError(f"{index}: damaged index ({error}); delete it to build it again") from error


def _pieces_folder(folder: Path, key: str) -> Path:
  """The folder for the pieces of an index; its name starts with a dot, so that it is deleted once it is old."""
  return folder / f".{key}.parts"


def _build(
  path: Path, key: str, shards: list[tuple[int, str, int]], scan: Scan, summarize: Summary, location: str
) -> None:
  """Writes the index.

  Args:
    path: the file to write. The index will be next to it; if it exists already, another process was faster.
    key: the stem of the index's name.
    shards: number, path and size in bytes of each shard.
    scan: see `find_or_build`.
    summarize: see `find_or_build`.
    location: for messages.
  """
  folder, index = _pieces_folder(path.parent, key), path.with_name(f"{key}.npy")
  groups = [shards[start : start + _GROUP] for start in range(0, len(shards), _GROUP)]
  todo = [jobs.Job(folder / f"{number:06d}", group, len(group)) for number, group in enumerate(groups)]
  for job in todo:  # of an interrupted build
    if job.path.is_file() and not indexes.is_usable(job.path, indexes.digest(job.argument), shards[0][1]):
      job.path.unlink(missing_ok=True)
  processes = jobs.cores() if len(groups) > 1 and sum(size for *_, size in shards) >= _ALONE else 1
  write = partial(_write_piece, scan)
  try:
    with progress.Bar(f"indexing {location}", len(shards), "shards") as bar:
      jobs.make_files(write, todo, processes if processes > 1 else 0, index.is_file, bar.set, interval=0.5)
    _join([job.path for job in todo], path, summarize)
  except (OSError, ValueError) as error:
    if isinstance(error, ValueError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
      shutil.rmtree(folder, ignore_errors=True)  # these shards have no index, or another folder will have it
    raise
  finally:
    with contextlib.suppress(OSError):
      folder.rmdir()  # if it is empty


def _write_piece(scan: Scan, path: Path, shards: list[tuple[int, str, int]], advance: jobs.Advance) -> None:
  """Writes the piece of an index for some consecutive shards: a line of JSON, then their raw spans `[m 3]`."""

  def scan_one(shard: tuple[int, str, int]) -> tuple[Any, ...]:
    found = scan(*shard[1:])
    advance(1)
    return found

  with ThreadPoolExecutor(len(shards)) as pool:
    scans = list(pool.map(scan_one, shards))
  with path.open("wb") as file:
    file.write(json.dumps([[len(spans), *about] for spans, *about in scans]).encode() + b"\n")
    for (number, *_), (spans, *_) in zip(shards, scans, strict=True):
      file.write(np.insert(spans, 0, number, axis=1).tobytes())
  indexes.seal(path, indexes.digest(shards))


def _join(pieces: list[Path], path: Path, summarize: Summary) -> None:
  """Writes the index from its pieces, one after the other."""
  scans = [scan for piece in pieces for scan in json.loads(_read_piece(piece)[0])]
  about = summarize(scans)
  index = np.lib.format.open_memmap(path, "w+", np.int64, (sum(count for count, *_ in scans), 3))
  start = 0
  for piece in pieces:
    spans = np.frombuffer(_read_piece(piece)[1], np.int64).reshape(-1, 3)
    index[start : start + len(spans)] = spans
    start += len(spans)
  index.flush()
  with path.open("ab") as file:
    file.write(json.dumps(about).encode())


def _read_piece(piece: Path) -> tuple[bytes, bytes]:
  line, _, spans = bytes(indexes.contents(piece)).partition(b"\n")
  return line, spans
