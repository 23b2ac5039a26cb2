"""The progress display: one line, redrawn on a terminal or in a notebook, and printed periodically in a log file.

`track` counts what an iteration yields, `Bar` what other processes report, and `TrainingProgress` follows a run.
`message` prints above the line.

Output that cannot be written is dropped: a closed pipe, a full disk under the log or a lost terminal does not end a
run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import math
import os
import shutil
import sys
import threading
import time
from typing import Any, Self, TextIO, TypeVar

from absl import logging
from tqdm import tqdm

T = TypeVar("T")
_REDRAW_SECONDS = 0.1  # on a terminal
_LOG_SECONDS = 10.0  # between two lines of a log file
_SMOOTH = 20  # steps
_FEW = 10  # images per second
_SLOW_STEP = 1.0  # seconds
_QUIET_SECONDS = 1.0  # seconds; shorter work shows no bar
_LIVE_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:,}/{total:,} {noun} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
_LOG_FORMAT = "{desc}: {n:,}/{total:,} {noun} ({percentage:.0f}%), {rate_noinv_fmt}, {remaining} left"
_OPEN_FORMAT = "{desc}: {n:,} {noun} [{elapsed}, {rate_noinv_fmt}]"  # without a total


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
    initial: count to start from; it does not affect the rate.
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
      file=_Display(stream) if live else _LogFile(stream),
      dynamic_ncols=live,
      mininterval=_REDRAW_SECONDS if live else _LOG_SECONDS,
      miniters=1,
      delay=_QUIET_SECONDS,
      bar_format=_OPEN_FORMAT if total is None else _LIVE_FORMAT if live else _LOG_FORMAT,
    )
    self._paused_at: float | None = None
    self._stack = contextlib.ExitStack()
    self._stack.callback(self._bar.close)
    self._stack.enter_context(logs_above(stream))

  def pause(self) -> None:
    """Stops the clock: what is done until `resume` changes neither the rate nor the time left."""
    if self._paused_at is None:
      self._paused_at = self._bar._time()

  def resume(self) -> None:
    """Starts the clock after `pause`."""
    if self._paused_at is not None:
      seconds, self._paused_at = self._bar._time() - self._paused_at, None
      self._bar.start_t += seconds
      self._bar.last_print_t += seconds

  def update(self, count: int = 1) -> None:
    """Adds to the count."""
    self._bar.update(count)
    if count:
      for listener in _listeners:
        listener(self._bar.desc)

  def set(self, count: int) -> None:
    """Sets the count, for progress that is reported as a total."""
    self.update(count - self._bar.n)

  def close(self) -> None:
    """Leaves the last state on the screen and moves below it; a second call does nothing."""
    self.resume()
    self._stack.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


_listeners: list[Callable[[str], object]] = []


@contextlib.contextmanager
def listening(listener: Callable[[str], object]) -> Iterator[None]:
  """Calls `listener` with the description of each bar that advances while the context is open."""
  _listeners.append(listener)
  try:
    yield
  finally:
    _listeners.remove(listener)


def message(text: str, *, stream: TextIO | None = None) -> None:
  """Prints a line above all bars of a stream, standard error if None."""
  stream = sys.stderr if stream is None else stream
  display = _Display(stream)
  with _Line.external_write_mode(file=display) if is_live(stream) else contextlib.nullcontext():
    display.write(text + "\n")
    display.flush()


def drop_lost_streams() -> None:
  """Redirects standard output and error to /dev/null if they cannot be written, since Python flushes them at exit."""
  for stream in (sys.stdout, sys.stderr):
    try:
      if stream is not None:
        stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except ValueError:  # it is closed
      pass


@contextlib.contextmanager
def logs_above(stream: TextIO) -> Iterator[None]:
  """Makes absl's log lines appear above the bars of a live stream while the context is open."""
  handler: Any = logging.get_absl_handler().python_handler
  before = handler.stream
  if not is_live(stream) or before is not stream:
    yield
    return
  handler.setStream(_Above(_Display(stream)))
  try:
    yield
  finally:
    handler.setStream(before)


def is_live(stream: TextIO | None) -> bool:
  """Whether a line of the stream can be redrawn: it is a terminal or the output of a notebook cell."""
  if stream is None or getattr(stream, "closed", False):
    return False
  return stream.isatty() or type(stream).__module__.startswith("ipykernel")


