"""Files that a run appends to."""

import contextlib
from pathlib import Path

from absl import logging


class Appender:
  """A file that is only appended to, and that tolerates a disk that is full for a while.

  TensorBoard's own writer does not: its thread ends, and training waits for it forever.
  """

  def __init__(self, path: Path):
    self._path, self._file = path, path.open("ab", buffering=0)
    self._waiting, self._warned = b"", False

  def append(self, data: bytes) -> None:
    """Writes bytes; those that cannot be written are kept for the next call."""
    self._waiting += data
    try:
      while self._waiting:
        self._waiting = self._waiting[self._file.write(self._waiting) :]
      self._warned = False
    except OSError as error:
      if not self._warned:
        self._warned = True
        logging.warning("%s cannot be written for now: %s", self._path, error)

  def close(self) -> None:
    """Tries to write one last time."""
    if not self._file.closed:
      self.append(b"")
      with contextlib.suppress(OSError):
        self._file.close()
