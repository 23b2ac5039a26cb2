"""Files to write, local or remote, that appear complete or not at all."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
from pathlib import Path
import tempfile

from declip_jax.data.storage import files, indexes, remote


@contextlib.contextmanager
def writing(path: str) -> Iterator[Path]:
  """Yields a local file to write, which becomes `path`, a path or URL, unless an error is raised."""
  folder, _, name = path.rpartition("/")
  temporaries, prefix = _place_for(folder)
  local = temporaries / f"{prefix}{name}"
  with temporary(local) as file:
    yield file
    files.upload(file, path) if remote.is_url(path) else files.commit(file, local)


def write_text(path: str, text: str) -> None:
  """Writes a text file, in UTF-8, to a path or URL."""
  with writing(path) as file:
    file.write_text(text, "utf-8", errors="replace")


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
  """Yields a file to write before it becomes `path`, locked so that no other process deletes it as a leftover."""
  file = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with file.open("wb") as opened:
      with contextlib.suppress(OSError):  # of file systems without locks
        fcntl.flock(opened, fcntl.LOCK_EX)
      yield file
  finally:
    file.unlink(missing_ok=True)


def remove_leftovers(folder: str) -> None:
  """Deletes temporary files for a folder that no process is writing: locks end with their process, even if killed."""
  temporaries, prefix = _place_for(folder)
  for file in temporaries.glob(f".{prefix}*.tmp"):
    with contextlib.suppress(OSError), file.open("rb+") as opened:
      fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
      file.unlink(missing_ok=True)


def _place_for(folder: str) -> tuple[Path, str]:
  """Where temporary files for a folder are, and the start of their names, after the dot."""
  if remote.is_url(folder):
    return Path(tempfile.gettempdir()), f"declip_jax-{indexes.digest(folder)}-"
  return Path(folder), ""
