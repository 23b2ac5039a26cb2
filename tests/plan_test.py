"""Tests of `declip_jax.plan`: its figures for a tiny step on two devices, the search, and libtpu where it is there."""

import importlib.util
import json
import math
from pathlib import Path
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import tiny_config

from declip_jax import build, plan, sharding
from declip_jax.data.recipes import RECIPES
from declip_jax.planning import devices, flops, hlo

CHIP = devices.Device(1e12, 2**30, 1e11, 2, 5e9, None, 4)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def step():
  """A compiled step of CLIP on one data and two fsdp devices, with small arrays split too."""
  config = tiny_config("clip")
  config.mesh.fsdp = 2
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "MIN_SIZE", 256)
    return config, plan.compile_step(config, jax.devices()[:2])


@pytest.fixture(scope="module")
def report(step):
  """The report on that step, if a CPU were `CHIP`."""
  config, compiled = step
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan, "compile_step", lambda *_: compiled)
    patch.setitem(devices.DEVICES, "cpu", CHIP)
    return plan.plan(config, jax.devices()[:2], search=False)


def test_the_state_is_what_its_shards_hold(step, report):
  config, compiled = step
  shapes = build.build(config, jax.devices()[:2]).batch_shape(config.batch_size)
  state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), compiled.abstract)

  def held(tree):
    shards = (shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[1])

  found = report["memory"]
  assert found["parameters"] == held(state.params) < sum(x.nbytes for x in jax.tree.leaves(state.params))
  assert found["optimizer_state"] == held(state.opt_state)
  assert found["collections"] == held(state.collections)
  assert found["batch"] == sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes.values()) / 2
  used = compiled.compiled.memory_analysis()
  assert found["temporaries"] == used.temp_size_in_bytes
  assert found["parameters"] + found["optimizer_state"] + found["batch"] + found["temporaries"] <= found["peak"]
  assert report["needed"] == found["peak"] <= 2**30
  assert report["fits"]


def test_times_are_work_over_peak_figures(step, report):
  config, compiled = step
  built = build.build(config, jax.devices()[:2])
  assert report["model_flops"] == flops.step_flops(config, built)
  moved = hlo.traffic(compiled.compiled.as_text(), 2)
  assert moved.links.total() > 0
  assert report["seconds"] == {
    "compute": pytest.approx(report["executed_flops"] / 2 / 1e12),
    "memory": pytest.approx(moved.memory / 1e11),
    "interconnect": pytest.approx(moved.links.total() / 1e10),
    "network": 0,
  }
  slowest = max(report["seconds"].values())
  needs = report["input"]
  assert needs["images_per_second_and_host"] == pytest.approx(config.batch_size / slowest)
  assert needs["cores_per_host"] == pytest.approx(config.batch_size / slowest / 840)
  assert needs["cpus_per_host"] == 8
  assert needs["utilisation"] == pytest.approx(report["model_flops"] / 2 / 1e12 / slowest)


def test_the_table_shows_what_json_holds(report):
  report = report | {"largest": {"pairs": 8, "batch_size": 16, "tried": [[4, 2.0**28], [8, 2.0**29], [16, None]]}}
  again = json.loads(json.dumps(report, allow_nan=False))
  assert plan.table(again) == plan.table(report)
  text = "\n".join(plan.table(report))
  assert max(map(len, text.splitlines())) < 160
  for name, size in report["memory"].items():
    assert re.search(rf"{name.replace('_', ' ')} +{re.escape(plan._bytes(size))}", text)
  for kind, sent in report["collectives"].items():
    assert re.search(rf"{kind} +{sent['count']} +{re.escape(plan._bytes(sent['links']))} ", text)
  assert f"{report['seconds']['compute'] * 1e3:.1f} ms" in text
  assert "8 pairs, batch 16 (compiled 4: 256.00 MiB, 8: 512.00 MiB, 16: more than there is)" in text


def test_a_step_that_does_not_fit_is_told_with_the_largest_that_does(monkeypatch):
  def compile_step(config, over):
    if config.batch_size // len(over) > 11:
      raise plan.TooLarge(1e7 * config.batch_size / len(over))
    return config.batch_size // len(over)

  monkeypatch.setattr(plan, "compile_step", compile_step)
  monkeypatch.setattr(plan, "memory", lambda pairs: {"peak": 1e7 * pairs})
  monkeypatch.setitem(devices.DEVICES, "cpu", CHIP._replace(memory=1.19e8))
  config = tiny_config("clip")
  config.batch_size, config.micro_batches = 128, 2
  report = plan.plan(config, jax.devices())
  assert not report["fits"]
  assert report["needed"] == 1.6e8
  assert report["memory"] is report["seconds"] is report["collectives"] is None
  assert report["largest"] == {"pairs": 10, "batch_size": 80, "tried": [[8, 8e7], [10, 1e8], [16, 1.6e8]]}
  text = "\n".join(plan.table(report))
  assert "DOES NOT FIT: needs 152.59 MiB of 113.49 MiB" in text
  assert "largest batch on each chip that fits: 10 pairs, batch 80 " in text


