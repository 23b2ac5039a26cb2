"""The optimisers and schedules of the papers, with what decays, what is frozen, and whose learning rate differs.

An optimiser is everything up to the learning rate, which the train step applies from its own step count; so are LARS'
local rate and the factors of single parameters. A schedule is that learning rate as a function of the 0-based step.
"""

from collections.abc import Callable, Sequence
from functools import partial
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np
import optax

Tree = Any
Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]

TEMPERATURES = ("logit_scale", "dense_logit_scale", "logit_bias")
EMBEDDINGS = ("position_embedding", "class_embedding", "mask_embedding")

# The sides of DeCLIP's hybrid optimiser; its encoders hold their projections, and its heads belong to them.
SIDES = {
  "image": (
    "towers/image",
    *(f"heads/{name}" for name in ("image_projection", "image_mapping", "projector", "predictor", "simclr")),
    *(f"heads/{name}" for name in ("momentum_project", "momentum_predict", "mim", "mim_norm")),
  ),
  "text": ("towers/text", *(f"heads/{name}" for name in ("text_projection", "text_mapping", "mlm"))),
}

# What layer-wise decay needs to know of an image ViT: what stands before its blocks, and the blocks, stacked.
IMAGE_INPUT = tuple(f"towers/image/{name}" for name in (*EMBEDDINGS, "patch_embedding", "pre_norm"))
IMAGE_BLOCKS = "towers/image/transformer/blocks"


# Paths of parameters.


def paths(params: Tree) -> Tree:
  """The path of each parameter, such as "towers/image/pre_norm/scale", in its place."""
  return jax.tree_util.tree_map_with_path(lambda keys, _: "/".join(key.key for key in keys), params)


def below(path: str, prefix: str) -> bool:
  """Whether a path such as "towers/image/pre_norm" lies at or under another."""
  return f"{path}/".startswith(f"{prefix.rstrip('/')}/")


def trainable(params: Tree, frozen: Sequence[str]) -> Tree:
  """False for the parameters at or below one of the paths `frozen`, such as "towers/image"; True for the others.

  Raises:
    ValueError: a path under which there is nothing.
  """
  _check_prefixes(params, frozen, "frozen")
  return jax.tree.map(lambda path: not any(below(path, prefix) for prefix in frozen), paths(params))


def without_gradient(params: Tree, frozen: Sequence[str]) -> Tree:
  """The same parameters, but no gradient is computed for the frozen ones, nor for what only they need."""
  if not frozen:
    return params
  return jax.tree.map(
    lambda param, free: param if free else jax.lax.stop_gradient(param), params, trainable(params, frozen)
  )


def _check_prefixes(params: Tree, prefixes: Sequence[str], field: str) -> None:
  found = jax.tree.leaves(paths(params))
  for prefix in prefixes:
    if not any(below(path, prefix) for path in found):
      parts = sorted({"/".join(path.split("/")[:3]) for path in found})
      raise ValueError(f"config.optimizer.{field}: there is nothing at {prefix!r}; there are {', '.join(parts)}")


def _stacked(path: str) -> bool:
  """Whether a parameter holds those of several blocks along its leading axis, as a scan has them."""
  return any(part == "blocks" or part.endswith("_rest") for part in path.split("/"))


# What decays. By name and not by rank, since scanned blocks stack biases into matrices.


def _spare(params: Tree, names: Sequence[str]) -> Tree:
  return jax.tree.map(lambda path: path.rpartition("/")[2] not in names, paths(params))


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
  return jax.tree.map(lambda path, decay: decay or path.endswith("/qkv/bias"), paths(params), decay_weights(params))


def decay_finetune(params: Tree) -> Tree:
  """BeiT's, by which SLIP fine-tunes: as `decay_weights`, but for positions, class token and mask token."""
  return _spare(params, ("bias", "scale", *TEMPERATURES, *EMBEDDINGS))


def decay_all(params: Tree) -> Tree:
  """Everything, temperatures too, as DeCLIP's 88M ResNet-50, whose config groups nothing apart."""
  return _spare(params, ())


DECAYED = {"weights": decay_weights, "declip": decay_declip, "finetune": decay_finetune, "all": decay_all}


# Optimisers. Each takes all settings of `make` and uses its own.


def _adamw(
  *, b1: float, b2: float, epsilon: float, weight_decay: float, decayed: Callable[[Tree], Tree], **_: Any
) -> optax.GradientTransformation:
  decay = optax.add_decayed_weights(weight_decay, mask=decayed)
  return optax.chain(optax.scale_by_adam(b1, b2, epsilon), decay)


