"""Tests of `declip_jax.objectives`: legal values of `config.objective`, and the weighted sum."""

import inspect

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
import references as reference
from tiny import tiny_config

from declip_jax import build, config
from declip_jax.build import check_objective
from declip_jax.data.recipes import RECIPES
from declip_jax.methods import METHODS
from declip_jax.objectives import TERMS, make_objective
from declip_jax.objectives.terms import option_names
from declip_jax.types import Outputs
from declip_jax.views import Views

RNG = np.random.default_rng(0)


def settings(**weights: float) -> dict[str, dict[str, float]]:
  """A `config.objective` that gives terms weights."""
  return {term: {"weight": weight} for term, weight in weights.items()}


def used(views: Views, **weights: float) -> Views:
  """The views of a recipe that terms with these weights use."""
  return make_objective(settings(**weights)).used_views(views)


def everything():
  """Outputs and a batch from which every term can be computed."""

  def rows(*shape):
    x = RNG.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

  outputs = Outputs(
    image=rows(2, 4, 3),
    text=rows(2, 4, 3),
    scale=jnp.float32(5.0),
    bias=jnp.float32(-3.0),
    image_tokens=rows(4, 5, 3),
    text_tokens=rows(4, 6, 3),
    text_valid=np.arange(6) < np.array([[6], [2], [3], [4]]),
    dense_scale=jnp.float32(7.0),
    simclr=rows(2, 4, 3),
    simsiam_projection=rows(2, 4, 3),
    simsiam_prediction=rows(2, 4, 3),
    momentum_prediction=rows(2, 4, 3),
    momentum_target=rows(2, 4, 3),
    mlm_logits=rows(4, 2, 7),
    mim_prediction=rows(4, 2, 6),
    mim_target=rows(4, 2, 6),
    neighbour=rows(1, 4, 3),
    neighbour_similarity=np.ones((1, 4), np.float32),
    neighbour_age=np.ones((1, 4), np.float32),
    neighbour_ready=jnp.float32(1.0),
  )
  batch = {"mlm_target": np.zeros((4, 2), int), "mlm_weight": np.ones((4, 2), np.float32)}
  return jax.tree.map(jnp.asarray, (outputs, batch))


# The terms that this can be computed for; a new one may need other outputs, and has tests of its own.
KNOWN = {name: term for name, term in TERMS.items() if {*term.needs} <= {*everything()[0]}}


def test_the_loss_is_the_weighted_sum_and_every_term_is_reported_unweighted() -> None:
  outputs, batch = everything()
  assert len(KNOWN) >= 11
  weights = {name: 0.1 * (1 + index) for index, name in enumerate(KNOWN)}

  @jax.jit
  def compute(outputs: Outputs, batch: dict[str, jax.Array]) -> tuple:
    alone = {name: reference.objective({name: 1.0})(outputs, batch, 0)[0] for name in KNOWN}
    return *reference.objective(weights)(outputs, batch, 0), alone

  loss, metrics, alone = compute(outputs, batch)
  np.testing.assert_allclose(loss, sum(weights[name] * alone[name] for name in KNOWN), rtol=1e-6)
  assert metrics["loss"] == loss
  for name in KNOWN:
    np.testing.assert_allclose(metrics[f"loss/{name}"], alone[name], rtol=1e-6)
    share = weights[name] * abs(alone[name]) / sum(weights[n] * abs(alone[n]) for n in KNOWN)
    np.testing.assert_allclose(metrics[f"share/{name}"], share, rtol=1e-5)
  assert len({float(value) for value in alone.values()}) == len(KNOWN)
  assert all(np.shape(value) == () for value in metrics.values())


def test_a_term_with_weight_zero_is_omitted() -> None:
  outputs = Outputs(image=np.eye(2)[None], text=np.eye(2)[None], scale=jnp.float32(1.0))
  objective = make_objective(settings(clip=2.0, simclr=0.0, mlm=0))
  metrics = jax.eval_shape(lambda outputs: objective(outputs, {}, 0)[1], outputs)
  assert set(metrics) == {"loss", "loss/clip", "image_to_text_accuracy", "text_to_image_accuracy"}


