"""The gradient of every term against central differences in float64, and the absence of others."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.test_util import check_vjp
import numpy as np
import pytest

from declip_jax.objectives.contrastive import clip, multi_view
from declip_jax.objectives.filip import filip
from declip_jax.objectives.masked_image import masked_image
from declip_jax.objectives.masked_lm import masked_lm
from declip_jax.objectives.momentum import byol, moco
from declip_jax.objectives.neighbours import nearest_neighbour
from declip_jax.objectives.sigmoid import sigmoid
from declip_jax.objectives.simclr import nt_xent
from declip_jax.objectives.simsiam import simsiam
from declip_jax.types import Outputs

RNG = np.random.default_rng(0)
COUNT, DIM = 3, 4
BATCH = {"mlm_target": np.array([[0, 4], [2, 1], [3, 3]]), "mlm_weight": np.array([[1.0, 0], [1, 1], [0, 1]])}


def rows(*leading: int, unit: bool = True) -> np.ndarray:
  x = RNG.normal(size=(*leading, DIM))
  return x / np.linalg.norm(x, axis=-1, keepdims=True) if unit else x


OUTPUTS = {
  "image": rows(2, COUNT),
  "text": rows(3, COUNT),
  "scale": np.float64(3.0),
  "bias": np.float64(-1.0),
  "image_tokens": rows(COUNT, 5),
  "text_tokens": rows(COUNT, 4),
  "text_valid": np.arange(4) < np.array([[2], [4], [3]]),
  "dense_scale": np.float64(4.0),
  "simclr": rows(2, COUNT, unit=False),
  "simsiam_projection": rows(2, COUNT, unit=False),
  "simsiam_prediction": rows(2, COUNT, unit=False),
  "momentum_prediction": rows(2, COUNT, unit=False),
  "momentum_target": rows(2, COUNT, unit=False),
  "mlm_logits": RNG.normal(size=(COUNT, 2, 5)),
  "mim_prediction": rows(COUNT, 2, unit=False),
  "mim_target": rows(COUNT, 2, unit=False),
  "neighbour": rows(2, COUNT),
  "neighbour_similarity": np.ones((2, COUNT)),
  "neighbour_age": np.ones((2, COUNT)),
  "neighbour_ready": np.float64(1.0),
}
PAIRS = ("image", "text", "scale")
TOKENS = ("image_tokens", "text_tokens", "dense_scale")

# Every term with its options, its differentiable fields, and its constant fields.
TERMS = {
  "clip": (clip, PAIRS, ()),
  "clip, smoothed": (partial(clip, label_smoothing=0.1), PAIRS, ()),
  "mvs": (multi_view, PAIRS, ()),
  "sigmoid": (sigmoid, (*PAIRS, "bias"), ()),
  "filip": (filip, TOKENS, ()),
  "filip, selected": (partial(filip, top_k=2, label_smoothing=0.1), TOKENS, ()),
  "simclr": (nt_xent, ("simclr",), ()),
  "simsiam": (simsiam, ("simsiam_prediction",), ("simsiam_projection",)),
  "moco": (moco, ("momentum_prediction",), ("momentum_target",)),
  "byol": (byol, ("momentum_prediction",), ("momentum_target",)),
  "mlm": (masked_lm, ("mlm_logits",), ()),
  "mim": (masked_image, ("mim_prediction",), ("mim_target",)),
  "nns": (nearest_neighbour, ("image", "scale"), ("text",)),
  "nns, one way": (partial(nearest_neighbour, symmetric=False, warmup=False), ("image", "scale"), ("text",)),
}


def check_gradient(function: Callable[[dict], jax.Array], value: jax.Array, gradient: dict, point: dict) -> None:
  """Compares a gradient with central differences of `function`, along a random direction."""

  def vjp(point: dict) -> tuple[jax.Array, Callable]:
    return value, lambda cotangent: (jax.tree.map(lambda x: cotangent * x, gradient),)

  check_vjp(function, vjp, (point,), atol=1e-8, rtol=1e-8, eps=1e-5)


Points = dict[str, dict[str, jax.Array]]


class Programs(NamedTuple):
  """All terms in float64, in two programs, since compiling takes most of the time.

  Attributes:
    points: the differentiable and the constant fields of each term.
    losses: function from such points to the loss of each term.
    gradients: the losses and gradients at these points.
  """

  points: Points
  losses: Callable[[Points], dict[str, jax.Array]]
  gradients: dict[str, tuple[jax.Array, dict[str, jax.Array]]]


@pytest.fixture(scope="module")
def programs() -> Programs:
  with jax.enable_x64(True):
    everything, batch = jax.tree.map(jnp.asarray, (Outputs(**OUTPUTS), BATCH))

    def loss(name: str, fields: dict[str, jax.Array]) -> jax.Array:
      return TERMS[name][0](everything.replace(**fields), batch)[0]

    points = {
      name: {field: getattr(everything, field) for field in (*learning, *constant)}
      for name, (_, learning, constant) in TERMS.items()
    }
    losses = jax.jit(lambda points: {name: loss(name, points[name]) for name in TERMS})
    gradients = jax.jit(lambda points: {name: jax.value_and_grad(partial(loss, name))(points[name]) for name in TERMS})
    return Programs(points, losses, gradients(points))


@pytest.mark.parametrize("name", TERMS)
def test_gradient_equals_central_differences(name: str, programs: Programs) -> None:
  _, learning, constant = TERMS[name]
  value, gradient = programs.gradients[name]
  point = programs.points[name]
  with jax.enable_x64(True):
    assert value.dtype == jnp.float64
    for field in learning:
      assert gradient[field].dtype == jnp.float64
      assert np.abs(gradient[field]).max() > 1e-3, field
    for field in constant:
      np.testing.assert_array_equal(gradient[field], np.zeros_like(point[field]), err_msg=field)

    def loss(fields: dict[str, jax.Array]) -> jax.Array:
      return programs.losses({**programs.points, name: point | fields})[name]

    moving = [{field: tree[field] for field in learning} for tree in (gradient, point)]
    check_gradient(loss, value, *moving)


@pytest.mark.parametrize(
  ("term", "pairs"), [(clip, [(0, 0)]), (multi_view, [(i, t) for i in (0, 1) for t in (0, 1, 2)][1:])]
)
def test_gradient_with_constant_candidates_equals_central_differences(term: Callable, pairs: list) -> None:
  """The differences are those of the same loss in which each query moves and its candidates are constant."""
  with jax.enable_x64(True):
    point = {field: jnp.asarray(OUTPUTS[field]) for field in PAIRS}
    start = dict(point)

    def one_way(query: jax.Array, candidate: jax.Array) -> jax.Array:
      return jnp.mean(jax.nn.logsumexp(query @ candidate.T, axis=1) - jnp.sum(query * candidate, axis=1))

    def loss_with_constants(fields: dict) -> jax.Array:
      image, text = fields["scale"] * fields["image"], fields["scale"] * fields["text"]
      losses = [(one_way(image[i], start["text"][t]) + one_way(text[t], start["image"][i])) / 2 for i, t in pairs]
      return sum(losses) / len(losses)

    loss = jax.value_and_grad(lambda fields: term(Outputs(**fields), {}, full_gradient=False)[0])
    value, gradient = jax.jit(loss)(point)
    for field in PAIRS:
      assert np.abs(gradient[field]).max() > 1e-3, field
    check_gradient(jax.jit(loss_with_constants), value, gradient, point)


@pytest.mark.parametrize("name", ["simclr", "simsiam", "moco", "byol"])
def test_rows_of_zeros_have_a_finite_gradient(name: str) -> None:
  term, learning, constant = TERMS[name]
  point = {field: OUTPUTS[field].astype(np.float32) for field in (*learning, *constant)}
  for field in point:
    point[field][0, 1] = 0
  value, gradient = jax.jit(jax.value_and_grad(lambda fields: term(Outputs(**fields), {})[0]))(point)
  assert np.isfinite(value)
  for field in point:
    assert np.isfinite(gradient[field]).all(), field
