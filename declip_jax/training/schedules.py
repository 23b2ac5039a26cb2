"""The learning rate schedules of the papers: functions of the 0-based step.

Adding a setting takes two places: its default in `config._optimizer` and a field of `ScheduleSettings`. Adding a
schedule takes one: its function, listed in `SCHEDULES`.
"""

from collections.abc import Callable
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from declip_jax.spelling import counted
from declip_jax.training.optim import check_finite, check_name

Schedule = Callable[[Int[Array, "*steps"]], Float[Array, "*steps"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
  """The fields of `config.optimizer` that set the learning rate, with durations in steps.

  If a run has changed its batch size, they are in batches of the current size.

  Attributes:
    schedule: one of `SCHEDULES`.
    total_steps: length of training, of a stage in a run with stages.
    learning_rate: the peak, reached at the end of the warm-up.
    warmup: length of the linear rise; 0 for none.
    warmup_start: learning rate of step 0, if there is a warm-up.
    end_learning_rate: final learning rate of the cosines and the cooldown.
    milestones: pairs of a step, counted from 1 as in DeCLIP's configs and our logs, and the factor from that step on.
    cooldown: length of the final decay of "cooldown".
    cooldown_power: exponent of that decay; 1 is linear.

  Raises:
    ValueError: an unknown schedule; a number that is not finite; a warm-up or cooldown longer than training; "step"
      without milestones, or with negative factors.
  """

  schedule: str
  total_steps: int
  learning_rate: float
  warmup: int
  warmup_start: float
  end_learning_rate: float
  milestones: tuple[tuple[int, float], ...]
  cooldown: int
  cooldown_power: float

  def __post_init__(self) -> None:
    check_name("schedule", self.schedule, SCHEDULES)
    check_finite(self)
    check_finite({f"milestones[{step}]": factor for step, factor in self.milestones})
    if self.warmup > self.total_steps:
      raise ValueError(
        f"config.optimizer.warmup is {counted(self.warmup, 'step')}, longer than the run or the stage of "
        f"{counted(self.total_steps, 'step')}: set --config.optimizer.warmup.steps to at most that, or "
        "lengthen the duration"
      )
    longest = self.total_steps - self.warmup
    if self.schedule == "cooldown" and not 0 < self.cooldown <= longest:
      raise ValueError(
        f"config.optimizer.cooldown is {counted(self.cooldown, 'step')}: choose 1 to {longest}, the steps "
        "after the warm-up"
      )
    if self.schedule == "step" and (not self.milestones or any(factor < 0 for _, factor in self.milestones)):
      raise ValueError(
        f"config.optimizer.milestones={self.milestones}: schedule 'step' needs pairs of a step and a factor >= 0"
      )


def _cosine(settings: ScheduleSettings) -> Schedule:
  """SLIP's and BeiT's cosine: the peak is at step `warmup`, and the end would be reached at `total_steps`.

  open_clip's cosine is this one with `warmup_start` = peak / `warmup` and end 0.
  """
  return _half_cosine(settings, settings.warmup, settings.total_steps)


def _declip_cosine(settings: ScheduleSettings) -> Schedule:
  """DeCLIP's cosine, one step earlier: from the peak at the last step of the warm-up to the end at the last step."""
  return _half_cosine(settings, settings.warmup - 1, settings.total_steps - 1)


def _half_cosine(settings: ScheduleSettings, first: int, last: int) -> Schedule:
  # optax.cosine_decay_schedule takes the end as a fraction of the peak, which rounds differently and needs a peak > 0.
  peak, end = settings.learning_rate, settings.end_learning_rate

  def schedule(step: Int[Array, "*steps"]) -> Float[Array, "*steps"]:
    progress = jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)
    return end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))

  return schedule


def _step(settings: ScheduleSettings) -> Schedule:
  """DeCLIP's step schedule: the peak times the factors of all milestones reached."""
  return optax.piecewise_constant_schedule(
    settings.learning_rate, {step - 1: factor for step, factor in settings.milestones}
  )


def _constant(settings: ScheduleSettings) -> Schedule:
  """open_clip's constant schedule: the peak."""
  return optax.constant_schedule(settings.learning_rate)


def _cooldown(settings: ScheduleSettings) -> Schedule:
  """open_clip's cooldown: the peak, then over the last `cooldown` steps a decay to the end by a power of those left."""
  return optax.polynomial_schedule(
    settings.learning_rate,
    settings.end_learning_rate,
    settings.cooldown_power,
    transition_steps=settings.cooldown,
    transition_begin=settings.total_steps - settings.cooldown,
  )


# What `config.optimizer.schedule` may name. Each function returns the learning rate after the warm-up.
SCHEDULES: dict[str, Callable[[ScheduleSettings], Schedule]] = {
  "cosine": _cosine,
  "declip_cosine": _declip_cosine,
  "step": _step,
  "constant": _constant,
  "cooldown": _cooldown,
}


def make_schedule(settings: ScheduleSettings) -> Schedule:
  """Makes the schedule: a linear rise, with the peak at step `warmup - 1`, then the named schedule."""
  # Not optax.join_schedules, which restarts the count at the boundary: milestones count from the start of training, and
  # DeCLIP's cosine starts one step before it.
  after = SCHEDULES[settings.schedule](settings)
  start, peak, warmup = settings.warmup_start, settings.learning_rate, settings.warmup

  def schedule(step: Int[Array, "*steps"]) -> Float[Array, "*steps"]:
    rising = start + (peak - start) * step / max(warmup - 1, 1)
    return jnp.where(step < warmup, rising, after(step))

  return schedule
