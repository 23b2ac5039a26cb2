"""The progress display: one line, redrawn on a terminal or in a notebook, repeated now and then in a log file.

`track` counts what an iteration yields, and `Bar` what other processes report. `message` prints above the bars.
"""

from collections.abc import Iterable, Iterator
import contextlib
import sys
import threading
from typing import Any, Self, TextIO, TypeVar

from absl import logging
from tqdm import tqdm

T = TypeVar("T")
_REDRAW_SECONDS = 0.1  # on a terminal
_LOG_SECONDS = 10.0  # between two lines of a log file
_QUIET_SECONDS = 1.0  # what takes less shows no bar
_LIVE_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:,}/{total:,}{unit} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
_LOG_FORMAT = "{desc}: {n:,}/{total:,}{unit} ({percentage:.0f}%), {rate_noinv_fmt}, {remaining} left"
_OPEN_FORMAT = "{desc}: {n:,}{unit} [{elapsed}, {rate_noinv_fmt}]"  # without a total


def track(
  iterable: Iterable[T],
  description: str,
  total: int | None = None,
  unit: str = "items",
  *,
  stream: TextIO | None = None,
) -> Iterator[T]:
  """Yields the items of `iterable` and shows how many there were; see `Bar` for the arguments.

  `total` is taken from the length of `iterable` if it has one.
  """
  if total is None and hasattr(iterable, "__len__"):
    total = len(iterable)
  with Bar(description, total, unit, stream=stream) as bar:
    for item in iterable:
      yield item
      bar.update()


class Bar:
  """A progress bar with a count, a rate and the time left; nothing is shown in the first second.

  Args:
    description: text in front of the count.
    total: expected final count, None if unknown.
    unit: plural noun for what is counted.
    initial: count to start from; it does not enter the rate.
    stream: where to draw, standard error if None.
  """

  def __init__(
    self,
    description: str,
    total: int | None = None,
    unit: str = "items",
    *,
    initial: int = 0,
    stream: TextIO | None = None,
  ):
    stream = sys.stderr if stream is None else stream
    live = is_live(stream)
    self._bar = _Line(
      desc=description,
      total=total,
      unit=f" {unit}",
      initial=initial,
      file=stream if live else _LogFile(stream),
      dynamic_ncols=live,
      mininterval=_REDRAW_SECONDS if live else _LOG_SECONDS,
      miniters=1,
      delay=_QUIET_SECONDS,
      bar_format=_OPEN_FORMAT if total is None else _LIVE_FORMAT if live else _LOG_FORMAT,
    )
    self._stack = contextlib.ExitStack()
    self._stack.callback(self._bar.close)
    self._stack.enter_context(logs_above(stream))

  def update(self, count: int = 1) -> None:
    """Adds to the count."""
    self._bar.update(count)

  def set(self, count: int) -> None:
    """Sets the count, for progress that is reported as a total."""
    self._bar.update(count - self._bar.n)

  def close(self) -> None:
    """Leaves the last state on the screen and moves below it; a second call does nothing."""
    self._stack.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def message(text: str, *, stream: TextIO | None = None) -> None:
  """Prints a line above all bars of a stream, standard error if None."""
  stream = sys.stderr if stream is None else stream
  with _Line.external_write_mode(file=stream) if is_live(stream) else contextlib.nullcontext():
    stream.write(text + "\n")
    stream.flush()


@contextlib.contextmanager
def logs_above(stream: TextIO) -> Iterator[None]:
  """Makes absl's log lines appear above the bars of a live stream while the context is open."""
  handler: Any = logging.get_absl_handler().python_handler
  before = handler.stream
  if not is_live(stream) or before is not stream:
    yield
    return
  handler.setStream(_Above(stream))
  try:
    yield
  finally:
    handler.setStream(before)


def is_live(stream: TextIO) -> bool:
  """Whether a line of the stream can be redrawn: it is a terminal or the output of a notebook cell."""
  return stream.isatty() or type(stream).__module__.startswith("ipykernel")


class _Line(tqdm):
  """tqdm without its monitor thread and its lock between processes."""

  monitor_interval = 0
  _lock = threading.RLock()


class _LogFile:
  """A stream to which tqdm's redrawn line is written as lines of their own."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> None:
    if text := " ".join(text.split()):  # tqdm pads with spaces
      self._stream.write(text + "\n")

  def flush(self) -> None:
    self._stream.flush()


class _Above:
  """A stream whose lines are printed above the bars of another one."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> None:
    with _Line.external_write_mode(file=self._stream):
      self._stream.write(text)

  def flush(self) -> None:
    self._stream.flush()
