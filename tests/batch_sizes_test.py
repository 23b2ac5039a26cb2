"""Durations in epochs and examples are those of a run with one batch size, even if a run has had several."""

import math

import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
from tiny import tiny_config

from declip_jax import build
from declip_jax import config as config_lib
from declip_jax.batch_sizes import BatchSizes
from declip_jax.runtime.services import Cadence
from declip_jax.training import schedules

SIZES = BatchSizes(((0, 16), (10, 64), (15, 24)))


def test_examples_and_steps_are_inverse() -> None:
  steps = range(30)
  seen = [SIZES.examples(step) for step in steps]
  assert seen == [*range(0, 160, 16), *range(160, 480, 64), *range(480, 830, 24)]
  assert [SIZES.step(examples) for examples in seen] == list(steps)
  assert [SIZES.step(examples - 0.5) for examples in seen[1:]] == list(steps)[1:]
  assert [SIZES.step(examples + 0.5) for examples in seen] == list(range(1, 31))
  assert [SIZES.batches(step) for step in (0, 10, 15, 16)] == [0, 7, 20, 21]


def test_the_sizes_of_some_steps_count_from_the_first_of_them() -> None:
  for first, last in ((0, 30), (0, 10), (4, 12), (10, 15), (12, 14), (14, 40), (20, 25)):
    part = SIZES.between(first, last)
    steps = range(last - first + 1)
    assert [part.examples(step) for step in steps] == [
      SIZES.examples(first + step) - SIZES.examples(first) for step in steps
    ]
    assert sum(count for _, count in part.counts(last - first)) == last - first
  assert SIZES.between(0, 10).changes == SIZES.changes[:1]
  assert SIZES.between(12, 20).changes == ((0, 64), (3, 24))
  assert SIZES.counts(16) == [(16, 10), (64, 5), (24, 1)]


@pytest.mark.parametrize("size", [16, 24])
def test_one_size_converts_as_a_division(size: int) -> None:
  sizes = BatchSizes.constant(size)
  for examples in np.linspace(0, 999, 150):
    assert sizes.step(examples) == math.ceil(examples / size)
  assert [sizes.batches(step) for step in range(9)] == list(range(9))


def test_resuming_continues_the_current_size_or_adds_another_one() -> None:
  assert SIZES.resumed(20, 24) == SIZES
  assert SIZES.resumed(20, 16).changes == (*SIZES.changes, (20, 16))
  assert SIZES.resumed(15, 64).changes == SIZES.changes[:2]
  assert SIZES.resumed(12, 24).changes == (*SIZES.changes[:2], (12, 24))
  assert SIZES.resumed(0, 8).changes == ((0, 8),)


EPOCH = 256


def config_of(size: int, *, every: ConfigDict, **optimizer: object) -> ConfigDict:
  config = tiny_config("clip")
  config.batch_size, config.evaluate_every, config.checkpoint.every = size, every, every
  config.duration = config_lib.duration(epochs=4)
  config.optimizer.warmup = config_lib.duration(examples=96)
  config.optimizer.update(optimizer)
  return config


def due(steps: build.Steps, since: int) -> list[int]:
  """The steps after `since` at which an evaluation is due; checkpoints are due at the same ones."""
  phases = {"evaluate_phase": steps.evaluate_phase, "checkpoint_phase": steps.checkpoint_phase}
  cadence = Cadence(steps.total, evaluate=steps.evaluate, checkpoint=steps.checkpoint, **phases)
  found = [step for step in range(since + 1, steps.total + 1) if cadence.evaluates(step)]
  assert found == [step for step in range(since + 1, steps.total + 1) if cadence.saves(step)]
  return found


@pytest.mark.parametrize(
  "optimizer",
  [
    {"schedule": "cosine"},
    {"schedule": "cosine", "warmup": config_lib.duration(epochs=1.5)},
    {"schedule": "declip_cosine"},
    {"schedule": "cooldown", "cooldown": config_lib.duration(examples=256)},
  ],
)
@pytest.mark.parametrize(("since", "size"), [(16, 32), (20, 32), (40, 8), (3, 8)])
def test_the_learning_rate_follows_the_examples(since: int, size: int, optimizer: dict) -> None:
  every = config_lib.duration(epochs=1)
  whole = build.to_steps(config_of(16, every=every, **optimizer), EPOCH)
  sizes = BatchSizes.constant(16).resumed(since, size)
  steps = build.to_steps(config_of(size, every=every, **optimizer), EPOCH, sizes)
  assert sizes.examples(steps.total) == 16 * whole.total == 4 * EPOCH
  before, after = schedules.make_schedule(whole.schedule), schedules.make_schedule(steps.schedule)
  numbers = jnp.array([step for step in range(since, steps.total) if sizes.examples(step) % 16 == 0])
  expected = before(jnp.array([sizes.examples(step) // 16 for step in numbers.tolist()]))
  found, peak = after(numbers + steps.lead), steps.schedule.learning_rate
  # Warm-ups, and DeCLIP's cosine, end one step earlier than such a duration: a step of another size then.
  early = optimizer["schedule"] == "declip_cosine"
  tolerance = jnp.where((numbers + steps.lead < steps.schedule.warmup) | early, 0.2 * peak, 1e-5 * peak)
  assert jnp.all(jnp.abs(found - expected) <= tolerance)
  assert [sizes.examples(step) for step in due(steps, since)] == [
    16 * step for step in due(whole, since) if 16 * step > sizes.examples(since)
  ]


def test_durations_in_steps_remain_steps() -> None:
  config = config_of(32, every=config_lib.duration(steps=5), schedule="step", milestones=((9, 0.5), (31, 0.1)))
  config.duration, config.optimizer.warmup = config_lib.duration(steps=40), config_lib.duration(steps=6)
  sizes = BatchSizes.constant(16).resumed(13, 32)
  steps = build.to_steps(config, EPOCH, sizes)
  assert steps.total == 40
  assert due(steps, 13) == [15, 20, 25, 30, 35, 40]
  assert steps.schedule.warmup == 3  # six steps of 16
  rates = schedules.make_schedule(steps.schedule)(jnp.arange(13, 40) + steps.lead)
  np.testing.assert_allclose(rates, [0.5 * 5e-4] * 17 + [0.05 * 5e-4] * 10, rtol=1e-5)


def test_a_batch_size_that_does_not_divide_the_examples_seen() -> None:
  config = config_of(24, every=config_lib.duration(examples=100))
  sizes = BatchSizes.constant(16).resumed(10, 24)
  steps = build.to_steps(config, EPOCH, sizes)
  assert 4 * EPOCH <= sizes.examples(steps.total) < 4 * EPOCH + 24
  assert sizes.examples(due(steps, 10)[0]) == 208  # the first after 200
