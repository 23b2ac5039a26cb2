"""Tests of `declip_jax.objectives.simclr` against loops and against SLIP's loss."""

import jax
import numpy as np
import references as reference

from declip_jax.objectives.simclr import nt_xent
from declip_jax.types import Outputs


def test_value_and_gradient_equal_slip():
  golden = reference.load("losses")
  step = jax.jit(jax.value_and_grad(lambda views: nt_xent(Outputs(simclr=views), {})[0]))
  value, gradient = step(np.stack([golden["ssl_a"], golden["ssl_b"]]))
  np.testing.assert_allclose(value, golden["simclr/loss"], atol=3e-6)
  np.testing.assert_allclose(gradient, np.stack([golden["simclr/grad_a"], golden["simclr/grad_b"]]), atol=3e-6)


def test_value_and_accuracy_equal_loops():
  count = 5
  views = np.random.default_rng(0).normal(size=(2, count, 3)).astype(np.float32)
  rows = [row / np.linalg.norm(row) for view in views for row in view]
  losses, hits = [], []
  for anchor, row in enumerate(rows):
    positive = (anchor + count) % (2 * count)
    others = {index: row @ other / 0.1 for index, other in enumerate(rows) if index != anchor}
    losses.append(np.log(sum(np.exp(list(others.values())))) - others[positive])
    hits.append(max(others, key=others.get) == positive)
  loss, metrics = nt_xent(Outputs(simclr=views), {})
  np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(metrics["simclr_accuracy"], np.mean(hits), rtol=1e-6)


def test_length_does_not_matter():
  views = np.random.default_rng(1).normal(size=(2, 4, 3)).astype(np.float32)
  scaled = views * np.array([0.1, 1, 10, 100], np.float32)[:, None]
  np.testing.assert_allclose(nt_xent(Outputs(simclr=views), {})[0], nt_xent(Outputs(simclr=scaled), {})[0], rtol=1e-5)
