"""What a run says about itself: `metrics.jsonl` and TensorBoard, a live progress line, and a table at the end.

`metrics.jsonl` in the work directory is the one truth: a JSON object per line, `{"step": 300, "time": 1.7e9, "loss":
5.1, ...}`, in order of step even after a run was killed and resumed. TensorBoard's files say the same for its viewer.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import logging
import math
import numbers
import os
from pathlib import Path
import shutil
import socket
import struct
import sys
import time
from typing import Any, Self, TextIO

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

_SPEED_MEMORY = 30.0  # seconds after which a measured speed counts 1/e in the average
_REDRAW_SECONDS = 0.1  # on a terminal; faster than the eye only costs time


class MetricWriter:
  """Appends the metrics of a run to `workdir/metrics.jsonl` and to the event files in `workdir/tensorboard`.

  A line reaches the operating system before `write` returns, so a killed process loses none; on a full disk it waits in
  memory, with a warning, until there is space again. Resuming drops what lies beyond the restored step, and a last line
  that a crash tore, with an atomic rewrite. JSON has no NaN: a number that is not finite is written as the string
  "NaN", "Infinity" or "-Infinity".

  Args:
    workdir: a directory of a file system that can append (mount a bucket, or keep the metrics beside it).
    resume_step: the step the run starts from; lines of later steps belong to a future that did not happen.
    enabled: False on all processes but the first; then nothing is touched.

  Raises:
    ValueError: `workdir` is the address of a bucket, or a line of `metrics.jsonl` other than the last is broken.
  """

  def __init__(self, workdir: str | os.PathLike[str], *, resume_step: int, enabled: bool = True):
    self._enabled = enabled
    if not enabled:
      return
    self._path = _metrics_path(workdir)
    folder = self._path.parent / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    self._events = _Appender(folder / f"events.out.tfevents.{time.time_ns() // 10**6}.{socket.gethostname()}")
    self._events.append(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))
    self._lines: _Appender | None = None
    self.go_back(resume_step)

  def go_back(self, step: int) -> None:
    """Drops what lies beyond a step, as resuming from it does."""
    if not self._enabled:
      return
    if self._lines:
      self._lines.close()
    if self._path.exists():
      _drop_steps_after(step, self._path)
    self._lines = _Appender(self._path)
    # The viewer hides earlier events from this step on.
    began = SessionLog(status=SessionLog.START)
    self._events.append(_record(Event(wall_time=time.time(), step=step + 1, session_log=began)))

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one line.

    Args:
      step: optimizer steps done.
      values: name to a number, or to an array of one element (a device array is fetched).

    Raises:
      ValueError: a value is not one number, or bears the name "step" or "time".
    """
    if not self._enabled:
      return
    now = time.time()
    values = {name: _as_float(name, value) for name, value in values.items()}
    self._lines.append(_to_line({"step": int(step), "time": round(now, 3), **values}).encode())
    summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
    self._events.append(_record(Event(wall_time=now, step=int(step), summary=summary)))

  def close(self) -> None:
    """Closes both files; a second call does nothing."""
    if self._enabled:
      self._lines.close()
      self._events.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class _Appender:
  """A file that is only appended to, and outlives a disk that is full for a while.

  TensorBoard's own writer does not: its thread would end, and training wait for it forever.
  """

  def __init__(self, path: Path):
    self._path, self._file = path, path.open("ab", buffering=0)
    self._waiting, self._told = b"", False

  def append(self, data: bytes) -> None:
    """Writes, or keeps for the next time what cannot be written."""
    self._waiting += data
    try:
      while self._waiting:
        self._waiting = self._waiting[self._file.write(self._waiting) :]
      self._told = False
    except OSError as error:
      if not self._told:
        self._told = True
        logging.getLogger(__name__).warning("%s cannot be written, for now: %s", self._path, error)

  def close(self) -> None:
    """Tries for the last time."""
    if not self._file.closed:
      self.append(b"")
      with contextlib.suppress(OSError):
        self._file.close()


