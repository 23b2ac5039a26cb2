"""Rolling back to an earlier checkpoint after a run has diverged, and skipping the offending batches.

Step count, parameters and schedule are those of the checkpoint, so training has its full length; the input
continues after the batches at which it diverged. Each rollback is a line of `rollbacks.jsonl`, from which a run that is
killed before its next checkpoint restores its input position.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
import time
from typing import Any

import jax

from declip_jax.runtime import records
from declip_jax.runtime.checkpoint import Checkpoints, Restored
from declip_jax.spelling import counted
from declip_jax.training.state import State


class Rollbacks:
  """The rollbacks of a run.

  Args:
    workdir: working directory.
    limit: maximum number of rollbacks.
  """

  def __init__(self, workdir: Path, limit: int = 0):
    self._path, self._limit = workdir / "rollbacks.jsonl", limit
    self._made = records.read_lines(self._path, _parse)

  def __len__(self) -> int:
    return len(self._made)

  def forget(self) -> None:
    """Removes the rollbacks of an earlier run in this directory, whose checkpoints are gone."""
    self._made = []
    if jax.process_index() == 0:
      self._path.unlink(missing_ok=True)

  def roll_back(
    self, at: int, skipped: int, position: dict[str, Any], checkpoints: Checkpoints, abstract: State
  ) -> Restored:
    """Restores the checkpoint before a run diverged; newer ones are renamed, since their steps will be repeated.

    Args:
      at: last step that was skipped.
      skipped: number of consecutive skipped steps.
      position: input position after the offending batches.
      checkpoints: where to restore from.
      abstract: shapes and shardings of the state.

    Returns:
      Step and state of the checkpoint, `position`, and messages.

    Raises:
      FloatingPointError: no earlier checkpoint exists, or the limit of rollbacks is reached; raised on every host.
    """
    checkpoints.wait()
    target = self.target(checkpoints.steps(), at - skipped)
    reason = (
      f"step {at}: {skipped} consecutive steps were skipped (loss, gradient or learning rate not finite, or a spike)"
    )
    if target is None or len(self) >= self._limit:
      limit = f"the run has rolled back {counted(len(self), 'time')} (config.safety.max_rollbacks={self._limit})"
      raise FloatingPointError(
        f"{reason}; {limit if target is not None else 'there is no earlier checkpoint'}. Lower "
        "config.optimizer.learning_rate, inspect the data, or allow larger gradients with config.safety.spike_factor "
        "and config.optimizer.gradient_clip"
      )
    newer = [step for step in checkpoints.steps() if step > target]
    renamed = [checkpoints.rename(step, "the run diverged", "diverged") for step in newer]
    restored = checkpoints.restore_newest(abstract)
    self.record(skipped, at, restored.step, position)
    message = (
      f"{reason}; rolled back to checkpoint {restored.step:,}, data continues at sample {position['next_index']:,} "
      f"(rollback {len(self)} of {self._limit})"
    )
    return restored._replace(data=position, messages=[message, *renamed, *restored.messages])

  def target(self, steps: Sequence[int], healthy: int) -> int | None:
    """Chooses the newest checkpoint up to the step `healthy` to roll back to; None if there are no checkpoints.

    If the latest rollback had the same target, the run has diverged again before its next checkpoint: then the one
    before is chosen, if there is one. If all checkpoints are newer than `healthy`, the oldest is chosen: skipped steps
    do not change parameters.
    """
    older = [step for step in sorted(steps) if step <= healthy]
    if len(older) > 1 and self._made and self._made[-1]["to"] == older[-1]:
      return older[-2]
    return older[-1] if older else min(steps, default=None)

  def position(self, step: int, data: dict[str, Any]) -> dict[str, Any]:
    """Returns the input position for a checkpoint that has `data`: after the batches that the run rolled back for."""
    if not self._made or self._made[-1]["to"] != step or self._made[-1]["data"]["next_index"] <= data["next_index"]:
      return data
    return self._made[-1]["data"]

  def record(self, skipped: int, at: int, to: int, data: Mapping[str, Any]) -> None:
    """Records a rollback from step `at`, after `skipped` skipped steps, to step `to` and input position `data`."""
    self._made.append({"time": round(time.time(), 3), "skipped": skipped, "at": at, "to": to, "data": dict(data)})
    if jax.process_index() == 0:
      records.write_lines(self._path, self._made)


def _parse(line: dict[str, Any]) -> dict[str, Any]:
  """Checks what `Rollbacks` needs of a line of `rollbacks.jsonl`.

  Raises:
    ValueError, LookupError, TypeError: the line is not a record of a rollback.
  """
  numbers = line["to"], line["data"]["next_index"]
  if not all(isinstance(number, int) and number >= 0 for number in numbers):
    raise ValueError(f"{numbers} are not whole numbers")
  return line
