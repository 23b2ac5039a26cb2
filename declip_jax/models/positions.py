"""Position embeddings for another number of positions: those of images are resized, those of texts cut."""

from collections.abc import Mapping
import math
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
  """Resizes position embeddings of a square grid to `size` positions, cubic with antialiasing.

  A class token, if there is one, precedes the grid in both.

  Raises:
    ValueError: one of the two grids is not square, or only one of the two has a class token.
  """
  first, sides = class_tokens(len(positions)), [math.isqrt(n) for n in (len(positions), size)]
  if [side**2 + first for side in sides] != [len(positions), size]:
    raise ValueError(f"{len(positions)} and {size} positions are not those of two square grids, with a class token")
  grid = positions[first:].reshape(sides[0], sides[0], -1)
  resized = jax.image.resize(grid, (sides[1], sides[1], grid.shape[-1]), "cubic", antialias=True)
  return jnp.concatenate([positions[:first], resized.reshape(size - first, -1)])


def class_tokens(count: int) -> int:
  """How many of the positions of an image precede its square grid: 0 or, if there is a class token, 1."""
  return int(math.isqrt(count) ** 2 != count)


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
  flat = flatten_dict(dict(towers))
  sizes = {path: patches + class_tokens(len(flat[path])) for path in IMAGE_POSITIONS.values() if path in flat}
  sizes |= {TEXT_POSITIONS: tokens} if tokens else {}
  other = {path: size for path, size in sizes.items() if path in flat and len(flat[path]) != size}
  for path, size in other.items():
    flat[path] = flat[path][:size] if path == TEXT_POSITIONS else resize_positions(flat[path], size)
  return unflatten_dict(flat) if other else towers
