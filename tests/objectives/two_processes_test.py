"""The loss over arrays whose rows are split over devices, against references that ran in two processes.

A trainer that averages gradients over processes, or DeCLIP's that adds them, gives its parameters the gradient
`global_grad_*`. Ours comes from one loss over the global batch.
"""

from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest
import references as reference

from declip_jax.objectives.contrastive import clip
from declip_jax.objectives.sigmoid import sigmoid
from declip_jax.objectives.simclr import nt_xent
from declip_jax.types import Outputs
from declip_jax.unit_norm import unit_norm

GOLDEN = reference.load("losses")


def info_nce(full_gradient):
  def loss(image, text, log_scale):
    outputs = Outputs(image=unit_norm(image)[None], text=unit_norm(text)[None], scale=jnp.exp(log_scale))
    return clip(outputs, {}, full_gradient=full_gradient)[0]

  return loss


def siglip(image, text, log_scale, bias):
  outputs = Outputs(image=unit_norm(image)[None], text=unit_norm(text)[None], scale=jnp.exp(log_scale), bias=bias)
  return sigmoid(outputs, {})[0]


# Loss, names of its inputs in the fixture, and names of their gradients.
PAIRS = ("img", "txt", "log_scale"), ("image", "text", "log_scale")
FORMS = {
  "full": (info_nce(True), *PAIRS),
  "constant candidates": (info_nce(False), *PAIRS),
  "simclr": (lambda a, b: nt_xent(Outputs(simclr=jnp.stack([a, b])), {})[0], ("ssl_a", "ssl_b"), ("a", "b")),
  "siglip": (
    siglip,
    ("img", "txt", "siglip_log_scale", "siglip_bias"),
    ("image", "text", "log_scale", "bias"),
  ),
}


@cache
def sharded(method):
  """Value and gradients by name, with rows split over two devices."""
  loss, inputs, names = FORMS[method]
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  placed = [
    jax.device_put(GOLDEN[name], NamedSharding(mesh, PartitionSpec("data") if GOLDEN[name].ndim else PartitionSpec()))
    for name in inputs
  ]
  value, gradients = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(placed)))))(*placed)
  return value, dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize(
  ("name", "method"),
  [
    ("slip_clip", "constant candidates"),
    ("simclr", "simclr"),
    ("declip_infonce", "full"),
    ("declip_ntxent", "simclr"),
    ("openclip_clip_local0_ggrad1", "full"),
    ("openclip_clip_local1_ggrad1", "full"),
    ("openclip_clip_local1_ggrad0", "constant candidates"),
    ("siglip_bidir", "siglip"),
    ("siglip_shift", "siglip"),
    ("siglip_reduce", "siglip"),
    ("siglip_gather", "siglip"),
  ],
)
def test_value_and_gradient_equal_the_reference_in_two_processes(name, method):
  value, gradients = sharded(method)
  np.testing.assert_allclose(value, GOLDEN[f"w2/{name}/loss_mean"], atol=7.5e-7)
  for field, gradient in gradients.items():
    expected = GOLDEN[f"w2/{name}/global_grad_{field}"].reshape(gradient.shape)
    np.testing.assert_allclose(gradient, expected, atol=7.5e-7, err_msg=field)
  check_processes(name, value, gradients)


def check_processes(name, value, gradients):
  """Compares the gradients of each process: DeCLIP's are summed over processes; the others' are averaged, so for rows
  that only one process has they are twice the gradient."""
  added = name.startswith("declip_")
  np.testing.assert_allclose(GOLDEN[f"w2/{name}/loss_per_rank"].mean(), value, atol=7.5e-7)
  for field, gradient in gradients.items():
    parts = GOLDEN[f"w2/{name}/rank_grad_{field}"]
    if gradient.ndim:
      np.testing.assert_allclose(parts, np.stack(np.split(gradient, 2)) * (1 if added else 2), atol=1.5e-6)
    else:
      np.testing.assert_allclose(parts.sum() if added else parts.mean(), gradient, atol=7.5e-7)


def test_open_clips_default_halves_the_gradient_in_two_processes():
  """We have no such option: its gather drops the other process's gradient of all logits, but not that of the scale."""
  name = "openclip_clip_local0_ggrad0"
  value, gradients = sharded("full")
  np.testing.assert_allclose(value, GOLDEN[f"w2/{name}/loss_mean"], atol=7.5e-7)
  passed = {field: factor * gradients[field] for field, factor in (("image", 0.5), ("text", 0.5), ("log_scale", 1))}
  for field, gradient in passed.items():
    np.testing.assert_allclose(gradient, GOLDEN[f"w2/{name}/global_grad_{field}"], atol=7.5e-7, err_msg=field)
  check_processes(name, value, passed)


def test_constant_candidates_halve_the_gradient_but_only_about():
  full, constant = (np.asarray(sharded(method)[1]["image"]).ravel() for method in ("full", "constant candidates"))
  length = np.linalg.norm(full) / np.linalg.norm(constant)
  direction = full @ constant / np.linalg.norm(full) / np.linalg.norm(constant)
  assert 1.8 < length < 2.2
  assert 0.9 < direction < 0.9999
