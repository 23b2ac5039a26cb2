"""Drop path, or stochastic depth (Huang et al. 2016): residual branches that are left out for single images."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def drop_path_rates(rate: float, depth: int) -> Float[Array, "depth"]:
  """The probability with which each block's branches are dropped: linear over depth, from 0 to `rate`, as in timm."""
  return jnp.linspace(0, rate, depth)


def draw_branch_scales(
  key: jax.Array, shape: tuple[int, int], *, rate: float, depth: int
) -> Float[Array, "b v depth 2"]:
  """The factors of both residual branches of each block, for each image: 0 if dropped, else 1 / (1 - its rate).

  They are drawn here and not in the tower, so that towers have no randomness: encoding a batch again, as gradient
  caching does, drops the same branches.

  Args:
    key: random key of the step.
    shape: `b` and `v`.
    rate: the rate of the last block, less than 1.
    depth: number of blocks.
  """
  kept = jnp.broadcast_to(1 - drop_path_rates(rate, depth)[None, None, :, None], (*shape, depth, 2))
  return jax.random.bernoulli(key, kept) / kept
