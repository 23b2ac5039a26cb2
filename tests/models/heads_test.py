"""Tests of `declip_jax.models.heads`: the bank, zero rows, precision; `weights/golden_test.py` compares whole steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as reference

from declip_jax import config
from declip_jax.data.recipes import RECIPES
from declip_jax.methods import METHODS
from declip_jax.models.model import make_model
from declip_jax.objectives import make_objective
from declip_jax.types import Features, Views
from declip_jax.unit_norm import unit_norm


def test_the_bank_is_ready_once_it_is_full():
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
  variables = model.heads.init(jax.random.key(1), features, model.views, True)
  collections = {"towers": {}, "heads": {"bank": variables["bank"]}}
  assert collections["heads"]["bank"]["text"].filled == 0  # init pushes nothing
  ready = []
  for _ in range(4):
    params = {"towers": {}, "heads": variables["params"]}
    outputs, new = model.apply_heads(params, collections, features)
    ready.append(float(outputs.neighbour_ready))
    collections["heads"] = new
  assert ready == [0, 0, 0, 1]


def test_unit_norm_of_a_zero_row_has_a_finite_gradient():
  x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
  np.testing.assert_allclose(unit_norm(x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
  gradient = jax.grad(lambda x: unit_norm(x).sum())(x)
  assert np.isfinite(gradient).all()
  assert unit_norm(x.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_stays_inside(method):
  """Parameters, collections, embeddings and logits are float32; only features are not."""
  c = config.default(method)
  c.model.dtype = "bfloat16"
  recipe = RECIPES[c.data.recipe]
  model = make_model(c.model.to_dict(), views=recipe.views, heads=make_objective(c.objective.to_dict()).heads)
  shape = jax.ShapeDtypeStruct
  batch = {
    "image": shape((2, len(recipe.image_views), 64, 64, 3), jnp.uint8),
    "text": shape((2, len(recipe.text_views), 77), jnp.int32),
    "mlm_position": shape((2, 5), jnp.int32),
    "mim_position": shape((2, 3), jnp.int32),
  }

  def run(batch):
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


def test_neighbours_come_with_the_cosine_to_the_text_that_searched():
  heads = {"image_width": 3, "text_width": 3, "embed_dim": 4, "bank_size": 9, "bank_neighbours": 2}
  views = Views(contrastive_text=(0, 1), neighbour_text=(1, 0))
  model = reference.make_model(reference.GivenImages(), reference.GivenTexts(), views, heads=("bank", "joint"), **heads)
  features = Features(image=jnp.ones((3, 1, 3)), text=jax.random.normal(jax.random.key(0), (3, 2, 3)))
  variables = model.heads.init(jax.random.key(1), features, views, True)
  params = {"towers": {}, "heads": variables["params"]}
  outputs, _ = model.apply_heads(params, {"towers": {}, "heads": {"bank": variables["bank"]}}, features)
  entries = variables["bank"]["text"].entries[0]
  for rank in range(2):
    for index, view in enumerate((1, 0)):
      for row, query in enumerate(outputs.text[view]):
        cosines = np.asarray(entries @ query)
        best = np.argsort(-cosines)[rank]
        np.testing.assert_array_equal(outputs.neighbour[2 * rank + index, row], entries[best])
        np.testing.assert_allclose(outputs.neighbour_similarity[2 * rank + index, row], cosines[best], rtol=1e-5)
