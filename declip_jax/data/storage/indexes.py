"""Indexes of data sets: derived files that are built once and shared by all processes and hosts."""

from collections.abc import Callable
import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path
import shutil
import tempfile
import time
from typing import Any

from declip_jax.data.storage import files, remote

_FOLDER = ".declip_jax"  # for indexes, next to the data
_LEFT_BEHIND = 24 * 3600  # seconds; no index takes this long to build


def digest(value: Any) -> str:
  """24 hexadecimal digits that depend on all of `value`, which must be JSON."""
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


def find_or_build(stamp: Any, near: str, build: Callable[[Path], Any], suffix: str) -> Path:
  """Returns the file of an index and builds it if it does not exist.

  The index is in `.declip_jax/` next to the data, or in the user's cache folder ($XDG_CACHE_HOME/declip_jax, else
  ~/.cache/declip_jax) if that folder is not writable or the data are remote. Its name is the `digest` of `stamp`, so an
  index whose `stamp` includes the stamps of the data files is never older than they are. It appears complete or not at
  all, even if the build is killed; if several processes build it, one wins. Files that killed processes left in the
  folder are deleted after a day.

  Args:
    stamp: everything that the index depends on, as JSON: paths and stamps of files, and the version of its format.
    near: one of the data files.
    build: writes the index to the given path. It may keep intermediate files next to that path, under names that start
      with a dot, and may end with an OSError if it finds that another process has built the index.
    suffix: the suffix of the file's name, such as ".npy".

  Raises:
    OSError: no folder can store the index, or whatever `build` raises.
  """
  name, cache = digest(stamp) + suffix, cache_folder()
  folders = [cache] if remote.is_url(near) else [Path(files.local_path(near)).parent / _FOLDER, cache]
  found = next((folder / name for folder in folders if os.path.isfile(folder / name)), None)
  if found is not None:
    return found
  failure = None
  for folder in folders:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=name, delete=False) as file:
        temporary = Path(file.name)
    except OSError as error:
      failure = error
      continue
    try:
      _clear(folder)
      build(temporary)
      files.commit(temporary, folder / name)
      return folder / name
    except OSError as error:
      if (folder / name).is_file():  # another process was faster
        return folder / name
      if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      failure = error
    finally:
      temporary.unlink(missing_ok=True)
  raise OSError(f"cannot store the index of {near}: {failure}; set XDG_CACHE_HOME to a writable folder")


def cache_folder() -> Path:
  """The folder of this package in the user's cache folder."""
  return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "declip_jax"


def _clear(folder: Path) -> None:
  """Deletes what killed builders left in a folder of indexes."""
  for path in folder.glob(".*"):
    with contextlib.suppress(OSError):  # another process was faster, or it belongs to another user
      if path.stat().st_mtime < time.time() - _LEFT_BEHIND:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
