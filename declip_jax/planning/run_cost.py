"""What a whole run costs: hours and device-hours, at the minimum time of its steps and at an assumed utilisation."""

from collections.abc import Mapping, Sequence
import dataclasses

from ml_collections import ConfigDict

from declip_jax.config import without_shares
from declip_jax.planning.devices import Device
from declip_jax.planning.report import Report
from declip_jax.spelling import counted
from declip_jax.stages import LAST, lengths_of_stages, plan_stages


@dataclasses.dataclass(frozen=True)
class Assumptions:
  """What a plan cannot know.

  Attributes:
    samples: number of samples of the data; None if unknown.
    utilisation: model FLOPs utilisation, 0 to 1.
    price: price of a device for an hour, in any currency; None if unknown.
  """

  samples: int | None
  utilisation: float
  price: float | None


@dataclasses.dataclass(frozen=True)
class RunCost:
  """The cost of training; evaluations, saves and compiling come on top.

  Attributes:
    steps: number of steps.
    devices: number of devices.
    least_hours: hours if each step took its minimum time; None if a step does not fit or the device is unknown.
    hours: hours at the assumed utilisation; None if the device is unknown.
    assumed: the assumptions.
  """

  steps: int
  devices: int
  least_hours: float | None
  hours: float | None
  assumed: Assumptions

  def price(self, hours: float) -> float | None:
    """Price of this many hours on all devices; None if that of one is unknown."""
    return None if self.assumed.price is None else hours * self.devices * self.assumed.price


def hours_at(utilisation: float, flops: float, peak: Device, devices: int) -> float:
  """Hours for FLOPs of a model on a number of devices, at a model FLOPs utilisation."""
  return flops / (devices * peak.flops * utilisation) / 3600


def run_cost(config: ConfigDict, reports: Mapping[str, Report], assumed: Assumptions) -> RunCost | None:
  """The cost of a run; None if its length depends on the number of samples, and that is unknown.

  Args:
    config: its config, with its stages.
    reports: the report on a step of each stage, by the name of the stage.
    assumed: the assumptions.

  Raises:
    ValueError: see `plan_stages`.
  """
  lengths = lengths_of_stages(config)
  if assumed.samples is None and any(length.epochs for length in lengths):
    return None
  stages = plan_stages(without_shares(config), assumed.samples or 1)
  steps = {stage.name: stage.last - stage.first for stage in stages}
  first = next(iter(reports.values()))
  least = hours = None
  if all(report.seconds for report in reports.values()):
    least = sum(steps[name] * report.seconds.step for name, report in reports.items()) / 3600
  if first.peak:
    flops = sum(steps[name] * report.model_flops for name, report in reports.items())
    hours = hours_at(assumed.utilisation, flops, first.peak, first.devices)
  return RunCost(stages[-1].last, first.devices, least, hours, assumed)


def cost_lines(cost: RunCost | None, why: str = "") -> list[str]:
  """The cost of a run as lines of text; `why` its data cannot be counted."""
  if cost is None:
    because = f": {why}" if why else ""
    return [f"hours of the run: unknown, as is the length of an epoch{because}; pass --samples, the number of samples"]
  lines = [f"cost of the run: {counted(cost.steps, 'step')}"]
  for name, hours in (("at the minimum time", cost.least_hours), (assumption(cost.assumed), cost.hours)):
    if hours:
      price = cost.price(hours)
      paid = "" if price is None else f"{_digits(price):>12} at {cost.assumed.price:g} for a device and hour"
      rate, all_hours = cost.steps / hours / 3600, hours * cost.devices
      lines.append(f"  {name:<22}{rate:>9.3g} steps/s{_digits(hours):>9} h{_digits(all_hours):>9} device-hours{paid}")
  return lines


def assumption(assumed: Assumptions) -> str:
  """The assumed utilisation in words."""
  return f"at {100 * assumed.utilisation:g} % utilisation"


def comparison(plans: Sequence[tuple[str, Mapping[str, Report], RunCost | None]]) -> list[str]:
  """A table with a row for each topology, with its reports and the cost of the run, as lines of text.

  Memory is that of the stage that needs most, and the minimum time that of a step of the last stage.
  """
  assumed = next((cost.assumed for _, _, cost in plans if cost), None)
  columns = ["topology", "devices", "pairs per device", "memory", "least step", "least hours"]
  columns += [f"hours {assumption(assumed)}", "device-hours"] if assumed else []
  columns += ["price"] if assumed and assumed.price is not None else []
  rows = [columns, *(_cells(*plan)[: len(columns)] for plan in plans)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _cells(topology: str, reports: Mapping[str, Report], cost: RunCost | None) -> list[str]:
  last, needed = reports[LAST], [report.needed for report in reports.values()]
  fits = all(report.fits is not False for report in reports.values())
  memory = "unknown" if None in needed else f"{max(filter(None, needed)) / 2**30:.1f} GiB"
  time = f"{1e3 * last.seconds.step:,.1f} ms" if last.seconds else ""
  cells = [topology, str(last.devices), f"{last.batch_size / last.devices:g}", memory if fits else "does not fit", time]
  if cost is None:
    return [*cells, ""]
  hours, least = cost.hours, cost.least_hours
  price = cost.price(hours) if hours else None
  return [
    *cells,
    _digits(least) if least else "",
    _digits(hours) if hours else "",
    _digits(hours * cost.devices) if hours else "",
    "" if price is None else _digits(price),
  ]


def _digits(number: float) -> str:
  """A number with three digits, or all before the decimal point."""
  return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
