"""Stopping a run by Ctrl-C, SIGTERM, SIGHUP or preemption: it saves a checkpoint first.

A signal is noticed between two steps, or at once while the run waits for data or for the compiler.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import threading
from types import FrameType
from typing import TypeVar

import jax

from declip_jax.reporting.progress import message

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
  """Training was stopped by `signum` at `step`, for which there is a checkpoint unless it is the first one."""

  def __init__(self, step: int, signum: int):
    super().__init__(f"stopped at step {step} by {signal.Signals(signum).name}; run the same command again to resume")
    self.step, self.signum = step, signum


class _Interrupted(BaseException):
  """A signal arrived while the run was waiting."""


class StopRequest:
  """The signal that asked the run to stop.

  Args:
    preempted: whether any process of several received SIGTERM, given a number that rises with each call.
    start: the first of these numbers minus one.

  Attributes:
    signum: first signal that this process received, 0 if none.
  """

  def __init__(self, preempted: Callable[[int], bool] = lambda number: False, start: int = 0):
    self.signum = 0
    self._preempted, self._number = preempted, start
    self._waiting = False

  def check(self) -> int:
    """Returns the signal that asked any process to stop, 0 if none; each process calls it once per step."""
    self._number += 1
    return self.signum or (signal.SIGTERM if self._preempted(self._number) else 0)

  def note(self, signum: int) -> None:
    """Records a signal, and interrupts the call of `wait_for`."""
    self.signum = self.signum or signum
    if self._waiting:
      self._waiting = False
      raise _Interrupted

  def wait_for(self, call: Callable[[], T]) -> T | None:
    """Returns what `call` returns, or None as soon as a signal arrives; it must be safe to interrupt `call`."""
    try:
      try:
        self._waiting = True
        return None if self.signum else call()
      finally:
        self._waiting = False
    except _Interrupted:
      return None


@contextlib.contextmanager
def stop_signals(request: StopRequest) -> Iterator[None]:
  """Records Ctrl-C, SIGTERM and SIGHUP in `request` while the context is open; a second Ctrl-C interrupts at once.

  With several processes JAX itself listens for SIGTERM and makes all of them stop at the same step, so the others are
  turned into SIGTERM. SIGHUP stays ignored under nohup. Outside the main thread, as in some notebooks, signals are not
  handled.
  """

  def note(signum: int, frame: FrameType | None) -> None:
    del frame
    if signum == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(RuntimeError):  # the signal arrived while the same stream was being written
      message(
        f"{signal.Signals(signum).name}: the run saves its steps and stops; "
        f"{'a second ' if signum == signal.SIGINT else ''}Ctrl-C would end it at once, and lose the steps since the "
        "newest checkpoint"
      )
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      request.note(signum)

  if threading.current_thread() is not threading.main_thread():
    yield
    return
  handled = [signum for signum in _SIGNALS if signum != signal.SIGTERM or jax.process_count() == 1]
  if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    handled.remove(signal.SIGHUP)
  before = {signum: signal.signal(signum, note) for signum in handled}
  try:
    yield
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)
