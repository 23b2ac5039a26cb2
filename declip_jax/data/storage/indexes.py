"""Indexes of data sets: derived files that are built once and shared by all processes and hosts.

An index ends with its checksums: CRC-32 of each piece of its contents, then the length of the contents, the name of the
index and the CRC-32 of all that. Each process that opens a data set reads its index once to compare them, in several
threads; the processes that it starts do not. So nothing that is read from an index was changed since it was built.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import contextlib
import errno
import hashlib
import json
import mmap
import os
from pathlib import Path
import shutil
import struct
import tempfile
import time
from typing import Any
import zlib

from absl import logging

from declip_jax.data.storage import files, remote

_FOLDER = ".declip_jax"  # for indexes, next to the data
_LEFT_BEHIND = 24 * 3600  # seconds; no index takes this long to build
_FORMAT = 1  # of the checksums, part of the name of an index
_PIECE = 2**24  # bytes that a checksum covers
_END = struct.Struct("<Q24s8sL")  # length of the contents, name, magic bytes, checksum of these and of the checksums
_MAGIC = b"declipjx"
_OTHERS_WRITE = 0o022


def digest(value: Any) -> str:
  """24 hexadecimal digits that depend on all of `value`, which must be JSON."""
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


def key(stamp: Any) -> str:
  """The name of an index without its suffix, see `find_or_build`."""
  return digest([_FORMAT, stamp])


def find_or_build(stamp: Any, near: str, build: Callable[[Path], Any], suffix: str) -> Path:
  """Returns the file of an index and builds it if it does not exist, is damaged, or could be written by other users.

  The index is in `.declip_jax/` next to the data, or in the user's cache folder ($XDG_CACHE_HOME/declip_jax, else
  ~/.cache/declip_jax) if that folder is not writable or the data are remote. Its name is the `key` of `stamp`, so an
  index whose `stamp` includes the stamps of the data files is never older than they are. It appears complete or not at
  all, even if the build is killed; if several processes build it, one wins. Files that killed processes left in the
  folder are deleted after a day. An index is trusted if it belongs to this user, to root or to the owner of the data,
  and nobody else may write it.

  Args:
    stamp: everything that the index depends on, as JSON: paths and stamps of files, and the version of its format.
    near: one of the data files.
    build: writes the index to the given path. It may keep intermediate files next to that path, under names that start
      with a dot, and may end with an OSError if it finds that another process has built the index.
    suffix: the suffix of the file's name, such as ".npy".

  Raises:
    OSError: no folder can store the index, or whatever `build` raises.
  """
  name, cache = key(stamp), cache_folder()
  folders = [cache] if remote.is_url(near) else [Path(files.local_path(near)).parent / _FOLDER, cache]
  indexes = [folder / f"{name}{suffix}" for folder in folders]
  found = [index for index in indexes if os.path.isfile(index)]
  for index in found:
    if is_usable(index, name, near):
      return index
  failure = None
  for index in indexes:
    folder = index.parent
    try:
      folder.mkdir(parents=True, exist_ok=True)
      with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=index.name, delete=False) as file:
        temporary = Path(file.name)
      temporary.chmod(0o644)  # as `files.commit` does
    except OSError as error:
      failure = error
      continue
    try:
      _clear(folder)
      if folder is not cache and any(_distrust(file, near) for file in (temporary, index) if file.exists()):
        continue  # the disk does not know owners, or another user's file has this name
      if index in found:  # it is damaged
        index.unlink(missing_ok=True)
      build(temporary)
      seal(temporary, name)
      files.commit(temporary, index)
      return index
    except OSError as error:
      if is_usable(index, name, near):  # another process was faster
        return index
      if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      failure = error
    finally:
      temporary.unlink(missing_ok=True)
  raise OSError(f"cannot store the index of {near}: {failure}; set XDG_CACHE_HOME to a writable folder")


def is_usable(path: Path, name: str, near: str) -> bool:
  """Whether a file exists, is trusted and is what was sealed under a name; otherwise a warning says what is wrong.

  Args:
    path: the file of an index or of a part of one.
    name: see `seal`.
    near: one of the data files.
  """
  if not os.path.isfile(path):
    return False
  try:
    problem = _distrust(path, near) or find_damage(path, name)
  except OSError as error:
    problem = str(error)
  if problem:
    logging.warning("%s is not used, and is built again: %s", path, problem)
  return not problem


def contents(index: Path) -> memoryview:
  """Maps the contents of an index into memory; `find_or_build` has compared them with their checksums.

  Raises:
    ValueError: the file is cut off or no index.
    OSError: it cannot be read.
  """
  with index.open("rb") as file:
    mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # ValueError for an empty file
  length, _, _ = _end(mapped)
  return mapped[:length]


def seal(path: Path, name: str) -> None:
  """Appends the checksums to the contents of an index or of a part of one.

  Args:
    path: the file.
    name: 24 characters by which `find_damage` recognises that it is this file and no other.
  """
  with path.open("rb") as file:
    size = os.fstat(file.fileno()).st_size
    mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
  sums = _checksums(mapped)
  end = _END.pack(len(mapped), name.encode(), _MAGIC, 0)[:-4]
  with path.open("ab") as file:
    file.write(sums + end + struct.pack("<L", zlib.crc32(sums + end)))


def find_damage(path: Path, name: str) -> str:
  """Returns how a file differs from what was sealed under a name, "" if it does not.

  Raises:
    OSError: the file cannot be read.
  """
  try:
    with path.open("rb") as file:
      mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    length, found, sums = _end(mapped)
  except ValueError as error:
    return str(error)
  if found != name.encode():
    return f"it is the index {found.decode(errors='replace')}"
  return "" if _checksums(mapped[:length]) == sums else "its contents do not match their checksums"


def cache_folder() -> Path:
  """The folder of this package in the user's cache folder."""
  return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "declip_jax"


def _end(mapped: memoryview) -> tuple[int, bytes, bytes]:
  """Length of the contents, name and checksums; the end of the file alone decides whether they are what was written."""
  place = len(mapped) - _END.size
  length, name, magic, checksum = _END.unpack_from(mapped, place) if place >= 0 else (0, b"", b"", 0)
  start = place - 4 * -(-length // _PIECE)
  if magic != _MAGIC or start != length or zlib.crc32(mapped[start:-4]) != checksum:
    raise ValueError("it is cut off or not an index")
  return length, name, bytes(mapped[start:place])


def _checksums(data: memoryview) -> bytes:
  with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
    sums = pool.map(lambda start: zlib.crc32(data[start : start + _PIECE]), range(0, len(data), _PIECE))
    return b"".join(struct.pack("<L", checksum) for checksum in sums)


def _distrust(path: Path, near: str) -> str:
  """Returns why a user who can change neither this package nor the data may have written a file, "" if none may."""
  stat = path.stat()
  if stat.st_uid not in {os.geteuid(), 0, *_owner(near)}:
    return f"it belongs to user {stat.st_uid}"
  return "other users may write it" if stat.st_mode & _OTHERS_WRITE else ""


def _owner(near: str) -> list[int]:
  """The owner of a local data file, who could change the data themselves."""
  if remote.is_url(near):
    return []
  with contextlib.suppress(OSError):
    return [os.stat(files.local_path(near)).st_uid]
  return []


def _clear(folder: Path) -> None:
  """Deletes what killed processes left in a folder of indexes."""
  for path in folder.glob(".*"):
    with contextlib.suppress(OSError):  # another process was faster, or it belongs to another user
      if path.stat().st_mtime < time.time() - _LEFT_BEHIND:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
