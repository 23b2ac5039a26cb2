"""Chooses what a config leaves to the data and the devices, and shortens a config for a try: one place for these rules.

What a config leaves open, and how it is chosen; `pairs` is the number of samples of the training sources:

  model.dtype="auto"     float32 on CPUs, bfloat16 on GPUs and TPUs
  batch_size=0           on each device the largest power of two with which a batch fits into memory and has at most
                         4,096 pairs (as in SLIP and DeCLIP), a 16th of all pairs but at least 32, and 256 on CPUs
  model.remat="auto"     "dots" if a batch then fits into memory, else "narrow_dots", else "full"
  duration (all 0)       32 epochs, as in CLIP; for fewer than 8,192 pairs as many as see 262,144 pairs, at most 100
  model.heads:
    norm_groups=0        groups of 128 pairs, as in DeCLIP's released code, or larger ones if these do not divide the
    bank_groups=0        batch
    bank_size=0          65,536 texts, as in DeCLIP, but at most half as many as pairs: a bank with the pair's own text
                         finds that; at least two batches

`log_every` is lowered so that such a run has at least twenty lines of metrics, which its warnings need.

A chosen batch size fits if its `Estimate` is at most three quarters of the memory that JAX reports, or of half of the
machine's memory on CPUs; for `model.remat` it may be all of this memory. Nothing is compiled for it: `python -m
declip_jax.plan` computes exactly what a config needs, and its `--fastest` finds the fastest choice.
"""

from collections.abc import Iterable, Mapping, Sequence
import math
import operator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from declip_jax import build
from declip_jax.config import duration, durations, steps_of
from declip_jax.models.paths import Tree, stop_gradient_below, trainable_mask
from declip_jax.planning.report import available_memory
from declip_jax.runtime.hosts import smallest
from declip_jax.sharding import traced_over
from declip_jax.spelling import counted
from declip_jax.stages import LAST, plan_stages, stage_configs
from declip_jax.training.schedules import ScheduleSettings

# Open fields, the value that leaves each open, and one that is legal while others are chosen.
_OPEN = {
  "model.dtype": ("auto", "float32"),
  "batch_size": (0, 1),
  "model.remat": ("auto", "dots"),
  "model.heads.norm_groups": (0, 1),
  "model.heads.bank_groups": (0, 1),
  "model.heads.bank_size": (0, 2**16),
}
_LARGEST_BATCH, _SMALLEST_BATCH, _LARGEST_BATCH_ON_CPU = 4096, 32, 256  # pairs
_BATCHES = 16  # in an epoch, at least
_LINES = 20  # of metrics, at least
_EPOCHS, _MOST_EPOCHS = 32, 100
_SEEN = 2**18  # pairs that a run sees at least, unless that takes more than the most epochs
_GROUP = 128  # pairs
_BANK = 2**16  # texts
_BYTES, _TRAINED_BYTES, _GATHERED_BYTES = 4, 12, 4  # of a parameter; of its gradient and AdamW's moments; of its copies
_TEMPORARIES = 1.5  # bytes that a step needs for each byte that is kept for the backward pass
_USED = 0.75  # share of the memory
_UNKNOWN_MEMORY = 8 * 2**30  # bytes of a device that does not report its memory
_TRACED = 8  # pairs on each device


class Estimate(NamedTuple):
  """The memory of a train step on each device, in bytes, within about 30 % of what the compiler allocates.

  Attributes:
    fixed: parameters, with gradients and moments of those that are trained.
    per_pair: what each pair on the device adds: one and a half times the arrays that the towers keep for the backward
      pass. They are traced.
  """

  fixed: float
  per_pair: float

  def of(self, config: ConfigDict, built: build.Built) -> float:
    """Bytes for the batch size of a config."""
    return self.fixed + self.per_pair * config.batch_size / built.mesh.size / config.micro_batches


def open_fields(config: ConfigDict) -> list[str]:
  """The names of the fields that a config leaves open."""
  found = [field for field, (value, _) in _OPEN.items() if operator.attrgetter(field)(config) == value]
  return found + (["duration"] if not any(config.duration.values()) else [])