class TrainingProgress:
  """A status line about a run: step, losses, time, speed, and the share of the time spent waiting for data.

  Losses are averages over about the last `_SMOOTH` steps, of which those are read that end `_REDRAW_SECONDS` or more
  after one another. A terminal shows one line, cut to its width, the least important fields first; a log file gets a
  plain line every `min_interval` seconds.

  Args:
    total_steps: step at which training ends.
    batch_size: global batch size.
    devices: number of devices that share the batch.
    enabled: False prints nothing, for all processes but the first.
    min_interval: seconds between two lines of a log file.
    stream: where to draw, standard error if None.
    now: returns seconds.
  """

  def __init__(
    self,
    total_steps: int,
    batch_size: int,
    *,
    devices: int = 1,
    enabled: bool = True,
    min_interval: float = _LOG_SECONDS,
    stream: TextIO | None = None,
    now: Callable[[], float] = time.perf_counter,
  ):
    self._total_steps, self._devices = total_steps, devices
    self.enter_stage("", total_steps, batch_size)
    self._enabled, self._now = enabled, now
    self._stream = sys.stderr if stream is None else stream
    self._display = _Display(self._stream)
    self._live = is_live(self._stream)
    self._interval = _REDRAW_SECONDS if self._live else min_interval
    self._began, self._read_at, self._drawn_at = self._now(), -math.inf, -math.inf
    self._losses: dict[str, _Average] = {}
    self._line: _Line | None = None
    self._stack = contextlib.ExitStack()

  def enter_stage(self, name: str, last_step: int, batch_size: int) -> None:
    """Names the stage that begins, "" in a run with one stage; the time left is that up to its last step."""
    self._stage, self._last_step, self._batch_size = name, last_step, batch_size

  def update(
    self,
    step: int,
    metrics: Mapping[str, Any],
    *,
    images_per_second: float = math.nan,
    utilisation: float | None = None,
    wait: float = 0.0,
  ) -> None:
    """Redraws the line if it is due.

    Args:
      step: number of steps done.
      metrics: metrics of this step, of which "loss", each "loss/<term>", "lr" and "temperature" are shown; device
        arrays are fetched at most every `_REDRAW_SECONDS`.
      images_per_second: over all devices; NaN if unknown.
      utilisation: model FLOPs utilisation, 0 to 1; None if unknown.
      wait: share of the time that the loop waited for data, 0 to 1.
    """
    now, ends = self._now(), step >= self._total_steps
    if not self._enabled:
      return
    if now - self._read_at >= _REDRAW_SECONDS or ends:
      self._read_at = now
      for name, value in metrics.items():
        if name.startswith("loss"):
          self._losses.setdefault(name, _Average()).add(step, float(value))
    if now - self._drawn_at >= self._interval or ends:
      self._drawn_at = now
      speed = [*self._speed_fields(step, images_per_second, utilisation), f"wait {wait:.0%}"]
      if images_per_second > 0 and (seconds := self._batch_size / images_per_second) >= _SLOW_STEP:
        speed.append(f"{seconds:,.1f} s/step")
      speed.append(f"{_duration(now - self._began)} elapsed")
      self._draw("  ".join(self._fit(self._fields(step, metrics, speed))))

  def message(self, text: str) -> None:
    """Prints a line above the live line."""
    if self._enabled:
      message(text, stream=self._stream)

  def close(self) -> None:
    """Leaves the last line on the screen and moves below it."""
    if self._line is not None:
      self._line.close()
      self._line = None

  def __enter__(self) -> Self:
    self._stack.enter_context(logs_above(self._stream))
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
    self._stack.close()

  def _fields(self, step: int, metrics: Mapping[str, Any], speed: list[str]) -> list[str]:
    """Returns the fields of the line, the most important first."""
    fields = [f"step {step:,}/{self._total_steps:,} {step / self._total_steps:.1%}"]
    fields += [f"stage {self._stage} to {self._last_step:,}"] if self._stage else []
    fields += [f"mean loss {self._losses['loss'].value:.3f}"] if "loss" in metrics else []
    fields += speed
    terms = [name for name in metrics if name.startswith("loss/")]
    fields += [f"{name.removeprefix('loss/')} {self._losses[name].value:.3f}" for name in terms]
    others = {"lr": ".2e", "temperature": ".4f", "dense_temperature": ".4f"}
    return fields + [f"{name} {float(metrics[name]):{digits}}" for name, digits in others.items() if name in metrics]

  def _speed_fields(self, step: int, images_per_second: float, utilisation: float | None) -> list[str]:
    if not images_per_second > 0:  # NaN
      return []
    left = (self._last_step - step) * self._batch_size / images_per_second
    each = f" ({images_per_second / self._devices:,.4g} per device)" if self._devices > 1 else ""
    of_what = " of the stage" if self._stage else ""
    digits = ",.0f" if images_per_second >= _FEW else ".2g"
    fields = [f"{_duration(left)} left{of_what}", f"{images_per_second:{digits}} images/s{each}"]
    return fields if utilisation is None else [*fields, f"{utilisation:.1%} of peak"]

  def _fit(self, fields: list[str]) -> list[str]:
    if self._live:
      columns = _columns(self._stream) - 1  # some terminals wrap in the last column
      while len(fields) > 1 and len("  ".join(fields)) > columns:
        fields = fields[:-1]
      fields[-1] = fields[-1][:columns]
    return fields

  def _draw(self, text: str) -> None:
    if not self._live:
      self._display.write(text + "\n")
      self._display.flush()
    elif self._line is None:
      self._line = _Line(desc=text, file=self._display, bar_format="{desc}", leave=True)
    else:
      self._line.set_description_str(text)


