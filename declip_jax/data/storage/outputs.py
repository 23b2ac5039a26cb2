"""Files to write, local or remote, that appear complete or not at all."""

from collections.abc import Iterator
import contextlib
import fcntl
import glob
import os
from pathlib import Path
import tempfile
import uuid

from declip_jax.data.storage import files, indexes, remote


@contextlib.contextmanager
def writing(path: str) -> Iterator[Path]:
  """Yields a local file to write, which becomes `path`, a path or URL, unless an error is raised."""
  folder, _, name = path.rpartition("/")
  temporaries, prefix = _place_for(folder)
  local = temporaries / f"{prefix[1:]}{name}"  # `temporary` adds the dot
  with temporary(local) as file:
    yield file
    files.upload(file, path) if remote.is_url(path) else files.commit(file, local)


def write_text(path: str, text: str) -> None:
  """Writes a text file, in UTF-8, to a path or URL."""
  with writing(path) as file:
    file.write_text(text, "utf-8", errors="replace")


def write(path: Path, content: bytes) -> None:
  """Writes a local file, so that every reader finds the old one or the new one, whoever else writes it meanwhile.

  What writers left behind when they were killed is deleted.

  Raises:
    OSError: it cannot be written; the old file remains.
  """
  with temporary(path) as file:
    with file.open("wb") as opened:
      opened.write(content)
      opened.flush()
      os.fsync(opened.fileno())  # otherwise an empty file may have the name after a power cut
    file.replace(path)
  _remove_unlocked(path.parent, f".{path.name}.")


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
  """Yields a file to write before it becomes `path`, locked so that no other process deletes it as a leftover.

  Its name is another one for each caller, also on other hosts that write the same path.
  """
  while True:
    file = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with file.open("xb") as opened:
      with contextlib.suppress(OSError):  # of file systems without locks
        fcntl.flock(opened, fcntl.LOCK_EX)
      if not file.exists():  # deleted as a leftover before it was locked
        continue
      try:
        yield file
      finally:
        file.unlink(missing_ok=True)
    return


def remove_leftovers(folder: str) -> None:
  """Deletes temporary files for a folder that no process is writing: locks end with their process, even if killed."""
  _remove_unlocked(*_place_for(folder))


def _remove_unlocked(folder: Path, prefix: str) -> None:
  for file in folder.glob(f"{glob.escape(prefix)}*.tmp"):
    with contextlib.suppress(OSError), file.open("rb+") as opened:
      fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
      file.unlink(missing_ok=True)


def _place_for(folder: str) -> tuple[Path, str]:
  """Where temporary files for a folder are, and the start of their names."""
  if remote.is_url(folder):
    return Path(tempfile.gettempdir()), f".declip_jax-{indexes.digest(folder)}-"
  return Path(folder), "."