def choose(
  config: ConfigDict,
  num_pairs: int | None,
  devices: Sequence[jax.Device] | None = None,
  saved: Mapping[str, Any] | None = None,
) -> ConfigDict:
  """A copy of a config without open fields.

  Args:
    config: the config.
    num_pairs: number of samples of the training sources; None if it is unknown and counts as large.
    devices: devices to train on; by default all of all processes, each of which has to call this.
    saved: fields of the config of a run that is resumed, which keeps its values, but for the duration: that depends on
      the data alone.

  Raises:
    ValueError: the config contradicts itself, see `build.build`.
  """
  fields, config = open_fields(config), config.copy_and_resolve_references()
  if not fields:
    return config
  pairs = math.inf if num_pairs is None else max(1, num_pairs)  # `Mixture` rejects empty sources
  if "duration" in fields:
    epochs = min(max(_EPOCHS, math.ceil(_SEEN / pairs)), _MOST_EPOCHS)
    config.duration = duration(epochs=epochs)
  before = {field: _get(saved or {}, field) for field in fields if field in _OPEN}
  kept = {field: value for field, value in before.items() if value is not None}
  _set(config, kept | {field: _OPEN[field][1] for field in before if field not in kept})
  fields = [field for field in fields if field not in kept]
  built = build.build(config, devices)
  if "model.dtype" in fields:
    config.model.dtype = "float32" if _is_cpu(built) else "bfloat16"
    built = build.build(config, devices)
  if {"batch_size", "model.remat"} & {*fields}:
    memory = smallest(_memory(jax.local_devices()[0])) if devices is None else _memory(devices[0])
    if "batch_size" in fields:
      config.batch_size = _batch_size(config, built, pairs, _USED * memory)
    if "model.remat" in fields:
      config.model.remat = _remat(config, devices, memory)
  for field in ("norm_groups", "bank_groups"):
    if f"model.heads.{field}" in fields:
      config.model.heads[field] = _divisor(config.batch_size, config.batch_size // _GROUP)
  if "model.heads.bank_size" in fields:
    largest = _BANK if math.isinf(pairs) else min(_BANK, _power_of_two(pairs / 2))
    config.model.heads.bank_size = max(largest, 2 * config.batch_size // config.model.heads.bank_groups)
  if num_pairs is not None:
    config.log_every = _log_every(config, plan_stages(config, max(1, num_pairs))[-1].total_steps)
  return config


def describe(config: ConfigDict, fields: Iterable[str]) -> str:
  """The values of these fields of a config, in words, such as "batch_size=256, duration.epochs=32"."""
  values = {field: operator.attrgetter(field)(config) for field in fields}
  if length := values.pop("duration", None):
    values |= {f"duration.{unit}": value for unit, value in length.items() if value}
  return ", ".join(
    f"{field}={value:g}" if isinstance(value, float) else f"{field}={value}" for field, value in values.items()
  )


def with_fitting_warmup(config: ConfigDict, epoch_examples: int) -> tuple[ConfigDict, list[str]]:
  """A copy of a config whose warm-ups are not longer than the run or the stage, for a try, and messages about that.

  The whole run is rejected in this case: its data are fewer than those that the config was written for.

  Raises:
    ValueError: see `stages.plan_stages`.
  """
  config, messages = config.copy_and_resolve_references(), []
  for stage in plan_stages(config, epoch_examples):
    of_stage, length = stage.config, stage.last - stage.first
    warmup, cooldown = (
      steps_of(
        of_stage.optimizer[field],
        name=f"optimizer.{field}",
        batch_size=of_stage.batch_size,
        epoch_examples=epoch_examples,
      )
      for field in ("warmup", "cooldown")
    )
    if warmup <= length:
      continue
    name = "optimizer" if stage.name == LAST else f"stages.{stage.name}"
    operator.attrgetter(name)(config).warmup = duration(steps=max(0, length - cooldown))
    messages.append(
      f"config.{name}.warmup is {counted(warmup, 'step')}, longer than the whole run or stage of {length:,}, and is "
      f"shortened for this try only: the whole run needs --config.{name}.warmup.steps={max(1, length // 10)} or so"
    )
  return config, messages


def shortened(config: ConfigDict, steps: int, epoch_examples: int) -> ConfigDict:
  """A copy of a config for a try of a few steps: the same run, in proportion.

  Warm-up and all schedules are scaled; the run evaluates and saves in the middle and at the end, and logs at least
  twenty lines if it has as many steps.

  Args:
    config: a config without open fields.
    steps: length of the try.
    epoch_examples: number of examples in an epoch.

  Raises:
    ValueError: there are fewer steps than stages; see also `build.to_steps`.
  """
  whole, config = build.to_steps(config, epoch_examples), config.copy_and_resolve_references()
  stages = plan_stages(config, epoch_examples)
  if steps < len(stages):
    raise ValueError(f"--steps={steps}: the run has {len(stages)} stages, and each needs a step")

  def scaled(step: int) -> int:
    return round(step * steps / whole.total)

  def points(of: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    return tuple({scaled(step): value for step, value in of}.items())  # of those at one step, the last

  def set_schedule(optimizer: ConfigDict, schedule: ScheduleSettings, length: int) -> None:
    cooldown = min(max(1, scaled(schedule.cooldown)), length) if schedule.cooldown else 0
    warmup = min(max(1, scaled(schedule.warmup)), length - min(cooldown, 1)) if schedule.warmup else 0
    optimizer.warmup = duration(steps=warmup)
    if "cooldown" in optimizer:
      optimizer.cooldown = duration(steps=min(cooldown, length - warmup))

  config.duration = duration(steps=steps)
  for name in durations(config):
    if not name.startswith("optimizer."):
      _set(config, {name: duration()})
  end = 0
  for number, stage in enumerate(stages[:-1], 1):
    first, end = end, min(max(end + 1, scaled(stage.last)), steps - (len(stages) - number))
    own = config.stages[stage.name]
    own.duration = duration(steps=end - first)
    set_schedule(own, build.stage_steps(stage, epoch_examples).schedule, end - first)
  set_schedule(config.optimizer, whole.schedule, steps - end)
  config.evaluate_every, config.checkpoint.every = (duration(steps=math.ceil(steps / 2)) for _ in range(2))
  config.optimizer.milestones = points(config.optimizer.milestones)
  for term in config.objective.values():
    term.schedule = points(term.schedule)
  config.log_every = _log_every(config, steps)
  return config


def _log_every(config: ConfigDict, steps: int) -> int:
  """The steps from one line of metrics to the next, of a run of this length."""
  return min(config.log_every, max(1, steps // _LINES))


def _get(fields: Mapping[str, Any], path: str) -> Any:
  """The value at a dotted path; None if an older version did not write it."""
  *above, last = path.split(".")
  for name in above:
    fields = fields.get(name, {})
  return fields.get(last)


def _set(config: ConfigDict, values: Mapping[str, Any]) -> None:
  for field, value in values.items():
    parent, _, name = field.rpartition(".")
    (operator.attrgetter(parent)(config) if parent else config)[name] = value


def _is_cpu(built: build.Built) -> bool:
  return built.mesh.devices.flat[0].platform == "cpu"


def _batch_size(config: ConfigDict, built: build.Built, pairs: float, memory: float) -> int:
  """The batch size for a number of pairs and this much usable memory of each device, in bytes."""
  num_devices, needed = built.mesh.size, estimate(config, built)
  fitting = num_devices * config.micro_batches * (memory - needed.fixed) / needed.per_pair
  largest = min(_LARGEST_BATCH, max(_SMALLEST_BATCH, pairs / _BATCHES), fitting)
  if _is_cpu(built):
    largest = min(largest, _LARGEST_BATCH_ON_CPU)
  return num_devices * _power_of_two(largest / num_devices)


def _remat(config: ConfigDict, devices: Sequence[jax.Device] | None, memory: float) -> str:
  """The first policy with which the batches of all stages fit into this much memory of each device, in bytes."""
  config = config.copy_and_resolve_references()

  def fits(of_stage: ConfigDict) -> bool:
    built = build.build(of_stage, devices)
    return estimate(of_stage, built).of(of_stage, built) <= memory

  for config.model.remat in ("dots", "narrow_dots"):
    if all(map(fits, stage_configs(config).values())):
      return config.model.remat
  return "full"


def _memory(device: jax.Device) -> float:
  """Bytes for programs on a device."""
  return available_memory(device) or _UNKNOWN_MEMORY


def estimate(config: ConfigDict, built: build.Built) -> Estimate:
  """Estimates the memory of the train step of a config that `built` was built from."""
  params, few = _kept_bytes(built, _TRACED)
  _, more = _kept_bytes(built, 2 * _TRACED)
  trained = jax.tree.map(
    lambda param, is_trained: param.size * is_trained, params, trainable_mask(params, built.frozen)
  )
  count, num_trained = sum(param.size for param in jax.tree.leaves(params)), sum(jax.tree.leaves(trained))
  averaged = _BYTES if config.optimizer.ema else 0
  sharded = count * (_BYTES + averaged) + num_trained * _TRAINED_BYTES
  fixed = sharded / built.mesh.shape["fsdp"] + count * _GATHERED_BYTES
  return Estimate(fixed, _TEMPORARIES * (more - few) / _TRACED)


def _kept_bytes(built: build.Built, pairs: int) -> tuple[Tree, int]:
  """The shapes of the parameters, and the bytes that the towers keep of this many pairs for the backward pass."""
  batch = built.batch_shape(pairs)
  params, collections = jax.eval_shape(built.model.init, jax.random.key(0), batch)

  def backward(params: Any, collections: Any, batch: Any) -> Any:
    def encode(params: Any) -> Any:
      return built.model.encode(built.model.merged(stop_gradient_below(params, built.frozen)), collections, batch)[0]

    return jax.vjp(encode, params)[1]

  kept = jax.eval_shape(traced_over(built.mesh, backward), params, collections, built.training_shape(batch))
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
  return params, size


def _power_of_two(limit: float) -> int:
  """The largest power of two up to a limit, at least 1."""
  return 1 << max(1, int(limit)).bit_length() - 1


def _divisor(number: int, limit: int) -> int:
  """The largest divisor of a number up to a limit, at least 1."""
  return next(divisor for divisor in range(max(1, limit), 0, -1) if number % divisor == 0)
