"""Tests of `declip_jax.objectives.momentum` against loops written from MoCo v3 and BYOL."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from declip_jax.objectives.momentum import byol, moco, momentum_at, moving_average
from declip_jax.types import Outputs

SIZES = [(7, 3), (2, 9), (19, 4)]


def random_outputs(seed, count=7, dim=3):
  prediction, target = np.random.default_rng(seed).normal(size=(2, 2, count, dim)).astype(np.float32)
  return Outputs(momentum_prediction=prediction, momentum_target=target)


def cosine(x, y):
  return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


@pytest.mark.parametrize(("count", "dim"), SIZES)
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_moco_equals_loops(temperature, count, dim):
  outputs = random_outputs(0, count, dim)
  losses, hits = [], []
  for query_view, key_view in ((0, 1), (1, 0)):
    total = 0.0
    for i, query in enumerate(outputs.momentum_prediction[query_view]):
      logits = np.array([cosine(query, key) / temperature for key in outputs.momentum_target[key_view]])
      total += np.log(np.sum(np.exp(logits))) - logits[i]
      hits.append(np.argmax(logits) == i)
    losses.append(2 * temperature * total / count)
  loss, metrics = jax.jit(partial(moco, temperature=temperature))(outputs, {})
  np.testing.assert_allclose(loss, losses[0] + losses[1], rtol=1e-5)
  np.testing.assert_allclose(metrics["moco_accuracy"], np.mean(hits), rtol=1e-6)
  assert count < 7 or 0 < np.mean(hits) < 1


@pytest.mark.parametrize(("count", "dim"), SIZES)
def test_byol_equals_loops(count, dim):
  outputs = random_outputs(1, count, dim)
  total = 0.0
  for i in range(count):
    for p, z in ((0, 1), (1, 0)):
      prediction, target = outputs.momentum_prediction[p, i], outputs.momentum_target[z, i]
      distance = prediction / np.linalg.norm(prediction) - target / np.linalg.norm(target)
      total += np.sum(distance**2)
  np.testing.assert_allclose(jax.jit(byol)(outputs, {})[0], total / count, rtol=1e-5)


def test_byol_is_0_where_predictions_are_the_targets_of_the_other_view_and_8_where_they_are_opposite():
  target = jnp.asarray(random_outputs(2).momentum_target)
  loss = jax.jit(lambda prediction: byol(Outputs(momentum_prediction=prediction, momentum_target=target), {})[0])
  np.testing.assert_allclose(loss(3 * target[::-1]), 0, atol=1e-6)
  np.testing.assert_allclose(loss(-target[::-1]), 8, rtol=1e-6)


def test_byol_normalises_with_an_epsilon_of_1e_6():
  short = jnp.full((2, 1, 1), 1e-7)
  for prediction, target in ((short, short / 1e-7), (short / 1e-7, short)):
    loss, _ = byol(Outputs(momentum_prediction=prediction, momentum_target=target), {})
    np.testing.assert_allclose(loss, 2 * (2 - 2 * 0.1), rtol=1e-5)


def test_momentum_rises_from_its_start_to_one():
  steps = [0, 25, 50, 100]
  expected = [0.99, 1 - 0.01 * (1 + np.sqrt(0.5)) / 2, 0.995, 1]
  found = jax.jit(jax.vmap(lambda step: momentum_at(step, 100, 0.99)))(jnp.array(steps))
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  np.testing.assert_allclose(momentum_at(jnp.int32(0), 7, 0.996), 0.996, rtol=1e-6)


def test_moving_average_leaf_by_leaf():
  old = {"a": jnp.array([1.0, 2.0]), "b": [jnp.array(4.0, jnp.bfloat16)]}
  new = {"a": jnp.array([3.0, 2.0]), "b": [jnp.array(0.0, jnp.bfloat16)]}
  found = moving_average(old, new, jnp.float32(0.75))
  np.testing.assert_array_equal(found["a"], [1.5, 2.0])
  assert found["b"][0] == 3
  assert found["b"][0].dtype == jnp.bfloat16


def test_moving_average_is_constant_at_momentum_one():
  old, new = np.random.default_rng(3).normal(size=(2, 5)).astype(np.float32)
  np.testing.assert_array_equal(moving_average(old, new, momentum_at(jnp.int32(9), 9, 0.9)), old)