def _sgd(
  *, momentum: float, nesterov: bool, weight_decay: float, decayed: Callable[[Tree], Tree], **_: Any
) -> optax.GradientTransformation:
  decay = optax.add_decayed_weights(weight_decay, mask=decayed)
  return optax.chain(decay, optax.trace(momentum, nesterov))


def _lars(
  *, trust_coefficient: float, weight_decay: float, decayed: Callable[[Tree], Tree], **settings: Any
) -> optax.GradientTransformation:
  sgd = _sgd(weight_decay=weight_decay, decayed=decayed, **settings)

  def update(gradient: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    def scaled(path: str, change: Array, gradient: Array, param: Array, decay: bool) -> Array:
      axes = tuple(range(int(_stacked(path)), param.ndim))
      of_param, of_gradient = (jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)) for x in (param, gradient))
      divisor = of_gradient + (weight_decay * of_param if decay else 0.0)
      return jnp.where(divisor > 0, trust_coefficient * of_param / divisor, 0.0) * change

    change, state = sgd.update(gradient, state, params)
    return jax.tree.map(scaled, paths(params), change, gradient, params, decayed(params)), state

  return optax.GradientTransformation(sgd.init, update)


def _adamw_sgd(*, sgd_side: str, sgd_weight_decay: float, **settings: Any) -> optax.GradientTransformation:
  _check_name("sgd_side", sgd_side, SIDES)

  def side(params: Tree) -> Tree:
    return jax.tree.map(
      lambda path: "sgd" if any(below(path, prefix) for prefix in SIDES[sgd_side]) else "adamw", paths(params)
    )

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
  decayed: str,
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
    weight_decay: acts where `decayed` says.
    decayed: one of `DECAYED`.
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
  _check_name("name", name, OPTIMIZERS)
  _check_name("decayed", decayed, DECAYED)
  numbers = {"b1": b1, "b2": b2, "epsilon": epsilon, "momentum": momentum, "trust_coefficient": trust_coefficient}
  numbers |= {"weight_decay": weight_decay, "sgd_weight_decay": sgd_weight_decay, "gradient_clip": gradient_clip}
  numbers |= {"layer_decay": layer_decay, **{f"multipliers: {path}": factor for path, factor in multipliers}}
  _check_finite(numbers)
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
    decayed=DECAYED[decayed],
  )
  if gradient_clip:
    optimizer = optax.chain(optax.clip_by_global_norm(gradient_clip), optimizer)
  if frozen:
    optimizer = optax.masked(optimizer, partial(trainable, frozen=frozen))
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
  _check_prefixes(params, [prefix for prefix, _ in multipliers], "multipliers")
  stacks = jax.tree.map(lambda path, param: param.shape[:1] if below(path, IMAGE_BLOCKS) else (), paths(params), params)
  depth = max(jax.tree.leaves(stacks), default=0)
  if layer_decay != 1 and not depth:
    raise ValueError(
      f"config.optimizer.layer_decay={layer_decay} acts on the blocks of a ViT, and there is no {IMAGE_BLOCKS}: "
      "choose 1, or config.model.image.kind='vit'"
    )

  def rate(path: str, param: Array) -> float | np.ndarray:
    factor = float(np.prod([factor for prefix, factor in multipliers if below(path, prefix)]))
    if layer_decay != 1 and any(below(path, prefix) for prefix in IMAGE_INPUT):
      return factor * layer_decay ** (depth + 1)
    if layer_decay != 1 and below(path, IMAGE_BLOCKS):
      return factor * layer_decay ** np.arange(depth, 0, -1).reshape(depth, *[1] * (param.ndim - 1))
    return factor

  return jax.tree.map(rate, paths(params), params)


def _scale_by(rates_of: Callable[[Tree], Tree]) -> optax.GradientTransformation:
  def init(params: Tree) -> optax.EmptyState:
    rates_of(params)  # what is wrong with the paths shows before anything is computed
    return optax.EmptyState()

  def update(change: Tree, state: optax.EmptyState, params: Tree) -> tuple[Tree, optax.EmptyState]:
    return jax.tree.map(lambda x, rate: x * rate, change, rates_of(params)), state

  return optax.GradientTransformation(init, update)


# Schedules. Each takes all settings of `make_schedule` and gives the learning rate behind the warm-up.


def _half_cosine(step: Array, peak: float, end: float, first: int, last: int) -> Array:
  return end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * _progress(step, first, last)))


def _progress(step: Array, first: int, last: int) -> Array:
  return jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)


def _cosine(*, peak: float, end: float, warmup_steps: int, total_steps: int, **_: Any) -> Schedule:
  return lambda step: _half_cosine(step, peak, end, warmup_steps, total_steps)


