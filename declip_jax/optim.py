"""The optimiser and the schedule of the papers: AdamW with a decay mask, linear warm-up, cosine decay."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

Tree = Any
NOT_DECAYED = ("bias", "scale", "logit_scale")  # "all weights that are not gains or biases" (Radford et al., 2.5)


def decay_mask(params: Tree) -> Tree:
  """True where weight decay acts: every parameter but biases, gains of norms and the temperature.

  By name and not by rank, since scanned layers stack biases into matrices. Embeddings, positions and the class token
  are decayed, as in CLIP, SLIP and DeCLIP.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def below(path: str, prefix: str) -> bool:
  """Whether a path such as "towers/image/pre_norm" lies at or under another."""
  return f"{path}/".startswith(f"{prefix.rstrip('/')}/")


def trainable(params: Tree, frozen: Sequence[str]) -> Tree:
  """False for the parameters at or below one of the paths `frozen`, such as "towers/image"; True for the others.

  Raises:
    ValueError: a path under which there is nothing.
  """
  paths = ["/".join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(params)]
  for prefix in frozen:
    if not any(below(path, prefix) for path in paths):
      parts = sorted({"/".join(path.split("/")[:3]) for path in paths})
      raise ValueError(f"config.optimizer.frozen: there is nothing at {prefix!r}; there are {', '.join(parts)}")
  free = [not any(below(path, prefix) for prefix in frozen) for path in paths]
  return jax.tree.unflatten(jax.tree.structure(params), free)


def without_gradient(params: Tree, frozen: Sequence[str]) -> Tree:
  """The same parameters, but no gradient is computed for the frozen ones, nor for what only they need."""
  if not frozen:
    return params
  return jax.tree.map(
    lambda param, free: param if free else jax.lax.stop_gradient(param), params, trainable(params, frozen)
  )


def adamw(
  *, b1: float, b2: float, epsilon: float, weight_decay: float, gradient_clip: float, frozen: Sequence[str] = ()
) -> optax.GradientTransformation:
  """AdamW up to the learning rate, which the train step applies from its own step count.

  Args:
    b1, b2, epsilon: of Adam.
    weight_decay: decoupled, under `decay_mask`.
    gradient_clip: largest global norm of the gradient, 0 for none.
    frozen: paths of parameters that have no moments and no decay; their gradient must be zero.
  """
  clip = [optax.clip_by_global_norm(gradient_clip)] if gradient_clip else []
  decay = [optax.add_decayed_weights(weight_decay, mask=decay_mask)] if weight_decay else []
  adam = optax.chain(*clip, optax.scale_by_adam(b1, b2, epsilon), *decay)
  return optax.masked(adam, partial(trainable, frozen=frozen)) if frozen else adam


def warmup_cosine(
  *, peak: float, warmup_steps: int, total_steps: int, start: float, end: float
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
  """Learning rate of a 0-based step: linear from `start`, reaching `peak` at step `warmup_steps - 1`, then a cosine.

  The cosine starts at `peak` at step `warmup_steps` and would reach `end` at `total_steps`, as in SLIP's
  `cosine_scheduler`.

  Raises:
    ValueError: the warm-up is longer than the training.
  """
  if warmup_steps > total_steps:
    raise ValueError(f"config.optimizer.warmup is {warmup_steps} steps, longer than the training of {total_steps}")

  def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
    rising = start + (peak - start) * step / max(warmup_steps - 1, 1)
    progress = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
    falling = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup_steps, rising, falling)

  return schedule
