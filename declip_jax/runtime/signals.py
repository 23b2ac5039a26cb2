"""Stopping a run: Ctrl-C, SIGTERM and preemption are noticed between two steps, so that a checkpoint can be saved."""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import threading
from types import FrameType

import jax


class Stopped(Exception):
  """Training was stopped by `signum` and saved a checkpoint at `step`."""

  def __init__(self, step: int, signum: int):
    super().__init__(f"stopped at step {step} by {signal.Signals(signum).name}; run the same command again to resume")
    self.step, self.signum = step, signum


class StopRequest:
  """The signal that asked the run to stop.

  Args:
    preempted: whether any process of several received SIGTERM, given a number that rises with each call.
    start: the first of these numbers minus one.

  Attributes:
    signum: signal that this process received, 0 if none.
  """

  def __init__(self, preempted: Callable[[int], bool] = lambda number: False, start: int = 0):
    self.signum = 0
    self._preempted, self._number = preempted, start

  def check(self) -> int:
    """Returns the signal that asked any process to stop, 0 if none; each process calls it once per step."""
    self._number += 1
    return self.signum or (signal.SIGTERM if self._preempted(self._number) else 0)


@contextlib.contextmanager
def stop_signals(request: StopRequest) -> Iterator[None]:
  """Notes Ctrl-C and SIGTERM in `request` while the context is open; a second Ctrl-C interrupts at once.

  With several processes JAX itself listens for SIGTERM and makes all of them stop at the same step, so Ctrl-C is turned
  into SIGTERM. Outside the main thread, as in some notebooks, signals are left alone.
  """

  def note(signum: int, frame: FrameType | None) -> None:
    del frame
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      request.signum = signum

  if threading.current_thread() is not threading.main_thread():
    yield
    return
  handled = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
  before = {signum: signal.signal(signum, note) for signum in handled}
  try:
    yield
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)
