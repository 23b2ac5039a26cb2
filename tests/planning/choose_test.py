"""Tests of `declip_jax.planning.choose`: what is chosen for which data and devices, and runs shortened to a try."""

import os
from pathlib import Path
import re
import shlex
from typing import Any

import jax
from ml_collections import ConfigDict
import pytest
from tiny import tiny_config

from declip_jax import build, config, config_files
from declip_jax.planning import choose
from declip_jax.stages import plan_stages

GIB = 2**30
PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


def open_config(method: str = "clip") -> ConfigDict:
  c = tiny_config(method)
  c.batch_size, c.duration, c.model.dtype, c.model.heads.bank_size = 0, config.duration(), "auto", 0
  return c


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Any:
  """Chooses for a number of accelerators on each of which this many pairs fit."""

  def call(c: ConfigDict, pairs: int | None, fitting: float = 1e6, devices: int = 8) -> ConfigDict:
    monkeypatch.setattr(choose, "_is_cpu", lambda built: False)
    monkeypatch.setattr(choose, "estimate", lambda config, built: choose.Estimate(GIB, GIB))
    monkeypatch.setattr(choose, "_memory", lambda device: (1 + fitting) * GIB / 0.75)
    return choose.choose(c, pairs, jax.devices()[:devices])

  return call


@pytest.mark.parametrize(
  ("pairs", "fitting", "devices", "micro_batches", "size"),
  [
    (None, 1e6, 8, 1, 4096),
    (10**7, 1e6, 1, 1, 4096),
    (10**7, 1e6, 6, 1, 6 * 512),  # the same power of two on each device
    (10**7, 100, 8, 1, 8 * 64),
    (10**7, 100, 8, 4, 8 * 256),
    (10**7, -300, 8, 1, 8),  # at least one pair on each device
    (7282, 1e6, 1, 1, 256),
    (450, 1e6, 1, 1, 32),
    (5, 1e6, 1, 1, 32),
  ],
)
def test_the_batch_fits_the_data_and_the_devices(
  pairs: int | None, fitting: float, devices: int, micro_batches: int, size: int, chosen: Any
) -> None:
  c = open_config()
  c.micro_batches = micro_batches
  assert chosen(c, pairs, fitting + 0.5, devices).batch_size == size


def test_a_cpu_has_smaller_batches_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
  found = choose.choose(open_config(), None)
  assert (found.model.dtype, found.batch_size) == ("float32", 256)
  needed, devices = choose.estimate(found, build.build(found)), jax.local_device_count()
  memory = 2 * devices * (needed.fixed + 5.5 * needed.per_pair) / 0.75  # of the machine, for 5 pairs on each device
  monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}.get)
  assert choose.choose(open_config(), None).batch_size == 4 * devices


