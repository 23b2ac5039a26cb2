"""Tests of `declip_jax.models.heads`: the bank, zero rows, precision; `weights/golden_test.py` compares whole steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as reference
from tiny import tiny_config

from declip_jax import config
from declip_jax.data.recipes import RECIPES
from declip_jax.methods import METHODS
from declip_jax.models.heads import HEADS, make_heads, parameters_of_side
from declip_jax.models.model import Model, make_model
from declip_jax.objectives import make_objective
from declip_jax.types import Features
from declip_jax.unit_norm import unit_norm
from declip_jax.views import Views


def test_the_bank_is_ready_once_it_is_full() -> None:
  model = reference.make_model(
    reference.GivenImages(),
    reference.GivenTexts(),
    heads=("bank", "joint"),
    image_width=3,
    text_width=3,
    embed_dim=2,
    bank_size=5,
  )
  features = Features(image=jnp.ones((2, 1, 3)), text=jax.random.normal(jax.random.key(0), (2, 1, 3)))
  variables = jax.jit(lambda key: model.heads.init(key, features, model.views, True))(jax.random.key(1))
  apply_heads = jax.jit(model.apply_heads)
  collections = {"towers": {}, "heads": {"bank": variables["bank"]}}
  assert collections["heads"]["bank"]["text"].filled == 0  # init pushes nothing
  ready = []
  for _ in range(4):
    params = {"towers": {}, "heads": variables["params"]}
    outputs, new = apply_heads(params, collections, features)
    ready.append(float(outputs.neighbour_ready))
    collections["heads"] = new
  assert ready == [0, 0, 0, 1]


def test_unit_norm_of_a_zero_row_has_a_finite_gradient() -> None:
  x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
  np.testing.assert_allclose(unit_norm(x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
  gradient = jax.grad(lambda x: unit_norm(x).sum())(x)
  assert np.isfinite(gradient).all()
  assert unit_norm(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_unit_norm_divides_by_at_least_its_epsilon() -> None:
  # PyTorch's `normalize` has 1e-12: a row of 1e-11 has length one, one of 1e-13 a tenth.
  rows = jnp.array([[1e-11, 0], [1e-13, 0]])
  np.testing.assert_allclose(unit_norm(rows), [[1, 0], [0.1, 0]], rtol=1e-5)
  np.testing.assert_allclose(unit_norm(rows, 1e-10), [[0.1, 0], [0.001, 0]], rtol=1e-5)


def test_a_head_shares_the_scope_of_all_heads() -> None:
  """Old checkpoints have these paths."""
  heads = ("joint", "sigmoid", "filip", "simclr", "simsiam", "momentum", "mlm", "mim", "bank")
  model = make_model(tiny_config("clip").model.to_dict(), views=VIEWS, heads=heads)
  shape = jax.ShapeDtypeStruct
  batch = {"image": shape((2, 3, 16, 16, 3), jnp.uint8), "text": shape((2, 3, 16), jnp.int32)}
  batch |= {"mlm_position": shape((2, 5), jnp.int32), "mim_position": shape((2, 3), jnp.int32)}
  params, collections = jax.eval_shape(model.init, jax.random.key(0), batch)
  expected = {"logit_scale", "image_projection", "text_projection", "logit_bias", "dense_logit_scale", "image_mapping"}
  expected |= {"text_mapping", "simclr", "projector", "predictor", "momentum_project", "momentum_predict", "mlm"}
  assert set(params["heads"]) == expected | {"mim", "mim_norm"}
  assert set(collections["heads"]["bank"]) == {"text"}
  statistics = {"simclr", "projector", "predictor", "momentum_project", "momentum_predict"}
  assert set(collections["heads"]["batch_stats"]) == statistics
  sides = {*parameters_of_side("image"), *parameters_of_side("text")}
  assert set(params["heads"]) - sides == {"logit_scale", "logit_bias", "dense_logit_scale"}


def test_unknown_heads_are_named_with_the_known_ones() -> None:
  with pytest.raises(ValueError, match=r"unknown heads \['jiont'\]: choose from \['joint'"):
    make_heads(("jiont",), {})


VIEWS = Views((0, 1), (0, 1), ssl_image=(0, 1), masked_text=2, masked_image=2, neighbour_text=(0,))


def test_heads_compute_in_bfloat16_and_return_float32() -> None:
  """Parameters, collections, embeddings and logits are float32; only features are not. All heads at once."""
  c = tiny_config("clip")
  c.model.dtype = "bfloat16"
  model = make_model(c.model.to_dict(), views=VIEWS, heads=tuple(HEADS))
  check_dtypes(model, jax.ShapeDtypeStruct((2, 3, 16, 16, 3), jnp.uint8), jax.ShapeDtypeStruct((2, 3, 16), jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_all_methods_compute_in_bfloat16_and_return_float32(method: str) -> None:
  c = config.default(method)
  recipe = RECIPES[c.data.recipe]
  model = make_model(c.model.to_dict(), views=recipe.views, heads=make_objective(c.objective.to_dict()).heads)
  images = jax.ShapeDtypeStruct((2, len(recipe.image_views), 64, 64, 3), jnp.uint8)
  check_dtypes(model, images, jax.ShapeDtypeStruct((2, len(recipe.text_views), 77), jnp.int32))


def check_dtypes(model: Model, images: jax.ShapeDtypeStruct, texts: jax.ShapeDtypeStruct) -> None:
  shape = jax.ShapeDtypeStruct
  batch = {
    "image": images,
    "text": texts,
    "mlm_position": shape((2, 5), jnp.int32),
    "mim_position": shape((2, 3), jnp.int32),
  }

  def run(batch: dict[str, jax.Array]) -> tuple:
    params, collections = model.init(jax.random.key(0), batch)
    features, _ = model.encode(params, collections, batch)
    outputs, new = model.apply_heads(params, collections, features)
    evaluated = []
    if "joint" in model.heads.members:
      evaluated.append(model.encode_image(params, collections, batch["image"][:, 0]))
      evaluated.append(model.encode_text(params, collections, batch["text"][:, 0]))
    return params, new, features, outputs, evaluated

  params, collections, features, outputs, evaluated = jax.eval_shape(run, batch)
  computed = features.replace(text_valid=None, masked_pixels=None)
  assert {leaf.dtype for leaf in jax.tree.leaves(computed)} == {jnp.dtype(jnp.bfloat16)}
  assert {leaf.dtype for leaf in jax.tree.leaves((params, evaluated))} == {jnp.dtype(jnp.float32)}
  float_leaves = [leaf for leaf in jax.tree.leaves(collections) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  assert {leaf.dtype for leaf in float_leaves} <= {jnp.dtype(jnp.float32)}
  assert {leaf.dtype for leaf in jax.tree.leaves(outputs.replace(text_valid=None))} == {jnp.dtype(jnp.float32)}


def test_neighbours_have_their_cosine_to_the_query() -> None:
  heads = {"image_width": 3, "text_width": 3, "embed_dim": 4, "bank_size": 9, "bank_neighbours": 2}
  views = Views(contrastive_text=(0, 1), neighbour_text=(1, 0))
  model = reference.make_model(reference.GivenImages(), reference.GivenTexts(), views, heads=("bank", "joint"), **heads)
  features = Features(image=jnp.ones((3, 1, 3)), text=jax.random.normal(jax.random.key(0), (3, 2, 3)))
  variables = jax.jit(lambda key: model.heads.init(key, features, views, True))(jax.random.key(1))
  params = {"towers": {}, "heads": variables["params"]}
  collections = {"towers": {}, "heads": {"bank": variables["bank"]}}
  outputs, _ = jax.jit(model.apply_heads)(params, collections, features)
  entries = variables["bank"]["text"].entries[0]
  for rank in range(2):
    for index, view in enumerate((1, 0)):
      for row, query in enumerate(outputs.text[view]):
        cosines = np.asarray(entries @ query)
        best = np.argsort(-cosines)[rank]
        np.testing.assert_array_equal(outputs.neighbour[2 * rank + index, row], entries[best])
        np.testing.assert_allclose(outputs.neighbour_similarity[2 * rank + index, row], cosines[best], rtol=1e-5)