def test_a_weight_interpolates_its_schedule_and_is_constant_after_it() -> None:
  outputs, batch = everything()
  points = ((10, 0.0), (20, 1.0), (40, 0.5))
  objective = make_objective({"clip": {"weight": 1.0}, "nns": {"weight": 0.4, "schedule": points}})
  compute = jax.jit(lambda step: objective(outputs, batch, step))
  for step, factor in ((0, 0), (10, 0), (15, 0.5), (20, 1), (30, 0.75), (1000, 0.5)):
    loss, metrics = compute(step)
    expected = metrics["loss/clip"] + 0.4 * factor * metrics["loss/nns"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5, err_msg=str(step))
  assert metrics["loss/nns"] > 0.1


def test_options_reach_their_term_and_unknown_ones_are_named() -> None:
  outputs, batch = everything()
  simclr = {"weight": 1.0, "schedule": ()}

  @jax.jit
  def losses(outputs: Outputs) -> list[jax.Array]:
    return [make_objective({"simclr": {**simclr, "temperature": t}})(outputs, batch, 0)[0] for t in (0.1, 1.0)]

  cold, warm = losses(outputs)
  assert abs(cold - warm) > 0.1
  with pytest.raises(ValueError, match=r"config.objective.simclr.temprature: .* has the options \['temperature'"):
    make_objective({"simclr": {**simclr, "temprature": 0.1}})
  with pytest.raises(ValueError, match=r"unknown terms \['simklr'\]"):
    make_objective({"simklr": {**simclr, "temperature": 0.1}})


@pytest.mark.parametrize(
  ("field", "value", "legal"),
  [
    ("weight", float("nan"), "a finite number"),
    ("temperature", 0.0, "more than 0"),
    ("label_smoothing", 1.5, "0 to 1"),
    ("schedule", ((9, 0.0), (5, 1.0)), "steps must be ascending"),
    ("schedule", (0, 0.0), "(step, factor) pairs"),
    ("schedule", ((0, float("nan")),), "factors must be finite"),
  ],
)
def test_an_invalid_number_is_named_with_its_field(field: str, value: object, legal: str) -> None:
  term = "simclr" if field == "temperature" else "clip"
  with pytest.raises(ValueError, match=f"config.objective.{term}.{field}=") as error:
    make_objective({term: {"weight": 1.0, field: value}})
  assert legal in str(error.value)
  with pytest.raises(ValueError, match=r"config.objective.byol.schedule=.*config.objective.byol.weight is 0"):
    make_objective({"clip": {"weight": 1.0}, "byol": {"weight": 0.0, "schedule": ((0, 1.0),)}})


def test_the_config_gives_every_term_a_weight_and_every_option_its_default() -> None:
  c = config.default()
  assert set(c.objective) == set(TERMS)
  for name, term in TERMS.items():
    parameters = inspect.signature(term.loss).parameters
    expected = {option: parameters[option].default for option in option_names(term.loss)}
    assert dict(c.objective[name]) == {"weight": float(name == "clip"), "schedule": (), **expected}


def test_only_views_that_a_term_uses_remain() -> None:
  views = RECIPES["declip"].views
  assert used(views, **METHODS["declip"][1]) == views
  alone = Views((0,), (0,), (), None, None, ())
  assert used(views, clip=1.0) == used(views, filip=1.0) == alone
  assert used(views, mvs=1.0) == alone.replace(contrastive_image=(0, 1), contrastive_text=(0, 1))
  assert used(views, mlm=1.0) == alone.replace(masked_text=2)
  assert used(views, simsiam=1.0) == alone.replace(ssl_image=(0, 1))
  assert used(RECIPES["slip"].views, simclr=1.0) == Views((), (), (1, 2), None, None, ())
  assert used(views, nns=1.0) == Views((0, 1), (0,), (), None, None, (0,))
  released = RECIPES["declip_repo"].views
  assert used(released, nns=1.0) == Views((0, 1), (0, 1), (), None, None, (0, 1))


