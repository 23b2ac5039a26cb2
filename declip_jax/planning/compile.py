"""Compiles the train step of a config, for devices that need not exist, and measures its memory."""

from collections.abc import Sequence
import dataclasses
import math
import re
import sys
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from declip_jax import build
from declip_jax.config import duration
from declip_jax.planning import flops
from declip_jax.runtime.compiling import interruptible, slow_compile_lines
from declip_jax.sharding import batch_sharding
from declip_jax.training.state import State, abstract_state
from declip_jax.training.trimming import trimmed_length
from declip_jax.types import BatchShapes

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class OutOfMemory(Exception):
  """Raised if a step does not fit into the memory of a device.

  Attributes:
    needed: bytes that the step needs on each device; infinity if unknown.
  """

  def __init__(self, needed: float):
    super().__init__(f"the step needs {needed:.3g} bytes on each device, more than its memory")
    self.needed = needed


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """A compiled train step.

  Attributes:
    state: shapes and shardings of the train state.
    batch: shapes and shardings of the global batch.
    executed_flops: FLOPs over all devices, including recomputation.
    compiled: the program.
    trace_seconds: time to trace and lower it.
    compile_seconds: time to compile it.
  """

  state: State
  batch: BatchShapes
  executed_flops: float
  compiled: jax.stages.Compiled
  trace_seconds: float
  compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on each device.

  Attributes:
    parameters: the model's parameters.
    optimizer_state: the optimiser's moments, and the average of the weights.
    collections: batch statistics, the neighbour bank, the momentum tower.
    batch: one batch.
    padding: what a TPU adds to arrays that do not fill its tiles.
    temporaries: activations, gradients and all other intermediate arrays.
    program: the compiled code.
    peak: sum of all of these and of the step's metrics.
  """

  parameters: float
  optimizer_state: float
  collections: float
  batch: float
  padding: float
  temporaries: float
  program: float
  peak: float


def compile_step(
  config: ConfigDict, devices: Sequence[jax.Device] | None = None, run: ConfigDict | None = None
) -> CompiledStep:
  """Compiles the train step as the trainer does, for all devices or for the given ones.

  Args:
    config: the config of a run, or of one of its stages.
    devices: devices to compile for.
    run: config of the run of a stage, whose train state has the shapes for all stages.

  Raises:
    OutOfMemory: the step does not fit into the devices' memory.
    ValueError: the config contradicts itself or does not fit the devices.
  """
  config = config.copy_and_resolve_references()
  # No data set is opened, so the length of an epoch is unknown; the compiled step does not depend on it.
  config.duration = duration(steps=10**9)
  built = build.build(config, devices)
  shapes, sharding = built.batch_shape(config.batch_size), batch_sharding(built.mesh)
  batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in shapes.items()}
  state = state_shapes(run, build.build(run, devices)) if run else state_shapes(config, built)
  step = build.make_step(config, built, build.to_steps(config, epoch_examples=10**6), state)
  start = time.perf_counter()
  traced = step.trace(state, batch)
  lowered = traced.lower()
  lowered_at = time.perf_counter()
  try:
    with slow_compile_lines("the step"):
      compiled = interruptible(lowered.compile)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      raise OutOfMemory(needed_bytes(str(error), bytes_per_device((state, batch)))) from error
    raise
  compiled_at = time.perf_counter()
  executed = flops.num_flops(traced.jaxpr)
  return CompiledStep(state, batch, executed, compiled, lowered_at - start, compiled_at - lowered_at)


def compile_with_progress(
  config: ConfigDict, devices: Sequence[jax.Device], run: ConfigDict | None = None
) -> CompiledStep:
  """Calls `compile_step` and prints to stderr what is compiled and how long it took."""
  pairs = config.batch_size / len(devices)
  print(
    f"compiling the step for {len(devices)} x {devices[0].device_kind}, {pairs:g} pairs per device; this takes minutes",
    file=sys.stderr,
    flush=True,
  )
  start = time.perf_counter()
  try:
    return compile_step(config, devices, run)
  finally:
    print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def with_trimmed_texts(config: ConfigDict, length: int, devices: Sequence[jax.Device] | None = None) -> ConfigDict:
  """The config of a step whose texts are trimmed to a length, as if it were a stage with shorter texts.

  Raises:
    ValueError: the config does not trim texts, or has none as long.
  """
  built = build.build(config, devices)
  if len(built.text_lengths) < 2:
    raise ValueError(f"--text_length={length}: this config does not trim texts, see config.model.text.buckets")
  whole, trimmed = built.text_lengths[-1], config.copy_and_resolve_references()
  if length > whole:
    raise ValueError(f"--text_length={length}: expected at most config.model.text.context_length={whole}")
  if slots := built.batch_shape(1).get("mlm_position"):
    trimmed.data.mask_slots = slots.shape[-1]
  trimmed.model.text.context_length = trimmed_length(built.text_lengths, length)
  return trimmed


def state_shapes(config: ConfigDict, built: build.Built) -> State:
  """Shapes and shardings of a config's train state."""
  shapes = built.batch_shape(config.batch_size)
  averaged = config.optimizer.ema > 0
  return abstract_state(shapes, built.mesh, model=built.model, optimizer=built.optimizer, averaged=averaged)


def needed_bytes(message: str, arguments: float) -> float:
  """Parses libtpu's out-of-memory message: bytes that the program needs, infinity if not stated.

  Args:
    message: in one of libtpu's two wordings; the second does not include the arguments.
    arguments: bytes of the program's arguments on each device.
  """
  number = r"([\d.]+)([KMGT])"
  if total := re.search(rf"Used {number} of \S+ hbm", message):
    return float(total[1]) * _UNITS[total[2]]
  if temporaries := re.search(rf"HLO temporaries \({number}\) exceeds", message):
    return float(temporaries[1]) * _UNITS[temporaries[2]] + arguments
  return math.inf


def bytes_per_device(tree: Any) -> float:
  """Bytes on each device of a tree of shapes with shardings."""
  return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def memory(step: CompiledStep) -> Memory:
  """Memory that a compiled step uses on each device."""
  used, state = step.compiled.memory_analysis(), step.state
  metrics = used.output_size_in_bytes - used.alias_size_in_bytes  # the state is donated, so its output is aliased
  return Memory(
    parameters=bytes_per_device(state.params),
    optimizer_state=bytes_per_device((state.opt_state, state.average)),
    collections=bytes_per_device(state.collections),
    batch=bytes_per_device(step.batch),
    padding=used.argument_size_in_bytes - bytes_per_device((state, step.batch)),
    temporaries=float(used.temp_size_in_bytes),
    program=float(used.generated_code_size_in_bytes),
    peak=float(
      used.argument_size_in_bytes + metrics + used.temp_size_in_bytes + used.generated_code_size_in_bytes,
    ),
  )
