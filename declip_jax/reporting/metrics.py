"""The metrics of a run: `metrics.jsonl`, trackers, and a table at the end.

`metrics.jsonl` in the working directory is the source of truth: a JSON object per line, `{"step": 300, "time": 1.7e9,
"loss": 5.1, ...}`, in order of step even after a run was killed and resumed. Trackers receive the same values.
"""

from collections.abc import Mapping, Sequence
import contextlib
import json
import math
import numbers
import os
from pathlib import Path
import time
from typing import Any, Self

import numpy as np

from declip_jax.reporting.appender import Appender
from declip_jax.reporting.trackers import Tracker
from declip_jax.runtime import records

# Metrics of evaluations that are not scores.
_NOT_SCORES = ("loss", "seconds", "images", "texts", "examples", "ties", "unreadable", "majority_share", "_rank")


class MetricWriter:
  """Appends the metrics of a run to `workdir/metrics.jsonl`, and gives them and its pictures to trackers.

  A line reaches the operating system before `write` returns, so a killed process loses none; on a full disk it waits in
  memory, with a warning, until there is space again. Resuming drops the lines after the restored step, and a last line
  that a crash has cut, with an atomic rewrite. JSON has no NaN: a number that is not finite is written as the string
  "NaN", "Infinity" or "-Infinity".

  Args:
    workdir: directory on a file system that can append (mount a bucket).
    resume_step: step from which the run starts; lines of later steps are dropped, and all of them if it is 0.
    trackers: trackers, which `close` closes.
    enabled: False on all processes but the first; then nothing is read or written.

  Raises:
    ValueError: `workdir` is the address of a bucket.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    resume_step: int,
    trackers: Sequence[Tracker] = (),
    enabled: bool = True,
  ):
    self._enabled = enabled
    if not enabled:
      return
    self._path = _metrics_path(workdir)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._trackers = trackers
    self._pictures = self._written_pictures()
    self._lines: Appender | None = None
    self._drop_after(resume_step or -1)  # a run that starts anew has no lines

  def roll_back(self, step: int) -> None:
    """Drops the lines after a step, as resuming from it does."""
    if self._enabled:
      self._drop_after(step)
      for tracker in self._trackers:
        tracker.roll_back(step)

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
    for tracker in self._trackers:
      tracker.log(int(step), values)

  def pictures(self, step: int) -> None:
    """Gives trackers the pictures in the working directory that have been written since the last call."""
    if not self._enabled:
      return
    before, self._pictures = self._pictures, self._written_pictures()
    for path, written in self._pictures.items():
      if before.get(path) != written:
        for tracker in self._trackers:
          tracker.picture(step, path.stem, path)

  def text(self, step: int, name: str, text: str) -> None:
    """Gives trackers a text in Markdown."""
    for tracker in self._trackers if self._enabled else ():
      tracker.text(step, name, text)

  def close(self, finished: bool = True) -> None:
    """Closes the file and the trackers, of a run that may have stopped early; a second call does nothing."""
    if self._enabled:
      self._lines.close()
      for tracker in self._trackers:
        tracker.close(finished)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self.close(finished=kind is None)

  def _drop_after(self, step: int) -> None:
    if self._lines:
      self._lines.close()
    if self._path.exists():
      _drop_steps_after(step, self._path)
    self._lines = Appender(self._path)

  def _written_pictures(self) -> dict[Path, int]:
    """The pictures in the working directory, and when each was written, in nanoseconds."""
    found = {}
    for path in sorted(self._path.parent.glob("*.png")):
      with contextlib.suppress(OSError):  # deleted meanwhile
        found[path] = path.stat().st_mtime_ns
    return found


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


def is_score(name: str) -> bool:
  """Whether a metric of an evaluation is a score, a share, rather than a loss, a rank, a duration or a count."""
  return not name.endswith(_NOT_SCORES)


def score_text(name: str, value: float) -> str:
  """A score for people: a share as a percentage, a mean rank as a number, a count in full."""
  return f"{name} {_score(name, value)}"


def _score(name: str, value: float) -> str:
  if not isinstance(value, float):
    return f"{value:,}"
  return f"{value:,.1f}" if name.endswith("_rank") else f"{value:.1%}"


def summary_table(values: Mapping[str, Any]) -> str:
  """Formats names and values as two aligned columns: scores as `score_text` does, other numbers with about four digits.

  Args:
    values: numbers and others by name; those named eval/... are scores.
  """
  width = max(map(len, values), default=0)
  return "\n".join(
    f"{name:<{width}}  {_score(name, value) if name.startswith('eval/') else number_text(value)}"
    for name, value in values.items()
  )


def number_text(value: Any) -> str:
  """A number with about four digits and thousands separators; anything else as it is."""
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    return str(value)
  if isinstance(value, numbers.Integral) or abs(value) >= 1000:
    return f"{value:,.0f}"
  return f"{value:.4g}"
