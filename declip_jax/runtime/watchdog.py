"""Exits a process whose training has stalled, so that its supervisor can restart it."""

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
_REPORT_SECONDS = 10.0  # for message and stacks before the exit: the directory may be what hangs


class Watchdog:
  """A thread that ends the process with exit code 70 when the time between two calls of `beat` becomes too long.

  The stacks of all threads are written to `hang.HOST.txt` in the working directory. JAX's heartbeats detect a dead peer
  sooner; this detects a process that hangs while its heartbeats continue: in a collective, a mount, a worker. It starts
  with the first call of `beat`, so compiling the first step may take as long as it needs.

  Args:
    workdir: working directory.
    seconds: maximum time between two beats; 0 never ends the process.
  """

  def __init__(self, workdir: Path, seconds: float):
    self._path = workdir / f"hang.{jax.process_index()}.txt"
    self._seconds, self._closed = seconds, threading.Event()
    self._latest = math.inf, ""
    if seconds:
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

  def beat(self, activity: str) -> None:
    """Reports that the process is alive and that `activity` begins."""
    self._latest = time.monotonic(), activity

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()

  def _watch(self) -> None:
    while not self._closed.wait(min(self._seconds / 10, 5.0)):
      since, activity = self._latest
      if time.monotonic() - since > self._seconds:
        reporter = threading.Thread(target=self._report, args=(activity,), daemon=True)
        reporter.start()
        reporter.join(_REPORT_SECONDS)
        os._exit(EXIT_CODE)

  def _report(self, activity: str) -> None:
    print(
      f"error: {activity} has not finished within config.safety.hang_timeout={self._seconds:g} s: this process exits, "
      f"and the others follow (stacks of all threads in {self._path})",
      file=sys.stderr,
      flush=True,
    )
    with self._path.open("w") as file:
      file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {activity}\n")
      file.flush()
      faulthandler.dump_traceback(file, all_threads=True)
