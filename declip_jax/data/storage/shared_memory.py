"""Names for the shared memory through which readers pass batches, so that what killed processes leave is removed.

The reader processes of one main process share a prefix. The main process holds a lock on
a file until it ends, which shows other processes whether it is still running, even in another container.
"""

import atexit
import fcntl
from functools import cache, partial
from multiprocessing import shared_memory
import os
from pathlib import Path
import secrets

from absl import logging

_FOLDER = Path("/dev/shm")
_NAME, _LOCK = "declip_jax-", ".lock"


@cache
def prefix() -> str:
  """Returns the prefix of the names of this process and its readers; "" where shared memory is not a folder."""
  while _FOLDER.is_dir():
    name = f"{_NAME}{secrets.token_hex(8)}"
    path = _FOLDER / f"{name}{_LOCK}"
    try:
      file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except BlockingIOError:  # another process has just taken it for abandoned, and is removing it
      continue
    except OSError as error:
      logging.warning("%s: %s; shared memory is not removed if this process is killed", path, error)
      break
    if path.exists():  # otherwise another process removed it before it was locked
      atexit.register(partial(path.unlink, missing_ok=True))
      return f"{name}-"
  return ""


def use_prefix(prefix: str) -> None:
  """Makes the names of this process's shared memory begin with a prefix, unless it is empty."""
  if prefix:  # Python has no public name for this
    setattr(shared_memory, "_make_filename", lambda: f"/{prefix}{secrets.token_hex(8)}")  # noqa: B010


def remove_abandoned() -> None:
  """Removes the shared memory of killed processes of this user."""
  for lock in _FOLDER.glob(f"{_NAME}*{_LOCK}"):
    try:
      file = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # of another user, or removed meanwhile
      continue
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if os.fstat(file).st_uid == os.getuid():
        for block in _FOLDER.glob(f"{_NAME}*"):
          if block.name.startswith(f"{lock.name.removesuffix(_LOCK)}-"):
            block.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
    except OSError:  # its process is running
      continue
    finally:
      os.close(file)
