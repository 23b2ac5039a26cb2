"""Tests of `declip_jax.plan`, the command."""

import importlib.util
import json
from pathlib import Path
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from absl import flags
import jax
from ml_collections import ConfigDict
import pytest
from steps import step_config
from tiny import tiny_config

from declip_jax import build, config, plan
from declip_jax.planning import choose
from declip_jax.planning.devices import DEVICES, Device
from declip_jax.planning.report import Report, Times

ROOT = Path(__file__).parent.parent
CHIP = Device(1e12, 2**30, 1e11, 2, 5e9, None, 4)


def fake_report(**fields: Any) -> Report:
  """A report on a step of 16 pairs that takes 0.1 s, on four devices, each with 1 TFLOP/s and 1 GiB."""
  known = {
    "device": "a",
    "devices": 4,
    "hosts": 1,
    "slices": 1,
    "mesh": {},
    "batch_size": 16,
    "batch": "b",
    "layout": [],
  }
  known |= {"model_flops": 100.0, "peak": CHIP, "available": 2.0**30, "needed": 2.0**29, "fits": True}
  return Report(**(known | {"seconds": Times(0.05, 0.1, 0.0, None)} | fields))


@pytest.fixture
def values(monkeypatch) -> SimpleNamespace:
  """The flags of a command that must not reach the compiler."""
  values = SimpleNamespace(
    config=tiny_config("clip"), topology=None, slices=1, search=True, json=None, text_length=None
  )
  values.fastest, values.samples, values.utilisation, values.price = False, None, 0.4, None
  monkeypatch.setattr(flags, "FLAGS", values)
  monkeypatch.setattr(plan, "choose", lambda config, *_: config)
  monkeypatch.setattr(plan, "make_report", lambda *_: pytest.fail("compiled before the flags were checked"))
  return values


def test_json_into_a_missing_folder_is_rejected_before_compiling(values, tmp_path):
  values.json = str(tmp_path / "missing" / "plan.json")
  with pytest.raises(ValueError, match=r"--json=.*missing/plan\.json"):
    plan._command([])


def test_slices_without_a_topology_are_rejected(values):
  values.slices = 2
  with pytest.raises(ValueError, match=r"--slices=2.*--topology"):
    plan._command([])


def test_what_a_config_leaves_open_is_chosen_for_its_data(values, monkeypatch, tmp_path):
  chosen_for = []
  monkeypatch.setattr(plan, "choose", lambda c, samples, devices: [chosen_for.append(samples), c][1])
  c = tiny_config("clip")
  assert plan._with_choices(c, None)[1] == ""
  c.batch_size = 0
  note = plan._with_choices(c, None)[1]
  assert note == "chosen for 256 samples: batch_size=0; --config.FIELD=VALUE sets another value"
  c.data.train = (f"table:{tmp_path}/pairs.csv",)
  assert "for a large data set (" in plan._with_choices(c, None)[1]
  assert f"{tmp_path}/pairs.csv" in plan._with_choices(c, None)[1]
  c.data.train = ()
  assert "for a large data set (without data=): batch_size=0" in plan._with_choices(c, None)[1]
  assert chosen_for == [256, None, None, None]
  values.samples = 10**6
  assert plan._with_choices(c, None)[1:3] == (
    "chosen for 1,000,000 samples: batch_size=0; --config.FIELD=VALUE sets another value",
    10**6,
  )


@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 1), (None, 0)])
def test_exit_code_is_1_if_the_step_does_not_fit(values, monkeypatch, fits, code):
  monkeypatch.setattr(plan, "make_report", lambda *_: fake_report(fits=fits))
  monkeypatch.setattr(plan, "table", lambda _: ["table"])
  assert plan._command([]) == code


def test_each_stage_has_a_report_and_the_run_has_its_flops(values, monkeypatch, tmp_path, capsys):
  compiled = []

  def make_report(of_stage: ConfigDict, devices: None, search: bool, run: ConfigDict) -> Report:
    assert run is values.config
    compiled.append(of_stage.data.image_size)
    size = of_stage.data.image_size
    return fake_report(fits=size != 8, batch=f"images of {size}")

  monkeypatch.setattr(plan, "make_report", make_report)
  values.config.stages.low = config.stage(duration=config.duration(steps=2), image_size=8)
  values.json = str(tmp_path / "plan.json")
  assert plan._command([]) == 1  # one of them does not fit
  assert compiled == [8, 16]
  printed = capsys.readouterr().out
  for text in ("stage low: images of 8", "stage last: images of 16", "FLOPs of the run: 800 "):
    assert text in printed
  written = json.loads(Path(values.json).read_text())
  assert {name: found["batch"] for name, found in written["stages"].items()} == {
    "low": "images of 8",
    "last": "images of 16",
  }
  assert written["run"] == {"flops": 800.0, "per_sample": False, "share": 1.0}