class _Average:
  """An exponential moving average over steps, of values that need not be those of all steps.

  Attributes:
    value: the average; the last value if that is not finite.
  """

  def __init__(self) -> None:
    self.value, self._sum, self._weight, self._step = math.nan, 0.0, 0.0, 0

  def add(self, step: int, value: float) -> None:
    """Adds the value of a step."""
    self.value = value
    if math.isfinite(value):
      decay = math.exp(-max(step - self._step, 1) / _SMOOTH)
      self._sum = decay * self._sum + (1 - decay) * value
      self._weight = decay * self._weight + 1 - decay
      self.value, self._step = self._sum / self._weight, step


def _columns(stream: TextIO) -> int:
  # Asks the stream itself: standard output, which `shutil` asks, may be a file. A terminal may answer 0.
  try:
    columns = os.get_terminal_size(stream.fileno()).columns
  except (OSError, ValueError):
    columns = 0
  return columns or shutil.get_terminal_size().columns


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f"{days}d {hours}h"
  if hours:
    return f"{hours}h {minutes:02}m"
  return f"{minutes}m {seconds:02}s"


class _Line(tqdm):
  """tqdm without its monitor thread and its lock between processes."""

  monitor_interval = 0
  _lock = threading.RLock()

  @property
  def format_dict(self) -> dict[str, Any]:
    """What the format may show: also `noun`, the unit of the count, in the singular for 1."""
    found = super().format_dict
    count = found["n"] if found["total"] is None else found["total"]
    unit = found["unit"].strip()
    return found | {"noun": unit.removesuffix("s") if count == 1 else unit}


class _Display:
  """A stream that drops what it cannot write; equal to that stream, since tqdm compares the streams of bars."""

  def __init__(self, stream: TextIO | None):
    self._stream = stream

  def write(self, text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
      if self._stream is not None:
        self._stream.write(text)

  def flush(self) -> None:
    with contextlib.suppress(OSError, ValueError):
      if self._stream is not None:
        self._stream.flush()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def __eq__(self, other: object) -> bool:
    return self._stream is (other._stream if isinstance(other, _Display) else other)

  def __hash__(self) -> int:
    return id(self._stream)


class _LogFile:
  """A stream to which tqdm's redrawn line is written as separate lines."""

  def __init__(self, stream: TextIO):
    self._stream = _Display(stream)

  def write(self, text: str) -> None:
    if text := " ".join(text.split()):  # tqdm pads with spaces
      self._stream.write(text + "\n")

  def flush(self) -> None:
    self._stream.flush()


class _Above:
  """A stream whose lines are printed above its bars."""

  def __init__(self, stream: _Display):
    self._stream = stream

  def write(self, text: str) -> None:
    with _Line.external_write_mode(file=self._stream):
      self._stream.write(text)

  def flush(self) -> None:
    self._stream.flush()
