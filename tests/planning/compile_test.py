"""Tests of `declip_jax.planning.compile`: the memory of a step on two devices, and libtpu's out-of-memory messages."""

import dataclasses
import math
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from declip_jax import build
from declip_jax.planning import compile as compilation


def test_memory_is_the_size_of_the_state_shards(config: ConfigDict, step: compilation.CompiledStep):
  shapes = build.build(config, jax.devices()[:2]).batch_shape(config.batch_size)
  state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), step.state)

  def bytes_on_second_device(tree: Any) -> int:
    shards = (shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[1])

  found = compilation.memory(step)
  parameters = sum(x.nbytes for x in jax.tree.leaves(state.params))
  assert found.parameters == bytes_on_second_device(state.params) < parameters
  assert found.optimizer_state == bytes_on_second_device(state.opt_state)
  assert found.collections == bytes_on_second_device(state.collections)
  assert found.batch == sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes.values()) / 2
  assert found.temporaries == step.compiled.memory_analysis().temp_size_in_bytes
  assert found.parameters + found.optimizer_state + found.batch + found.temporaries <= found.peak


def test_memory_has_the_average_of_the_weights(config: ConfigDict, step: compilation.CompiledStep):
  before = compilation.memory(step)
  with_average = config.copy_and_resolve_references()
  with_average.optimizer.ema = 0.9
  state = compilation.state_shapes(with_average, build.build(with_average, jax.devices()[:2]))
  whole = compilation.bytes_per_device(state.params)
  assert compilation.bytes_per_device(state.average) == whole
  after = compilation.memory(dataclasses.replace(step, state=step.state.replace(average=step.state.params)))
  assert after.optimizer_state == before.optimizer_state + before.parameters


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    (
      "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
      20.5 * 2**30,
    ),
    (
      "the total memory required for HLO temporaries (111.87G) exceeds available HBM (15.75G).",
      111.87 * 2**30 + 1e9,
    ),
    ("something else", math.inf),
  ],
)
def test_needed_bytes_are_parsed_from_libtpus_messages(message: str, needed: float):
  assert compilation.needed_bytes(message, arguments=1e9) == needed
