"""The common parts of residual networks: stages, convolutions and hidden patches.

A stage is a first block that changes the shape, then equal blocks as one scanned block.
"""

from collections.abc import Mapping
from typing import Any

from einops import repeat
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from declip_jax.models.transformer import REMAT_POLICIES, Initializer


def convolution(
  features: int, kernel: int, stride: int, init: Initializer, dtype: Any, name: str, groups: int = 1
) -> nn.Conv:
  """A square convolution without bias, padded so that stride 1 keeps the size."""
  return nn.Conv(
    features,
    (kernel, kernel),
    (stride, stride),
    padding=kernel // 2,
    use_bias=False,
    feature_group_count=groups,
    dtype=dtype,
    kernel_init=init,
    name=name,
  )


def hide(images: Float[Array, "b h w c"], hidden: Bool[Array, "b n"] | None, stride: int) -> Float[Array, "b h w c"]:
  """Sets the hidden cells of a grid `stride` wide to 0, the mean; a convolution has no tokens to mask."""
  if hidden is None:
    return images
  shape = {"y": images.shape[1] // stride, "x": images.shape[2] // stride}
  grid = hidden.reshape(len(hidden), shape["y"], shape["x"])
  return jnp.where(repeat(grid, "b y x -> b (y p) (x q) 1", p=stride, q=stride), 0, images)


def apply_stage(
  block: type[nn.Module],
  x: Float[Array, "b h w c"],
  *,
  blocks: int,
  first: Mapping[str, Any],
  fields: Mapping[str, Any],
  name: str,
  remat: str,
  unroll: int,
) -> Float[Array, "b h2 w2 c2"]:
  """Applies a stage inside a compact module.

  Parameters and batch statistics of the first block are under `<name>_first`; those of the others are stacked along a
  leading axis under `<name>_rest`, which a stage of one block does not have.

  Args:
    block: a module that maps `x` and None to `(x, None)`, as a scan requires.
    x: input.
    blocks: number of blocks, including the first.
    first: fields of the first block that differ from `fields`.
    fields: fields of all blocks.
    name: name of the stage.
    remat: what the backward pass of a block recomputes, one of `REMAT_POLICIES`.
    unroll: scanned blocks that the compiler sees at once.
  """
  policy = REMAT_POLICIES[remat]
  one = many = block
  if policy is not None:
    one, many = (nn.remat(block, prevent_cse=prevent_cse, policy=policy) for prevent_cse in (True, False))
  if blocks > 0:
    x, _ = one(**{**fields, **first}, name=f"{name}_first")(x, None)
  if blocks > 1:
    axes = {"params": 0, "batch_stats": 0}
    scanned = nn.scan(many, variable_axes=axes, split_rngs={"params": True}, length=blocks - 1, unroll=unroll)
    x, _ = scanned(**fields, name=f"{name}_rest")(x, None)
  return x
