"""The learning rates of the papers, each a function of the 0-based step."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from declip_jax.training.optim import check_finite, check_name

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


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
  check_name("schedule", name, SCHEDULES)
  factors = {f"milestones[{step}]": factor for step, factor in milestones}
  check_finite(
    {
      "learning_rate": peak,
      "warmup_start": start,
      "end_learning_rate": end,
      "cooldown_power": cooldown_power,
      **factors,
    }
  )
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
