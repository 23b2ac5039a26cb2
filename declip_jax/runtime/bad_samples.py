"""Samples that cannot be used: how many there were, and when there are too many."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from declip_jax.data.sources import BAD
from declip_jax.runtime.hosts import sum_over_hosts

_PREFIX = "bad/"  # prefix of their metrics
_FEW = 10  # fewer bad samples than this do not stop a run, whatever their share, unless none is allowed


class BadSamples:
  """Counts the samples that were skipped since the last line of metrics.jsonl, on all hosts.

  Args:
    start: step from which the loop starts.
    batch_size: global batch size.
    max_share: share of bad samples among all that were read between two lines at which the run stops, 0 to 1. While
      there are fewer than ten, the lines after them are counted, too.
  """

  def __init__(self, start: int, batch_size: int, max_share: float):
    self._batch_size, self._max_share = batch_size, max_share
    self.roll_back(start)

  def roll_back(self, step: int) -> None:
    """Continues from `step`; what was counted since the last line is dropped."""
    self._begin_line(step)
    self._judged: Counter[str] = Counter()

  def _begin_line(self, step: int) -> None:
    self._logged, self._step = step, step
    self._counts = np.zeros(len(BAD), np.int32)

  def update(self, step: int, counts: np.ndarray) -> None:
    """Adds the samples that this host skipped to fill the batch of `step`, `[len(BAD)]`."""
    self._step = step
    self._counts += counts

  def values(self) -> dict[str, float]:
    """Returns the share and the number of bad samples by kind since the last line; every host has to call it."""
    counts = sum_over_hosts(self._counts)
    used, bad = self._batch_size * (self._step - self._logged), int(counts.sum())
    kinds = {f"{_PREFIX}{kind.replace(' ', '_')}": int(n) for kind, n in zip(BAD, counts, strict=True) if n}
    self._judged.update({**kinds, "read": bad + used})
    self._begin_line(self._step)
    return {"bad_share": bad / (bad + used), **kinds}

  def check(self) -> None:
    """Stops a run that can use too little of its data, according to what `values` returned.

    Raises:
      ValueError: the same on every host; the message names the share and the kinds.
    """
    bad = number_of_bad(self._judged)
    share = bad / max(self._judged["read"], 1)
    if share <= self._max_share:
      self._judged.clear()
    elif bad >= _FEW or not self._max_share:
      raise ValueError(
        f"step {self._step}: {share:.1%} of the latest samples cannot be used ({describe(self._judged)}), more than "
        f"config.data.max_bad={self._max_share:.1%}: repair the samples that the warnings above and python -m "
        "declip_jax.data.inspect name, or allow more"
      )


def number_of_bad(values: Mapping[str, float]) -> int:
  """The number of bad samples in a line of metrics.jsonl."""
  return int(sum(value for name, value in values.items() if name.startswith(_PREFIX)))


def describe(values: Mapping[str, float]) -> str:
  """The numbers of bad samples in a line of metrics.jsonl, by kind."""
  kinds = {name.removeprefix(_PREFIX): value for name, value in values.items() if name.startswith(_PREFIX)}
  return ", ".join(f"{int(value):,} {kind.replace('_', ' ')}" for kind, value in kinds.items())


def total(lines: Iterable[Mapping[str, float]]) -> Counter[str]:
  """The numbers of bad samples in all lines of metrics.jsonl, by kind."""
  sums: Counter[str] = Counter()
  for line in lines:
    sums.update({name: int(value) for name, value in line.items() if name.startswith(_PREFIX)})
  return sums
