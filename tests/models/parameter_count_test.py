"""Parameter counts of the published models, from shapes alone."""

import jax
import jax.numpy as jnp
import pytest

from declip_jax import architectures, config
from declip_jax.data.recipes import RECIPES
from declip_jax.models.model import make_model
from declip_jax.objectives import heads_for


def count(c):
  recipe = RECIPES[c.data.recipe]
  model = make_model(c.model, views=recipe.views, heads=heads_for(c.weights))
  shape = jax.ShapeDtypeStruct
  batch = {
    "image": shape((2, len(recipe.image_views), 224, 224, 3), jnp.uint8),
    "text": shape((2, len(recipe.text_views), 77), jnp.int32),
    "mlm_position": shape((2, 20), jnp.int32),
  }
  params, _ = jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), batch)
  return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
  ("patch", "width", "depth", "embed_dim", "text_width", "expected"),
  [
    (32, 768, 12, 512, 512, 151_277_313),
    (16, 768, 12, 512, 512, 149_620_737),
    (14, 1024, 24, 768, 768, 427_616_513),
  ],
)
def test_clip_vit(patch, width, depth, embed_dim, text_width, expected):
  c = config.default("clip")
  c.model.image = architectures.vit(patch, width, depth, width // 64)
  c.model.text.width, c.model.text.heads = text_width, text_width // 64
  c.model.heads.embed_dim = embed_dim
  assert count(c) == expected


@pytest.mark.parametrize(
  ("layers", "embed_dim", "expected"), [((3, 4, 6, 3), 1024, 102_007_137), ((3, 4, 23, 3), 512, 119_688_033)]
)
def test_clip_resnet(layers, embed_dim, expected):
  c = config.default("clip")
  c.model.image = architectures.resnet(64, layers)
  c.model.heads.image_bias = True
  c.model.heads.embed_dim = embed_dim
  assert count(c) == expected


@pytest.mark.parametrize(
  ("method", "width", "depth", "heads", "expected"),
  [
    ("clip", 384, 12, 12, 85_290_369),
    ("clip", 768, 12, 12, 149_619_969),
    ("clip", 1024, 24, 16, 367_254_017),
    ("slip", 384, 12, 12, 104_713_857),
    ("slip", 768, 12, 12, 170_616_321),
    ("slip", 1024, 24, 16, 389_298_945),
  ],
)
def test_slip_vit(method, width, depth, heads, expected):
  c = config.default(method)
  c.model.image = architectures.vit(16, width, depth, heads)
  c.model.image.pre_norm, c.model.image.patch_bias = False, True
  assert count(c) == expected


def test_declip_vit():
  assert count(config.default("declip")) == 180_306_946
