"""The metrics of a run: `metrics.jsonl`, TensorBoard, and a table at the end.

`metrics.jsonl` in the working directory is the source of truth: a JSON object per line, `{"step": 300, "time": 1.7e9,
"loss": 5.1, ...}`, in order of step even after a run was killed and resumed. TensorBoard's files have the same values.
"""

from collections.abc import Mapping
import contextlib
import json
import math
import numbers
import os
from pathlib import Path
import socket
import struct
import time
from typing import Any, Self

from absl import logging
import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from declip_jax.runtime import records

TENSORBOARD = "tensorboard"  # folder of event files in a working directory


class MetricWriter:
  """Appends the metrics of a run to `workdir/metrics.jsonl` and to the event files in `workdir/tensorboard`.

  A line reaches the operating system before `write` returns, so a killed process loses none; on a full disk it waits in
  memory, with a warning, until there is space again. Resuming drops the lines after the restored step, and a last line
  that a crash has cut, with an atomic rewrite. JSON has no NaN: a number that is not finite is written as the string
  "NaN", "Infinity" or "-Infinity".

  Args:
    workdir: directory on a file system that can append (mount a bucket).
    resume_step: step from which the run starts; lines of later steps are dropped.
    enabled: False on all processes but the first; then nothing is read or written.

  Raises:
    ValueError: `workdir` is the address of a bucket.
  """

  def __init__(self, workdir: str | os.PathLike[str], *, resume_step: int, enabled: bool = True):
    self._enabled = enabled
    if not enabled:
      return
    self._path = _metrics_path(workdir)
    self._events = EventFile(self._path.parent / TENSORBOARD)
    self._lines: _Appender | None = None
    self.roll_back(resume_step)

  def roll_back(self, step: int) -> None:
    """Drops the lines after a step, as resuming from it does."""
    if not self._enabled:
      return
    if self._lines:
      self._lines.close()
    if self._path.exists():
      _drop_steps_after(step, self._path)
    self._lines = _Appender(self._path)
    self._events.hide_from(step + 1)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one line.

    Args:
      step: number of steps done.
      values: numbers or arrays of one element by name (device arrays are fetched).

    Raises:
      ValueError: a value is not a single number, or is named "step" or "time".
    """
    if not self._enabled:
      return
    now = time.time()
    values = {name: _as_float(name, value) for name, value in values.items()}
    self._lines.append(_to_line({"step": int(step), "time": round(now, 3), **values}).encode())
    self._events.write(int(step), values, now)

  def close(self) -> None:
    """Closes both files; a second call does nothing."""
    if self._enabled:
      self._lines.close()
      self._events.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class EventFile:
  """A new file of scalars in a folder of TensorBoard.

  Args:
    folder: folder on a file system that can append; it is made if it does not exist.
  """

  def __init__(self, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    self._file = _Appender(folder / f"events.out.tfevents.{time.time_ns() // 10**6}.{socket.gethostname()}")
    self._file.append(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))

  def write(self, step: int, values: Mapping[str, float], now: float | None = None) -> None:
    """Adds the values of a step, at a time in seconds, by default the present."""
    summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
    self._file.append(_record(Event(wall_time=time.time() if now is None else now, step=step, summary=summary)))

  def hide_from(self, step: int) -> None:
    """Hides the earlier events of the folder from a step on."""
    start = SessionLog(status=SessionLog.START)
    self._file.append(_record(Event(wall_time=time.time(), step=step, session_log=start)))

  def close(self) -> None:
    """Closes the file; a second call does nothing."""
    self._file.close()


class _Appender:
  """A file that is only appended to, and that tolerates a disk that is full for a while.

  TensorBoard's own writer does not: its thread ends, and training waits for it forever.
  """

  def __init__(self, path: Path):
    self._path, self._file = path, path.open("ab", buffering=0)
    self._waiting, self._warned = b"", False

  def append(self, data: bytes) -> None:
    """Writes bytes; those that cannot be written are kept for the next call."""
    self._waiting += data
    try:
      while self._waiting:
        self._waiting = self._waiting[self._file.write(self._waiting) :]
      self._warned = False
    except OSError as error:
      if not self._warned:
        self._warned = True
        logging.warning("%s cannot be written for now: %s", self._path, error)

  def close(self) -> None:
    """Tries to write one last time."""
    if not self._file.closed:
      self.append(b"")
      with contextlib.suppress(OSError):
        self._file.close()


def _record(event: Event) -> bytes:
  """Encodes an event as in TensorBoard's files: length and content, each followed by its checksum."""
  data = event.SerializeToString()
  length = struct.pack("<Q", len(data))
  return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, float]]:
  """Reads the lines of `workdir/metrics.jsonl`, in order; safe while the run is writing.

  A last line without a newline is left out, and so is any line that has no step or a value that is not a number, with
  a warning.

  Raises:
    FileNotFoundError: there are no metrics.
  """
  path = _metrics_path(workdir)
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist")
  return records.read_lines(path, _from_line)


def _metrics_path(workdir: str | os.PathLike[str]) -> Path:
  if "://" in os.fspath(workdir):
    raise ValueError(f"metrics cannot be appended at {os.fspath(workdir)!r}: expected a local or mounted directory")
  return Path(workdir) / "metrics.jsonl"


def _drop_steps_after(step: int, path: Path) -> None:
  kept = (_to_line(line) for line in read_metrics(path.parent) if line["step"] <= step)
  records.write(path, "".join(kept).encode())


def _as_float(name: str, value: Any) -> float:
  array = np.asarray(value)
  if name in ("step", "time") or array.size != 1:
    raise ValueError(f"metric {name!r} of shape {array.shape}: expected one number, not named 'step' or 'time'")
  return float(array.reshape(()))


def _to_line(values: Mapping[str, float]) -> str:
  # `json.dumps` writes a number that is not finite as a bare word; the quotes make it JSON.
  finite = {
    name: value if value is None or math.isfinite(value) else json.dumps(value) for name, value in values.items()
  }
  return json.dumps(finite, allow_nan=False) + "\n"


def _from_line(values: dict[str, Any]) -> dict[str, float]:
  """The numbers of a line; null means a missing value.

  Raises:
    ValueError, TypeError, AttributeError, OverflowError: a value is not a number, or there is no finite step.
  """
  line = {name: float(value) if isinstance(value, str) else value for name, value in values.items()}
  if not math.isfinite(values["step"]):  # raises TypeError for a text
    raise ValueError("no step")
  for value in filter(None, line.values()):
    math.isfinite(value)
  return line


def score_text(name: str, value: float) -> str:
  """A score for people: a share as a percentage, a mean rank as a number, a count in full."""
  if not isinstance(value, float):
    return f"{name} {value:,}"
  return f"{name} {value:,.1f}" if name.endswith("_rank") else f"{name} {value:.1%}"


def summary_table(values: Mapping[str, Any]) -> str:
  """Formats names and values as two aligned columns, numbers with about four digits and thousands separators."""
  width = max(map(len, values), default=0)
  return "\n".join(f"{name:<{width}}  {_format(value)}" for name, value in values.items())


def _format(value: Any) -> str:
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    return str(value)
  if isinstance(value, numbers.Integral) or abs(value) >= 1000:
    return f"{value:,.0f}"
  return f"{value:.4g}"