def test_an_unknown_device_has_no_times(step, monkeypatch):
  config, compiled = step
  monkeypatch.setattr(plan, "compile_step", lambda *_: compiled)
  report = plan.plan(config, jax.devices()[:2])
  assert report["peak"] is report["fits"] is report["seconds"] is report["input"] is report["largest"] is None
  assert report["collectives"]
  assert "roofline" not in "\n".join(plan.table(report))


@pytest.mark.parametrize(
  ("first", "unit", "slope", "base", "want"),
  [
    (64, 1, 1.0, 100.0, 900),
    (64, 8, 1.0, 100.0, 896),
    (2000, 1, 1.0, 100.0, 900),
    (7, 7, 1.5, 40.0, 112),
    (64, 1, 0, 9, 1024),
  ],
)
def test_the_search_finds_the_largest_in_three_compilations(first, unit, slope, base, want):
  asked = []

  def need_of(pairs):
    asked.append(pairs)
    return base + slope * pairs

  tried = plan.search_largest(need_of, 1000.0, {first: base + slope * first}, unit)
  fitting = [pairs for pairs, need in tried.items() if need <= 1000]
  assert max(fitting) == want
  assert len(asked) <= 3
  assert not any(pairs % unit for pairs in asked)


def test_the_search_halves_while_nobody_says_what_is_needed():
  tried = plan.search_largest(lambda pairs: 500.0 if pairs <= 9 else math.inf, 1000.0, {64: math.inf}, 1)
  assert tried == {64: math.inf, 32: math.inf, 16: math.inf, 8: 500.0}
  assert plan.search_largest(lambda _: math.inf, 1.0, {1: math.inf}, 1) == {1: math.inf, 2: math.inf}


def test_libtpus_refusals_are_read():
  used = "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
  assert plan.needed(used, 1e9) == 20.5 * 2**30
  rest = "the total memory required for HLO temporaries (111.87G) exceeds available HBM (15.75G)."
  assert plan.needed(rest, 1e9) == 111.87 * 2**30 + 1e9
  assert plan.needed("something else", 1e9) == math.inf


def test_batches_that_do_not_divide_are_refused_by_name():
  config = tiny_config("clip")
  config.batch_size = 12
  with pytest.raises(ValueError, match=r"config.batch_size=12 does not divide over the 8 devices"):
    plan.plan(config)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(ModuleNotFoundError, match=r"v5e:4x4 needs libtpu.*pip install 'declip_jax\[tpu\]'"):
    plan.topology("v5e:4x4")


def test_every_recipe_has_a_measured_rate_that_the_results_show():
  measured = {plan._LIKE.get(name, name) for name in RECIPES}
  assert measured <= set(plan.RATES)
  results = (
    (ROOT / "docs" / "results.md").read_text().partition("500x375 JPEGs of 58 kB")[2].partition("flickr8k, 128")[0]
  )
  for name, rates in plan.RATES.items():
    cells = [cell.strip() for cell in re.search(rf"^\| {name} \|.*", results, re.MULTILINE)[0].split("|")]
    assert tuple(map(int, cells[4:7])) == rates


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_topology_is_compiled_for_with_libtpu(tmp_path):
  def command(*arguments):
    run = [sys.executable, "-m", "declip_jax.plan", f"--config={ROOT}/tests/tiny.py:clip", *arguments]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True)

  file = tmp_path / "plan.json"
  done = command("--topology=v5e:2x2", "--nosearch", f"--json={file}")
  assert done.returncode == 0, done.stderr
  report = json.loads(file.read_text())
  assert (report["device"], report["devices"], report["hosts"]) == ("TPU v5 lite", 4, 1)
  assert report["fits"]
  assert report["memory"]["peak"] <= report["available"] == 15.75 * 2**30
  assert report["seconds"]["compute"] == pytest.approx(report["executed_flops"] / 4 / 197e12)
  assert done.stdout == "\n".join(plan.table(report)) + "\n"
  assert "compiling the step for 4 x TPU v5 lite, 4 pairs on each" in done.stderr
  refused = command("--topology=v5e:3x3")
  assert refused.returncode == 2
  assert "v5e:3x3" in refused.stderr
  assert "v5e:16x16" in refused.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_parameters_are_gathered_in_bfloat16_on_a_tpu():
  code = """
import re, jax, jax.numpy as jnp
from declip_jax import plan, sharding
mesh = sharding.make_mesh(2, 2, plan.topology("v5e:2x2"))
shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
layout = sharding.shard_like(shape, mesh)
loss = lambda w, x: (x.astype(jnp.bfloat16) @ sharding.gather(w, mesh, jnp.bfloat16)).astype(jnp.float32).sum()
x = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=sharding.batch_sharding(mesh))
w = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout)
text = jax.jit(jax.value_and_grad(loss), out_shardings=(None, layout)).lower(w, x).compile().as_text()
print(sorted(set(re.findall(r"= (\\w+[[][0-9,]+[]])[^ ]* all-gather", text))))
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "['bf16[1024,1024]']"
