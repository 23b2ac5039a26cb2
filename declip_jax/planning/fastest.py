"""Searches for the mesh, recomputation and micro-batches with which a step is fastest, by its minimum time."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from declip_jax import build
from declip_jax.planning import choose
from declip_jax.planning.report import Report
from declip_jax.reporting.progress import message

_MICRO_BATCHES = (1, 2, 4, 8)
_SURELY_TOO_MUCH = 1.5  # times the available memory: estimates are right within 30 %


class Choice(NamedTuple):
  """What does not change the results of training.

  Attributes:
    fsdp: `config.mesh.fsdp`.
    remat: `config.model.remat`.
    micro_batches: `config.micro_batches`.
  """

  fsdp: int
  remat: str
  micro_batches: int

  @property
  def flags(self) -> str:
    """The arguments that set it."""
    return (
      f"--config.mesh.fsdp={self.fsdp} --config.model.remat={self.remat} --config.micro_batches={self.micro_batches}"
    )

  def applied(self, config: ConfigDict) -> ConfigDict:
    """A config with this choice."""
    c = config.copy_and_resolve_references()
    c.mesh.fsdp, c.model.remat, c.micro_batches = self
    return c


class Tried(NamedTuple):
  """A choice and the report on its step."""

  choice: Choice
  report: Report

  @property
  def fits(self) -> bool:
    """Whether the step fits, as far as this is known."""
    return self.report.fits is not False and self.report.seconds is not None

  @property
  def seconds(self) -> float:
    """Minimum time of the step, infinite if it does not fit."""
    return self.report.seconds.step if self.fits else float("inf")


def search_fastest(
  config: ConfigDict, devices: Sequence[jax.Device], available: float | None, report: Callable[[ConfigDict], Report]
) -> list[Tried]:
  """Reports on the steps that were compiled, the fastest first; the time of a step that does not fit is infinite.

  The batch size stays. The search is greedy: it tries how many devices share the parameters, in powers of four and all
  of a slice; with the fastest of these, or the most if none fits, what else the backward pass may recompute; and only
  if nothing fits, more micro-batches. Choices that surely need too much memory are not compiled.

  Args:
    config: the config.
    devices: devices to plan for, with known peak figures.
    available: memory for programs on each device, in bytes; None if unknown.
    report: makes the report on a config's step, which takes minutes.
  """
  tried: list[Tried] = []

  def attempt(choices: Sequence[Choice]) -> None:
    for choice in choices:
      if choice in (one.choice for one in tried) or not _is_possible(choice, config, devices, available):
        continue
      message(f"trying {choice.flags}")
      tried.append(Tried(choice, report(choice.applied(config))))
    tried.sort(key=lambda one: one.seconds)

  sizes = _fsdp_sizes(devices)
  for micro_batches in _MICRO_BATCHES:
    attempt([Choice(fsdp, "dots", micro_batches) for fsdp in sizes])
    fsdp = tried[0].choice.fsdp if tried and tried[0].fits else max(sizes)
    attempt([Choice(fsdp, remat, micro_batches) for remat in ("narrow_dots", "full", "none")])
    if tried and tried[0].fits:
      break
  return tried


def fastest_lines(tried: Sequence[Tried]) -> list[str]:
  """What was tried as lines of text, and the arguments of the fastest."""
  lines = ["fastest step", f"  {'minimum time':>12}{'memory':>12}"]
  for one in tried:
    time = f"{1e3 * one.seconds:,.1f} ms" if one.fits else "does not fit"
    memory = f"{one.report.needed / 2**30:.2f} GiB" if one.report.needed else "unknown"
    lines.append(f"  {time:>12}{memory:>12}  {one.choice.flags}")
  if not tried or not tried[0].fits:
    return [*lines, "none of them fits: choose more devices or a smaller config.batch_size"]
  return [*lines, f"use {tried[0].choice.flags}"]


def _is_possible(choice: Choice, config: ConfigDict, devices: Sequence[jax.Device], available: float | None) -> bool:
  """Whether a choice suits the config and the devices, and may fit."""
  if config.batch_size % (len(devices) * choice.micro_batches):
    return False
  c = choice.applied(config)
  try:
    built = build.build(c, devices)
  except ValueError:  # such as groups of batch norm that micro-batches would divide
    return False
  if available is None:
    return True
  return choose.estimate(c, built).of(c, built) < _SURELY_TOO_MUCH * available


def _fsdp_sizes(devices: Sequence[jax.Device]) -> list[int]:
  """Numbers of devices that may share the parameters: powers of four that divide a slice, and the slice."""
  size = len(devices) // len({getattr(device, "slice_index", 0) for device in devices})
  return sorted({size, *(4**power for power in range(8) if size % 4**power == 0)})
