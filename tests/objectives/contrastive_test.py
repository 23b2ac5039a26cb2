"""Tests of `declip_jax.objectives.contrastive` against loops and against open_clip's and SLIP's CLIP loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as reference

from declip_jax.objectives.contrastive import clip, cross_entropy, info_nce, multi_view
from declip_jax.types import Outputs
from declip_jax.unit_norm import unit_norm


@pytest.fixture(scope="module")
def golden():
  return reference.load("losses")


def one_way(logits, label_smoothing):
  """Cross-entropy of one query whose candidate is the first, by the definition of label smoothing."""
  target = np.full(len(logits), label_smoothing / len(logits))
  target[0] += 1 - label_smoothing
  return -np.sum(target * (logits - np.log(np.sum(np.exp(logits)))))


def loops(image, text, scale, label_smoothing=0.0):
  """The symmetric cross-entropy, query by query, each with its own candidate first."""
  total, count = 0.0, len(image)
  for i in range(count):
    order = [i, *(j for j in range(count) if j != i)]
    total += one_way(np.array([scale * np.dot(image[i], text[j]) for j in order]), label_smoothing)
    total += one_way(np.array([scale * np.dot(image[j], text[i]) for j in order]), label_smoothing)
  return total / (2 * count)


def random_views(seed, views, count=7, dim=5):
  x = np.random.default_rng(seed).normal(size=(views, count, dim))
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
  ("name", "full_gradient"), [("infonce", True), ("slip_clip", True), ("infonce_stopgrad", False)]
)
def test_value_and_gradient_equal_open_clip_and_slip(golden, name, full_gradient):
  def loss(image, text, log_scale):
    outputs = Outputs(image=unit_norm(image)[None], text=unit_norm(text)[None], scale=jnp.exp(log_scale))
    return clip(outputs, {}, full_gradient=full_gradient)

  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
  (value, metrics), gradients = step(golden["img"], golden["txt"], golden["log_scale"])
  np.testing.assert_allclose(value, golden[f"{name}/loss"], atol=7.5e-7)
  np.testing.assert_allclose(metrics["image_to_text_accuracy"], golden["slip_clip/acc"] / 100, atol=1e-6)
  for field, gradient in zip(("image", "text", "log_scale"), gradients, strict=True):
    np.testing.assert_allclose(gradient, golden[f"{name}/grad_{field}"], atol=7.5e-7, err_msg=field)


def test_unit_rows_and_their_logits_equal_open_clip(golden):
  image, text = (np.asarray(unit_norm(jnp.asarray(golden[name]))) for name in ("img", "txt"))
  logits = np.exp(golden["log_scale"]) * np.einsum("id,jd->ij", image.astype(np.float64), text.astype(np.float64))
  np.testing.assert_allclose(logits, golden["infonce/logits_per_image"], atol=2.5e-6)


def test_gradient_of_the_embeddings_equals_open_clip(golden):
  def loss(image, text):
    return info_nce(image[None], text[None], jnp.exp(golden["log_scale"])).loss[0, 0]

  inputs = unit_norm(jnp.asarray(golden["img"])), unit_norm(jnp.asarray(golden["txt"]))
  gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(*inputs)
  for field, gradient in zip(("image", "text"), gradients, strict=True):
    np.testing.assert_allclose(gradient, golden[f"infonce/grad_normalized_{field}"], atol=7.5e-7, err_msg=field)


compiled_info_nce = jax.jit(info_nce, static_argnames="full_gradient")


@pytest.mark.parametrize(("count", "dim"), [(7, 5), (2, 9), (19, 4)])
@pytest.mark.parametrize(("full_gradient", "label_smoothing"), [(True, 0.0), (True, 0.1), (False, 0.3), (True, 1.0)])
def test_value_equals_loops(full_gradient, label_smoothing, count, dim):
  image, text = random_views(0, 2, count, dim), random_views(1, 3, count, dim)
  pairs = compiled_info_nce(image, text, jnp.float32(7.0), full_gradient=full_gradient)
  found = pairs.smoothed(label_smoothing)
  for i in range(2):
    for t in range(3):
      np.testing.assert_allclose(found[i, t], loops(image[i], text[t], 7.0, label_smoothing), rtol=1e-6)


def test_label_smoothing_has_its_optimum_at_the_smoothed_target():
  """Cross-entropy is minimal where the softmax equals the target, and is then the target's entropy."""
  target = np.full((4, 4), 0.3 / 4) + 0.7 * np.eye(4)
  value, gradient = jax.jit(jax.value_and_grad(partial(cross_entropy, label_smoothing=0.3)))(
    np.log(target).astype(np.float32)
  )
  np.testing.assert_allclose(value, -np.sum(target[0] * np.log(target[0])), rtol=1e-6)
  np.testing.assert_allclose(gradient, np.zeros((4, 4)), atol=1e-7)


