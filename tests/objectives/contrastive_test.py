"""Tests of `declip_jax.objectives.contrastive` against loops and against open_clip's and SLIP's CLIP loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as reference

from declip_jax.models.heads import unit_norm
from declip_jax.objectives.contrastive import clip, info_nce, multi_view
from declip_jax.types import Outputs


@pytest.fixture(scope="module")
def golden():
  return reference.load("losses")


def loops(image, text, scale):
  """The symmetric cross-entropy, pair by pair."""
  total, count = 0.0, len(image)
  for i in range(count):
    image_to_text = [scale * np.dot(image[i], text[j]) for j in range(count)]
    text_to_image = [scale * np.dot(image[j], text[i]) for j in range(count)]
    for logits in (image_to_text, text_to_image):
      total -= logits[i] - np.log(np.sum(np.exp(logits)))
  return total / (2 * count)


def random_views(seed, views, count=6, dim=5):
  x = np.random.default_rng(seed).normal(size=(views, count, dim))
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_value_and_gradient_equal_open_clip(golden):
  def loss(image, text, log_scale):
    outputs = Outputs(image=unit_norm(image)[None], text=unit_norm(text)[None], scale=jnp.exp(log_scale))
    return clip(outputs, {})

  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
  (value, metrics), gradients = step(golden["img"], golden["txt"], golden["log_scale"])
  np.testing.assert_allclose(value, golden["infonce/loss"], atol=3e-6)
  np.testing.assert_allclose(metrics["clip_accuracy"], golden["slip_clip/acc"] / 100, atol=1e-6)
  for name, gradient in zip(("image", "text", "log_scale"), gradients, strict=True):
    np.testing.assert_allclose(gradient, golden[f"infonce/grad_{name}"], atol=3e-6, err_msg=name)
  # SLIP's released code stops the gradient at the gathered side; ours is the whole one.
  assert np.abs(gradients[0] - golden["infonce_stopgrad/grad_image"]).max() > 1e-3


def test_logits_equal_open_clip(golden):
  _, logits = info_nce(unit_norm(golden["img"]), unit_norm(golden["txt"]), jnp.exp(golden["log_scale"]))
  np.testing.assert_allclose(logits, golden["infonce/logits_per_image"], atol=1e-5)


def test_value_equals_loops():
  (image,), (text,) = random_views(0, 1), random_views(1, 1)
  np.testing.assert_allclose(info_nce(image, text, jnp.float32(7.0))[0], loops(image, text, 7.0), rtol=1e-6)


def test_clip_takes_the_first_views_and_multi_view_all_other_pairs():
  image, text = random_views(2, 2), random_views(3, 3)
  outputs = Outputs(image=image, text=text, scale=jnp.float32(4.0))
  np.testing.assert_allclose(clip(outputs, {})[0], loops(image[0], text[0], 4.0), rtol=1e-6)
  pairs = [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
  expected = np.mean([loops(image[i], text[t], 4.0) for i, t in pairs])
  np.testing.assert_allclose(multi_view(outputs, {})[0], expected, rtol=1e-6)


def test_multi_view_needs_a_second_view():
  outputs = Outputs(image=random_views(0, 1), text=random_views(1, 1), scale=jnp.float32(1.0))
  with pytest.raises(ValueError, match="'mvs' needs Outputs.image or Outputs.text with a second view"):
    multi_view(outputs, {})


def test_accuracy_counts_images_that_find_their_text():
  text = np.eye(4, dtype=np.float32)
  image = text[[0, 1, 3, 2]]
  _, metrics = clip(Outputs(image=image[None], text=text[None], scale=jnp.float32(1.0)), {})
  assert metrics["clip_accuracy"] == 0.5
