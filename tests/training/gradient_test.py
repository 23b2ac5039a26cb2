"""Micro-batches: the exact gradient of the whole batch ("cached"), and the mean of theirs ("plain")."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
from tiny import tiny_config

from declip_jax import build, objectives, sharding
from declip_jax.objectives.blockwise import PLAIN
from declip_jax.training import gradient


def test_two_cached_micro_batches_and_split_parameters_give_the_gradient_of_every_term(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  expected = steps.one_device("everything")
  monkeypatch.setattr(sharding, "MIN_SIZE", 256)
  found = steps.take_gradient("everything", 2, 2, micro_batches=2)
  assert sum(name.startswith("gradient/") for name in found) > 50
  steps.compare("everything", found, {name: expected[name] for name in found})


# One method of each kind of state and loss; the others are made of these.
@pytest.mark.slow
@pytest.mark.parametrize(
  "method", ["clip", "slip", "declip", "filip", "siglip", "slip_mocov3", "slip_mim", "defilip_repo"]
)
def test_four_cached_micro_batches_give_the_parameters_of_the_whole_batch_after_three_steps(method: str) -> None:
  steps.compare(method, steps.take_steps(method, 2, 1, micro_batches=4), steps.one_device(method))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["declip", "slip_mocov3"])
def test_steps_with_micro_batches_and_split_parameters(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
  expected = steps.one_device(method)
  monkeypatch.setattr(sharding, "MIN_SIZE", 256)
  steps.compare(method, steps.take_steps(method, 2, 2, micro_batches=2), expected)


def built_of(method: str) -> tuple[build.Built, objectives.Objective, dict, tuple]:
  config = tiny_config(method)
  config.model.heads.bank_size = steps.BATCH
  built = build.build(config)
  objective = dataclasses.replace(built.objective, method=PLAIN)
  batch = steps.random_batch(built, np.random.default_rng(0))
  return built, objective, batch, built.model.init(jax.random.key(0), batch)


def test_plain_micro_batches_give_the_mean_of_their_gradients() -> None:
  built, objective, batch, (params, collections) = built_of("clip")
  options = {"model": built.model, "objective": objective}
  whole = jax.jit(gradient.make_gradient("cached", 1, **options))
  losses, expected = [], []
  for index in range(4):
    result, gradients = whole(params, collections, {name: x[index::4] for name, x in batch.items()}, 0)
    losses.append(result.loss)
    expected.append(gradients)
  result, gradients = jax.jit(gradient.make_gradient("plain", 4, **options))(params, collections, batch, 0)
  np.testing.assert_allclose(result.loss, np.mean(losses), rtol=1e-6)
  np.testing.assert_allclose(result.metrics["loss/clip"], np.mean(losses), rtol=1e-6)
  jax.tree.map(
    lambda ours, *theirs: np.testing.assert_allclose(ours, np.mean(theirs, axis=0), atol=1e-6), gradients, *expected
  )
  assert abs(float(whole(params, collections, batch, 0)[0].loss) - np.mean(losses)) > 0.1  # fewer negatives


def test_plain_micro_batches_pass_the_bank_on() -> None:
  built, objective, batch, (params, collections) = built_of("declip")
  plain = gradient.make_gradient("plain", 4, model=built.model, objective=objective)
  result, _ = jax.jit(plain)(params, collections, batch, 0)
  assert int(result.collections["heads"]["bank"]["text"].filled) == steps.BATCH
  assert result.outputs.image.shape[1] == steps.BATCH // 4


def test_cached_micro_batches_keep_the_activations_of_one() -> None:
  """Temporary bytes of the compiled gradient, in which the towers' activations are most."""
  built, objective, batch, (params, collections) = built_of("clip")
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((16 * len(x), *x.shape[1:]), x.dtype), batch)

  def temporary(micro_batches: int) -> int:
    cached = gradient.make_gradient("cached", micro_batches, model=built.model, objective=objective)
    compiled = jax.jit(cached).lower(params, collections, shapes, jnp.int32(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(8) < 0.4 * temporary(1)


def test_bad_values_are_rejected_by_name() -> None:
  built, objective, *_ = built_of("clip")
  with pytest.raises(ValueError, match=r"config.micro_batching='grad': choose one of \['cached', 'plain'\]"):
    gradient.make_gradient("grad", 2, model=built.model, objective=objective)
  with pytest.raises(ValueError, match="config.micro_batches=0: 1 or more"):
    gradient.make_gradient("plain", 0, model=built.model, objective=objective)
