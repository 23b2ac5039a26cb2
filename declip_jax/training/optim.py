"""The optimisers of the papers: update rules, weight decay masks, frozen parameters, per-parameter learning rates.

An optimiser here includes everything except the global learning rate, which the train step applies from its own step
count; the local rates of LARS and the multipliers of single parameters are part of the optimiser.

Adding a setting takes two places: its default in `config._optimizer` and a field of `OptimizerSettings`. Adding an
optimiser takes one: its function, listed in `OPTIMIZERS`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
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
  freezes_blocks,
  is_below,
  is_below_any,
  is_stacked,
  parameter_paths,
  side_prefixes,
  trainable,
  trainable_mask,
)
from declip_jax.spelling import did_you_mean

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
  """The fields of `config.optimizer` that make the optimiser.

  Attributes:
    name: one of `OPTIMIZERS`.
    b1, b2, epsilon: coefficients of Adam.
    momentum, nesterov: momentum of SGD and LARS.
    trust_coefficient: trust coefficient of LARS.
    weight_decay: applied where `decay_mask` is True.
    decay_mask: one of `DECAY_MASKS`.
    sgd_side: the side that "adamw_sgd" trains with SGD, one of `models.paths.SIDES`. The name of the released class
      says the image side; according to secondary sources, the paper used SGD for the text side of its ViT.
    sgd_weight_decay: weight decay of the SGD side of "adamw_sgd", in place of `weight_decay`.
    gradient_clip: largest global norm of the gradient; 0 for no clipping. PyTorch divides by the norm plus 1e-6;
      we do not.
    multipliers, layer_decay: factors of the learning rate, see `rate_multipliers`.
    frozen: paths of parameters without moments and weight decay; their gradients must be zero. See `paths.trainable`.
    logit_scale_range: bounds of the log inverse temperatures after each step; () for none.
    ema: decay of the moving average of the weights, see `step.update_average`; 0 for none.

  Raises:
    ValueError: an unknown name, a number that is not finite, or a range that is not ascending.
  """

  name: str
  b1: float
  b2: float
  epsilon: float
  momentum: float
  nesterov: bool
  trust_coefficient: float
  weight_decay: float
  decay_mask: str
  sgd_side: str
  sgd_weight_decay: float
  gradient_clip: float
  multipliers: tuple[tuple[str, float], ...]
  layer_decay: float
  frozen: tuple[str, ...]
  logit_scale_range: tuple[float, ...]
  ema: float

  def __post_init__(self) -> None:
    check_name("name", self.name, OPTIMIZERS)
    check_name("decay_mask", self.decay_mask, DECAY_MASKS)
    check_name("sgd_side", self.sgd_side, SIDES)
    check_finite(self)
    check_finite({f"multipliers[{path!r}]": factor for path, factor in self.multipliers})
    bounds = self.logit_scale_range
    if bounds and not (len(bounds) == 2 and bounds[0] <= bounds[1]):
      raise ValueError(f"config.optimizer.logit_scale_range={bounds!r}: expected two ascending numbers, or ()")


def check_name(field: str, name: str, known: Collection[str]) -> None:
  """Rejects a name that is not in a table.

  Raises:
    ValueError: the message names the field of `config.optimizer`, the name and the known ones.
  """
  if name not in known:
    raise ValueError(f"config.optimizer.{field}={name!r}: choose one of {sorted(known)}{did_you_mean(name, known)}")


def check_finite(settings: OptimizerSettings | Any | Mapping[str, float]) -> None:
  """Rejects NaN and infinity in the floats of a dataclass or a mapping.

  Raises:
    ValueError: the message names the field of `config.optimizer` and the number.
  """
  values = settings if isinstance(settings, Mapping) else vars(settings)
  for field, value in values.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f"config.optimizer.{field}={value}: expected a finite number")


# Weight decay masks. Selected by name and not by rank, since scanned blocks stack biases into matrices.


def _all_except(params: Tree, names: Sequence[str]) -> Tree:
  return jax.tree.map(lambda path: path.rpartition("/")[2] not in names, parameter_paths(params))


def decay_weights(params: Tree) -> Tree:
  """All but biases, gains of norms and temperatures: "all weights that are not gains or biases" (CLIP, section 2.5).

  SLIP's rule selects the same parameters. It excludes those with fewer than two axes, or with "bias", "ln" or "bn" in
  their names; all of these are vectors and the temperature, but not the class token, which has three axes in timm.
  open_clip's rule is similar, but its class token has one axis and is excluded.
  """
  return _all_except(params, ("bias", "scale", *TEMPERATURES))


def decay_declip(params: Tree) -> Tree:
  """DeCLIP's mask: that of `decay_weights`, and the packed bias of query, key and value.

  Its parameter groups contain the biases of known modules; this one is a bare parameter of PyTorch's attention.
  """
  packed = jax.tree.map(lambda path: path.endswith("/qkv/bias"), parameter_paths(params))
  return jax.tree.map(operator.or_, packed, decay_weights(params))


def decay_finetune(params: Tree) -> Tree:
  """BeiT's mask, used for SLIP's fine-tuning: `decay_weights` without positions, class token and mask token."""
  return _all_except(params, ("bias", "scale", *TEMPERATURES, *EMBEDDINGS))


def decay_all(params: Tree) -> Tree:
  """All parameters, including temperatures, as in DeCLIP's 88M ResNet-50, whose config has no parameter groups."""
  return _all_except(params, ())


