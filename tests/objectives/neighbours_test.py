"""Tests of `declip_jax.objectives.neighbours` against loops, which are first shown to give DeCLIP's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as reference

from declip_jax.objectives.neighbours import nearest_neighbour
from declip_jax.types import Outputs


@pytest.fixture(scope="module")
def golden():
  return reference.load("losses")


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def one_way(query, key, scale):
  """Mean cross-entropy of finding key `i` for query `i`."""
  losses = []
  for index, row in enumerate(query):
    logits = [scale * row @ other for other in key]
    losses.append(np.log(np.sum(np.exp(logits))) - logits[index])
  return np.mean(losses)


def outputs_of(golden, ready=1.0):
  images = np.stack([unit(golden["nn/image1"]), unit(golden["nn/image2"])])
  return Outputs(
    image=images,
    text=golden["nn/text1"][None],
    scale=jnp.exp(golden["log_scale"]),
    neighbour=golden["nn/nn_text1"],
    neighbour_ready=jnp.float32(ready),
  )


def test_loops_equal_declip_whose_loss_is_one_way_and_over_both_texts(golden):
  scale = np.exp(golden["log_scale"])
  for view in ("image1", "image2"):
    found = [one_way(unit(golden[f"nn/{view}"]), golden[f"nn/nn_{text}"], scale) for text in ("text1", "text2")]
    np.testing.assert_allclose(np.mean(found), golden[f"nn/loss_{view}"], atol=5e-6)


def test_value_equals_loops_both_ways(golden):
  outputs = outputs_of(golden)
  expected = np.mean(
    [
      one_way(query, key, outputs.scale)
      for image in outputs.image
      for query, key in ((image, outputs.neighbour), (outputs.neighbour, image))
    ]
  )
  loss, metrics = nearest_neighbour(outputs, {})
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  likeness = np.mean([text @ near for text, near in zip(golden["nn/text1"], golden["nn/nn_text1"], strict=True)])
  np.testing.assert_allclose(metrics["neighbour_similarity"], likeness, rtol=1e-5)


def test_costs_nothing_until_the_bank_is_full(golden):
  outputs = outputs_of(golden, ready=0.0)
  value, gradient = jax.value_and_grad(lambda x: nearest_neighbour(outputs.replace(image=x), {})[0])(outputs.image)
  assert value == 0
  np.testing.assert_array_equal(gradient, np.zeros_like(outputs.image))