def test_several_topologies_are_rows_of_a_table(values, monkeypatch, tmp_path, capsys):
  values.topology, values.samples, values.price = "v5e:2x2,v5e:4x4", 3600, 1.5
  values.config.duration = config.duration(epochs=10)
  values.json = str(tmp_path / "plan.json")
  reports = {
    4: fake_report(model_flops=4e11),
    16: fake_report(devices=16, model_flops=4e11, fits=False, needed=2.0**31, seconds=None),
  }
  sizes = {"v5e:2x2": 4, "v5e:4x4": 16}
  monkeypatch.setattr(plan, "topology_devices", lambda name, slices: [None] * sizes[name])
  monkeypatch.setattr(plan, "make_report", lambda c, devices, *_: reports[len(devices)])
  assert plan._command([]) == 1
  head, small, large = capsys.readouterr().out.splitlines()
  # 2,250 steps of 4e11 FLOPs at 40 % of 4 TFLOP/s are 562.5 s.
  cost = ["0.0625", "0.156", "0.625", "0.938"]  # least hours, hours, device-hours, price
  assert small.split() == ["v5e:2x2", "4", "4", "0.5", "GiB", "100.0", "ms", *cost]
  assert large.split() == ["v5e:4x4", "16", "1", "does", "not", "fit", "0.0391", "0.625", "0.938"]
  assert len(head) == len(small) == len(large)
  written = json.loads(Path(values.json).read_text())["topologies"]
  assert written["v5e:2x2"]["cost"]["steps"] == 2250
  assert written["v5e:2x2"]["cost"]["hours"] == pytest.approx(562.5 / 3600)
  values.samples, values.config.data.train = None, ()
  assert plan._command([]) == 1
  assert "pass --samples, the number of samples" in capsys.readouterr().out


def test_the_fastest_step_that_fits_is_found_and_its_arguments_printed(values, monkeypatch, capsys):
  values.config.batch_size, values.fastest, values.config.duration = 64, True, config.duration(steps=10)
  compiled = []

  def make_report(c: ConfigDict, *_: Any) -> Report:
    compiled.append((c.mesh.fsdp, c.model.remat, c.micro_batches))
    fits = c.mesh.fsdp > 1 and c.model.remat != "none"
    seconds = {(4, "dots"): 0.2, (4, "full"): 0.1}.get((c.mesh.fsdp, c.model.remat), 0.3)
    return fake_report(devices=8, fits=fits, seconds=Times(0.0, seconds, 0.0, None))

  monkeypatch.setattr(plan, "make_report", make_report)
  monkeypatch.setattr(plan, "available_memory", lambda device: None)
  with pytest.raises(ValueError, match="--fastest: the peak figures of 'cpu' are not known"):
    plan._command([])
  monkeypatch.setitem(DEVICES, "cpu", CHIP)
  monkeypatch.setattr(plan, "table", lambda report: [f"step {report.seconds.step}"])
  assert plan._command([]) == 0
  assert compiled == [
    (1, "dots", 1),
    (4, "dots", 1),
    (8, "dots", 1),
    (4, "narrow_dots", 1),
    (4, "full", 1),
    (4, "none", 1),
  ]
  printed = capsys.readouterr().out
  assert printed.startswith("step 0.1\n")
  assert "use --config.mesh.fsdp=4 --config.model.remat=full --config.micro_batches=1\n" in printed
  assert printed.count("does not fit") == 2
  values.config.stages.low = config.stage(duration=config.duration(steps=2))
  with pytest.raises(ValueError, match=r"--fastest: a config with config\.stages"):
    plan._command([])


