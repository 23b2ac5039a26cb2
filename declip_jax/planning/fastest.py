"""Searches for the mesh, recomputation and micro-batches with which a step is fastest, by its minimum time."""

from collections.abc import Callable, Iterator, Sequence
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
  def seconds(self) -> float:
    """Minimum time of the step, infinite if it does not fit."""
    fits = self.report.fits is not False and self.report.seconds
    return self.report.seconds.step if fits else float("inf")


def search_fastest(
  config: ConfigDict, devices: Sequence[jax.Device], available: float | None, report: Callable[[ConfigDict], Report]
) -> list[Tried]:
  """Reports on the steps that were compiled, the fastest first; it is infinitely slow if none fits.

  The batch size stays. First it tries how many devices share the parameters; with the fastest of these, what else the
  backward pass may recompute; and only if nothing fits, more micro-batches. Choices that surely need too much memory
  are not compiled.

  Args:
    config: the config.
    devices: devices to plan for.
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

  for micro_batches in _MICRO_BATCHES:
    attempt([Choice(fsdp, "dots", micro_batches) for fsdp in _powers_of_four(len(devices))])
    fsdp = tried[0].choice.fsdp if tried else max(_powers_of_four(len(devices)))
    attempt([Choice(fsdp, remat, micro_batches) for remat in ("full", "none")])
    if tried and tried[0].seconds < float("inf"):
      break
  return tried


def fastest_lines(tried: Sequence[Tried]) -> list[str]:
  """What was tried as lines of text, and the arguments of the fastest."""
  lines = ["fastest step", f"  {'minimum time':>12}{'memory':>12}"]
  for choice, report in tried:
    time = f"{1e3 * report.seconds.step:,.1f} ms" if report.seconds and report.fits is not False else "does not fit"
    memory = f"{report.needed / 2**30:.2f} GiB" if report.needed else "unknown"
    lines.append(f"  {time:>12}{memory:>12}  {choice.flags}")
  if not tried or tried[0].seconds == float("inf"):
    return [*lines, "none of them fits: choose more devices or a smaller config.batch_size"]
  return [*lines, f"use {tried[0].choice.flags}"]


def _is_possible(choice: Choice, config: ConfigDict, devices: Sequence[jax.Device], available: float | None) -> bool:
  """Whether a choice divides the batch, and may fit."""
  if config.batch_size % (len(devices) * choice.micro_batches):
    return False
  if available is None:
    return True
  c = choice.applied(config)
  needed = choose.estimate(c, build.build(c, devices))
  pairs = config.batch_size / len(devices) / choice.micro_batches
  return needed.fixed + pairs * needed.per_pair < _SURELY_TOO_MUCH * available


def _powers_of_four(limit: int) -> Iterator[int]:
  power = 1
  while power <= limit and limit % power == 0:
    yield power
    power *= 4
