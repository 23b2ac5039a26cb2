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
  """Traces the steps `first` to `last` into a folder, each process of several into one of its own there.

  Args:
    folder: for the trace.
    steps: first and last, None traces nothing.
  """

  def __init__(self, folder: Path, steps: tuple[int, int] | None):
    self._folder = folder / f"process_{jax.process_index()}" if jax.process_count() > 1 else folder
    self._steps, self._active = steps, False

  def out_of_reach(self, start: int, total: int) -> str:
    """What to say of steps that a run from `start` to `total` does not take, "" if it takes some of them."""
    if not self._steps or (self._steps[0] <= total and start < self._steps[1]):
      return ""
    return (
      f"--profile={self._steps[0]}:{self._steps[1]} traces nothing: this run takes the steps {start + 1} to {total}"
    )

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
    return self._stop(f"step {step}")

  def _stop(self, until: str) -> str:
    self._active, self._steps = False, None
    jax.profiler.stop_trace()
    return (
      f"traced to {until}: tensorboard --logdir {self._folder} (pip install xprof), or open the "
      "perfetto-readable *.trace.json.gz in it at https://ui.perfetto.dev"
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    if self._active:
      print(self._stop("the end"))
