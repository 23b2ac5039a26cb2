"""Tests of `declip_jax.plan`, the command."""

import dataclasses
import importlib.util
import json
from pathlib import Path
import subprocess
import sys
from types import SimpleNamespace

from absl import flags
from ml_collections import ConfigDict
import pytest
from steps import step_config
from tiny import tiny_config

from declip_jax import build, config, plan
from declip_jax.planning.report import Report

ROOT = Path(__file__).parent.parent


@pytest.fixture
def values(monkeypatch) -> SimpleNamespace:
  """The flags of a command that must not reach the compiler."""
  values = SimpleNamespace(
    config=tiny_config("clip"), topology=None, slices=1, search=True, json=None, text_length=None
  )
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


def test_what_a_config_leaves_open_is_chosen_for_its_data(monkeypatch, tmp_path):
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


@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 1), (None, 0)])
def test_exit_code_is_1_if_the_step_does_not_fit(values, monkeypatch, fits, code):
  monkeypatch.setattr(plan, "make_report", lambda *_: dataclasses.make_dataclass("Fake", ["fits"])(fits))
  monkeypatch.setattr(plan, "table", lambda _: ["table"])
  assert plan._command([]) == code


def test_each_stage_has_a_report_and_the_run_has_its_flops(values, monkeypatch, tmp_path, capsys):
  of_all = {"device": "a", "devices": 1, "hosts": 1, "slices": 1, "mesh": {}, "batch_size": 16, "layout": []}
  of_all |= {"model_flops": 100.0, "peak": None, "available": 1.0, "needed": 1.0}
  compiled = []

  def make_report(of_stage: ConfigDict, devices: None, search: bool, run: ConfigDict) -> Report:
    assert run is values.config
    compiled.append(of_stage.data.image_size)
    size = of_stage.data.image_size
    return Report(**of_all, fits=size != 8, batch=f"images of {size}")

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


@pytest.mark.parametrize(("method", "longest"), [("declip", 16), ("simclr", 0), ("clip siglip", 0)])
def test_a_length_of_texts_is_planned_as_a_stage_whose_masks_are_those_of_whole_texts(
  values, monkeypatch, method, longest, capsys
):
  values.config = step_config(method)
  values.config.model.text.buckets, values.config.data.mask_slots, values.text_length = (8, 12), 0, 12
  planned = []
  monkeypatch.setattr(
    plan, "make_report", lambda *args: planned.append(args) or dataclasses.make_dataclass("Fake", ["fits"])(True)
  )
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
