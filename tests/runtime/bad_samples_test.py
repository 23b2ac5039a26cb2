"""When a run has too many bad samples, and what it says about them."""

import numpy as np
import pytest

from declip_jax.data.sources import BAD
from declip_jax.runtime import bad_samples
from declip_jax.runtime.bad_samples import BadSamples


def _line(counter: BadSamples, step: int, bad: int) -> dict[str, float]:
  counter.update(step, np.array([bad] + [0] * (len(BAD) - 1)))
  return counter.values()


def test_one_bad_sample_of_a_small_batch_stops_no_run() -> None:
  counter = BadSamples(0, batch_size=4, max_share=0.05)
  assert _line(counter, 1, 1) == {"bad_share": 0.2, "bad/missing_file": 1}
  counter.check()
  for step in range(2, 30):
    _line(counter, step, 0)
    counter.check()
  for step in range(30, 38):  # until a line with few bad samples, the share counts from there
    _line(counter, step, 1)
    counter.check()


def test_a_large_share_stops_a_run_however_short_its_lines_are() -> None:
  counter = BadSamples(0, batch_size=4, max_share=0.05)
  for step in range(1, 5):
    _line(counter, step, 2)
    counter.check()
  _line(counter, 5, 2)
  with pytest.raises(ValueError, match=r"step 5: 33.3% .*\(10 missing file\).*config.data.max_bad=5.0%"):
    counter.check()


def test_a_share_of_0_allows_none() -> None:
  counter = BadSamples(0, batch_size=1000, max_share=0.0)
  _line(counter, 1, 1)
  with pytest.raises(ValueError, match="config.data.max_bad=0.0%"):
    counter.check()


def test_totals_of_a_run() -> None:
  lines = [
    {"step": 1, "bad/too_slow": 2},
    {"step": 2, "loss": 1.0},
    {"step": 3, "bad/too_slow": 1, "bad/missing_file": 4},
  ]
  total = bad_samples.total(lines)
  assert bad_samples.number_of_bad(total) == 7
  assert bad_samples.describe(total) == "3 too slow, 4 missing file"
