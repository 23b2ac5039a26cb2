"""Position embeddings for another number of positions: those of images are resized, those of texts cut."""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Tree = Mapping[str, Any]
# Paths of the position embeddings in the parameters of the towers, by kind of image tower; a RegNet has none.
IMAGE_POSITIONS = {
  "vit": ("image", "position_embedding"),
  "resnet": ("image", "attention_pool", "position_embedding"),
}
TEXT_POSITIONS = ("text", "position_embedding")


def resize_positions(positions: Float[Array, "n f"], size: int) -> Float[Array, "m f"]:
  """Resizes position embeddings of a class token and a square grid to `size` positions, cubic with antialiasing.

  Raises:
    ValueError: one of the two grids is not square.
  """
  sides = [round((n - 1) ** 0.5) for n in (len(positions), size)]
  if [side**2 + 1 for side in sides] != [len(positions), size]:
    raise ValueError(f"{len(positions)} and {size} positions are not those of a class token and a square grid")
  grid = positions[1:].reshape(sides[0], sides[0], -1)
  resized = jax.image.resize(grid, (sides[1], sides[1], grid.shape[-1]), "cubic", antialias=True)
  return jnp.concatenate([positions[:1], resized.reshape(size - 1, -1)])


def fit_positions(towers: Tree, *, patches: int, tokens: int | None) -> Tree:
  """The parameters of the towers with position embeddings for smaller images and shorter texts; differentiable.

  A stage of a run (`config.stages`) trains the position embeddings of the whole model through this function, so that
  its state has the same shapes in all stages. CLIPA (Li et al. 2023) trains as many position embeddings as its small
  images have patches and resizes them once, before it trains on larger images.

  Args:
    towers: parameters of the towers.
    patches: number of patches of an image, or of cells of the last map.
    tokens: length of the texts; None if there are none.
  """
  sizes = dict.fromkeys(IMAGE_POSITIONS.values(), patches + 1) | ({TEXT_POSITIONS: tokens} if tokens else {})
  flat = flatten_dict(dict(towers))
  other = {path: size for path, size in sizes.items() if path in flat and len(flat[path]) != size}
  for path, size in other.items():
    flat[path] = flat[path][:size] if path == TEXT_POSITIONS else resize_positions(flat[path], size)
  return unflatten_dict(flat) if other else towers