# What `config.optimizer.decay_mask` may name.
DECAY_MASKS: dict[str, Callable[[Tree], Tree]] = {
  "weights": decay_weights,
  "declip": decay_declip,
  "finetune": decay_finetune,
  "all": decay_all,
}


# Optimisers.


def _add_weight_decay(settings: OptimizerSettings) -> optax.GradientTransformation:
  return optax.add_decayed_weights(settings.weight_decay, mask=DECAY_MASKS[settings.decay_mask])


def _adamw(settings: OptimizerSettings) -> optax.GradientTransformation:
  """PyTorch's AdamW: decoupled decay (Loshchilov and Hutter 2019), as in CLIP, SLIP, DeCLIP and open_clip."""
  return optax.chain(optax.scale_by_adam(settings.b1, settings.b2, settings.epsilon), _add_weight_decay(settings))


def _sgd(settings: OptimizerSettings) -> optax.GradientTransformation:
  """PyTorch's SGD: the decay is added to the gradient, and the first gradient initialises the momentum buffer."""
  return optax.chain(_add_weight_decay(settings), optax.trace(settings.momentum, settings.nesterov))


def _lars(settings: OptimizerSettings) -> optax.GradientTransformation:
  """DeCLIP's LARS (You et al. 2017): SGD times a local rate for each tensor `p` with gradient `g`.

  The rate is `trust_coefficient |p| / (|g| + weight_decay |p|)`. A tensor of zeros, such as a new bias, therefore never
  changes; where the released code divides by zero, nothing changes. Each of the blocks that a scan stacks has its own
  rate.
  """
  sgd, decay_mask = _sgd(settings), DECAY_MASKS[settings.decay_mask]

  def update(gradient: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    def scaled(path: str, change: Array, gradient: Array, param: Array, decay: bool) -> Array:
      axes = tuple(range(int(is_stacked(path)), param.ndim))
      param_norm, gradient_norm = (jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)) for x in (param, gradient))
      divisor = gradient_norm + (settings.weight_decay * param_norm if decay else 0.0)
      return jnp.where(divisor > 0, settings.trust_coefficient * param_norm / divisor, 0.0) * change

    change, state = sgd.update(gradient, state, params)
    return jax.tree.map(scaled, parameter_paths(params), change, gradient, params, decay_mask(params)), state

  return optax.GradientTransformation(sgd.init, update)


def _adamw_sgd(settings: OptimizerSettings) -> optax.GradientTransformation:
  """DeCLIP's hybrid: SGD on `sgd_side` and AdamW on the rest; `multipliers` sets the ratio of their learning rates.

  The released code adds epsilon before Adam's bias correction; PyTorch and this function add it after.
  """

  def labels(params: Tree) -> Tree:
    prefixes = side_prefixes(settings.sgd_side)
    return jax.tree.map(lambda path: "sgd" if is_below_any(path, prefixes) else "adamw", parameter_paths(params))

  sgd = _sgd(dataclasses.replace(settings, weight_decay=settings.sgd_weight_decay))
  return optax.partition({"adamw": _adamw(settings), "sgd": sgd}, labels)


