"""The optimisers and schedules of the papers, with what decays, what is frozen, and whose learning rate differs.

An optimiser is everything up to the learning rate, which the train step applies from its own step count; so are LARS'
local rate and the factors of single parameters. A schedule is that learning rate as a function of the 0-based step.
"""

from collections.abc import Callable, Sequence
from functools import partial
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
import optax

from declip_jax.models.paths import (
  EMBEDDINGS,
  IMAGE_BLOCKS,
  IMAGE_INPUT,
  SIDES,
  TEMPERATURES,
  check_prefixes,
  is_below,
  is_below_any,
  is_stacked,
  parameter_paths,
  trainable_mask,
)

Tree = Any

# What decays. By name and not by rank, since scanned blocks stack biases into matrices.


def _spare(params: Tree, names: Sequence[str]) -> Tree:
  return jax.tree.map(lambda path: path.rpartition("/")[2] not in names, parameter_paths(params))


def decay_weights(params: Tree) -> Tree:
  """All but biases, gains of norms and temperatures: "all weights that are not gains or biases" (CLIP, section 2.5).

  SLIP's rule comes to the same. It spares what has fewer than two axes, or "bias", "ln" or "bn" in its name; all of
  that are vectors and the temperature, and the class token is none of it, since timm's has three axes. open_clip's rule
  is like it, but the class token has one axis there and is spared.
  """
  return _spare(params, ("bias", "scale", *TEMPERATURES))


def decay_declip(params: Tree) -> Tree:
  """DeCLIP's: as `decay_weights`, and the packed bias of query, key and value.

  Its grouping looks for the biases of modules that it knows, and this one is a bare parameter of PyTorch's attention.
  """
  packed = jax.tree.map(lambda path: path.endswith("/qkv/bias"), parameter_paths(params))
  return jax.tree.map(operator.or_, packed, decay_weights(params))


def decay_finetune(params: Tree) -> Tree:
  """BeiT's, by which SLIP fine-tunes: as `decay_weights`, but for positions, class token and mask token."""
  return _spare(params, ("bias", "scale", *TEMPERATURES, *EMBEDDINGS))


def decay_all(params: Tree) -> Tree:
  """Everything, temperatures too, as DeCLIP's 88M ResNet-50, whose config groups nothing apart."""
  return _spare(params, ())


DECAY_MASKS = {"weights": decay_weights, "declip": decay_declip, "finetune": decay_finetune, "all": decay_all}


# Optimisers. Each takes all settings of `make` and uses its own.


def _adamw(
  *, b1: float, b2: float, epsilon: float, weight_decay: float, decay_mask: Callable[[Tree], Tree], **_: Any
) -> optax.GradientTransformation:
  decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
  return optax.chain(optax.scale_by_adam(b1, b2, epsilon), decay)


def _sgd(
  *, momentum: float, nesterov: bool, weight_decay: float, decay_mask: Callable[[Tree], Tree], **_: Any
) -> optax.GradientTransformation:
  decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
  return optax.chain(decay, optax.trace(momentum, nesterov))


def _lars(
  *, trust_coefficient: float, weight_decay: float, decay_mask: Callable[[Tree], Tree], **settings: Any
) -> optax.GradientTransformation:
  sgd = _sgd(weight_decay=weight_decay, decay_mask=decay_mask, **settings)

  def update(gradient: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    def scaled(path: str, change: Array, gradient: Array, param: Array, decay: bool) -> Array:
      axes = tuple(range(int(is_stacked(path)), param.ndim))
      of_param, of_gradient = (jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)) for x in (param, gradient))
      divisor = of_gradient + (weight_decay * of_param if decay else 0.0)
      return jnp.where(divisor > 0, trust_coefficient * of_param / divisor, 0.0) * change

    change, state = sgd.update(gradient, state, params)
    return jax.tree.map(scaled, parameter_paths(params), change, gradient, params, decay_mask(params)), state

  return optax.GradientTransformation(sgd.init, update)


def _adamw_sgd(*, sgd_side: str, sgd_weight_decay: float, **settings: Any) -> optax.GradientTransformation:
  check_name("sgd_side", sgd_side, SIDES)

  def side(params: Tree) -> Tree:
    return jax.tree.map(lambda path: "sgd" if is_below_any(path, SIDES[sgd_side]) else "adamw", parameter_paths(params))

  return optax.partition(
    {"adamw": _adamw(**settings), "sgd": _sgd(**settings | {"weight_decay": sgd_weight_decay})}, side
  )


OPTIMIZERS = {"adamw": _adamw, "sgd": _sgd, "lars": _lars, "adamw_sgd": _adamw_sgd}


