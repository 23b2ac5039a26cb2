"""Exits a process whose training has stalled, so that its supervisor can restart it."""

import faulthandler
import os
from pathlib import Path
import threading
import time
from typing import Self

import jax

from declip_jax.reporting.progress import message

EXIT_CODE = 70
_REPORT_SECONDS = 10.0  # seconds for message and stacks before the exit: the directory itself may hang


class _Beat:
  """An activity that began; `limited` is whether its time is limited."""

  def __init__(self, activity: str, limited: bool):
    self.activity, self.limited = activity, limited


class Watchdog:
  """A thread that ends the process with exit code 70 when the time between two calls of `beat` becomes too long.

  The stacks of all threads are written to `hang.HOST.txt` in the working directory. JAX's heartbeats detect a dead peer
  sooner; this detects a process that hangs while its heartbeats continue: in a collective, a mount, a worker. It starts
  with the first call of `beat`. Time in which this thread did not run does not count: the process was suspended.

  Args:
    workdir: working directory.
    seconds: maximum time between two beats; 0 never ends the process.
  """

  def __init__(self, workdir: Path, seconds: float):
    self._path = workdir / f"hang.{jax.process_index()}.txt"
    self._seconds, self._closed = seconds, threading.Event()
    self._latest = _Beat("", limited=False)
    if seconds > 0:
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

  def beat(self, activity: str) -> None:
    """Reports that the process is alive and that `activity` begins."""
    self._latest = _Beat(activity, limited=True)

  def exempt(self, activity: str) -> None:
    """Reports that `activity` begins, which may take as long as it needs."""
    self._latest = _Beat(activity, limited=False)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()

  def _watch(self) -> None:
    interval = min(self._seconds / 10, 5.0)
    latest, waited, now = self._latest, 0.0, time.monotonic()
    while not self._closed.wait(interval):
      before, now = now, time.monotonic()
      waited += min(now - before, 2 * interval)
      if latest is not self._latest:
        latest, waited = self._latest, 0.0
      if latest.limited and waited > self._seconds:
        reporter = threading.Thread(target=self._report, args=(latest.activity,), daemon=True)
        reporter.start()
        reporter.join(_REPORT_SECONDS)
        os._exit(EXIT_CODE)

  def _report(self, activity: str) -> None:
    message(
      f"error: {activity} has not finished within config.safety.hang_timeout={self._seconds:g} s: this process exits, "
      f"and the others follow (stacks of all threads in {self._path})"
    )
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with self._path.open("w") as file:
      file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {activity}\n")
      file.flush()
      faulthandler.dump_traceback(file, all_threads=True)
