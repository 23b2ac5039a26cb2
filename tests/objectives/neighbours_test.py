"""Tests of `declip_jax.objectives.neighbours` against DeCLIP's loss, and against loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as reference

from declip_jax.objectives.neighbours import nearest_neighbour
from declip_jax.types import Outputs
from declip_jax.unit_norm import unit_norm


@pytest.fixture(scope="module")
def golden():
  return reference.load("losses")


def one_way(query, key, scale, label_smoothing=0.0):
  """Mean cross-entropy of finding key `i` for query `i`."""
  losses = []
  for index, row in enumerate(query):
    logits = np.array([scale * row @ other for other in key])
    target = np.full(len(key), label_smoothing / len(key))
    target[index] += 1 - label_smoothing
    losses.append(np.log(np.sum(np.exp(logits))) - np.sum(target * logits))
  return np.mean(losses)


def random_outputs(views=2, neighbours=3, count=5, dim=4):
  rng = np.random.default_rng(0)

  def rows(leading):
    x = rng.normal(size=(leading, count, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  return Outputs(
    image=rows(views),
    text=rows(2),
    scale=jnp.float32(3.0),
    neighbour=rows(neighbours),
    neighbour_similarity=np.arange(neighbours * count, dtype=np.float32).reshape(neighbours, count) / 7,
    neighbour_age=np.arange(neighbours * count, dtype=np.float32).reshape(neighbours, count),
    neighbour_ready=jnp.float32(1.0),
  )


def test_value_and_gradient_of_the_released_variant_equal_declip(golden):
  """From images to the neighbours of both texts, whether or not the bank is full."""
  neighbour = jnp.stack([golden["nn/nn_text1"], golden["nn/nn_text2"]])

  def loss(images, log_scale):
    outputs = Outputs(
      image=unit_norm(images),
      text=jnp.stack([golden["nn/text1"], golden["nn/text2"]]),
      scale=jnp.exp(log_scale),
      neighbour=neighbour,
      neighbour_similarity=jnp.ones(neighbour.shape[:2]),
      neighbour_age=jnp.zeros(neighbour.shape[:2]),
      neighbour_ready=jnp.float32(0.0),
    )
    return nearest_neighbour(outputs, {}, symmetric=False, warmup=False)

  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  for view in (1, 2):
    one = step(golden[f"nn/image{view}"][None], golden["log_scale"])[0][0]
    np.testing.assert_allclose(one, golden[f"nn/loss_image{view}"], atol=7.5e-7)
  images = np.stack([golden["nn/image1"], golden["nn/image2"]])
  (value, metrics), (gradient, scale_gradient) = step(images, golden["log_scale"])
  np.testing.assert_allclose(value, golden["nn/loss"], atol=7.5e-7)
  np.testing.assert_allclose(gradient, np.stack([golden["nn/grad_image1"], golden["nn/grad_image2"]]), atol=7.5e-7)
  np.testing.assert_allclose(scale_gradient, golden["nn/grad_log_scale"][0], atol=7.5e-7)


@pytest.mark.parametrize(("count", "dim"), [(5, 4), (2, 9), (19, 3)])
@pytest.mark.parametrize(
  ("views", "neighbours", "symmetric", "label_smoothing"),
  [(1, 1, True, 0.0), (2, 3, True, 0.0), (2, 1, True, 0.1), (2, 2, False, 0.0), (1, 3, False, 0.1)],
)
def test_value_and_metrics_equal_loops(views, neighbours, symmetric, label_smoothing, count, dim):
  outputs = random_outputs(views, neighbours, count, dim)
  losses = []
  for image in outputs.image:
    for near in outputs.neighbour:
      both = [one_way(image, near, 3.0, label_smoothing), one_way(near, image, 3.0, label_smoothing)]
      losses.append(np.mean(both) if symmetric else both[0])
  options = {"symmetric": symmetric, "label_smoothing": label_smoothing}
  loss, metrics = jax.jit(partial(nearest_neighbour, **options))(outputs, {})
  np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
  # The first one has age 0: it is random.
  np.testing.assert_allclose(metrics["neighbour_similarity"], np.mean(range(1, count * neighbours)) / 7, rtol=1e-5)
  np.testing.assert_allclose(metrics["neighbour_age"], np.mean(range(1, count * neighbours)), rtol=1e-6)
  np.testing.assert_allclose(metrics["neighbour_noise"], 1 / (count * neighbours), rtol=1e-5)


def test_the_loss_is_zero_until_the_bank_is_full_with_warmup_only():
  outputs = jax.tree.map(jnp.asarray, random_outputs())

  def loss(image, ready, warmup=True):
    return nearest_neighbour(outputs.replace(image=image, neighbour_ready=ready), {}, warmup=warmup)[0]

  step = jax.jit(jax.value_and_grad(loss))
  value, gradient = step(outputs.image, 0.0)
  assert value == 0
  np.testing.assert_array_equal(gradient, np.zeros_like(outputs.image))
  full, _ = step(outputs.image, 1.0)
  assert full > 0
  np.testing.assert_allclose(jax.jit(partial(loss, warmup=False))(outputs.image, 0.0), full, rtol=1e-6)
