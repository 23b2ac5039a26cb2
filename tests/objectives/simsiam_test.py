"""Tests of `declip_jax.objectives.simsiam` against DeCLIP's loss, and of its metric."""

import jax
import numpy as np
import pytest
import references as reference

from declip_jax.objectives.diagnostics import diagnose
from declip_jax.objectives.simsiam import simsiam
from declip_jax.types import Outputs


def test_value_and_gradient_equal_declip():
  golden = reference.load("losses")
  p, z = (np.stack([golden[f"simsiam/{name}{view}"] for view in (1, 2)]) for name in "pz")

  def loss(p, z):
    return simsiam(Outputs(simsiam_prediction=p, simsiam_projection=z), {})[0]

  value, (gradient, nothing) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(p, z)
  np.testing.assert_allclose(value, golden["simsiam/loss"], atol=7.5e-7)
  expected = np.stack([golden["simsiam/grad_p1"], golden["simsiam/grad_p2"]])
  np.testing.assert_allclose(gradient, expected, atol=7.5e-7)
  np.testing.assert_array_equal(nothing, np.zeros_like(z))


@pytest.mark.parametrize(("count", "dim"), [(5, 3), (2, 9), (19, 4)])
def test_value_equals_loops(count, dim):
  p, z = np.random.default_rng(0).normal(size=(2, 2, count, dim)).astype(np.float32)

  def cosine(x, y):
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

  expected = -np.mean([(cosine(p[0, i], z[1, i]) + cosine(p[1, i], z[0, i])) / 2 for i in range(count)])
  loss, _ = jax.jit(simsiam)(Outputs(simsiam_prediction=p, simsiam_projection=z), {})
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_deviation_of_projections_shows_a_collapse():
  rng = np.random.default_rng(1)
  healthy = rng.normal(size=(2, 400, 16)).astype(np.float32)
  collapsed = np.broadcast_to(healthy[:, :1], healthy.shape)

  @jax.jit
  def deviation(z):
    found = diagnose(Outputs(simsiam_projection=z), {"simsiam_projection": "embeddings"})
    return found["diagnostics/simsiam_projection/deviation"]

  np.testing.assert_allclose(deviation(healthy), 1, atol=0.02)
  np.testing.assert_allclose(deviation(collapsed), 0, atol=1e-5)
