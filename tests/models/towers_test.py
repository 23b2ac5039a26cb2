"""Tests of `declip_jax.models.towers`: the patches hidden for masked image modelling, and the targets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from declip_jax import architectures, build
from declip_jax.models.towers import Towers

PATCH, GRID, BATCH = 8, 3, 4
TOWERS = {
  "vit": architectures.vit(patch=PATCH, width=32, depth=2, heads=2),
  "resnet": architectures.resnet(4, (1, 1, 1, 1)),
}


@pytest.fixture(scope="module", params=["vit", pytest.param("resnet", marks=pytest.mark.slow)])
def masked(request):
  """A jitted encoder of a tower, the masked view, a batch, the side of its patches, and the normalisation of pixels."""
  config = tiny_config("slip_mim")
  config.model.image = TOWERS[request.param]
  side = PATCH if request.param == "vit" else 32
  config.data.image_size = GRID * side
  built = build.build(config)
  rng = np.random.default_rng(0)
  batch = {name: np.zeros(x.shape, x.dtype) for name, x in built.batch_shape(BATCH).items()}
  batch["image"] = rng.integers(256, size=batch["image"].shape, dtype=np.uint8)
  # Four of the nine patches, different for each image.
  batch["mim_position"] = rng.permuted(np.tile(np.arange(GRID**2, dtype=np.int32), (BATCH, 1)), axis=1)[:, :4]
  params, collections = jax.jit(built.model.init)(jax.random.key(0), batch)
  encode = jax.jit(lambda batch: built.model.encode(params, collections, batch)[0])
  normalise = (np.array(config.model.mean), np.array(config.model.std))
  return encode, built.recipe.views.masked_image, batch, side, normalise


def patch_at(batch, view, example, position, side):
  """The pixels of a patch, which are counted row by row."""
  y, x = divmod(int(position), GRID)
  return batch["image"][example, view, y * side : (y + 1) * side, x * side : (x + 1) * side]


def test_the_targets_are_the_standardised_pixels_of_the_hidden_patches(masked):
  encode, view, batch, side, (mean, std) = masked
  found = encode(batch).masked_pixels
  for example, positions in enumerate(batch["mim_position"]):
    for slot, position in enumerate(positions):
      pixels = ((patch_at(batch, view, example, position, side) / 255 - mean) / std).ravel()
      # Of variance 1 as MAE has it, whose code counts one degree of freedom less.
      expected = (pixels - pixels.sum() / pixels.size) / np.sqrt(
        ((pixels - pixels.mean()) ** 2).sum() / (pixels.size - 1)
      )
      np.testing.assert_allclose(found[example, slot], expected, atol=1e-4)


def test_predictions_depend_on_visible_pixels_only(masked):
  encode, view, batch, side, _ = masked
  hidden, shown = ({**batch, "image": batch["image"].copy()} for _ in range(2))
  for example, positions in enumerate(batch["mim_position"]):
    for position in range(GRID**2):
      changed = hidden if position in positions else shown
      patch = patch_at(changed, view, example, position, side)
      patch[:] = 255 - patch
  before, without_hidden, without_shown = encode(batch), encode(hidden), encode(shown)
  assert np.abs(without_hidden.masked_pixels - before.masked_pixels).max() > 0.1
  np.testing.assert_array_equal(without_shown.masked_pixels, before.masked_pixels)
  for name in ("image", "masked_image"):
    np.testing.assert_array_equal(getattr(without_hidden, name), getattr(before, name), err_msg=name)
    assert np.abs(getattr(without_shown, name) - getattr(before, name)).max() > 1e-3, name


def test_each_view_keeps_its_own_patches_and_momentum_targets_see_all():
  config = tiny_config("slip_mocov3")
  config.model.image.depth, config.model.remat = 1, "none"
  model = build.build(config).model
  model = dataclasses.replace(model, towers=model.towers.clone(text=None))
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.integers(256, size=(2, 3, 16, 16, 3), dtype=np.uint8))
  kept = jnp.asarray(rng.permuted(np.tile(np.arange(4, dtype=np.int32), (2, 3, 1)), axis=-1)[..., :2])
  towers = jax.jit(lambda: model.towers.init(jax.random.key(0), images, True, method=Towers.encode_views)["params"])()
  collections = {"towers": {}, "heads": {}, "momentum": {"towers": towers}}

  @jax.jit
  def encode(kept):
    return model.encode({"towers": towers, "heads": {}}, collections, {"image": images, "kept_patches": kept})[0]

  @jax.jit
  def by_view(kept=None):
    pixels = model.towers.apply({}, images, method=Towers.normalise)
    encoded = [
      model.towers.image.apply(
        {"params": towers["image"]}, pixels[:, view], kept=kept if kept is None else kept[:, view]
      )
      for view in range(3)
    ]
    return jnp.stack([feature for feature, _ in encoded], axis=1)

  features = encode(kept)
  np.testing.assert_allclose(features.image, by_view(kept), atol=1e-5)
  np.testing.assert_allclose(features.momentum_image, by_view()[:, np.array(model.views.ssl_image)], atol=1e-5)


def test_a_text_is_valid_up_to_its_end_and_with_it():
  towers = build.build(tiny_config("filip")).model.towers
  start, end = 49406, 49407
  tokens = jnp.array([[start, 5, end, 0, end, 0], [start, end, 7, 7, 7, 7], [start, 1, 2, 3, 4, end]])
  shapes = jax.eval_shape(lambda: towers.init(jax.random.key(0), tokens, method=Towers.encode_text))
  variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  valid = np.asarray(towers.apply(variables, tokens, method=Towers._valid))
  assert valid.sum(axis=1).tolist() == [3, 2, 6]
  assert valid[0].tolist() == [True] * 3 + [False] * 3
