"""The train step: which steps and entries it skips, and when the momentum tower moves."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_equal
from steps import random_batch
from tiny import tiny_config

from declip_jax import build
from declip_jax.models.heads import diagnostic_kinds
from declip_jax.objectives import make_objective
from declip_jax.objectives.diagnostics import diagnose
from declip_jax.training.gradient import Gradient, make_gradient
from declip_jax.training.state import State, init_state
from declip_jax.training.step import is_spike, train_step


def make_plain_gradient(built: build.Built, settings: Mapping[str, Any]) -> Gradient:
  return make_gradient("cached", 1, model=built.model, objective=make_objective(settings))


class Compiled(NamedTuple):
  """A compiled step of DeCLIP on one batch, and the state before it."""

  step: Callable[[State], tuple[State, dict[str, jax.Array]]]
  state: State


@pytest.fixture(scope="module")
def compiled() -> Compiled:
  config = tiny_config("declip")
  built = build.build(config)
  batch = random_batch(built, np.random.default_rng(0))
  step = partial(
    train_step,
    batch=batch,
    model=built.model,
    optimizer=built.optimizer,
    schedule=lambda step: 0.1,
    gradient_fn=make_plain_gradient(built, config.objective.to_dict()),
    momentum_decay=lambda step: 1.0,
    is_diagnosed=lambda step: False,
    logit_scale_range=(0.0, 4.6),
    spike_factor=10.0,
  )
  state = jax.jit(partial(init_state, 0, batch, model=built.model, optimizer=built.optimizer))()
  return Compiled(jax.jit(step), state)


def kernel(state: State) -> np.ndarray:
  return np.asarray(state.params["heads"]["text_projection"]["kernel"])


def test_a_step_with_nan_changes_only_counts(compiled: Compiled) -> None:
  state = compiled.state
  broken = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
  after, metrics = compiled.step(broken)
  assert_equal(after.params, broken.params)
  assert_equal((after.opt_state, after.collections), (broken.opt_state, broken.collections))
  assert (int(after.step), int(metrics["skipped_total"]), int(metrics["skipped_in_a_row"])) == (1, 1, 1)
  recovered, metrics = compiled.step(after.replace(params=state.params))
  assert int(metrics["skipped_in_a_row"]) == 0
  assert int(recovered.skipped["total"]) == 1
  assert not np.array_equal(kernel(recovered), kernel(state))


def test_an_entry_whose_update_is_not_finite_stays_and_the_others_move(compiled: Compiled) -> None:
  broken = []

  def break_entry(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    name = jax.tree_util.keystr(path)
    if ".nu" not in name or "text_projection" not in name or "kernel" not in name:
      return leaf
    broken.append(name)
    return leaf.at[1, 2].set(jnp.nan)

  before = compiled.state.replace(opt_state=jax.tree.map_with_path(break_entry, compiled.state.opt_state))
  after, metrics = compiled.step(before)
  assert len(broken) == 1
  assert np.argwhere(kernel(before) == kernel(after)).tolist() == [[1, 2]]
  assert int(metrics["skipped_total"]) == 0


def test_a_spike_changes_only_counts(compiled: Compiled) -> None:
  state = compiled.state
  _, metrics = compiled.step(state)
  usual = float(jnp.log(metrics["gradient_norm"]))
  for factor, skipped in ((9.0, 0), (11.0, 1)):
    known = {"measured": jnp.int32(100), "log_norm": jnp.float32(usual - np.log(factor))}
    before = state.replace(skipped={**state.skipped, **known})
    after, metrics = compiled.step(before)
    assert (int(metrics["skipped_total"]), int(after.step)) == (skipped, 1)
    same = [np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (after.params, before.params)), strict=True)]
    assert all(same) == bool(skipped)
    assert (float(after.skipped["log_norm"]) == float(before.skipped["log_norm"])) == bool(skipped)


def test_a_spike_is_a_gradient_far_above_the_mean_of_those_before() -> None:
  rng = np.random.default_rng(0)
  norms = np.exp(rng.normal(size=400)).astype(np.float32)
  norms[[50, 150, 151, 300]] *= 1000
  norms[200] = 0
  state = {"measured": jnp.int32(0), "log_norm": jnp.float32(0)}
  judge = jax.jit(lambda norm, state: is_spike(norm, state, 30.0))
  logs: list[float] = []
  for index, norm in enumerate(norms):
    too_large, after = judge(norm, state)
    weights = 0.99 ** np.arange(len(logs))[::-1]
    weights[: min(len(logs), 100)] = 0.99 ** max(len(logs) - 100, 0)  # the first hundred have one weight
    log_norm = float(np.log(max(norm, np.finfo(np.float32).tiny)))
    expected = len(logs) >= 100 and log_norm > np.average(logs, weights=weights) + np.log(30)
    assert bool(too_large) == expected, index
    if norm == 0:  # of a loss that has not begun: no measure of anything
      assert all(np.array_equal(after[name], state[name]) for name in state)
    elif not expected:  # as `train_step` keeps it
      state = after
      logs.append(log_norm)
  assert [bool(judge(norm, state)[0]) for norm in (1e3, 1.0)] == [True, False]
  assert not is_spike(jnp.float32(1e30), state, 0.0)[0]


def test_the_momentum_tower_follows_the_parameters_before_it_encodes() -> None:
  config = tiny_config("slip_mocov3")
  built = build.build(config)
  batch = {name: jnp.ones(x.shape, x.dtype) for name, x in built.batch_shape(16).items()}
  batch["image"] = jax.random.randint(jax.random.key(1), batch["image"].shape, 0, 256).astype(jnp.uint8)
  state = init_state(0, batch, model=built.model, optimizer=built.optimizer)
  kept = 0.75
  step = jax.jit(
    lambda state: train_step(
      state,
      batch,
      model=built.model,
      optimizer=built.optimizer,
      schedule=lambda step: 1e-2,
      gradient_fn=make_plain_gradient(built, {"moco": {"weight": 1.0}}),
      momentum_decay=lambda step: kept,
      is_diagnosed=lambda step: step == 1,
      diagnose=partial(diagnose, kinds=diagnostic_kinds(("momentum",))),
    )
  )
  first, metrics = step(state)
  assert_equal(first.collections["momentum"]["towers"]["image"], state.params["towers"]["image"], atol=1e-7)
  assert np.isnan(metrics["diagnostics/momentum_target/deviation"])
  second, metrics = step(first)
  assert np.isfinite(metrics["diagnostics/momentum_target/deviation"])
  for half, part in (("towers", "image"), ("heads", "momentum_project")):
    old, new = (tree.params[half][part] for tree in (state, first))
    expected = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, old, new)
    assert_equal(second.collections["momentum"][half][part], expected, atol=1e-6)
    assert not np.allclose(jax.tree.leaves(new)[0], jax.tree.leaves(old)[0])
