"""Tests of `declip_jax.objectives.sigmoid` against loops and against open_clip's SigLIP loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as reference

from declip_jax.objectives.sigmoid import sigmoid
from declip_jax.types import Outputs
from declip_jax.unit_norm import unit_norm


def test_value_and_gradient_equal_open_clip():
  golden = reference.load("losses")

  def loss(image, text, log_scale, bias):
    outputs = Outputs(image=unit_norm(image)[None], text=unit_norm(text)[None], scale=jnp.exp(log_scale), bias=bias)
    return sigmoid(outputs, {})[0]

  inputs = golden["img"], golden["txt"], golden["siglip_log_scale"], golden["siglip_bias"]
  value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*inputs)
  np.testing.assert_allclose(value, golden["siglip/loss"], atol=7.5e-7)
  for field, gradient in zip(("image", "text", "log_scale", "bias"), gradients, strict=True):
    np.testing.assert_allclose(gradient, golden[f"siglip/grad_{field}"], atol=7.5e-7, err_msg=field)


def test_value_and_gradient_equal_big_vision():
  golden = reference.load("siglip_training")
  names = ("image", "text", "log_scale", "bias")

  def loss(image, text, log_scale, bias):
    outputs = Outputs(image=unit_norm(image)[None], text=unit_norm(text)[None], scale=jnp.exp(log_scale), bias=bias)
    return sigmoid(outputs, {})[0]

  value, gradients = jax.jit(jax.value_and_grad(loss, argnums=range(4)))(*(golden[name] for name in names))
  np.testing.assert_allclose(value, golden["loss"], rtol=1e-6)
  for name, gradient in zip(names, gradients, strict=True):
    np.testing.assert_allclose(gradient, golden[f"grad/{name}"], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("count", "dim"), [(7, 3), (2, 9), (19, 4)])
def test_value_and_metrics_equal_loops(count, dim):
  rng = np.random.default_rng(0)
  image, text = rng.normal(size=(2, 2, count, dim)).astype(np.float32)  # the second views are not used
  outputs = Outputs(image=image, text=text, scale=jnp.float32(1.5), bias=jnp.float32(-2.0))
  loss, metrics = jax.jit(sigmoid)(outputs, {})
  total, logits = 0.0, {True: [], False: []}
  for i in range(count):
    for j in range(count):
      logit = 1.5 * image[0, i] @ text[0, j] - 2
      total -= np.log(1 / (1 + np.exp(-logit if i == j else logit)))
      logits[i == j].append(logit)
  np.testing.assert_allclose(loss, total / count, rtol=1e-5)
  np.testing.assert_allclose(metrics["sigmoid_positive_logit"], np.mean(logits[True]), rtol=1e-5)
  np.testing.assert_allclose(metrics["sigmoid_negative_logit"], np.mean(logits[False]), rtol=1e-5)


def test_the_loss_is_exact_for_extreme_logits():
  image = np.eye(2, dtype=np.float32)[None]
  wrong = Outputs(image=image, text=image[:, ::-1], scale=jnp.float32(400.0), bias=jnp.float32(-200.0))
  run = jax.jit(sigmoid)
  np.testing.assert_allclose(run(wrong, {})[0], 400, rtol=1e-6)
  np.testing.assert_allclose(run(wrong.replace(text=image), {})[0], 0, atol=1e-30)