def test_clip_uses_the_first_views_and_multi_view_all_other_pairs():
  image, text = random_views(2, 2), random_views(3, 3)
  outputs = Outputs(image=image, text=text, scale=jnp.float32(4.0))
  pairs = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
  for label_smoothing in (0.0, 0.2):
    options = {"label_smoothing": label_smoothing}
    first, *others = (loops(image[i], text[t], 4.0, label_smoothing) for i, t in pairs)
    np.testing.assert_allclose(jax.jit(partial(clip, **options))(outputs, {})[0], first, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(partial(multi_view, **options))(outputs, {})[0], np.mean(others), rtol=1e-6)


def test_multi_view_can_hold_the_candidates_constant():
  image, text = jnp.asarray(random_views(4, 2)), jnp.asarray(random_views(5, 1))

  def gradient(full_gradient):
    def loss(image):
      outputs = Outputs(image=image, text=text, scale=jnp.float32(4.0))
      return multi_view(outputs, {}, full_gradient=full_gradient)[0]

    return jax.jit(jax.grad(loss))(image)

  def expected(image):  # of the only remaining pair
    return cross_entropy(4 * image[1] @ text[0].T) / 2

  np.testing.assert_allclose(gradient(False), jax.jit(jax.grad(expected))(image), atol=1e-6)
  assert np.abs(gradient(True) - gradient(False)).max() > 1e-3


def test_multi_view_needs_a_second_view():
  outputs = Outputs(image=random_views(0, 1), text=random_views(1, 1), scale=jnp.float32(1.0))
  with pytest.raises(ValueError, match="'mvs' needs Outputs.image or Outputs.text with a second view"):
    multi_view(outputs, {})


def test_accuracy_counts_images_that_find_their_text_and_texts_that_find_their_image():
  image = jnp.eye(4)
  text = jnp.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0.9, 0.8, 0], [0, 0, 0.7, 0]])
  _, metrics = clip(Outputs(image=image[None], text=text[None], scale=jnp.float32(1.0)), {})
  # Image 3 sees only zeros, of which the first counts; text 2 prefers image 1, and text 3 image 2.
  assert metrics["image_to_text_accuracy"] == 0.75
  assert metrics["text_to_image_accuracy"] == 0.5


def test_unit_norm_keeps_float64_and_widens_bfloat16():
  x = np.random.default_rng(6).normal(size=(3, 4))
  expected = x / np.linalg.norm(x, axis=-1, keepdims=True)
  with jax.enable_x64(True):
    assert unit_norm(jnp.asarray(x)).dtype == jnp.float64
    np.testing.assert_allclose(unit_norm(jnp.asarray(x)), expected, rtol=1e-14)
  assert unit_norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32
  np.testing.assert_allclose(unit_norm(jnp.asarray(x, jnp.float32)), expected, rtol=3e-7)


def test_unit_norm_divides_short_rows_by_epsilon():
  x = np.array([[0, 0], [3e-4, 0], [0, 2e-3]], np.float32)
  rows, gradient = jax.vjp(lambda x: unit_norm(x, 1e-3), x)
  np.testing.assert_allclose(rows, [[0, 0], [0.3, 0], [0, 1]], rtol=1e-6)
  np.testing.assert_allclose(gradient(jnp.ones((3, 2)))[0], [[1e3, 1e3], [1e3, 1e3], [500, 0]], rtol=1e-5, atol=1e-3)
  assert np.isfinite(jax.grad(lambda x: unit_norm(x).sum())(np.zeros((1, 2), np.float32))).all()


def test_separate_directions_equal_declips_convirt_losses(golden):
  """Three quarters image to text and one quarter text to image at temperature 0.1; that solver never trains with it."""

  def loss(image, text):
    logits = unit_norm(image) @ unit_norm(text).T / 0.1
    return 0.75 * cross_entropy(logits) + 0.25 * cross_entropy(logits.T)

  value, (image, text) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(golden["img"], golden["txt"])
  name = "convirt_t0.1_a0.75"
  np.testing.assert_allclose(value, golden[f"{name}/loss"], atol=7.5e-7)
  np.testing.assert_allclose(image, golden[f"{name}/grad_image"], atol=7.5e-7)
  np.testing.assert_allclose(text, golden[f"{name}/grad_text"], atol=7.5e-7)
  declip = reference.load("declip")
  image, text = (
    [jnp.asarray(declip[f"declip/{kind}_features{view}"]) for view in (1, 2)] for kind in ("image", "text")
  )
  views = (loss(x, text[0]) for x in image)
  np.testing.assert_allclose(sum(views), declip["declip/convirt_logged"], atol=1e-5)
