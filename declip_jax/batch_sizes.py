"""The batch sizes of a run, which may change from stage to stage or at a restart: converts steps and examples."""

import math
from typing import NamedTuple, Self


class BatchSizes(NamedTuple):
  """The batch sizes of a run.

  Attributes:
    changes: pairs of a number of steps done and the batch size from there on; the first number is 0.
  """

  changes: tuple[tuple[int, int], ...]

  @classmethod
  def constant(cls, size: int) -> Self:
    """One size for the whole run."""
    return cls(((0, size),))

  @property
  def size(self) -> int:
    """The current size."""
    return self.changes[-1][1]

  @property
  def since(self) -> int:
    """The number of steps that had been done when the current size was chosen."""
    return self.changes[-1][0]

  def resumed(self, step: int, size: int) -> "BatchSizes":
    """The batch sizes of a run that resumes after `step` steps with batches of `size`."""
    before = tuple(change for change in self.changes if change[0] < step)
    if before and before[-1][1] == size:
      return BatchSizes(before)
    return BatchSizes((*before, (step, size)))

  def between(self, first: int, last: int) -> "BatchSizes":
    """The batch sizes of the steps after `first` up to `last`, counted from `first`."""
    ends = [end for end, _ in self.changes[1:]] + [math.inf]
    inside = [
      (max(start - first, 0), size) for (start, size), end in zip(self.changes, ends, strict=True) if end > first
    ]
    return BatchSizes(tuple(change for change in inside if change[0] < max(last - first, 1)))

  def counts(self, step: int) -> list[tuple[int, int]]:
    """Pairs of a batch size and the number of the first `step` steps that have it, in order; none are empty."""
    ends = [first for first, _ in self.changes[1:]] + [step]
    steps = [(size, min(end, step) - first) for (first, size), end in zip(self.changes, ends, strict=True)]
    return [(size, count) for size, count in steps if count > 0]

  def examples(self, step: int) -> int:
    """The number of examples in the first `step` steps."""
    return sum(size * count for size, count in self.counts(step))

  def step(self, examples: float) -> int:
    """The first step after which at least this many examples have been seen."""
    for (first, size), (end, _) in zip(self.changes, self.changes[1:], strict=False):
      if examples <= self.examples(end):
        return first + math.ceil((examples - self.examples(first)) / size)
    return self.since + math.ceil((examples - self.examples(self.since)) / self.size)

  def batches(self, step: int) -> int:
    """The number of batches of the current size with as many examples as the first `step` steps, rounded."""
    earlier = min(step, self.since)
    return step - earlier + round(self.examples(earlier) / self.size)
