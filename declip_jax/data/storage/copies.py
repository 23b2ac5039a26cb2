"""Local copies of remote files, for readers that can open local files only."""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import fcntl
import glob
import os
from pathlib import Path
import shutil
import tempfile

from absl import logging

from declip_jax.data.storage import files, indexes, remote
from declip_jax.data.storage.files import Stamp

_PIECE = 2**25  # bytes per request while a file is copied; a request that fails is repeated
_COPIES = "copies"  # the folder of copies in the user's cache folder


def local_copy(path: str, stamp: Stamp) -> str:
  """Returns a local file with the contents of `path`: itself if it is local, else a copy, made on first use.

  Raises:
    OSError: as in `fetch`.
  """
  if not remote.is_url(path):
    return path
  copy = folder(path, {"": stamp}) / path.rpartition("/")[2]
  fetch(path, stamp, copy)
  return os.fspath(copy)


def folder(url: str, stamps: Mapping[str, Stamp]) -> Path:
  """Returns the local folder for copies of a remote file, or of the files in a remote folder; `fetch` fills it.

  It is in `declip_jax/copies/` of the user's cache folder, and all data sets and processes that read these files share
  it. Copies of earlier versions of the files are deleted; other copies never are.

  Args:
    url: the URL of the file or folder.
    stamps: the stamp of every file that matters, by name; if any changes, the folder is another one.
  """
  return indexes.cache_folder() / _COPIES / f"{indexes.digest(url)}-{indexes.digest(sorted(stamps.items()))}"


def fetch(url: str, stamp: Stamp, path: Path) -> None:
  """Copies a remote file to `path`, in a `folder` of copies, unless it exists; it appears complete or not at all.

  If several processes or threads want it, one copies it while the others wait. A lock, which the system releases when
  its process ends, ensures this; on a disk without locks each makes its own copy and one of them remains.

  Raises:
    OSError: the file cannot be read, or it changed since `stamp` was taken, or the disk is full; in the last case the
      message names the bytes needed.
  """
  if path.is_file():
    return
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise OSError(f"cannot store a copy of {url}: {error}; set XDG_CACHE_HOME to a writable folder") from None
  with _exclusive(path) as locked:
    if path.is_file():
      return
    if locked:  # so these belong to processes that were killed
      for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)
    try:
      _copy(url, stamp, path)
    except OSError as error:
      if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      free = f"{shutil.disk_usage(path.parent).free:,} bytes are free; set XDG_CACHE_HOME to a folder on a larger disk"
      message = f"{url}: its copy needs {stamp[0]:,} bytes in {path.parent}, but {free}"
      raise OSError(error.errno, message) from error
  for former in path.parent.parent.glob(f"{path.parent.name.partition('-')[0]}-*"):
    if former != path.parent:
      shutil.rmtree(former, ignore_errors=True)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
  """Waits until no other thread or process works on a file; yields False if the disk has no locks."""
  lock = path.with_name(f".{path.name}.lock")
  with lock.open("wb") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX)
      locked = True
    except OSError:
      locked = False
    yield locked
    lock.unlink(missing_ok=True)  # only now: those that still wait for it will find the file


def _copy(url: str, stamp: Stamp, path: Path) -> None:
  _expect(url, stamp)
  if shutil.disk_usage(path.parent).free < stamp[0]:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # now, rather than after most of the transfer
  logging.info("copying %s, %.1f MiB, to %s", url, stamp[0] / 2**20, path)
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
    temporary = Path(file.name)
    try:
      for start in range(0, stamp[0], _PIECE):
        file.write(files.read(url, start, min(_PIECE, stamp[0] - start)))
      file.close()
      _expect(url, stamp)  # otherwise the pieces may be of two versions
      files.commit(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)


def _expect(url: str, expected: Stamp) -> None:
  with remote.filesystem(url) as (system, name):
    system.invalidate_cache(system._parent(name))
  found = files.stamp(url)
  if found != tuple(expected):
    raise OSError(f"{url} changed since it was opened: {found}, not {tuple(expected)} (bytes, version); open it again")