def _declip_cosine(*, peak: float, end: float, warmup_steps: int, total_steps: int, **_: Any) -> Schedule:
  return lambda step: _half_cosine(step, peak, end, warmup_steps - 1, total_steps - 1)


def _step(*, peak: float, milestones: Sequence[tuple[int, float]], **_: Any) -> Schedule:
  def schedule(step: Array) -> Array:
    rate = jnp.asarray(peak)
    for milestone, factor in milestones:
      rate = jnp.where(step + 1 >= milestone, factor * rate, rate)
    return rate

  return schedule


def _constant(*, peak: float, **_: Any) -> Schedule:
  return lambda step: jnp.asarray(peak)


def _cooldown(
  *, peak: float, end: float, total_steps: int, cooldown_steps: int, cooldown_power: float, **_: Any
) -> Schedule:
  def schedule(step: Array) -> Array:
    left = 1 - _progress(step, total_steps - cooldown_steps, total_steps)
    return end + (peak - end) * left**cooldown_power

  return schedule


SCHEDULES = {
  "cosine": _cosine,
  "declip_cosine": _declip_cosine,
  "step": _step,
  "constant": _constant,
  "cooldown": _cooldown,
}


def make_schedule(
  name: str,
  *,
  peak: float,
  warmup_steps: int,
  total_steps: int,
  start: float,
  end: float,
  milestones: Sequence[tuple[int, float]] = (),
  cooldown_steps: int = 0,
  cooldown_power: float = 1.0,
) -> Schedule:
  """Learning rate of a 0-based step: linear from `start`, reaching `peak` at step `warmup_steps - 1`, then by `name`.

  - "cosine": SLIP's and BeiT's. From `peak` at step `warmup_steps`; would reach `end` at `total_steps`. open_clip's is
    this one with `start` = `peak / warmup_steps` and `end` 0.
  - "declip_cosine": DeCLIP's, one step ahead: from `peak` at the last step of the warm-up, to `end` at the last step.
  - "step": DeCLIP's. `peak` times the factors of the milestones passed.
  - "constant": open_clip's. `peak`.
  - "cooldown": open_clip's. `peak`, and in the last `cooldown_steps` to `end`, as what is left of them to a power.

  Args:
    name: one of `SCHEDULES`.
    peak: learning rate after the warm-up.
    warmup_steps: of the linear rise; 0 is none.
    total_steps: of the training.
    start: learning rate of step 0, if there is a warm-up.
    end: learning rate that the cosines and the cooldown fall to.
    milestones: pairs of a step, counted from 1 as in DeCLIP's configs and our logs, and the factor from it on.
    cooldown_steps, cooldown_power: length and form of the cooldown; power 1 is linear.

  Raises:
    ValueError: an unknown name; a rate that is not finite; warm-up and cooldown are longer than the training; "step"
      without milestones.
  """
  _check_name("schedule", name, SCHEDULES)
  factors = {f"milestones[{step}]": factor for step, factor in milestones}
  _check_finite({"learning_rate": peak, "warmup_start": start, "end": end, "cooldown_power": cooldown_power, **factors})
  if warmup_steps > total_steps:
    raise ValueError(f"config.optimizer.warmup is {warmup_steps} steps, longer than the training of {total_steps}")
  if name == "cooldown" and not 0 < cooldown_steps <= total_steps - warmup_steps:
    raise ValueError(
      f"config.optimizer.cooldown is {cooldown_steps} steps: 1 to {total_steps - warmup_steps}, what the training "
      f"of {total_steps} has behind its warm-up"
    )
  if name == "step" and not milestones:
    raise ValueError("config.optimizer.milestones=(): schedule 'step' needs pairs of a step and a factor")
  falling = SCHEDULES[name](
    peak=peak,
    end=end,
    warmup_steps=warmup_steps,
    total_steps=total_steps,
    milestones=milestones,
    cooldown_steps=cooldown_steps,
    cooldown_power=cooldown_power,
  )

  def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
    rising = start + (peak - start) * step / max(warmup_steps - 1, 1)
    return jnp.where(step < warmup_steps, rising, falling(step))

  return schedule


def _check_name(field: str, name: str, legal: dict[str, Any]) -> None:
  if name not in legal:
    raise ValueError(f"config.optimizer.{field}={name!r}: choose one of {sorted(legal)}")


def _check_finite(numbers: dict[str, float]) -> None:
  for field, number in numbers.items():
    if not math.isfinite(number):
      raise ValueError(f"config.optimizer.{field}={number}: a finite number")
