"""Compiling, which may take minutes: what the terminal shows meanwhile, and a signal that arrives meanwhile.

Python handles a signal between two of its own instructions, in the main thread, and XLA has none. So XLA compiles in
another thread, while the main thread waits.
"""

import atexit
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
import contextlib
import os
import threading
from typing import TypeVar

import jax

from declip_jax.command_line import COMPILER
from declip_jax.reporting.progress import message

T = TypeVar("T")
_FIRST_LINE = 60.0  # seconds; each further line comes after twice the time
# JAX records events of these names when it has traced a function, when it has lowered it, and when the program is
# compiled and written to the compile cache, but has not run.
_STAGES = "/jax/core/compile/"
_COMPILED = f"{_STAGES}backend_compile_duration"
_POLL = 0.1  # seconds


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
    with hidden_alarms():
      yield
  finally:
    done.set()


@contextlib.contextmanager
def hidden_alarms() -> Iterator[None]:
  """Hides errors that XLA and JAX log, the alarm about slow compiling among them, unless the user chose a level."""
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


def interruptible(call: Callable[[], T]) -> T:
  """Returns what `call` returns, in another thread, so that Ctrl-C ends the wait at once; the call itself continues."""
  return _start(call).result()


def unless_unwanted(call: Callable[[], T], is_unwanted: Callable[[], bool]) -> T | None:
  """Calls a jitted function for the first time, or returns None if its result is no longer needed by then.

  In that case nothing has run or will run: its arguments are still there. XLA may still be compiling, and JAX writes
  the program to the compile cache if the process lives until then.

  Args:
    call: calls the function; it is called in another thread.
    is_unwanted: whether the result is no longer needed; asked again and again, in both threads.
  """
  # XLA runs between the end of one of JAX's stages and that of the last one. The caller may leave during that time,
  # but not while the program runs.
  lock, state = threading.Lock(), {"thread": 0, "compiling": False, "abandoned": False}

  def listen(event: str, seconds: float, **about: str | int) -> None:
    del seconds, about
    if not event.startswith(_STAGES) or threading.get_ident() != state["thread"]:
      return
    with lock:
      state["compiling"] = event != _COMPILED
      if state["abandoned"] or is_unwanted():
        raise _Abandoned

  def called() -> T | None:
    state["thread"] = threading.get_ident()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      return call()
    except _Abandoned:
      return None
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)

  result = _start(called)
  while not wait([result], _POLL).done:
    with lock:
      if state["compiling"] and is_unwanted():
        state["abandoned"] = True
        return None
  return result.result()


def _start(call: Callable[[], T]) -> Future[T]:
  """Calls a function in a thread that does not keep the process alive; see `command_line.COMPILER`."""
  result: Future[T] = Future()

  def run() -> None:
    try:
      result.set_result(call())
    except BaseException as error:  # the caller raises it
      result.set_exception(error)

  atexit.unregister(_join_compilers)
  atexit.register(_join_compilers)  # again, so that it comes first: what is cleaned up later may be in use until then
  threading.Thread(target=run, name=COMPILER, daemon=True).start()
  return result


def _join_compilers() -> None:
  """Waits for XLA, which crashes when Python ends around it; see `command_line.run` for commands."""
  for thread in threading.enumerate():
    if thread.name == COMPILER:
      thread.join()
