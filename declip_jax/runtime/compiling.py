"""Compiling, which may take minutes: what the terminal shows meanwhile, and a signal that arrives meanwhile."""

from collections.abc import Callable, Iterator
import contextlib
import os
import threading
from typing import TypeVar

import jax

from declip_jax.reporting.progress import message

T = TypeVar("T")
_FIRST_LINE = 60.0  # seconds; each further line comes after twice the time
# JAX records events of these names when it has traced a function, when it has lowered it, and when the program is
# compiled and written to the compile cache, but has not run.
_STAGES = "/jax/core/compile/"


@contextlib.contextmanager
def slow_compile_lines(what: str) -> Iterator[None]:
  """Prints after 1, 2, 4, ... minutes that `what` is still being compiled, in place of XLA's alarm.

  XLA logs its alarm, a suggestion to file a bug, as an error, so errors of its log are hidden while the context is
  open; those that matter are raised, too. A level of logging that the user has chosen is left as it is.
  """
  done = threading.Event()

  def report() -> None:
    waited, due = 0.0, _FIRST_LINE
    while not done.wait(due - waited):
      message(f"still compiling {what}, after {due / 60:.0f} min")
      waited, due = due, 2 * due

  threading.Thread(target=report, name="slow compile", daemon=True).start()
  try:
    with _hidden_log():
      yield
  finally:
    done.set()


@contextlib.contextmanager
def _hidden_log() -> Iterator[None]:
  """Hides what XLA logs, unless the user has chosen what it logs."""
  # "1" is what JAX itself sets.
  is_chosen = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") != "1" or jax.config.jax_logging_level != "NOTSET"
  if is_chosen:
    yield
    return
  jax.config.update("jax_logging_level", "CRITICAL")
  try:
    yield
  finally:
    jax.config.update("jax_logging_level", "WARNING")  # "NOTSET" leaves XLA's level as it is
    jax.config.update("jax_logging_level", "NOTSET")


class _Abandoned(BaseException):
  """The program is no longer needed."""


def unless_unwanted(call: Callable[[], T], is_unwanted: Callable[[], bool]) -> T | None:
  """Calls a jitted function for the first time, or returns None if its result is no longer needed by then.

  In that case nothing has run: its arguments are still there. A program that was already being compiled is finished,
  and is in the compile cache.

  Args:
    call: calls the function.
    is_unwanted: asked in this thread after tracing, lowering and compiling, of each function in it.
  """
  thread = threading.get_ident()

  def listen(event: str, seconds: float, **about: str | int) -> None:
    del seconds, about
    if event.startswith(_STAGES) and threading.get_ident() == thread and is_unwanted():
      raise _Abandoned

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    return call()
  except _Abandoned:
    return None
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
