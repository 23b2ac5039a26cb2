"""Which checkpoints are kept, as preservation policies of orbax: the newest, the best, and one of each interval."""

from collections.abc import Callable, Mapping, Sequence
import json
import math
from pathlib import Path
from typing import Any

from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from declip_jax.runtime import records

_SCORES = "scores.json"  # metrics of an evaluation; written after the checkpoint and its seal


def make_policy(last: int, first: "KeepFirstOfEach", best: "KeepBest") -> AnyPreservationPolicy:
  """Returns the policy that keeps the `last` newest checkpoints, the best, and the first of each interval."""
  return AnyPreservationPolicy([LatestN(max(last, 1)), best, first])


class KeepFirstOfEach:
  """Keeps the first checkpoint in each interval of `every` steps, except the first interval; 0 keeps none.

  Orbax's `EveryNSteps` keeps only exact multiples, which checkpoints saved by the clock or at a signal miss, or counts
  from the oldest remaining checkpoint, so that the intervals drift.

  Attributes:
    length: function from a step to the length of training up to it; it differs from the step itself once the batch
      size has changed.
  """

  def __init__(self, every: int):
    self._every = every
    self.length: Callable[[int], int] = lambda step: step

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    steps = sorted((checkpoint.step for checkpoint in checkpoints), reverse=True) if self._every else []
    kept = {self.length(step) // self._every: step for step in steps if self.length(step) >= self._every}.values()
    return [checkpoint.step in kept for checkpoint in checkpoints]


class KeepBest:
  """Keeps the `count` checkpoints with the highest `metric`; of equal ones, the newest.

  Orbax's `BestN` needs the metrics when a checkpoint is saved, but they are known only after its evaluation.

  Args:
    folder: folder of all checkpoints.
    count: number of checkpoints to keep, 0 keeps none.
    metric: name of the metric.
  """

  def __init__(self, folder: Path, count: int, metric: str):
    self._folder, self._count, self._metric = folder, count, metric
    self._scores: dict[int, float] = {}

  def record(self, step: int, metrics: Mapping[str, float], write: bool) -> None:
    """Stores the metrics of a checkpoint, with `write` also in its folder, for later runs.

    Raises:
      OSError: they cannot be written.
    """
    values = {name: float(value) for name, value in metrics.items()}
    self._scores[step] = values.get(self._metric, math.nan)
    if write:
      records.write(self._folder / str(step) / _SCORES, json.dumps(values).encode())

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    kept = set(self.best([checkpoint.step for checkpoint in checkpoints]))
    return [checkpoint.step in kept for checkpoint in checkpoints]

  def best(self, steps: Sequence[int]) -> list[int]:
    """Returns the best of some steps, best first; those without the metric are never among them."""
    scores = {step: self._score(step) for step in steps} if self._count else {}
    ranked = sorted(((score, step) for step, score in scores.items() if not math.isnan(score)), reverse=True)
    return [step for _, step in ranked[: self._count]]

  def _score(self, step: int) -> float:
    if step not in self._scores:
      try:
        metrics = json.loads((self._folder / str(step) / _SCORES).read_text())
        self._scores[step] = float(metrics.get(self._metric, math.nan))
      except (OSError, ValueError, TypeError, AttributeError):  # not evaluated, by an older version, or damaged
        self._scores[step] = math.nan
    return self._scores[step]
