"""Micro-batches: the exact gradient of the whole batch ("cached"), and the mean of their gradients ("plain")."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
from tiny import tiny_config

from declip_jax import build, objectives, sharding
from declip_jax.models.model import Model
from declip_jax.objectives.blockwise import PLAIN
from declip_jax.training import gradient
from declip_jax.types import Features, Outputs


# tests/methods_test.py has the representative of the next three.
@pytest.mark.slow
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


class ToyModel(Model):
  """One matrix in each half; the heads count the examples that they have seen."""

  def __init__(self) -> None:
    pass

  def encode(self, params: dict, collections: dict, batch: dict) -> tuple[Features, dict]:
    return Features(image=jnp.tanh(batch["image"] @ params["towers"]["kernel"])), collections["towers"]

  def apply_heads(self, params: dict, collections: dict, features: Features) -> tuple[Outputs, dict]:
    heads = {"seen": collections["heads"]["seen"] + len(features.image)}
    return Outputs(image=features.image @ params["heads"]["kernel"], scale=1.0 * heads["seen"]), heads


class ToyObjective(objectives.Objective):
  """Not a mean over examples, as a contrast is not; multiplied by the examples seen so far."""

  def __init__(self) -> None:
    pass

  def __call__(self, outputs: Outputs, batch: dict, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    similarity = outputs.image @ outputs.image.T
    loss = jax.nn.logsumexp(similarity) * outputs.scale
    return loss, {"loss": loss}


def test_plain_micro_batches_give_the_mean_of_their_gradients_and_pass_collections_on() -> None:
  image, towers, heads = (jax.random.normal(jax.random.key(seed), (8, 8)) for seed in range(3))
  params = {"towers": {"kernel": towers}, "heads": {"kernel": heads}}
  options = {"model": ToyModel(), "objective": ToyObjective()}
  whole = jax.jit(gradient.make_gradient("plain", 1, **options))
  losses, expected = [], []
  for index in range(4):
    seen = {"towers": {}, "heads": {"seen": 10 + 2 * index}}
    result, gradients = whole(params, seen, {"image": image[index::4]}, 0)
    losses.append(result.loss)
    expected.append(gradients)
  collections = {"towers": {}, "heads": {"seen": 10}}
  result, gradients = jax.jit(gradient.make_gradient("plain", 4, **options))(params, collections, {"image": image}, 0)
  np.testing.assert_allclose(result.loss, np.mean(losses), rtol=1e-6)
  np.testing.assert_allclose(result.metrics["loss"], np.mean(losses), rtol=1e-6)
  jax.tree.map(
    lambda ours, *theirs: np.testing.assert_allclose(ours, np.mean(theirs, axis=0), rtol=1e-5, atol=1e-5),
    gradients,
    *expected,
  )
  assert result.collections["heads"]["seen"] == 18
  assert result.outputs.image.shape == (2, 8)  # those of the last
  single, _ = whole(params, collections, {"image": image}, 0)
  assert abs(single.loss - result.loss) > 0.1  # the loss of a micro-batch has fewer negatives


@pytest.mark.slow
def test_plain_micro_batches_of_declip_pass_the_bank_on() -> None:
  state = steps.first_state("declip")
  bank = state.collections["heads"]["bank"]["text"]._replace(filled=np.int32(0))
  collections = {**state.collections, "heads": {**state.collections["heads"], "bank": {"text": bank}}}
  built = steps.build_steps(steps.step_config("declip"))
  plain = gradient.make_gradient("plain", 4, model=built.model, objective=built.objective)
  batch = steps.random_batch(built, np.random.default_rng(0))
  result, _ = jax.jit(plain)(state.params, collections, batch, 0)
  assert int(result.collections["heads"]["bank"]["text"].filled) == steps.BATCH
  assert result.outputs.image.shape[1] == steps.BATCH // 4


def built_of(method: str) -> tuple[build.Built, objectives.Objective]:
  built = build.build(tiny_config(method))
  return built, dataclasses.replace(built.objective, method=PLAIN)


@pytest.mark.slow
def test_cached_micro_batches_store_one_micro_batchs_activations() -> None:
  """Temporary bytes of the compiled gradient, mostly activations of the towers."""
  built, objective = built_of("clip")
  shapes = built.batch_shape(16 * steps.BATCH)
  params, collections = jax.eval_shape(built.model.init, jax.random.key(0), shapes)

  def temporary(micro_batches: int) -> int:
    cached = gradient.make_gradient("cached", micro_batches, model=built.model, objective=objective)
    compiled = jax.jit(cached).lower(params, collections, shapes, jnp.int32(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(8) < 0.4 * temporary(1)


def test_bad_values_are_rejected_by_name() -> None:
  built, objective = built_of("clip")
  with pytest.raises(ValueError, match=r"config.micro_batching='grad': choose one of \['cached', 'plain'\]"):
    gradient.make_gradient("grad", 2, model=built.model, objective=objective)
  with pytest.raises(ValueError, match="config.micro_batches=0: expected 1 or more"):
    gradient.make_gradient("plain", 0, model=built.model, objective=objective)
