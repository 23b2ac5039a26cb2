"""Tests of `declip_jax.planning.report`: the figures of a step on two devices, and of steps that do not fit."""

import dataclasses

import jax
from ml_collections import ConfigDict
import pytest
from tiny import tiny_config

from declip_jax import build
from declip_jax import config as config_lib
from declip_jax.planning import compile as compilation
from declip_jax.planning import devices, flops, hlo
from declip_jax.planning import search as search_lib
from declip_jax.planning.report import Report, RunFlops, Times, make_report, run_flops
from declip_jax.planning.search import Largest
from declip_jax.planning.table import table
from declip_jax.stages import stage_configs


def test_needed_memory_is_the_peak(step: compilation.CompiledStep, report: Report):
  assert report.memory == compilation.memory(step)
  assert report.needed == report.memory.peak <= report.available == 2**30
  assert report.fits


def test_times_are_loads_over_peak_rates(config: ConfigDict, step: compilation.CompiledStep, report: Report):
  assert report.model_flops == flops.step_flops(build.build(config, jax.devices()[:2]), config.batch_size)
  traffic = hlo.traffic(step.compiled.as_text(), 2)
  assert traffic.links.total() > 0
  expected = Times(
    compute=report.executed_flops / 2 / 1e12,
    memory=traffic.memory / 1e11,
    interconnect=traffic.links.total() / 1e10,
    network=0,
  )
  assert dataclasses.astuple(report.seconds) == pytest.approx(dataclasses.astuple(expected))
  slowest = max(report.seconds.compute, report.seconds.memory, report.seconds.interconnect)
  assert report.input.step == slowest
  assert report.input.images_per_second_and_host == pytest.approx(config.batch_size / slowest)
  assert report.input.cores_per_host == pytest.approx(config.batch_size / slowest / 840)
  assert report.input.cpus_per_host == 8
  assert report.input.utilisation == pytest.approx(report.model_flops / 2 / 1e12 / slowest)


def test_a_step_that_does_not_fit_reports_the_largest_that_does(report: Report, monkeypatch):
  @dataclasses.dataclass
  class FakeMemory:
    peak: float

  class FakeStep(compilation.CompiledStep):
    def __init__(self, pairs: int):
      object.__setattr__(self, "pairs", pairs)

  def compile_step(config: ConfigDict, devices: list[jax.Device], run: None = None) -> FakeStep:
    pairs = config.batch_size // len(devices)
    if pairs > 11:
      raise compilation.OutOfMemory(1e7 * pairs)
    return FakeStep(pairs)

  monkeypatch.setattr(compilation, "compile_step", compile_step)
  monkeypatch.setattr(search_lib, "memory", lambda step: FakeMemory(1e7 * step.pairs))
  monkeypatch.setitem(devices.DEVICES, "cpu", dataclasses.replace(report.peak, memory=1.19e8))
  config = tiny_config("clip")
  config.batch_size, config.micro_batches = 32, 2
  report = make_report(config, jax.devices()[:2])
  assert report.fits is False
  assert report.needed == 1.6e8
  assert report.memory is report.seconds is report.collectives is report.input is None
  assert report.largest == Largest(pairs=10, batch_size=20, tried=[(8, 8e7), (10, 1e8), (16, 1.6e8)])
  text = "\n".join(table(report))
  assert "DOES NOT FIT: needs 152.59 MiB of 113.49 MiB" in text
  assert "10 pairs, batch 20 " in text


@pytest.mark.slow
def test_an_unknown_device_has_no_times(config: ConfigDict, step: compilation.CompiledStep, monkeypatch):
  monkeypatch.setattr(compilation, "compile_step", lambda *_: step)
  report = make_report(config, jax.devices()[:2])
  assert report.peak is report.seconds is report.input is report.largest is None
  assert report.fits  # into the memory of the machine
  assert report.collectives
  lines = "\n".join(table(report))
  assert "roofline" not in lines
  assert "minimum time: unknown, as are the peak figures of 'cpu'" in lines


def test_the_flops_of_a_run_are_those_of_its_stages():
  config = tiny_config("clip")
  low = {"duration": config_lib.duration(examples=640), "batch_size": 32}
  config.stages.low, config.duration = config_lib.stage(**low), config_lib.duration(examples=960)
  step_flops = {"low": 100.0, "last": 200.0}
  assert run_flops(config, step_flops) == RunFlops(20 * 100.0 + 20 * 200.0, False, 6000 / (60 * 200.0))
  config.stages.low.duration = config_lib.duration(epochs=2)
  assert run_flops(config, step_flops) is None
  config.duration = config_lib.duration(epochs=3)
  found = run_flops(config, step_flops)
  config.stages.low.duration = config_lib.duration(share=2 / 3)
  assert run_flops(config, step_flops) == found
  assert found.per_sample
  assert (found.flops, found.share) == pytest.approx((2 * 100 / 32 + 200 / 16, 18.75 / (3 * 200 / 16)))
  config.stages = ConfigDict()
  assert run_flops(config, step_flops).share == 1


@pytest.mark.slow
def test_the_step_of_a_stage_has_the_state_of_the_whole_run():
  config = tiny_config("clip", image_size=32)
  config.stages.low = config_lib.stage(duration=config_lib.duration(steps=1), image_size=16, context_length=8)
  step = compilation.compile_step(stage_configs(config)["low"], jax.devices()[:1], config)
  assert (step.batch["image"].shape[2], step.batch["text"].shape[2]) == (16, 8)
  towers = step.state.params["towers"]
  assert [towers[side]["position_embedding"].shape[0] for side in ("image", "text")] == [17, 16]


def test_a_batch_that_does_not_divide_over_the_devices_is_rejected():
  config = tiny_config("clip")
  config.batch_size = 13
  with pytest.raises(ValueError, match=r"config.batch_size=13.* devices, 2 "):
    make_report(config, jax.devices()[:2])
