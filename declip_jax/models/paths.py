"""Paths of parameters, such as "towers/image/pre_norm/scale": what is stacked, and where blocks and sides are."""

from collections.abc import Sequence
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from declip_jax.models.heads import parameters_of_side

Tree = Any

TEMPERATURES = ("logit_scale", "dense_logit_scale", "logit_bias")
EMBEDDINGS = ("position_embedding", "class_embedding", "mask_embedding", "probe")

# The sides of DeCLIP's hybrid optimiser. Its encoders own their projections, and its heads belong to the encoders.
SIDES = ("image", "text")

# An image ViT for layer-wise decay: the parameters before its blocks, and the blocks, stacked.
IMAGE_INPUT = tuple(f"towers/image/{name}" for name in (*EMBEDDINGS, "patch_embedding", "pre_norm"))
IMAGE_BLOCKS = "towers/image/transformer/blocks"

_BLOCKS = re.compile(r"(.+)\[(-?\d+)?:(-?\d+)?\]")  # a path with a slice of its blocks


def parameter_paths(params: Tree) -> Tree:
  """The same tree with each parameter replaced by its path, such as "towers/image/pre_norm/scale"."""
  return jax.tree_util.tree_map_with_path(lambda keys, _: "/".join(key.key for key in keys), params)


def is_below(path: str, prefix: str) -> bool:
  """Whether a path such as "towers/image/pre_norm" is equal to `prefix` or below it."""
  return f"{path}/".startswith(f"{prefix.rstrip('/')}/")


def is_below_any(path: str, prefixes: Sequence[str]) -> bool:
  """Whether a path is equal to one of `prefixes` or below one of them."""
  return any(is_below(path, prefix) for prefix in prefixes)


def side_prefixes(side: str) -> tuple[str, ...]:
  """The paths that belong to one of `SIDES`: a tower, and the parameters that heads declare as its own."""
  return (f"towers/{side}", *(f"heads/{name}" for name in parameters_of_side(side)))


def is_stacked(path: str) -> bool:
  """Whether an array has a leading axis of layers: blocks of a transformer, or all blocks of a stage but the first."""
  return any(name == "blocks" or name.endswith("_rest") for name in path.split("/"))


def freezes_blocks(prefix: str) -> bool:
  """Whether a path of `config.optimizer.frozen` is a slice of blocks, as "towers/text/transformer/blocks[:-2]" is."""
  return _BLOCKS.fullmatch(prefix) is not None


def trainable(params: Tree, frozen: Sequence[str]) -> Tree:
  """Which parameters are trained: True, False, or for stacked blocks of which some are frozen booleans `[depth 1 ...]`.

  Args:
    params: all parameters.
    frozen: paths, such as "towers/image", at or below which parameters are not trained. Of stacked blocks a slice in
      Python's notation may be frozen: "towers/image/transformer/blocks[:-2]" are all blocks but the last two.

  Raises:
    ValueError: a path without parameters, or a slice of what has no blocks, or without a block.
  """
  slices = [
    (match[1], slice(*map(_number, match.group(2, 3)))) for path in frozen if (match := _BLOCKS.fullmatch(path))
  ]
  whole = [path for path in frozen if not freezes_blocks(path)]
  check_prefixes(params, [*whole, *(prefix for prefix, _ in slices)], "config.optimizer.frozen")

  def is_trained(path: str, param: Any) -> Any:
    if is_below_any(path, whole):
      return False
    chosen = [part for prefix, part in slices if is_below(path, prefix)]
    if not chosen:
      return True
    if not is_stacked(path):
      raise ValueError(
        f"config.optimizer.frozen={tuple(frozen)}: {path} is not in a stack of blocks, so it cannot have a slice"
      )
    trained = np.ones(param.shape[0], bool)
    for part in chosen:
      if not trained[part].size:
        raise ValueError(f"config.optimizer.frozen={tuple(frozen)} names none of the {len(trained)} blocks of {path}")
      trained[part] = False
    return trained.reshape(-1, *[1] * (param.ndim - 1)) if trained.any() else False

  return jax.tree.map(is_trained, parameter_paths(params), params)


def trainable_mask(params: Tree, frozen: Sequence[str]) -> Tree:
  """False for parameters that are not trained at all, True for the others; see `trainable`."""
  return jax.tree.map(lambda trained: bool(np.any(trained)), trainable(params, frozen))


def stop_gradient_below(params: Tree, frozen: Sequence[str]) -> Tree:
  """The same parameters, with a stopped gradient where they are not `trainable`.

  The compiler then drops the gradients of whole arrays and everything that only those gradients need.

  Raises:
    ValueError: see `trainable`.
  """
  if not frozen:
    return params

  def stopped(param: Any, trained: Any) -> Any:
    if isinstance(trained, bool):
      return param if trained else jax.lax.stop_gradient(param)
    return jnp.where(trained, param, jax.lax.stop_gradient(param))

  return jax.tree.map(stopped, params, trainable(params, frozen))


def _number(text: str | None) -> int | None:
  return int(text) if text else None


def check_prefixes(params: Tree, prefixes: Sequence[str], field: str) -> None:
  """Rejects prefixes without parameters.

  Raises:
    ValueError: the message names the field, the prefix and the existing paths.
  """
  paths = jax.tree.leaves(parameter_paths(params))
  for prefix in prefixes:
    if not any(is_below(path, prefix) for path in paths):
      known = sorted({"/".join(path.split("/")[:3]) for path in paths})
      raise ValueError(f"{field}: no parameter at {prefix!r}; choose from {known}")
