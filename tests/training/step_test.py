"""The train step on a toy model; `methods_test.py` and `train_test.py` take steps of real ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from declip_jax.models.model import Model
from declip_jax.training.gradient import Result
from declip_jax.training.state import State, start_average
from declip_jax.training.step import _diagnose_if, is_spike, train_step, update_average
from declip_jax.types import Outputs


class ToyModel(Model):
  def __init__(self) -> None:
    pass

  def momentum_copy(self, params: dict) -> dict:
    return {}


def take_step(
  params: dict,
  gradients: dict,
  *,
  loss: float = 1.0,
  rate: float = 0.1,
  skipped: dict | None = None,
  optimizer: optax.GradientTransformation | None = None,
  **options: object,
) -> State:
  """The state after a step on `params` with these gradients, by default of gradient descent.

  With `ema`, it has an average, which is larger than the parameters by 1 before the step.
  """
  optimizer = optimizer or optax.identity()
  zero = jnp.zeros((), jnp.int32)
  counts = {"total": zero, "in_a_row": zero, "measured": zero, "log_norm": jnp.zeros(())} | (skipped or {})

  def gradient_fn(params: dict, collections: dict, batch: dict, step: jax.Array) -> tuple[Result, dict]:
    result = Result(jnp.float32(loss), {}, Outputs(), {"seen": collections["seen"] + 1})
    return result, jax.tree.map(jnp.float32, gradients)

  state = State(zero, params, optimizer.init(params), {"seen": zero + 1}, counts)
  if "ema" in options:
    state = state.replace(average=jax.tree.map(lambda x: x + 1, start_average(state).average))
  state, _ = train_step(
    state,
    {},
    model=ToyModel(),
    optimizer=optimizer,
    schedule=lambda step: jnp.float32(rate),
    gradient_fn=gradient_fn,
    momentum_decay=lambda step: jnp.float32(1.0),
    is_diagnosed=lambda step: step < 0,
    diagnose=lambda outputs: {},
    **options,
  )
  assert state.step == 1
  return state


def tree(image: list[float], scale: float, dense: float = 0.0) -> dict:
  heads = {"logit_scale": jnp.float32(scale), "dense_logit_scale": jnp.float32(dense)}
  return {"towers": {"image": {"kernel": jnp.asarray(image, jnp.float32)}}, "heads": heads}


@pytest.mark.parametrize(
  ("bounds", "frozen", "trained"),
  [((), 2.5, 3.0), ((2.75, 6.0), 2.75, 3.0), ((3.5, 6.0), 3.5, 3.5), ((0.0, 2.75), 2.5, 2.75), ((0.0, 2.0), 2.0, 2.0)],
)
def test_log_scales_are_clipped_even_if_frozen(bounds: tuple[float, ...], frozen: float, trained: float) -> None:
  """Both start at 2.5; the first is frozen, the second moves by 0.5."""
  state = take_step(tree([1, 1], 2.5, 2.5), tree([1, 1], 0, -5), logit_scale_range=bounds)
  found = {name: float(value) for name, value in state.params["heads"].items()}
  assert found == pytest.approx({"logit_scale": frozen, "dense_logit_scale": trained})


@pytest.mark.parametrize(
  ("loss", "gradient", "rate", "good"),
  [
    (1.0, 2.0, 0.1, True),
    (math.nan, 2.0, 0.1, False),
    (math.inf, 2.0, 0.1, False),
    (1.0, math.nan, 0.1, False),
    (1.0, -math.inf, 0.1, False),
    (1.0, 2.0, math.nan, False),
  ],
)
def test_a_step_that_is_not_finite_changes_only_counts(loss: float, gradient: float, rate: float, good: bool) -> None:
  before = {"total": jnp.int32(5), "in_a_row": jnp.int32(3)}
  state = take_step(tree([1, 1], 1), tree([gradient, 1], 1), loss=loss, rate=rate, skipped=before)
  kernel, scale = state.params["towers"]["image"]["kernel"], state.params["heads"]["logit_scale"]
  assert kernel.tolist() == pytest.approx([0.8, 0.9] if good else [1, 1])
  assert float(scale) == pytest.approx(0.9 if good else 1)
  assert int(state.collections["seen"]) == (2 if good else 1)
  assert (int(state.skipped["total"]), int(state.skipped["in_a_row"])) == ((5, 0) if good else (6, 4))
  assert int(state.skipped["measured"]) == (1 if good else 0)


def test_an_entry_whose_update_is_not_finite_keeps_its_value() -> None:
  """For example, Adam without an epsilon divides 0 by 0."""
  optimizer = optax.stateless(lambda updates, _: jax.tree.map(lambda x: x / (x > 0), updates))
  state = take_step(tree([1, 1], 1), tree([0, 1], 1), rate=1.0, optimizer=optimizer)
  assert state.params["towers"]["image"]["kernel"].tolist() == pytest.approx([1, 0])


@pytest.mark.parametrize(("ema", "kept"), [(0.1, 0.1), (0.9, 2 / 11)])
def test_a_step_moves_the_average_to_the_new_weights(ema: float, kept: float) -> None:
  """An entry whose update is not finite keeps its value, and the average follows that."""
  optimizer = optax.stateless(lambda updates, _: jax.tree.map(lambda x: x * x / x, updates))
  state = take_step(tree([1, 1], 1), tree([0, 2], 3), optimizer=optimizer, ema=ema)
  average = state.average["params"]
  assert state.params["towers"]["image"]["kernel"].tolist() == pytest.approx([1, 0.8])
  assert average["towers"]["image"]["kernel"].tolist() == pytest.approx([1 + kept, 2 * kept + (1 - kept) * 0.8])
  assert float(average["heads"]["logit_scale"]) == pytest.approx(2 * kept + (1 - kept) * 0.7)


def test_a_skipped_step_does_not_move_the_average_and_without_one_there_is_none() -> None:
  for options in ({"loss": math.nan}, {"rate": math.nan}):
    state = take_step(tree([1, 1], 1), tree([2, 2], 2), ema=0.5, **options)
    jax.tree.map(np.testing.assert_array_equal, state.average["params"], tree([2, 2], 2, 1))
  assert take_step(tree([1, 1], 1), tree([2, 2], 2)).average == {}


@pytest.mark.parametrize("decay", [0.0, 0.45, 0.999])
def test_the_average_is_that_of_a_loop(decay: float) -> None:
  """Over parameters and batch statistics, with one skipped step; what does not change is equal to its average."""
  rng, zero = np.random.default_rng(0), jnp.zeros((), jnp.int32)

  def draw() -> tuple[dict, dict]:
    kernel, mean = (jnp.asarray(rng.normal(size=5), jnp.float32) for _ in range(2))
    return {"kernel": kernel, "frozen": frozen}, {"towers": {"batch_stats": {"mean": mean}}, "heads": {"bank": kernel}}

  frozen = jnp.asarray(rng.normal(size=1000), jnp.float32)
  params, collections = draw()
  state = start_average(State(zero, params, {}, collections, {}))
  kernel, mean = (np.asarray(x, np.float64) for x in (params["kernel"], collections["towers"]["batch_stats"]["mean"]))
  update = jax.jit(lambda state, good: update_average(state, good, decay))
  for step in range(1, 10):
    params, collections = draw()
    state = state.replace(step=zero + step, params=params, collections=collections)
    state = state.replace(average=update(state, jnp.bool_(step != 4)))
    if step != 4:
      kept = min(decay, (1 + step) / (10 + step))
      kernel = kept * kernel + (1 - kept) * np.asarray(params["kernel"])
      mean = kept * mean + (1 - kept) * np.asarray(collections["towers"]["batch_stats"]["mean"])
    np.testing.assert_allclose(state.average["params"]["kernel"], kernel, rtol=0, atol=1e-6)
    np.testing.assert_allclose(state.average["batch_stats"]["towers"]["mean"], mean, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(state.average["params"]["frozen"], frozen)
  assert state.average["batch_stats"].keys() == {"towers"}
  assert {leaf.dtype for leaf in jax.tree.leaves(state.average)} == {np.dtype("float32")}


def test_a_step_that_is_not_measured_has_no_nan() -> None:
  """With JAX_DEBUG_NANS=1 it would end a healthy run."""
  found = _diagnose_if(jnp.bool_(False), lambda outputs: {"rank": jnp.float32(3)}, Outputs())
  assert np.isfinite(found["rank"])


@pytest.mark.parametrize(
  ("norm", "measured", "factor", "good"),
  [(9.9, 100, 10.0, True), (10.1, 100, 10.0, False), (10.1, 99, 10.0, True), (1e6, 100, 0.0, True)],
)
def test_a_spike_is_skipped(norm: float, measured: int, factor: float, good: bool) -> None:
  """The usual norm is 1, and is trusted after 100 steps."""
  statistics = {"measured": jnp.int32(measured), "log_norm": jnp.float32(0.0)}
  state = take_step(tree([1, 1], 1), tree([norm, 0], 0), skipped=statistics, spike_factor=factor)
  assert (state.params["towers"]["image"]["kernel"][0] != 1) == good
  assert int(state.skipped["total"]) == (0 if good else 1)
  usual = math.log(norm) / 100 if good else 0.0
  assert float(state.skipped["log_norm"]) == pytest.approx(usual, rel=1e-3)


def test_a_spike_is_a_norm_far_above_the_mean_of_previous_norms() -> None:
  rng = np.random.default_rng(0)
  norms = np.exp(rng.normal(size=400)).astype(np.float32)
  norms[[50, 150, 151, 300]] *= 1000
  norms[200] = 0
  state = {"measured": jnp.int32(0), "log_norm": jnp.float32(0)}
  judge = jax.jit(lambda norm, state: is_spike(norm, state, 30.0))
  logs: list[float] = []
  for index, norm in enumerate(norms):
    spike, after = judge(norm, state)
    weights = 0.99 ** np.arange(len(logs))[::-1]
    weights[: min(len(logs), 100)] = 0.99 ** max(len(logs) - 100, 0)  # the first hundred have one weight
    log_norm = float(np.log(max(norm, np.finfo(np.float32).tiny)))
    expected = len(logs) >= 100 and log_norm > np.average(logs, weights=weights) + np.log(30)
    assert bool(spike) == expected, index
    if norm == 0:  # a loss whose weight is still 0 is not evidence of the usual norm
      assert all(np.array_equal(after[name], state[name]) for name in state)
    elif not expected:  # as `train_step` keeps it
      state = after
      logs.append(log_norm)
  assert [bool(judge(norm, state)[0]) for norm in (1e3, 1.0)] == [True, False]
  assert not is_spike(jnp.float32(1e30), state, 0.0)[0]
