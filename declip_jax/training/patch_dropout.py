"""Patch dropout (FLIP, Li et al. 2023): only a random subset of an image's patches enters the image transformer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def num_kept(patches: int, rate: float) -> int:
  """Number of patches of an image that are kept, out of `patches`: rounded down as in open_clip, at least 1.

  The product is that of floats: with a rate of 0.9, 4 of 50 patches are kept.
  """
  return max(1, int(patches * (1 - rate)))


def draw_kept_patches(key: jax.Array, shape: tuple[int, int], *, patches: int, kept: int) -> Int[Array, "b v n"]:
  """Draws, for each view of each image, a uniformly random subset of its patches, in random order.

  FLIP, section 3. The patches are drawn here and not in the tower, so that towers have no randomness: encoding a batch
  again, as gradient caching does, keeps the same patches.

  Args:
    key: random key of the step.
    shape: `b` and `v`.
    patches: number of patches of an image.
    kept: number of patches to keep, `n`.

  Returns:
    Positions of patches, int32, counted row by row from 0, without repetition.
  """
  order = jnp.argsort(jax.random.uniform(key, (*shape, patches)), axis=-1)
  return order[..., :kept].astype(jnp.int32)