def test_a_step_that_fits_only_if_all_devices_share_the_parameters_is_found(values, monkeypatch, capsys):
  values.config.batch_size, values.fastest, values.topology = 64, True, "v5e:2x2,v5e:2x4"
  monkeypatch.setitem(DEVICES, "cpu", CHIP)
  monkeypatch.setattr(plan, "available_memory", lambda device: None)
  sizes = {"v5e:2x2": 4, "v5e:2x4": 8}
  monkeypatch.setattr(plan, "topology_devices", lambda name, slices: jax.devices()[: sizes[name]])
  monkeypatch.setattr(
    plan,
    "make_report",
    lambda c, devices, *_: fake_report(
      devices=len(devices), fits=(c.mesh.fsdp, c.model.remat) == (len(devices), "full"), needed=2.0**30
    ),
  )
  assert plan._command([]) == 0
  *_, small, large = filter(None, capsys.readouterr().out.splitlines())
  assert small == "topology v5e:2x2: use --config.mesh.fsdp=4 --config.model.remat=full --config.micro_batches=1"
  assert large == "topology v5e:2x4: use --config.mesh.fsdp=8 --config.model.remat=full --config.micro_batches=1"
  values.topology = "v5e:2x2,"
  with pytest.raises(ValueError, match="--topology=v5e:2x2,: expected different names"):
    plan._command([])


def test_more_micro_batches_are_tried_only_if_nothing_fits(values, monkeypatch, capsys):
  values.config.batch_size, values.fastest = 64, True
  monkeypatch.setitem(DEVICES, "cpu", CHIP)
  available = 16.0
  monkeypatch.setattr(plan, "available_memory", lambda device: available)
  monkeypatch.setattr(
    choose, "estimate", lambda c, built: choose.Estimate(8.0, 1.0)
  )  # 16, 12, 10 bytes with 8, 4, 2 pairs
  compiled = []

  def make_report(c: ConfigDict, *_: Any) -> Report:
    compiled.append(c.micro_batches)
    return fake_report(devices=8, fits=c.micro_batches == 4)

  monkeypatch.setattr(plan, "make_report", make_report)
  monkeypatch.setattr(plan, "table", lambda report: [])
  assert plan._command([]) == 0
  assert sorted(set(compiled)) == [1, 2, 4]
  compiled.clear()
  available = 5.0  # less than a step needs even if the estimate is wrong, so nothing is compiled
  with pytest.raises(ValueError, match="--fastest: "):
    plan._command([])
  assert not compiled


@pytest.mark.parametrize(("method", "longest"), [("declip", 16), ("simclr", 0), ("clip siglip", 0)])
def test_a_length_of_texts_is_planned_as_a_stage_whose_masks_are_those_of_whole_texts(
  values, monkeypatch, method, longest, capsys
):
  values.config = step_config(method)
  values.config.model.text.buckets, values.config.data.mask_slots, values.text_length = (8, 12), 0, 12
  planned = []
  monkeypatch.setattr(plan, "make_report", lambda *args: planned.append(args) or fake_report())
  monkeypatch.setattr(plan, "table", lambda _: ["table"])
  if not longest:
    with pytest.raises(ValueError, match="--text_length=12: this config does not trim texts"):
      plan._command([])
    return
  assert plan._command([]) == 0
  assert "texts are trimmed to what 12 tokens need" in capsys.readouterr().out
  [(trimmed, _, _, run)] = planned
  assert run is values.config
  whole, short = (build.build(c).batch_shape(16) for c in (run, trimmed))
  assert (short["text"].shape[-1], whole["text"].shape[-1]) == (12, 16)
  assert {**short, "text": 0} == {**whole, "text": 0}
  values.text_length = 17
  with pytest.raises(ValueError, match=r"--text_length=17: expected at most config\.model\.text\.context_length=16"):
    plan._command([])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_command_compiles_for_a_topology(tmp_path):
  def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "declip_jax.plan", f"--config={ROOT}/tests/tiny.py:clip", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)

  file = tmp_path / "plan.json"
  done = command("--topology=v5e:2x2", "--nosearch", f"--json={file}")
  assert done.returncode == 0, done.stderr
  report = json.loads(file.read_text())
  assert (report["device"], report["devices"], report["hosts"]) == ("TPU v5 lite", 4, 1)
  assert report["fits"]
  assert report["memory"]["peak"] <= report["available"] == 15.75 * 2**30
  assert report["seconds"]["compute"] == pytest.approx(report["executed_flops"] / 4 / 197e12)
  for text in ("4 x TPU v5 lite, 1 host", "minimum time (roofline)", f"{report['seconds']['compute'] * 1e3:.1f} ms"):
    assert text in done.stdout
  assert "4 x TPU v5 lite, 4 pairs" in done.stderr
  rejected = command("--topology=v5e:3x3")
  assert rejected.returncode == 2
  assert "v5e:3x3" in rejected.stderr
  assert "v5e:16x16" in rejected.stderr
