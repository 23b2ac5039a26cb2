"""A profile of some steps: what the devices and the host did, by `jax.profiler`."""

from pathlib import Path
from typing import Any, Self

import jax


def parse_steps(text: str) -> tuple[int, int]:
  """First and last step of "100:110".

  Raises:
    ValueError: it is not of that form.
  """
  first, colon, last = text.partition(":")
  if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
    raise ValueError(f"--profile={text!r}: give the first and the last step to trace, such as 100:110")
  return int(first), int(last)


class Trace:
  """Traces the steps `first` to `last` into a folder; every host writes files of its own.

  Args:
    folder: for the trace.
    steps: first and last, None traces nothing.
  """

  def __init__(self, folder: Path, steps: tuple[int, int] | None):
    self._folder, self._steps, self._active = folder, steps, False

  def begin(self, step: int, state: Any) -> None:
    """Before a step is dispatched: starts if it is one of them, when the steps before are done."""
    if self._steps and not self._active and self._steps[0] <= step <= self._steps[1]:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._folder))
      self._active = True

  def end(self, step: int, state: Any) -> str:
    """After it is dispatched: ends behind the last one. Returns what to say, or ""."""
    if not self._active or step < self._steps[1]:
      return ""
    jax.block_until_ready(state)
    self._stop()
    return (
      f"traced to step {step}: tensorboard --logdir {self._folder} (pip install xprof), or open the "
      "perfetto-readable *.trace.json.gz in it at https://ui.perfetto.dev"
    )

  def _stop(self) -> None:
    if self._active:
      self._active, self._steps = False, None
      jax.profiler.stop_trace()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()
