"""Tests of `declip_jax.training.drop_path`, against the rates of BeiT's fine-tuning (fixtures/beit_finetuning.npz)."""

from pathlib import Path

import jax
import numpy as np

from declip_jax.training.drop_path import draw_branch_scales, drop_path_rates

GOLDEN = np.load(Path(__file__).parents[1] / "fixtures" / "beit_finetuning.npz")


def test_rates_equal_beit() -> None:
  for size, rate in {"S": 0.0, "B": 0.1, "L": 0.1}.items():
    expected = GOLDEN[f"layer_decay/{size}/drop_path_rates"]
    np.testing.assert_allclose(drop_path_rates(rate, len(expected)), expected, rtol=1e-6, atol=1e-9)


def test_branches_are_dropped_at_their_rates_and_keep_their_mean() -> None:
  depth, rate, count = 3, 0.4, 4000
  scale = np.asarray(draw_branch_scales(jax.random.key(0), (count, 2), rate=rate, depth=depth))
  assert scale.shape == (count, 2, depth, 2)
  for block, dropped in enumerate((0.0, 0.2, 0.4)):
    found = scale[:, :, block]
    np.testing.assert_allclose(np.unique(found), [1] if not dropped else [0, 1 / (1 - dropped)], rtol=1e-6)
    assert abs((found == 0).mean() - dropped) < 4 * np.sqrt(dropped * (1 - dropped) / found.size) + 1e-9
  both, views = (scale == 0)[:, :, 2], (scale == 0)[:, :, 2, 0]
  assert abs((both[..., 0] & both[..., 1]).mean() - 0.16) < 0.03  # independent branches ...
  assert abs((views[:, 0] & views[:, 1]).mean() - 0.16) < 0.03  # ... and views