def _record(event: Event) -> bytes:
  """An event as TensorBoard's files have it: length and content, a checksum behind each."""
  data = event.SerializeToString()
  length = struct.pack("<Q", len(data))
  return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, float]]:
  """Reads the lines of `workdir/metrics.jsonl`, in order; safe while the run still writes.

  A line counts once its newline is there: a torn last one is left out.

  Raises:
    FileNotFoundError: no metrics there.
    ValueError: a finished line is no JSON object.
  """
  path = _metrics_path(workdir)
  *lines, _ = path.read_text(errors="replace").split("\n")
  return [_from_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _metrics_path(workdir: str | os.PathLike[str]) -> Path:
  if "://" in os.fspath(workdir):
    raise ValueError(f"metrics cannot be appended at {os.fspath(workdir)!r}: expected a local or mounted directory")
  return Path(workdir) / "metrics.jsonl"


def _drop_steps_after(step: int, path: Path) -> None:
  temporary = path.with_suffix(".jsonl.tmp")
  with temporary.open("w") as file:
    file.writelines(_to_line(row) for row in read_metrics(path.parent) if row["step"] <= step)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _as_float(name: str, value: Any) -> float:
  array = np.asarray(value)
  if name in ("step", "time") or array.size != 1:
    raise ValueError(f"metric {name!r} of shape {array.shape}: expected one number, not named 'step' or 'time'")
  return float(array.reshape(()))


def _to_line(row: Mapping[str, float]) -> str:
  # `json.dumps` spells a number that is not finite as a bare word; the quotes make it JSON.
  finite = {name: value if math.isfinite(value) else json.dumps(value) for name, value in row.items()}
  return json.dumps(finite, allow_nan=False) + "\n"


def _from_line(line: str, place: str) -> dict[str, float]:
  try:
    return {name: float(value) if isinstance(value, str) else value for name, value in json.loads(line).items()}
  except (ValueError, AttributeError) as error:
    raise ValueError(f"{place}: expected a JSON object of numbers, found {line[:80]!r}") from error


class Progress:
  """A live line on how training goes: step, losses, speed, share of time spent waiting for data, time left.

  A terminal shows one line, overwritten and cut to its width, the least important fields first; a log file gets a plain
  line every `min_interval` seconds. Speed is an average over about the last half minute that leaves out the time before
  the first update, which is mostly compilation, and what passes in `pause`.

  Args:
    total_steps: the step at which training ends.
    start_step: the step it starts from.
    batch_size: examples of one step, over all processes.
    enabled: False draws nothing, for all processes but the first; speed is still measured.
    devices: that share the work.
    peak: examples per second if all devices multiplied matrices at their peak; None is not known.
    min_interval: seconds between two lines of a log file.
    stream: where to draw, standard error if None.
    clock: returns seconds.
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int,
    batch_size: int,
    enabled: bool = True,
    *,
    devices: int = 1,
    peak: float | None = None,
    min_interval: float = 10.0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self._total_steps, self._batch_size, self._enabled, self._clock = total_steps, batch_size, enabled, clock
    self._devices, self._peak = devices, peak
    self._stream = sys.stderr if stream is None else stream
    self._live = self._stream.isatty()
    self._interval = _REDRAW_SECONDS if self._live else min_interval
    self._step, self._mark = start_step, None  # the last step measured, and when
    self._steps, self._seconds = 0.0, 0.0  # decaying sums: their quotient is the speed
    self._line, self._drawn_at = "", -math.inf

  @property
  def images_per_second(self) -> float:
    """Examples per second over all processes; NaN before the second update."""
    return self._batch_size * self._steps / self._seconds if self._seconds else math.nan

  @property
  def utilisation(self) -> float | None:
    """Model FLOPs utilisation, 0 to 1 (Chowdhery et al. 2022, appendix B); None if peak or speed is not known."""
    speed = self.images_per_second
    return speed / self._peak if self._peak and speed > 0 else None

  def go_back(self, step: int) -> None:
    """The next update is of the step behind this one, whatever came before."""
    self._step, self._mark = step, None

  def update(self, step: int, metrics: Mapping[str, Any], wait_fraction: float) -> None:
    """Measures the speed and redraws the line if it is due.

    Args:
      step: optimizer steps done.
      metrics: shown are "loss", all "loss/<term>", "lr" and "temperature"; a device array is fetched only to be drawn.
      wait_fraction: share of the time that the loop waited for data, 0 to 1.
    """
    self._measure(step)
    now = self._clock()
    if self._enabled and (now - self._drawn_at >= self._interval or step >= self._total_steps):
      self._drawn_at = now
      self._draw("  ".join(self._fit(self._fields(step, metrics, wait_fraction))))

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Leaves the time spent inside, evaluating or saving, out of the speed."""
    start = self._clock()
    try:
      yield
    finally:
      if self._mark is not None:
        self._mark += self._clock() - start

  def message(self, text: str) -> None:
    """Prints `text` above the line."""
    if self._enabled:
      line = self._line
      self._erase()
      self._print(text + "\n")
      if line:
        self._draw(line)

  def close(self) -> None:
    """Leaves the last line on the screen and moves below it."""
    if self._line:
      self._line = ""
      self._print("\n")

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _measure(self, step: int) -> None:
    now = self._clock()
    if self._mark is not None:
      seconds = now - self._mark
      decay = math.exp(-seconds / _SPEED_MEMORY)
      self._steps = decay * self._steps + step - self._step
      self._seconds = decay * self._seconds + seconds
    self._step, self._mark = step, now

  def _fields(self, step: int, metrics: Mapping[str, Any], wait_fraction: float) -> list[str]:
    """The fields of the line, the most important first."""
    fields = [f"step {step:,}/{self._total_steps:,} {step / self._total_steps:.1%}"]
    fields += [f"loss {float(metrics['loss']):.3f}"] if "loss" in metrics else []
    speed = self.images_per_second
    if speed > 0:  # not NaN
      left = (self._total_steps - step) * self._batch_size / speed
      each = f" ({speed / self._devices:,.4g} a device)" if self._devices > 1 else ""
      fields += [f"{_duration(left)} left", f"{speed:,.0f} images/s{each}"]
      fields += [f"{self.utilisation:.1%} of peak"] if self._peak else []
    fields += [f"wait {wait_fraction:.0%}"]
    terms = [name for name in metrics if name.startswith("loss/")]
    fields += [f"{name.removeprefix('loss/')} {float(metrics[name]):.3f}" for name in terms]
    rest = {"lr": ".2e", "temperature": ".4f"}
    return fields + [f"{name} {float(metrics[name]):{form}}" for name, form in rest.items() if name in metrics]

  def _fit(self, fields: list[str]) -> list[str]:
    if self._live:
      columns = _columns(self._stream) - 1  # in the last column some terminals wrap
      while len(fields) > 1 and len("  ".join(fields)) > columns:
        fields = fields[:-1]
      fields[-1] = fields[-1][:columns]
    return fields

  def _draw(self, line: str) -> None:
    if self._live:
      self._erase()
      self._line = line
      self._print(line)
    else:
      self._print(line + "\n")

  def _erase(self) -> None:
    if self._line:
      self._line = ""
      self._print("\r\x1b[K")

  def _print(self, text: str) -> None:
    self._stream.write(text)
    self._stream.flush()


def _columns(stream: TextIO) -> int:
  # Asks the stream itself: standard output, which `shutil` asks, may go to a file. A terminal may answer 0.
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


def summary_table(rows: Mapping[str, Any]) -> str:
  """Formats names and values as two aligned columns, numbers with about four digits and thousands separated."""
  width = max(map(len, rows), default=0)
  return "\n".join(f"{name:<{width}}  {_format(value)}" for name, value in rows.items())


def _format(value: Any) -> str:
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    return str(value)
  if isinstance(value, numbers.Integral) or abs(value) >= 1000:
    return f"{value:,.0f}"
  return f"{value:.4g}"
