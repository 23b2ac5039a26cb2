"""A thread for a tracker whose calls may be slow, fail or hang."""

from collections.abc import Callable, Mapping
from pathlib import Path
import queue
import threading
import time

from absl import logging

from declip_jax.reporting.trackers.base import Tracker

CLOSE_SECONDS = 30.0  # time that a tracker has at the end of a run
_WAITING = 1000  # calls that wait for a slow tracker


class Background(Tracker):
  """Opens and calls a tracker in a thread of its own, so that it neither delays nor ends the run.

  The first problem gives a warning, and later ones are silent: the tracker cannot be opened, and all its calls are
  dropped; a call fails; a thousand calls are waiting, and further ones are dropped; or it does not end in time.

  Args:
    name: name of the tracker in warnings.
    open_tracker: opens it.
    seconds: time for the waiting calls and the tracker's own end, after which `close` returns.
  """

  def __init__(self, name: str, open_tracker: Callable[[], Tracker], seconds: float = CLOSE_SECONDS):
    self._name, self._open, self._seconds = name, open_tracker, seconds
    self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_WAITING)
    self._warned, self._closed = False, False
    self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
    self._thread.start()

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._call(lambda tracker: tracker.log(step, values))

  def picture(self, step: int, name: str, path: Path) -> None:
    self._call(lambda tracker: tracker.picture(step, name, path))

  def text(self, step: int, name: str, text: str) -> None:
    self._call(lambda tracker: tracker.text(step, name, text))

  def roll_back(self, step: int) -> None:
    self._call(lambda tracker: tracker.roll_back(step))

  def close(self, finished: bool) -> None:
    """Waits for the tracker, but not longer than its time; a second call does nothing."""
    if self._closed:
      return
    self._closed, deadline = True, time.monotonic() + self._seconds
    try:
      for call in (lambda tracker: tracker.close(finished), None):
        self._calls.put(call, timeout=max(0.0, deadline - time.monotonic()))
      self._thread.join(max(0.0, deadline - time.monotonic()))
    except queue.Full:
      pass
    if self._thread.is_alive():
      self._warn(f"has not ended within {self._seconds:g} s, and is abandoned")

  def _call(self, call: Callable[[Tracker], None]) -> None:
    try:
      self._calls.put_nowait(call)
    except queue.Full:
      self._warn(f"does not keep up: {_WAITING} calls are waiting, and further ones are dropped")

  def _work(self) -> None:
    tracker = None
    try:
      tracker = self._open()
    except (Exception, SystemExit) as error:
      self._warn(f"could not be opened, and is off until the next start: {type(error).__name__}: {error}")
    while (call := self._calls.get()) is not None:
      try:
        if tracker is not None:
          call(tracker)
      except (Exception, SystemExit) as error:
        self._warn(f"failed: {type(error).__name__}: {error}")

  def _warn(self, what: str) -> None:
    if not self._warned:
      self._warned = True
      logging.warning("config.trackers.%s %s; metrics.jsonl has all metrics", self._name, what)
