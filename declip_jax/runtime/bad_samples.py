"""Samples that cannot be used: how many there were, and when there are too many."""

import numpy as np

from declip_jax.data.sources import BAD
from declip_jax.runtime.hosts import sum_over_hosts


class BadSamples:
  """Counts the samples that were skipped since the last line of metrics.jsonl, on all hosts.

  Args:
    start: step from which the loop starts.
    batch_size: global batch size.
    max_share: share of bad samples among all that were read between two lines at which the run stops, 0 to 1.
  """

  def __init__(self, start: int, batch_size: int, max_share: float):
    self._batch_size, self._max_share = batch_size, max_share
    self.roll_back(start)

  def roll_back(self, step: int) -> None:
    """Continues from `step`, whatever was counted since the last line."""
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
    self.roll_back(self._step)
    kinds = {f"bad/{kind.replace(' ', '_')}": int(count) for kind, count in zip(BAD, counts, strict=True) if count}
    return {"bad_share": bad / (bad + used), **kinds}

  def check(self, values: dict[str, float]) -> None:
    """Stops a run that can use too little of its data, according to what `values` returned.

    Raises:
      ValueError: the same on every host; names the share and the kinds.
    """
    if values["bad_share"] > self._max_share:
      kinds = ", ".join(f"{values[name]} {name[4:].replace('_', ' ')}" for name in values if name.startswith("bad/"))
      raise ValueError(
        f"step {self._step}: {values['bad_share']:.1%} of the samples since the last log line cannot be used "
        f"({kinds}), more than config.data.max_bad={self._max_share:.1%}: repair the samples that the warnings "
        "above and python -m declip_jax.data.inspect name, or allow more"
      )
