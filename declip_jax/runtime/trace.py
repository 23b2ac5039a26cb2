"""Profiles some steps with `jax.profiler`: what the devices and the host do in them."""

from pathlib import Path
from typing import Any, Self

import jax

from declip_jax.reporting.progress import message


def parse_steps(text: str) -> tuple[int, int]:
  """Parses the first and the last step from a text such as "100:110".

  Raises:
    ValueError: the text has another form.
  """
  first, colon, last = text.partition(":")
  if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
    raise ValueError(f"--profile={text!r}: expected the first and the last step to trace, such as 100:110")
  return int(first), int(last)


class Trace:
  """Traces the steps `first` to `last` into a folder; each of several processes has its own subfolder.

  Args:
    folder: folder for the trace.
    steps: first and last step, None traces nothing.
  """

  def __init__(self, folder: Path, steps: tuple[int, int] | None):
    self._folder = folder / f"process_{jax.process_index()}" if jax.process_count() > 1 else folder
    self._steps, self._active = steps, False

  def unreachable(self, start: int, total: int) -> str:
    """Returns a message if a run from `start` to `total` contains none of the steps to trace, otherwise ""."""
    if not self._steps or (self._steps[0] <= total and start < self._steps[1]):
      return ""
    return (
      f"--profile={self._steps[0]}:{self._steps[1]} has no effect: this run has only the steps {start + 1} to {total}"
    )

  def begin(self, step: int, state: Any) -> None:
    """Starts the trace if it is due, after the previous step has finished; call it before `step` is dispatched."""
    if self._steps and not self._active and self._steps[0] <= step <= self._steps[1]:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._folder))
      self._active = True

  def end(self, step: int, state: Any) -> str:
    """Ends the trace after its last step and returns a message, otherwise ""; call it after `step` is dispatched."""
    if not self._active or step < self._steps[1]:
      return ""
    jax.block_until_ready(state)
    return self._stop(f"step {step}")

  def _stop(self, until: str) -> str:
    self._active, self._steps = False, None
    jax.profiler.stop_trace()
    return (
      f"traced up to {until}: view it with tensorboard --logdir {self._folder} (pip install xprof), or open its "
      "*.trace.json.gz at https://ui.perfetto.dev"
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    if self._active:
      message(self._stop("the end"))
