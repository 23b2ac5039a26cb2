"""Tests of `declip_jax.objectives.simclr` against loops and against SLIP's and DeCLIP's losses."""

from functools import partial

import jax
import numpy as np
import pytest
import references as reference

from declip_jax.objectives.simclr import nt_xent
from declip_jax.types import Outputs


@partial(jax.jit, static_argnums=1)
def run(views, temperature):
  return nt_xent(Outputs(simclr=views), {}, temperature=temperature)


@pytest.mark.parametrize(("name", "temperature"), [("simclr", 0.1), ("ntxent_gather_t0.1", 0.1), ("ntxent_t0.5", 0.5)])
def test_value_and_gradient_equal_slip_and_declip(name, temperature):
  golden = reference.load("losses")
  step = jax.jit(jax.value_and_grad(lambda views: run(views, temperature), has_aux=True))
  (value, metrics), gradient = step(np.stack([golden["ssl_a"], golden["ssl_b"]]))
  np.testing.assert_allclose(value, golden[f"{name}/loss"], atol=7.5e-7)
  np.testing.assert_allclose(gradient, np.stack([golden[f"{name}/grad_a"], golden[f"{name}/grad_b"]]), atol=7.5e-7)
  np.testing.assert_allclose(metrics["simclr_accuracy"], golden["simclr/acc"] / 100, rtol=1e-6)


@pytest.mark.parametrize(("count", "temperature"), [(5, 0.1), (8, 0.7), (19, 0.5)])
def test_value_and_accuracy_equal_loops(count, temperature):
  rng = np.random.default_rng(0)
  first = rng.normal(size=(count, 3))
  views = np.stack([first, first + 0.4 * rng.normal(size=(count, 3))]).astype(np.float32)
  rows = [row / np.linalg.norm(row) for view in views for row in view]
  losses, hits = [], []
  for anchor, row in enumerate(rows):
    positive = (anchor + count) % (2 * count)
    others = {index: row @ other / temperature for index, other in enumerate(rows) if index != anchor}
    losses.append(np.log(sum(np.exp(list(others.values())))) - others[positive])
    if anchor < count:
      hits.append(max(others, key=others.get) == positive)
  loss, metrics = run(views, temperature)
  np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(metrics["simclr_accuracy"], np.mean(hits), rtol=1e-6)
  assert 0 < np.mean(hits) < 1


def test_a_collapsed_batch_has_chance_accuracy():
  """All candidates tie: SLIP's argmax chooses the first of the other view."""
  _, metrics = run(np.ones((2, 4, 3), np.float32), 0.1)
  assert metrics["simclr_accuracy"] == 0.25


def test_length_does_not_matter():
  views = np.random.default_rng(1).normal(size=(2, 4, 3)).astype(np.float32)
  scaled = views * np.array([0.1, 1, 10, 100], np.float32)[:, None]
  np.testing.assert_allclose(run(views, 0.1)[0], run(scaled, 0.1)[0], rtol=1e-5)
