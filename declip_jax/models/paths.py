"""Paths of parameters, such as "towers/image/pre_norm/scale": what is stacked, and where blocks and sides are."""

from collections.abc import Sequence
from typing import Any

import jax

from declip_jax.models.heads import parameters_of_side

Tree = Any

TEMPERATURES = ("logit_scale", "dense_logit_scale", "logit_bias")
EMBEDDINGS = ("position_embedding", "class_embedding", "mask_embedding")

# The sides of DeCLIP's hybrid optimiser. Its encoders own their projections, and its heads belong to the encoders.
SIDES = ("image", "text")

# An image ViT for layer-wise decay: the parameters before its blocks, and the blocks, stacked.
IMAGE_INPUT = tuple(f"towers/image/{name}" for name in (*EMBEDDINGS, "patch_embedding", "pre_norm"))
IMAGE_BLOCKS = "towers/image/transformer/blocks"


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


def trainable_mask(params: Tree, frozen: Sequence[str]) -> Tree:
  """False for the parameters at or below one of the paths `frozen`, such as "towers/image"; True for the others.

  Raises:
    ValueError: a path without parameters.
  """
  check_prefixes(params, frozen, "config.optimizer.frozen")
  return jax.tree.map(lambda path: not is_below_any(path, frozen), parameter_paths(params))


def stop_gradient_below(params: Tree, frozen: Sequence[str]) -> Tree:
  """The same parameters, with a stopped gradient at or below the paths `frozen`.

  The compiler then drops their gradients and everything that only those gradients need.

  Raises:
    ValueError: a path without parameters.
  """
  if not frozen:
    return params
  return jax.tree.map(
    lambda param, trainable: param if trainable else jax.lax.stop_gradient(param),
    params,
    trainable_mask(params, frozen),
  )


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
