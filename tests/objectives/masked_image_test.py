"""Tests of `declip_jax.objectives.masked_image` against a loop."""

import numpy as np
import pytest

from declip_jax.objectives.masked_image import masked_image
from declip_jax.types import Outputs


@pytest.mark.parametrize(("count", "hidden", "pixels"), [(3, 5, 7), (8, 2, 12), (2, 9, 3)])
def test_value_equals_loops(count, hidden, pixels):
  prediction, target = np.random.default_rng(0).normal(size=(2, count, hidden, pixels)).astype(np.float32)
  patches = []
  for i in range(count):
    for m in range(hidden):
      patches.append(np.mean([(prediction[i, m, e] - target[i, m, e]) ** 2 for e in range(pixels)]))
  loss, _ = masked_image(Outputs(mim_prediction=prediction, mim_target=target), {})
  np.testing.assert_allclose(loss, np.mean(patches), rtol=1e-6)


def test_predicting_the_mean_of_normalised_patches_has_a_loss_of_one():
  rng = np.random.default_rng(1)
  target = rng.normal(loc=3, scale=2, size=(2, 5, 48))
  target = (target - target.mean(axis=-1, keepdims=True)) / target.std(axis=-1, keepdims=True)
  loss, _ = masked_image(Outputs(mim_prediction=np.zeros_like(target), mim_target=target), {})
  np.testing.assert_allclose(loss, 1, rtol=1e-6)
