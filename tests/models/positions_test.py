"""Position embeddings for another number of positions: values, gradients, and what does not change."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from declip_jax.models.positions import fit_positions, resize_positions

RNG = np.random.default_rng(0)


def table(side: int, width: int = 3) -> np.ndarray:
  return RNG.normal(size=(side**2 + 1, width)).astype(np.float32)


def by_pillow(positions: np.ndarray, side: int) -> np.ndarray:
  """The class token, and the grid of each channel resized as an image."""
  before = round((len(positions) - 1) ** 0.5)
  grids = positions[1:].T.reshape(-1, before, before)
  resized = [np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)) for grid in grids]
  return np.concatenate([positions[:1], np.stack(resized, axis=-1).reshape(side**2, -1)])


@pytest.mark.parametrize(("before", "after"), [(14, 8), (14, 7), (4, 1), (7, 7), (4, 8)])
def test_positions_are_resized_as_pillow_resizes_images(before: int, after: int) -> None:
  positions = table(before)
  found = resize_positions(jnp.asarray(positions), after**2 + 1)
  np.testing.assert_allclose(found, by_pillow(positions, after), atol=1e-5)


def test_positions_are_resized_in_their_grid() -> None:
  grid = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij"), axis=-1).reshape(16, 2)
  positions = jnp.asarray(np.concatenate([[[7.0, 7.0]], grid]).astype(np.float32))
  larger = resize_positions(positions, 65)
  np.testing.assert_array_equal(larger[0], 7)
  middle = larger[1:].reshape(8, 8, 2)[2:6, 2:6]
  np.testing.assert_allclose(np.diff(middle[..., 0], axis=0), 0.5, atol=0.05)
  np.testing.assert_allclose(np.diff(middle[..., 1], axis=1), 0.5, atol=0.05)
  np.testing.assert_allclose(np.diff(middle[..., 0], axis=1), 0, atol=1e-5)
  with pytest.raises(ValueError, match="square grid"):
    resize_positions(positions, 60)


@pytest.mark.parametrize("path", [("position_embedding",), ("attention_pool", "position_embedding")])
def test_the_positions_of_a_smaller_image_and_a_shorter_text(path: tuple[str, ...]) -> None:
  positions, texts, other = table(4), RNG.normal(size=(9, 3)).astype(np.float32), np.ones(2)
  image = {path[0]: {path[1]: positions} if len(path) > 1 else positions, "kernel": other}
  towers = {"image": jax.tree.map(jnp.asarray, image), "text": {"position_embedding": jnp.asarray(texts)}}
  fitted = fit_positions(towers, patches=4, tokens=5)
  found = fitted["image"]
  for name in path:
    found = found[name]
  np.testing.assert_allclose(found, by_pillow(positions, 2), atol=1e-5)
  np.testing.assert_array_equal(fitted["text"]["position_embedding"], texts[:5])
  np.testing.assert_array_equal(fitted["image"]["kernel"], other)
  assert fit_positions(towers, patches=16, tokens=9) is towers
  assert fit_positions({"image": towers["image"]}, patches=16, tokens=None)["image"] is towers["image"]


def test_every_position_of_an_image_is_trained_and_those_of_unused_tokens_are_not() -> None:
  towers = {
    "image": {"position_embedding": jnp.asarray(table(4))},
    "text": {"position_embedding": jnp.ones((9, 3))},
  }

  def loss(towers: dict) -> jax.Array:
    fitted = fit_positions(towers, patches=4, tokens=5)
    return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(fitted))

  gradient = jax.grad(loss)(towers)
  assert np.all(np.abs(gradient["image"]["position_embedding"]).sum(axis=-1) > 0)
  np.testing.assert_array_equal(np.abs(gradient["text"]["position_embedding"]).sum(axis=-1) > 0, np.arange(9) < 5)