# What `config.optimizer.name` may name.
OPTIMIZERS: dict[str, Callable[[OptimizerSettings], optax.GradientTransformation]] = {
  "adamw": _adamw,
  "sgd": _sgd,
  "lars": _lars,
  "adamw_sgd": _adamw_sgd,
}


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
  """The optimiser without the global learning rate: a step is `param - learning rate * update`.

  Raises:
    ValueError: in `init`: a path in `frozen` or `multipliers` has no parameters, or layer-wise decay has no ViT.
  """
  optimizer = OPTIMIZERS[settings.name](settings)
  if settings.gradient_clip:
    optimizer = optax.chain(optax.clip_by_global_norm(settings.gradient_clip), optimizer)
  if settings.frozen:
    optimizer = optax.masked(optimizer, partial(trainable_mask, frozen=settings.frozen))
  if any(map(freezes_blocks, settings.frozen)):  # weight decay would change them
    optimizer = optax.chain(optimizer, _scale_by(partial(trainable, frozen=settings.frozen)))
  if settings.multipliers or settings.layer_decay != 1:
    multipliers = partial(rate_multipliers, multipliers=settings.multipliers, layer_decay=settings.layer_decay)
    optimizer = optax.chain(optimizer, _scale_by(multipliers))
  return optimizer


def rate_multipliers(params: Tree, *, multipliers: Sequence[tuple[str, float]], layer_decay: float) -> Tree:
  """The factor of each parameter's learning rate: a number, or `[depth 1 ...]` for stacked blocks `[depth ...]`.

  Args:
    params: all parameters.
    multipliers: pairs of a path, such as "heads/logit_scale" or "towers/image", and the factor of all parameters at or
      below it; the factors of nested paths multiply. In DeCLIP, these are groups with their own initial learning rates.
    layer_decay: BeiT's layer-wise decay, used for SLIP's fine-tuning of a ViT with `depth` blocks: block `i`, from 0,
      has the factor `layer_decay ** (depth - i)`, and the parameters before the blocks `layer_decay ** (depth + 1)`.
      1 for none.

  Raises:
    ValueError: a path without parameters, or a `layer_decay` other than 1 and an image tower that is not a ViT.
  """
  check_prefixes(params, [prefix for prefix, _ in multipliers], "config.optimizer.multipliers")
  paths = parameter_paths(params)
  depths = jax.tree.map(lambda path, param: param.shape[:1] if is_below(path, IMAGE_BLOCKS) else (), paths, params)
  depth = max(jax.tree.leaves(depths), default=0)
  if layer_decay != 1 and not depth:
    raise ValueError(
      f"config.optimizer.layer_decay={layer_decay} needs the blocks of a ViT at {IMAGE_BLOCKS}: choose 1, or "
      "config.model.image.kind='vit'"
    )

  def rate(path: str, param: jax.Array | jax.ShapeDtypeStruct) -> float | np.ndarray:
    factor = float(np.prod([factor for prefix, factor in multipliers if is_below(path, prefix)]))
    if layer_decay != 1 and is_below_any(path, IMAGE_INPUT):
      return factor * layer_decay ** (depth + 1)
    if layer_decay != 1 and is_below(path, IMAGE_BLOCKS):
      return factor * layer_decay ** np.arange(depth, 0, -1).reshape(depth, *[1] * (param.ndim - 1))
    return factor

  return jax.tree.map(rate, paths, params)


def _scale_by(multipliers: Callable[[Tree], Tree]) -> optax.GradientTransformation:
  def init(params: Tree) -> optax.EmptyState:
    multipliers(params)  # so that wrong paths are reported before anything is computed
    return optax.EmptyState()

  def update(change: Tree, state: optax.EmptyState, params: Tree) -> tuple[Tree, optax.EmptyState]:
    return jax.tree.map(lambda x, rate: x * rate, change, multipliers(params)), state

  return optax.GradientTransformation(init, update)
