"""Tests of `declip_jax.objectives`: what `config.weights` may say, and the weighted sum."""

import jax.numpy as jnp
import numpy as np
import pytest

from declip_jax import config
from declip_jax.objectives import TERMS, active, check_inputs, heads_for, total_loss
from declip_jax.types import Outputs

RNG = np.random.default_rng(0)


def everything():
  """Outputs and batch that every term can be computed from."""

  def rows(*shape):
    x = RNG.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

  outputs = Outputs(
    image=rows(2, 4, 3),
    text=rows(2, 4, 3),
    scale=jnp.float32(5.0),
    simclr=rows(2, 4, 3),
    simsiam_projection=rows(2, 4, 3),
    simsiam_prediction=rows(2, 4, 3),
    mlm_logits=rows(4, 2, 7),
    neighbour=rows(4, 3),
    neighbour_ready=jnp.float32(1.0),
  )
  return outputs, {"mlm_target": np.zeros((4, 2), int), "mlm_weight": np.ones((4, 2), np.float32)}


def test_the_loss_is_the_weighted_sum_and_every_term_is_reported_unweighted():
  outputs, batch = everything()
  weights = {name: 0.1 * (1 + index) for index, name in enumerate(TERMS)}
  loss, metrics = total_loss(outputs, batch, weights)
  alone = {name: total_loss(outputs, batch, {name: 1.0})[0] for name in TERMS}
  np.testing.assert_allclose(loss, sum(weights[name] * alone[name] for name in TERMS), rtol=1e-6)
  assert metrics["loss"] == loss
  for name in TERMS:
    np.testing.assert_allclose(metrics[f"loss/{name}"], alone[name], rtol=1e-6)
  assert len({float(value) for value in alone.values()}) == len(TERMS)
  assert all(np.shape(value) == () for value in metrics.values())


def test_a_weight_of_zero_leaves_a_term_out():
  outputs = Outputs(image=np.eye(2)[None], text=np.eye(2)[None], scale=jnp.float32(1.0))
  _, metrics = total_loss(outputs, {}, {"clip": 2.0, "simclr": 0.0, "mlm": 0})
  assert set(metrics) == {"loss", "loss/clip", "clip_accuracy"}


def test_unknown_terms_are_named_with_the_known_ones():
  with pytest.raises(ValueError, match=r"unknown terms \['byol', 'filp'\]: choose from \['clip', 'mlm', 'mvs'"):
    active({"clip": 1.0, "filp": 0.0, "byol": 1.0})


@pytest.mark.parametrize("weights", [{}, {"clip": 0.0, "mlm": 0}])
def test_a_method_without_terms_is_refused(weights):
  with pytest.raises(ValueError, match="every term weight 0"):
    active(weights)


def test_heads_exist_where_a_term_needs_them():
  found = {method: heads_for(config.default(method).weights) for method in config.METHODS}
  assert found == {"clip": (), "slip": ("simclr",), "declip": ("bank", "mlm", "simsiam")}
  assert heads_for({"clip": 1.0, "nns": 0.0}) == ()


@pytest.mark.parametrize(("term", "field"), [(n, f) for n, term in TERMS.items() for f in term.needs])
def test_a_missing_input_is_named_with_its_term_and_recipe(term, field):
  outputs, _ = everything()
  check_inputs(outputs, {term: 1.0}, "some-recipe")
  with pytest.raises(ValueError, match=f"term '{term}' .*needs Outputs.{field}, .*recipe 'some-recipe'"):
    check_inputs(outputs.replace(**{field: None}), {term: 1.0}, "some-recipe")
  check_inputs(outputs.replace(**{field: None}), {"clip" if field not in ("image", "text") else "mlm": 1.0}, "any")