def test_multi_view_supervision_of_one_view_is_rejected() -> None:
  with pytest.raises(ValueError, match=r"term 'mvs' .*needs Views.contrastive_text\[1\].*recipe 'plain'"):
    reference.objective({"mvs": 1.0}).check_views(Views(), "plain")


def built_or_rejected(term: str, recipe: str) -> tuple[ConfigDict, build.Built] | None:
  """The config of one term on a recipe and its objects; None if the error names both."""
  c = tiny_config("clip")
  c.data.recipe, c.model.text.vocab_size, c.objective.clip.weight = recipe, 49409, 0.0
  c.objective[term].weight = 1.0
  try:
    return c, build.build(c)
  except ValueError as error:
    assert f"term '{term}'" in str(error)  # noqa: PT017
    assert f"recipe '{recipe}'" in str(error)  # noqa: PT017
    return None


def test_any_term_with_any_recipe_is_either_built_or_rejected_by_name() -> None:
  fitting = {term: [recipe for recipe in RECIPES if built_or_rejected(term, recipe)] for term in TERMS}
  assert all(fitting.values())  # every term has a recipe
  pairs = [name for name, recipe in RECIPES.items() if recipe.views.contrastive_image and recipe.views.contrastive_text]
  assert fitting["clip"] == pairs
  assert "simclr" not in pairs


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("term", TERMS)
def test_any_term_that_is_built_finds_its_inputs(recipe: str, term: str) -> None:
  if found := built_or_rejected(term, recipe):
    c, built = found
    check_objective(c, built, built.batch_shape(8))


@pytest.mark.parametrize("term", ["mvs", "nns", "mim"])
def test_a_term_that_is_built_finds_its_inputs(term: str) -> None:
  c, built = built_or_rejected(term, "slip_mim" if term == "mim" else "declip")
  check_objective(c, built, built.batch_shape(8))


def test_unknown_terms_are_named_with_the_known_ones() -> None:
  with pytest.raises(ValueError, match=r"unknown terms \['barlow', 'filp'\]: choose from \['byol', 'classify', 'clip'"):
    make_objective(settings(clip=1.0, filp=0.0, barlow=1.0))


@pytest.mark.parametrize("weights", [{}, {"clip": 0.0, "mlm": 0}])
def test_a_method_without_terms_is_rejected(weights) -> None:
  with pytest.raises(ValueError, match="every term weight 0"):
    make_objective(settings(**weights))


def test_heads_exist_where_a_term_needs_them() -> None:
  expected = {
    "clip": ("joint",),
    "simclr": ("simclr",),
    "slip": ("joint", "simclr"),
    "slip_mocov3": ("joint", "momentum"),
    "slip_byol": ("joint", "momentum"),
    "slip_mim": ("joint", "mim"),
    "declip": ("bank", "joint", "mlm", "simsiam"),
    "filip": ("filip", "joint"),
    "defilip": ("bank", "filip", "joint", "mlm", "simsiam"),
    "siglip": ("joint", "sigmoid"),
  }
  found = {method: make_objective(config.default(method).objective.to_dict()).heads for method in expected}
  assert found == expected
  assert make_objective(settings(clip=1.0, nns=0.0)).heads == ("joint",)


@pytest.mark.parametrize(("term", "field"), [(n, f) for n, term in KNOWN.items() for f in term.needs])
def test_a_missing_input_is_named_with_its_term_and_recipe(term, field) -> None:
  outputs, _ = everything()
  reference.objective({term: 1.0}).check_inputs(outputs, "some-recipe")
  with pytest.raises(ValueError, match=f"term '{term}' .*needs Outputs.{field}, .*recipe 'some-recipe'"):
    reference.objective({term: 1.0}).check_inputs(outputs.replace(**{field: None}), "some-recipe")
  other = reference.objective({"clip" if field not in ("image", "text") else "mlm": 1.0})
  other.check_inputs(outputs.replace(**{field: None}), "any")
