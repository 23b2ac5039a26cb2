"""Prints a `Report` as a table."""

from collections.abc import Mapping
import dataclasses

from declip_jax.planning.devices import Device
from declip_jax.planning.input_rate import InputRate
from declip_jax.planning.report import Report, RunFlops, Sent, Times


def table(report: Report) -> list[str]:
  """The report as lines of text."""
  lines = [*_devices(report), "", *report.layout, "", *_memory(report), "", _flops(report)]
  if report.collectives is not None:
    lines += ["", *_traffic(report.collectives, report.memory_traffic)]
  if report.peak and report.seconds and report.input:
    lines += ["", *_times(report.seconds, report.peak), _step(report.input, report.devices), "", *_input(report.input)]
  elif not report.peak:
    lines += ["", f"minimum time: unknown, as are the peak figures of {report.device!r}; --topology plans for a TPU"]
  return lines


def run_table(reports: Mapping[str, Report], of_run: RunFlops | None) -> list[str]:
  """The reports on the stages of a run, by name, and the FLOPs of the run, as lines of text."""
  lines = []
  for name, report in reports.items():
    lines += [f"stage {name}: {report.batch}", *table(report), ""]
  if of_run is None:
    return [*lines, "FLOPs of the run: not known without data, since only some of its durations are in epochs"]
  unit = " for each sample of the data" if of_run.per_sample else ""
  return [
    *lines,
    f"FLOPs of the run: {of_run.flops:.4g} of the model{unit}, {100 * of_run.share:.1f} % of those of as many pairs in "
    "the last stage",
  ]


def _devices(report: Report) -> list[str]:
  mesh = " x ".join(f"{axis}={size}" for axis, size in report.mesh.items())
  slices = f", {_number(report.slices, 'slice')}" if report.slices > 1 else ""
  return [
    f"{report.devices} x {report.device}, {_number(report.hosts, 'host')}{slices}; mesh {mesh}",
    f"batch {report.batch_size:,}: {report.batch_size / report.devices:g} pairs per device",
  ]


def _memory(report: Report) -> list[str]:
  lines = ["memory on each device"]
  available = report.available
  for name, size in dataclasses.asdict(report.memory).items() if report.memory else ():
    share = f" of {format_bytes(available)}, {100 * size / available:.1f} %" if name == "peak" and available else ""
    lines.append(f"  {name.replace('_', ' '):<22}{format_bytes(size):>12}{share}")
  if report.fits is False:
    lines.append(f"  DOES NOT FIT: needs {format_bytes(report.needed)} of {format_bytes(available)}")
  elif report.fits:
    lines.append("  fits")
  else:
    lines.append(f"  whether it fits is unknown, as is the memory of {report.device!r}")
  if largest := report.largest:
    tried = ", ".join(f"{pairs:,}: {format_bytes(needed)}" for pairs, needed in largest.tried)
    found = f"{largest.pairs:,} pairs, batch {largest.batch_size:,}" if largest.pairs else "none of those tried"
    if largest.pairs == max(pairs for pairs, _ in largest.tried):
      found += ", or more"
    lines.append(f"  largest batch per device that fits: {found} (compiled {tried})")
  return lines


def _flops(report: Report) -> str:
  model, executed = report.model_flops, report.executed_flops
  text = f"FLOPs of a step: {model:.4g} of the model ({model / report.devices:.4g} per device)"
  if executed:
    text += f"; {executed:.4g} including recomputation (+{100 * (executed / model - 1):.1f} %)"
  return text


def _traffic(collectives: dict[str, Sent], memory_traffic: float | None) -> list[str]:
  lines = [f"{'sent by each device in a step':<30}{'number':>8}{'in the slice':>16}{'between slices':>16}"]
  for kind, sent in collectives.items():
    lines.append(f"  {kind:<28}{sent.count:>8,}{format_bytes(sent.links):>16}{format_bytes(sent.network):>16}")
  lines.append(f"  {'memory reads and writes':<28}{'':>8}{format_bytes(memory_traffic):>16}")
  return lines


def _times(times: Times, peak: Device) -> list[str]:
  lines = ["minimum time (roofline)"]
  rates = _rates(peak)
  for name, seconds in dataclasses.asdict(times).items():
    if name != "network" or seconds != 0:
      time = "unknown" if seconds is None else f"{1e3 * seconds:.1f} ms"
      lines.append(f"  {name:<22}{time:>12}  at {rates[name]}")
  return lines


def _step(required: InputRate, devices: int) -> str:
  return (
    f"  {'step':<22}{1e3 * required.step:>9.1f} ms  model FLOPs utilisation {100 * required.utilisation:.0f} %, "
    f"{required.images_per_second / devices:,.0f} pairs/s per device"
  )


def _rates(peak: Device) -> dict[str, str]:
  network = peak.network_bandwidth
  return {
    "compute": f"{peak.flops / 1e12:g} TFLOP/s in bfloat16",
    "memory": f"{peak.memory_bandwidth / 1e9:g} GB/s",
    "interconnect": f"{peak.links} links of {peak.link_bandwidth / 1e9:g} GB/s in one direction",
    "network": f"{network / 1e9:g} GB/s" if network else "an unknown rate",
  }


def _input(required: InputRate) -> list[str]:
  line = f"  {required.images_per_second_and_host:,.0f} images/s on each host"
  if required.cores_per_host:
    cpus = f" of {required.cpus_per_host:g} vCPUs" if required.cpus_per_host else ""
    line += (
      f": {required.cores_per_host:.1f} cores{cpus}, at {required.measured_rate} images/s per core "
      f"(recipe {required.measured_recipe}, JPEGs of 500x375, docs/results.md)"
    )
  else:
    line += f": the rate of recipe {required.measured_recipe} was not measured"
  return ["input rate that a step this fast requires; half of it at half the utilisation", line]


def format_bytes(size: float | None) -> str:
  """A size in the largest suitable unit; None is a size that is unknown because the step does not fit."""
  if size is None:
    return "more than available"
  for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
    if size >= factor:
      return f"{size / factor:,.2f} {unit}"
  return f"{size:.0f} B"


def _number(count: int, noun: str) -> str:
  return f"{count} {noun}" + "s" * (count > 1)
