"""Low-rank adapters (LoRA, Hu et al. 2021): small trained matrices that are added to kernels of frozen transformers.

A kernel `W [f g]` becomes `W + (alpha / rank) A B` with `A [f rank]` and `B [rank g]` (section 4.1). Adapters are
parameters beside the kernels of their blocks, stacked like these: `blocks/lora/query/a` is `[depth f rank]`. `merge`
adds them to the kernels before a model reads its parameters, so towers do not know them, and a merged model is a plain
one. Query, key and value have adapters of their own, though their kernels are packed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from declip_jax.models.paths import check_prefixes, is_below, is_below_any, parameter_paths
from declip_jax.models.transformer import torch_uniform
from declip_jax.spelling import did_you_mean

Tree = Any
Leaf = jax.Array | np.ndarray
TARGETS = ("query", "key", "value", "out", "fc1", "fc2")  # what `config.lora.targets` may name
TOWERS = ("image", "text")
_ADAPTERS = "lora"  # name of the adapters in the parameters of a stack of blocks
_KERNELS = {"qkv": ("query", "key", "value"), "out": ("out",), "fc1": ("fc1",), "fc2": ("fc2",)}  # targets in each
_PROJECTIONS = ("heads/image_projection", "heads/text_projection")


@dataclass(frozen=True, kw_only=True)
class Lora:
  """The fields of `config.lora`.

  Attributes:
    rank: width of the adapters, 1 or more.
    alpha: `alpha / rank` is the factor of the product of an adapter.
    targets: kernels with adapters, some of `TARGETS`.
    towers: towers whose blocks have adapters, some of `TOWERS`.
    trained: paths of parameters of towers and projections that are trained besides the adapters.

  Raises:
    ValueError: an unknown or missing name, or a number out of range.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]
  towers: tuple[str, ...]
  trained: tuple[str, ...]

  def __post_init__(self) -> None:
    if self.rank < 1:
      raise ValueError(f"config.lora.rank={self.rank}: expected 1 or more")
    for field, legal in (("targets", TARGETS), ("towers", TOWERS)):
      names = getattr(self, field)
      unknown = [name for name in names if name not in legal]
      if unknown or not names:
        hint = did_you_mean(unknown[0], legal) if unknown else ""
        raise ValueError(f"config.lora.{field}={names!r}: choose one or more of {list(legal)}{hint}")

  @property
  def scale(self) -> float:
    """The factor of the product of an adapter."""
    return self.alpha / self.rank

  @property
  def trains_image(self) -> bool:
    """Whether any parameter of the image tower is trained."""
    return "image" in self.towers or any(
      is_below(path, "towers/image") or is_below("towers/image", path) for path in self.trained
    )


def add_adapters(params: Tree, key: jax.Array, lora: Lora) -> Tree:
  """Adds adapters to the parameters of a model, which do not change what it computes.

  `A` is uniform within `1 / sqrt(f)`, and `B` is 0, as in the paper's code (microsoft/LoRA) and in peft; the paper says
  that `A` is Gaussian.

  Args:
    params: plain parameters, under "towers" and "heads".
    key: random key.
    lora: the adapters.

  Raises:
    ValueError: a tower has no transformer blocks, or none of the towers exists.
  """
  towers = dict(params["towers"])
  found = [tower for tower in lora.towers if tower in towers]
  if not found:
    raise ValueError(f"config.lora.towers={lora.towers!r}: this model has only {sorted(towers)}")
  for tower in found:
    blocks = _blocks(towers[tower])
    if blocks is None:
      raise ValueError(
        f"config.lora.towers={lora.towers!r}: the {tower} tower has no transformer blocks, so it can have no adapters: "
        "leave it out"
      )
    drawn = _draw(blocks, jax.random.fold_in(key, TOWERS.index(tower)), lora)
    towers[tower] = _with_blocks(towers[tower], {**blocks, _ADAPTERS: drawn})
  return {**params, "towers": towers}


def _draw(blocks: Tree, key: jax.Array, lora: Lora) -> Tree:
  """The first adapters of a stack of blocks, by target."""
  drawn = {}
  for name, parts in _KERNELS.items():
    depth, inputs, outputs = blocks[name]["kernel"].shape
    for target in parts:
      if target in lora.targets:
        a = torch_uniform(inputs)(jax.random.fold_in(key, TARGETS.index(target)), (depth, inputs, lora.rank))
        drawn[target] = {"a": a, "b": jnp.zeros((depth, lora.rank, outputs // len(parts)), jnp.float32)}
  return drawn


def merge(params: Tree, lora: Lora) -> Tree:
  """Adds the products of all adapters to their kernels, in float32: parameters of a plain model, without adapters."""
  towers = dict(params["towers"])
  for tower, tree in towers.items():
    blocks = _blocks(tree)
    if blocks is not None and _ADAPTERS in blocks:
      towers[tower] = _with_blocks(tree, _merged(blocks, lora.scale))
  return {**params, "towers": towers}


def _merged(blocks: Tree, scale: float) -> Tree:
  adapters, plain = blocks[_ADAPTERS], {name: entry for name, entry in blocks.items() if name != _ADAPTERS}
  for name, parts in _KERNELS.items():
    if adapters.keys() & set(parts):
      kernel = plain[name]["kernel"]
      changes = [_change(adapters.get(target), kernel, len(parts)) for target in parts]
      plain[name] = {**plain[name], "kernel": kernel + scale * jnp.concatenate(changes, axis=-1)}
  return plain


def _change(adapter: Mapping[str, Leaf] | None, kernel: Leaf, parts: int) -> Float[Array, "depth f g"]:
  """The product of an adapter; zeros for a part of a packed kernel that has none."""
  if adapter is None:
    return jnp.zeros((*kernel.shape[:-1], kernel.shape[-1] // parts), kernel.dtype)
  return jnp.einsum("dfr,drg->dfg", adapter["a"], adapter["b"], precision=jax.lax.Precision.HIGHEST)


def frozen_paths(params: Tree, lora: Lora) -> tuple[str, ...]:
  """The paths of the parameters that are not trained: those of towers and their projections, but for the adapters.

  The other heads are trained: temperatures, the bias of the sigmoid loss, and what only training needs.

  Args:
    params: parameters with adapters, or their shapes.
    lora: the adapters.

  Raises:
    ValueError: `lora.trained` has a path without parameters.
  """
  check_prefixes(params, lora.trained, "config.lora.trained")
  paths = jax.tree.leaves(parameter_paths(params))
  kept = [path for path in paths if is_below_any(path, ("towers", *_PROJECTIONS)) and not _is_adapter(path)]
  return tuple(path for path in kept if not is_below_any(path, lora.trained))


def _is_adapter(path: str) -> bool:
  return f"/{_ADAPTERS}/" in path


def _blocks(tower: Tree) -> Tree | None:
  """The parameters of the stacked blocks of a tower, None if it has none."""
  return tower.get("transformer", {}).get("blocks")


def _with_blocks(tower: Tree, blocks: Tree) -> Tree:
  return {**tower, "transformer": {**tower["transformer"], "blocks": blocks}}
