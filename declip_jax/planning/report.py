"""The cost of a train step on given devices: memory, FLOPs, traffic, minimum time, and the input rate that it needs."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import os

import jax
from ml_collections import ConfigDict

from declip_jax import build
from declip_jax.config import without_shares
from declip_jax.planning import compile as compilation
from declip_jax.planning import devices as device_table
from declip_jax.planning import flops, hlo
from declip_jax.planning.devices import Device
from declip_jax.planning.input_rate import InputRate, measured_rate
from declip_jax.planning.search import Largest, largest_batch
from declip_jax.sharding import check_batch, layout_table
from declip_jax.stages import flops_until, lengths_of_stages, plan_stages


@dataclasses.dataclass(frozen=True)
class Sent:
  """The bytes that each device sends in one step by one kind of collective.

  Attributes:
    count: number of these collectives.
    links: bytes to devices of the same slice or node.
    network: bytes to other slices or nodes.
  """

  count: int
  links: float
  network: float


@dataclasses.dataclass(frozen=True)
class Times:
  """Minimum seconds of a step at the peak figures of a device, by the resource that limits it; None if unknown."""

  compute: float
  memory: float
  interconnect: float
  network: float | None

  @property
  def step(self) -> float:
    """Minimum seconds of a step that uses all resources at the same time."""
    return max(filter(None, dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Report:
  """The cost of a train step. Sizes are bytes on each device, FLOPs are over all devices, times are seconds.

  Attributes:
    device: JAX's name for the kind of device.
    devices: number of devices.
    hosts: number of hosts.
    slices: number of slices that a network connects.
    mesh: size of each axis.
    batch_size: global batch size.
    batch: what a step reads, in words.
    layout: a table of how the state is sharded, as lines.
    model_flops: FLOPs of the model in one step, `flops.step_flops`.
    peak: peak figures of the device; None if it is not in `devices.DEVICES`.
    available: memory for programs; None if unknown.
    needed: memory that the step needs; None if unknown.
    fits: whether it needs at most what is available; None if unknown.
    memory: `needed` by use; None if the step does not fit.
    executed_flops: `model_flops` and recomputation; None if the step does not fit.
    collectives: what each kind of collective sends; None if the step does not fit.
    memory_traffic: bytes read and written in main memory; None if the step does not fit.
    seconds: the minimum times; None if the device is unknown or the step does not fit.
    input: the input rate that the minimum time requires; None if that time is unknown.
    largest: the largest batch that fits; None if it was not searched for, as on CPUs, or the memory is unknown.
  """

  device: str
  devices: int
  hosts: int
  slices: int
  mesh: dict[str, int]
  batch_size: int
  batch: str
  layout: list[str]
  model_flops: float
  peak: Device | None
  available: float | None
  needed: float | None
  fits: bool | None
  memory: compilation.Memory | None = None
  executed_flops: float | None = None
  collectives: dict[str, Sent] | None = None
  memory_traffic: float | None = None
  seconds: Times | None = None
  input: InputRate | None = None
  largest: Largest | None = None


@dataclasses.dataclass(frozen=True)
class RunFlops:
  """FLOPs of the model in a whole run, over all its stages.

  Attributes:
    flops: FLOPs; of a run whose durations are in epochs, divided by the number of samples of the data, which are not
      read.
    per_sample: whether they are divided by it.
    share: the FLOPs, divided by those of as many pairs in the last stage.
  """

  flops: float
  per_sample: bool
  share: float


def run_flops(config: ConfigDict, step_flops: Mapping[str, float]) -> RunFlops | None:
  """The FLOPs of a run; None if they depend on data, since only some of the durations of its stages are in epochs.

  Args:
    config: config, with its stages.
    step_flops: FLOPs of the model in a step of each stage.

  Raises:
    ValueError: see `plan_stages`.
  """
  config = without_shares(config)
  lengths = lengths_of_stages(config)
  per_sample = all(length.epochs for length in lengths)
  if not per_sample and any(length.epochs for length in lengths):
    return None
  stages = plan_stages(config, samples := 10**9 if per_sample else 1)  # so many that rounding to steps does not matter
  last = stages[-1]
  total = flops_until(stages, last.last, lambda stage, size: step_flops[stage.name])
  alone = step_flops[last.name] / last.config.batch_size * last.batch_sizes.examples(last.last)
  return RunFlops(total / samples if per_sample else total, per_sample, total / alone)


def make_report(
  config: ConfigDict,
  devices: Sequence[jax.Device] | None = None,
  search: bool = True,
  run: ConfigDict | None = None,
) -> Report:
  """Compiles the step of a config for all devices or for the given ones, and reports what it costs.

  Args:
    config: config of a run, or of one of its stages; its duration does not matter.
    devices: devices to compile for, such as those of `topology_devices`.
    search: whether to search for the largest batch that fits.
    run: config of the run of a stage.

  Raises:
    ValueError: the config contradicts itself or does not fit the devices.
  """
  devices = list(devices or jax.devices())
  built = build.build(config, devices)
  check_batch(config.batch_size, built.mesh, "config.batch_size")
  peak, available = device_table.find(devices[0].device_kind), available_memory(devices[0])
  try:
    step = compilation.compile_with_progress(config, devices, run)
    memory = compilation.memory(step)
    needed = memory.peak
  except compilation.OutOfMemory as error:
    step, memory, needed = None, None, error.needed
  report = Report(
    device=devices[0].device_kind,
    devices=len(devices),
    hosts=len({device.process_index for device in devices}),
    slices=len({getattr(device, "slice_index", 0) for device in devices}),
    mesh=dict(built.mesh.shape),
    batch_size=config.batch_size,
    batch=build.describe_batch(built, config.batch_size),
    layout=layout_table(compilation.state_shapes(run or config, build.build(run, devices) if run else built)),
    model_flops=flops.step_flops(built, config.batch_size),
    peak=peak,
    available=available,
    needed=needed if math.isfinite(needed) else None,
    fits=None if available is None else needed <= available,
    memory=memory,
  )
  if step:
    traffic = hlo.traffic(step.compiled.as_text(), report.devices, report.slices)
    report = dataclasses.replace(
      report,
      executed_flops=step.executed_flops,
      collectives=sent_by_kind(traffic),
      memory_traffic=traffic.memory,
    )
    if peak:
      seconds = least_times(step.executed_flops / report.devices, traffic, peak)
      report = dataclasses.replace(report, seconds=seconds, input=required_input(report, config, seconds.step, peak))
  if search and available and (peak or devices[0].platform != "cpu"):
    report = dataclasses.replace(report, largest=largest_batch(config, devices, needed, available, run))
  return report


def available_memory(device: jax.Device) -> float | None:
  """Bytes that a program may use: the device's own limit, or else the table's; None if neither is known.

  Each of the CPU devices of a machine has an equal share of half of its memory.
  """
  known = device_table.find(device.device_kind)
  try:
    limit = (device.memory_stats() or {}).get("bytes_limit")
  except (AttributeError, RuntimeError):  # a device that is only compiled for
    limit = None
  if limit:
    return float(limit)
  if known:
    return known.memory
  if device.platform == "cpu":
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 / jax.local_device_count("cpu")
  return None


def sent_by_kind(traffic: hlo.Traffic) -> dict[str, Sent]:
  """Number and bytes of each kind of collective in a step."""
  return {
    kind: Sent(traffic.collectives[kind], traffic.links[kind], traffic.network[kind])
    for kind in hlo.COLLECTIVES
    if traffic.collectives[kind]
  }


def least_times(flops_per_device: float, traffic: hlo.Traffic, peak: Device) -> Times:
  """The roofline of a step: each of its loads divided by the peak rate of a device."""
  links, network = traffic.links.total(), traffic.network.total()
  return Times(
    compute=flops_per_device / peak.flops,
    memory=traffic.memory / peak.memory_bandwidth,
    interconnect=links / peak.interconnect,
    network=network and (network / peak.network_bandwidth if peak.network_bandwidth else None),
  )


def required_input(report: Report, config: ConfigDict, step: float, peak: Device) -> InputRate:
  """The input rate that a step of `step` seconds, the minimum time, requires of the hosts."""
  images_per_second = report.batch_size / step
  name, rate = measured_rate(config.data.recipe, config.data.engine, config.data.augment_on)
  return InputRate(
    step=step,
    utilisation=report.model_flops / report.devices / peak.flops / step,
    images_per_second=images_per_second,
    images_per_second_and_host=images_per_second / report.hosts,
    cores_per_host=rate and images_per_second / report.hosts / rate,
    cpus_per_host=peak.host_cpus and peak.host_cpus * report.devices / report.hosts,
    measured_recipe=name,
    measured_rate=rate,
  )
