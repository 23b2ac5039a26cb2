"""Ends a process whose training stands still, so that whoever started it can start it again."""

import faulthandler
import math
import os
from pathlib import Path
import sys
import threading
import time
from typing import Self

import jax

EXIT_CODE = 70
_LAST_WORDS = 10.0  # seconds for message and stacks: the directory may be what hangs


class Watchdog:
  """A thread that ends the process, by exit code 70, when the time between two calls of `beat` becomes too long.

  The stacks of all threads go to `hang.HOST.txt` in the directory of the run. A peer that dies is noticed sooner, by
  the heartbeats of JAX; this is for what hangs and still beats: a collective, a mount, a worker. It begins with the
  first call of `beat`: compiling the first step may take as long as it likes.

  Args:
    workdir: of the run.
    seconds: between two beats, at most; 0 never ends the process.
  """

  def __init__(self, workdir: Path, seconds: float):
    self._path = workdir / f"hang.{jax.process_index()}.txt"
    self._seconds, self._closed = seconds, threading.Event()
    self._latest = math.inf, ""
    if seconds:
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

  def beat(self, doing: str) -> None:
    """Life goes on; `doing` names what begins now."""
    self._latest = time.monotonic(), doing

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()

  def _watch(self) -> None:
    while not self._closed.wait(min(self._seconds / 10, 5.0)):
      since, doing = self._latest
      if time.monotonic() - since > self._seconds:
        speaker = threading.Thread(target=self._tell, args=(doing,), daemon=True)
        speaker.start()
        speaker.join(_LAST_WORDS)
        os._exit(EXIT_CODE)

  def _tell(self, doing: str) -> None:
    print(
      f"error: {doing} has not ended within config.safety.hang_timeout={self._seconds:g} s: this process ends, and so "
      f"do the others (stacks of all threads in {self._path})",
      file=sys.stderr,
      flush=True,
    )
    with self._path.open("w") as file:
      file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {doing}\n")
      file.flush()
      faulthandler.dump_traceback(file, all_threads=True)
