"""Samples that take too long: each thread's sample is known, and a thread that hangs in one is abandoned.

A sample may hang in a system call, or in a library that never returns. Python cannot end a thread, but another one can
continue with the samples after it. That requires Python's lock. If C code holds the lock forever, the whole process
must be ended, see `end_if_stuck`; this is possible for a worker, but not for training that reads in its own process.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import ctypes
import faulthandler
import hashlib
import math
import threading
import time
from typing import Any, NamedTuple, TypeVar

from declip_jax.data.sources import BadSample, Source

SECONDS = 60.0  # for one sample
_TOLERANCE = 2.0  # multiple of the seconds for one sample after which a process whose lock is held ends

Made = TypeVar("Made")
Key = str  # of a sample: a digest of its source, the data in it and its index

_reading: dict[int, "_Time"] = {}  # what each thread of this process reads
_slow: dict[Key, list[float]] = {}  # samples that took too long in this process, and how many seconds each try had


class _Time(NamedTuple):
  """The time for samples that a thread reads together.

  Attributes:
    keys: keys of the samples.
    leave: called if the thread hangs.
  """

  keys: Sequence[Key]
  leave: Callable[[], None]


def key_of(source: Source, index: int) -> Key:
  """The key of a sample, which changes with the data of its source."""
  text = f"{source.name}\0{getattr(source, 'stamp', '')}\0{index}"
  return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


def check(key: Key, place: str, tries: int = 1) -> None:
  """Raises BadSample if a sample, named `place`, took too long in that many tries before."""
  if len(seconds := _slow.get(key, ())) >= tries:
    raise BadSample("too slow", f"{place}: not read within {seconds[-1]:g} s" + (", twice" if tries == 2 else ""))


@contextlib.contextmanager
def reading(keys: Sequence[Key], leave: Callable[[], None] = lambda: None) -> Iterator[None]:
  """Times samples that this thread reads together; `leave` is called if the thread is abandoned in them."""
  thread = threading.get_ident()
  _reading[thread] = _Time(keys, leave)
  try:
    yield
  finally:
    _reading.pop(thread, None)


def make_all(make: Callable[[int], Made], count: int, seconds: float) -> list[Made]:
  """Returns `make(0)`, ..., `make(count - 1)`.

  Args:
    make: a function that reads samples, within `reading`.
    count: number of calls.
    seconds: seconds for the samples of one call; 0 means no limit. A call that takes longer is repeated, and `check`
      then knows its samples.

  Raises:
    BaseException: whatever `make` raises.
  """
  if not seconds:
    return [make(number) for number in range(count)]
  made: list[Made] = []
  while len(made) < count:
    work = _Work(make, len(made), count)
    work.start()
    _wait(work, seconds)
    made += work.made
    if work.error is not None:
      raise work.error
  return made


class _Work(threading.Thread):
  """Calls `make` for some numbers, in order.

  Attributes:
    made: the results so far.
    error: what was raised, if anything.
    done: set at the end.
  """

  def __init__(self, make: Callable[[int], Any], start: int, stop: int):
    super().__init__(daemon=True)
    self._make, self._numbers, self._left = make, range(start, stop), False
    self.made: list[Any] = []
    self.error: BaseException | None = None
    self.done = threading.Event()

  def run(self) -> None:
    try:
      for number in self._numbers:
        made = self._make(number)
        if self._left:
          return
        self.made.append(made)
    except BaseException as error:  # raised again in the thread that waits
      if not self._left:
        self.error = error
    finally:
      self.done.set()

  def leave(self) -> None:
    """Abandons the thread; it ends when it returns to Python."""
    self._left = True
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident or 0), ctypes.py_object(_Left))


class _Left(SystemExit):
  """Ends a thread that was abandoned."""


def _wait(work: _Work, seconds: float) -> None:
  """Waits until work is done or hangs in a sample.

  It counts waits and not seconds: the whole time for which a process is suspended is one wait.
  """
  step, waits, before = min(1.0, seconds / 4), 0, None
  while not work.done.wait(step):
    now = _reading.get(work.ident or 0)
    waits, before = waits + 1 if now is before else 0, now
    if now is not None and waits * step >= seconds:
      for key in now.keys:
        _slow.setdefault(key, []).append(seconds)
      now.leave()
      return work.leave()


def end_if_stuck(seconds: float) -> None:
  """Makes this process end, with the stacks of its threads, when one of them holds Python's lock for too long.

  The timer is a C thread, which needs no lock. A worker that ends in this way is replaced, see `pipeline.TrainStream`.

  Args:
    seconds: seconds for one sample; 0 never ends the process.
  """
  if seconds:
    threading.Thread(target=_push_timer, args=(math.ceil(_TOLERANCE * seconds),), daemon=True).start()


def _push_timer(seconds: int) -> None:
  while True:
    faulthandler.dump_traceback_later(seconds, exit=True)
    time.sleep(seconds / 8)
