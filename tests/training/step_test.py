"""The train step on a toy model; `methods_test.py` and `train_test.py` take steps of real ones."""

import jax
import jax.numpy as jnp
import optax
import pytest

from declip_jax.models.model import Model
from declip_jax.training.gradient import Result
from declip_jax.training.state import State
from declip_jax.training.step import train_step
from declip_jax.types import Outputs


class ToyModel(Model):
  def __init__(self) -> None:
    pass

  def momentum_copy(self, params: dict) -> dict:
    return {}


def scales_after_a_step(bounds: tuple[float, ...]) -> dict[str, float]:
  """Both log inverse temperatures after a step from 2.5, in which the first is frozen and the second moves by 0.5."""
  start = {"logit_scale": jnp.float32(2.5), "dense_logit_scale": jnp.float32(2.5)}
  params = {"towers": {"image": {"kernel": jnp.ones(2)}}, "heads": start}
  zero = jnp.zeros((), jnp.int32)
  skipped = {"total": zero, "in_a_row": zero, "measured": zero, "log_norm": jnp.zeros(())}

  def gradient_fn(params: dict, collections: dict, batch: dict, step: jax.Array) -> tuple[Result, dict]:
    gradients = {"towers": params["towers"], "heads": {"logit_scale": 0 * step, "dense_logit_scale": jnp.float32(-5.0)}}
    return Result(jnp.float32(1.0), {}, Outputs(), collections), jax.tree.map(jnp.float32, gradients)

  state, _ = train_step(
    State(zero, params, optax.identity().init(params), {}, skipped),
    {},
    model=ToyModel(),
    optimizer=optax.identity(),
    schedule=lambda step: jnp.float32(0.1),
    gradient_fn=gradient_fn,
    momentum_decay=lambda step: jnp.float32(1.0),
    is_diagnosed=lambda step: step < 0,
    diagnose=lambda outputs: {},
    logit_scale_range=bounds,
  )
  assert state.step == 1
  return {name: float(value) for name, value in state.params["heads"].items()}


@pytest.mark.parametrize(
  ("bounds", "frozen", "trained"),
  [((), 2.5, 3.0), ((2.75, 6.0), 2.75, 3.0), ((3.5, 6.0), 3.5, 3.5), ((0.0, 2.75), 2.5, 2.75), ((0.0, 2.0), 2.0, 2.0)],
)
def test_log_scales_stay_in_their_range_even_where_they_are_frozen(
  bounds: tuple[float, ...], frozen: float, trained: float
) -> None:
  assert scales_after_a_step(bounds) == pytest.approx({"logit_scale": frozen, "dense_logit_scale": trained})