@pytest.mark.parametrize(
  ("batch_size", "room", "remat"),
  [
    (64, 16.1, "dots"),
    (64, 15.9, "narrow_dots"),
    (64, 9.1, "narrow_dots"),
    (64, 8.9, "full"),
    (0, 15.9, "dots"),  # 32 pairs
    (0, 1.9, "narrow_dots"),  # a pair on each device, at least
  ],
)
def test_the_backward_pass_recomputes_more_if_a_batch_would_not_fit(
  batch_size: int, room: float, remat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Batches of 64 in two micro-batches, of which each of 8 devices has 4 pairs."""
  c = open_config()
  c.batch_size, c.model.remat, c.micro_batches = batch_size, "auto", 2
  per_pair = {"none": 9.0, "dots": 4.0, "narrow_dots": 2.25, "full": 1.0}
  monkeypatch.setattr(choose, "estimate", lambda config, built: choose.Estimate(0.0, per_pair[config.model.remat]))
  monkeypatch.setattr(choose, "_memory", lambda device: room)
  assert "model.remat" in choose.open_fields(c)
  found = choose.choose(c, None, jax.devices()[:8])
  assert (found.model.remat, found.batch_size) == (remat, batch_size or (32 if remat == "dots" else 8))
  assert choose.choose(c, None, saved={"model": {"remat": "none"}}).model.remat == "none"


def test_what_is_recomputed_takes_no_memory() -> None:
  c, found = tiny_config("clip"), []
  for c.model.remat in ("dots", "narrow_dots", "full"):
    found.append(choose.estimate(c, build.build(c, jax.devices()[:1])).per_pair)
  assert found[0] > 1.1 * found[1] > 1.2 * found[2]


@pytest.mark.parametrize(
  ("pairs", "epochs"), [(100, 100), (2622, 100), (7282, 36), (8192, 32), (10**7, 32), (None, 32)]
)
def test_few_pairs_are_seen_more_often(pairs: int | None, epochs: int, chosen: Any) -> None:
  assert chosen(open_config(), pairs).duration.to_dict() == config.duration(epochs=epochs).to_dict()


@pytest.mark.parametrize(("epochs", "every", "logged"), [(10.0, 50, 7), (100.0, 50, 50), (10.0, 5, 5), (10.0, 0, 0)])
def test_a_short_run_has_twenty_lines_of_metrics(epochs: float, every: int, logged: int, chosen: Any) -> None:
  c = open_config()
  c.duration, c.log_every = config.duration(epochs=epochs), every
  assert chosen(c, 450, devices=1).log_every == logged  # of 140 or 1,406 steps of 32 pairs


@pytest.mark.parametrize(
  ("pairs", "devices", "groups", "size"),
  [(None, 8, 32, 2**16), (10**5, 8, 32, 2**15), (7282, 1, 2, 2**11), (600, 1, 1, 256), (40, 6, 1, 48), (50, 1, 1, 64)],
)
def test_groups_and_banks_fit_the_batch(pairs: int | None, devices: int, groups: int, size: int, chosen: Any) -> None:
  c = open_config("declip_repo")
  c.model.heads.norm_groups = c.model.heads.bank_groups = 0
  heads = chosen(c, pairs, devices=devices).model.heads
  assert (heads.norm_groups, heads.bank_groups, heads.bank_size) == (groups, groups, size)


def test_groups_divide_a_batch_that_is_not_a_power_of_two(chosen: Any) -> None:
  c = open_config("declip_repo")
  c.model.heads.norm_groups = c.model.heads.bank_groups = 0
  found = chosen(c, 10_000, devices=7)
  assert (found.batch_size, found.model.heads.norm_groups) == (448, 2)


def test_what_is_set_stays_and_what_was_chosen_is_kept(chosen: Any) -> None:
  closed = tiny_config("declip")
  assert choose.open_fields(closed) == []
  assert choose.choose(closed, 100).to_dict() == closed.to_dict()
  c = open_config()
  c.batch_size = 48
  found = chosen(c, 10**6)
  assert found.batch_size == 48
  assert choose.open_fields(c) == ["model.dtype", "model.heads.bank_size", "duration"]
  assert choose.open_fields(found) == []
  again = choose.choose(open_config(), 10**6, saved=found.to_dict())  # on CPUs, where float32 would be chosen
  assert (again.batch_size, again.model.dtype) == (48, "bfloat16")
  assert again.to_dict() == found.to_dict()
  text = choose.describe(found, ["batch_size", "model.dtype", "duration"])
  assert text == "batch_size=48, model.dtype=bfloat16, duration.epochs=32"


def test_a_try_is_the_run_in_proportion() -> None:
  c = tiny_config("clip")
  c.batch_size, c.duration, c.log_every = 10, config.duration(epochs=20), 50  # 2000 steps
  c.evaluate_every, c.checkpoint.every = config.duration(epochs=1), config.duration(examples=100)
  c.checkpoint.keep_every = config.duration(steps=100)
  c.optimizer.warmup, c.optimizer.cooldown = config.duration(share=0.1), config.duration(steps=500)
  c.optimizer.milestones = ((1000, 0.1),)
  c.objective.clip.schedule = ((0, 0.0), (400, 1.0))
  steps = build.to_steps(choose.shortened(c, 101, 1000), 1000)
  assert (steps.total, steps.evaluate, steps.checkpoint, steps.keep_every) == (101, 51, 51, 0)
  schedule = steps.schedule
  assert (schedule.total_steps, schedule.warmup, schedule.cooldown) == (101, 10, 25)
  assert schedule.milestones == ((50, 0.1),)
  short = choose.shortened(c, 101, 1000)
  assert short.objective.clip.schedule == ((0, 0.0), (20, 1.0))
  assert short.log_every == 5
  assert choose.shortened(c, 1, 1000).log_every == 1
  steps = build.to_steps(choose.shortened(c, 1, 1000), 1000)
  assert (steps.total, steps.evaluate, steps.checkpoint) == (1, 1, 1)
  assert (steps.schedule.warmup, steps.schedule.cooldown) == (0, 1)
  assert c.duration.epochs == 20  # the config itself is not changed


def test_a_try_scales_a_warmup_that_is_longer_than_the_whole_run() -> None:
  c = tiny_config("clip")
  c.batch_size, c.duration, c.optimizer.warmup = 10, config.duration(epochs=2), config.duration(steps=2000)
  assert choose.with_fitting_warmup(c, 10**4)[1] == []
  c.stages.first = config.stage(duration=config.duration(steps=50))
  fitting, (first, last) = choose.with_fitting_warmup(c, 1000)
  assert first.startswith("config.stages.first.warmup is 2,000 steps, longer than the whole run or stage of 50, ")
  assert last.endswith("the whole run needs --config.optimizer.warmup.steps=15 or so")
  short = plan_stages(choose.shortened(fitting, 20, 1000), 1000)
  assert [build.stage_steps(stage, 1000).schedule.warmup for stage in short] == [5, 15]
  with pytest.raises(ValueError, match="warmup is 2,000 steps"):
    choose.shortened(c, 20, 1000)


def test_a_try_has_all_stages_in_proportion() -> None:
  c = tiny_config("clip")
  c.batch_size, c.duration, c.optimizer.warmup = 10, config.duration(epochs=20), config.duration(share=0.05)
  c.stages.first = config.stage(duration=config.duration(share=0.6), batch_size=20, warmup=config.duration(share=0.1))
  c.stages.second = config.stage(duration=config.duration(steps=200))
  whole = plan_stages(c, 1000)
  assert [(stage.first, stage.last) for stage in whole] == [(0, 600), (600, 800), (800, 1400)]
  short = plan_stages(choose.shortened(c, 140, 1000), 1000)
  assert [(stage.first, stage.last) for stage in short] == [(0, 60), (60, 80), (80, 140)]
  with pytest.raises(ValueError, match="--steps=2: the run has 3 stages"):
    choose.shortened(c, 2, 1000)
  for steps in (3, 4, 5, 7):
    short = plan_stages(choose.shortened(c, steps, 1000), 1000)
    assert [stage.last for stage in short] == sorted({stage.last for stage in short})
    assert short[-1].last == steps
    for stage in short:
      assert 1 <= build.stage_steps(stage, 1000).schedule.warmup <= stage.last - stage.first
  short = plan_stages(choose.shortened(c, 140, 1000), 1000)
  warmups = [build.stage_steps(stage, 1000).schedule.warmup for stage in (whole[0], short[0], whole[2], short[2])]
  assert warmups == [100, 10, 100, 10]


def test_parameters_that_are_not_trained_need_no_moments() -> None:
  c = tiny_config("clip")
  whole = build.build(c, jax.devices()[:1])
  c.optimizer.frozen = ("towers/image",)
  frozen = build.build(c, jax.devices()[:1])
  params, _ = jax.eval_shape(whole.model.init, jax.random.key(0), whole.batch_shape(8))
  count = sum(param.size for param in jax.tree.leaves(params["towers"]["image"]))
  saved = choose.estimate(c, whole).fixed - choose.estimate(c, frozen).fixed
  assert saved == 12 * count  # a gradient and two moments in float32
  assert choose.estimate(c, frozen).per_pair < 0.7 * choose.estimate(c, whole).per_pair  # no backward pass of images


@pytest.mark.slow
def test_estimates_are_close_to_the_compiled_steps_of_the_page() -> None:
  found = 0
  for command, rest in re.findall(r"python -m declip_jax\.plan ((?:.|\\\n)*?)\n```\n((?:.|\n)*?)(?=\n## |\Z)", PAGE):
    peak = re.search(r"  peak +([\d.]+) GiB", rest)
    pairs = re.search(r"(\d+) pairs per device", rest)
    if not (peak and pairs):
      continue
    flags = dict(word.removeprefix("--").split("=", 1) for word in shlex.split(command) if "=" in word)
    c = choose.choose(config_files.load(flags["config"]), None)
    c.model.dtype, c.model.remat = "bfloat16", flags.get("config.model.remat", "dots")
    needed, fsdp = choose.estimate(c, build.build(c)), int(flags.get("config.mesh.fsdp", 1))
    sharded = choose._BYTES + choose._TRAINED_BYTES
    fixed = needed.fixed * (sharded / fsdp + choose._GATHERED_BYTES) / (sharded + choose._GATHERED_BYTES)
    assert fixed + int(pairs[1]) * needed.per_pair == pytest.approx(float(peak[1]) * GIB, rel=0.3), command
    found += 1
  assert found == 4