def make(
  name: str,
  *,
  b1: float,
  b2: float,
  epsilon: float,
  momentum: float,
  nesterov: bool,
  trust_coefficient: float,
  weight_decay: float,
  decay_mask: str,
  sgd_side: str = "image",
  sgd_weight_decay: float = 0.0,
  gradient_clip: float = 0.0,
  multipliers: Sequence[tuple[str, float]] = (),
  layer_decay: float = 1.0,
  frozen: Sequence[str] = (),
) -> optax.GradientTransformation:
  """The optimiser called `name`, up to the learning rate: the step is `param - learning rate * update`.

  - "adamw": PyTorch's, with decoupled decay (Loshchilov and Hutter 2019); that of CLIP, SLIP, DeCLIP and open_clip.
  - "sgd": PyTorch's. The decay is added to the gradient, and the first buffer is the gradient.
  - "lars": DeCLIP's (You et al. 2017). SGD times a local rate of each tensor `p` with gradient `g`,
    `trust_coefficient |p| / (|g| + weight_decay |p|)`. A tensor of zeros, such as a new bias, so never moves; where the
    released code divides by zero, nothing moves. Each of the blocks that a scan stacks has a rate of its own.
  - "adamw_sgd": DeCLIP's hybrid, SGD on one side and AdamW on the rest; `multipliers` sets the ratio of their learning
    rates. The released one adds epsilon before Adam's bias correction, PyTorch and this one behind it.

  Args:
    name: one of `OPTIMIZERS`.
    b1, b2, epsilon: of Adam.
    momentum, nesterov: of SGD and LARS.
    trust_coefficient: of LARS.
    weight_decay: acts where `decay_mask` says.
    decay_mask: one of `DECAY_MASKS`.
    sgd_side: what "adamw_sgd" trains by SGD, one of `SIDES`. The released class has the image side by its name;
      second-hand, the paper gave SGD to the text side of its ViT.
    sgd_weight_decay: that of the SGD half of "adamw_sgd", in place of `weight_decay`.
    gradient_clip: largest global norm of the gradient, 0 for none. PyTorch divides by the norm plus 1e-6, we do not.
    multipliers, layer_decay: see `rates`.
    frozen: paths of parameters that have no moments and no decay; their gradient must be zero.

  Raises:
    ValueError: an unknown name, or a number that is not finite; and, from `init` on, paths that are none, or layer-wise
      decay of what is no ViT.
  """
  check_name("name", name, OPTIMIZERS)
  check_name("decay_mask", decay_mask, DECAY_MASKS)
  numbers = {"b1": b1, "b2": b2, "epsilon": epsilon, "momentum": momentum, "trust_coefficient": trust_coefficient}
  numbers |= {"weight_decay": weight_decay, "sgd_weight_decay": sgd_weight_decay, "gradient_clip": gradient_clip}
  numbers |= {"layer_decay": layer_decay, **{f"multipliers: {path}": factor for path, factor in multipliers}}
  check_finite(numbers)
  optimizer = OPTIMIZERS[name](
    b1=b1,
    b2=b2,
    epsilon=epsilon,
    momentum=momentum,
    nesterov=nesterov,
    trust_coefficient=trust_coefficient,
    weight_decay=weight_decay,
    sgd_side=sgd_side,
    sgd_weight_decay=sgd_weight_decay,
    decay_mask=DECAY_MASKS[decay_mask],
  )
  if gradient_clip:
    optimizer = optax.chain(optax.clip_by_global_norm(gradient_clip), optimizer)
  if frozen:
    optimizer = optax.masked(optimizer, partial(trainable_mask, frozen=frozen))
  if multipliers or layer_decay != 1:
    optimizer = optax.chain(optimizer, _scale_by(partial(rates, multipliers=multipliers, layer_decay=layer_decay)))
  return optimizer


def rates(params: Tree, *, multipliers: Sequence[tuple[str, float]], layer_decay: float) -> Tree:
  """What the learning rate of each parameter is multiplied by: a number, or `[depth 1 ...]` for blocks `[depth ...]`.

  Args:
    params: all parameters.
    multipliers: pairs of a path, such as "heads/logit_scale" or "towers/image", and the factor of all at or below it;
      where several paths hold, their factors multiply. This is DeCLIP's group with another initial learning rate.
    layer_decay: BeiT's, by which SLIP fine-tunes, on an image ViT of `depth` blocks: block `i`, counted from 0, has the
      factor `layer_decay ** (depth - i)`, and what stands before the blocks `layer_decay ** (depth + 1)`. 1 is none.

  Raises:
    ValueError: a path under which there is nothing; or `layer_decay` is not 1 and the image tower is no ViT.
  """
  check_prefixes(params, [prefix for prefix, _ in multipliers], "config.optimizer.multipliers")
  paths = parameter_paths(params)
  depths = jax.tree.map(lambda path, param: param.shape[:1] if is_below(path, IMAGE_BLOCKS) else (), paths, params)
  depth = max(jax.tree.leaves(depths), default=0)
  if layer_decay != 1 and not depth:
    raise ValueError(
      f"config.optimizer.layer_decay={layer_decay} acts on the blocks of a ViT, and there is no {IMAGE_BLOCKS}: "
      "choose 1, or config.model.image.kind='vit'"
    )

  def rate(path: str, param: Array) -> float | np.ndarray:
    factor = float(np.prod([factor for prefix, factor in multipliers if is_below(path, prefix)]))
    if layer_decay != 1 and is_below_any(path, IMAGE_INPUT):
      return factor * layer_decay ** (depth + 1)
    if layer_decay != 1 and is_below(path, IMAGE_BLOCKS):
      return factor * layer_decay ** np.arange(depth, 0, -1).reshape(depth, *[1] * (param.ndim - 1))
    return factor

  return jax.tree.map(rate, paths, params)


def _scale_by(rates_of: Callable[[Tree], Tree]) -> optax.GradientTransformation:
  def init(params: Tree) -> optax.EmptyState:
    rates_of(params)  # what is wrong with the paths shows before anything is computed
    return optax.EmptyState()

  def update(change: Tree, state: optax.EmptyState, params: Tree) -> tuple[Tree, optax.EmptyState]:
    return jax.tree.map(lambda x, rate: x * rate, change, rates_of(params)), state

  return optax.GradientTransformation(init, update)


def check_name(field: str, name: str, legal: dict[str, Any]) -> None:
  if name not in legal:
    raise ValueError(f"config.optimizer.{field}={name!r}: choose one of {sorted(legal)}")


def check_finite(numbers: dict[str, float]) -> None:
  for field, number in numbers.items():
    if not math.isfinite(number):
      raise ValueError(f"config.optimizer.{field}={number}: a finite number")
