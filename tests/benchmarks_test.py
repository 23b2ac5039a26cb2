"""Tests of `benchmarks/`: two source trees are compared, and every benchmark starts."""

import argparse
import os
from pathlib import Path
import subprocess
import sys
from types import ModuleType

import jax
from ml_collections import ConfigDict
import pytest

from declip_jax import build, config
from declip_jax.planning.compile import OutOfMemory

ROOT = Path(__file__).parent.parent
BENCHMARKS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())
# Follows the protocol of `benchmarks/step_worker.py` without compiling anything.
WORKER = """
import json, sys
if "bad" in sys.argv:
  sys.exit("ValueError: unknown method")
print(json.dumps({{"batch_size": 4, "compile_seconds": {seconds}}}), flush=True)
for index, _ in enumerate(sys.stdin):
  print(json.dumps({{"seconds": {seconds} * (1 + 100 * (index == 0)), "cpu_seconds": 2 * {seconds}}}), flush=True)
"""


@pytest.fixture
def two_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
  """The module, for a tree "this" whose steps take 1 ms and a tree "other" whose steps take 2 ms."""
  for name, seconds in (("this", 1e-3), ("other", 2e-3)):
    (tmp_path / name / "benchmarks").mkdir(parents=True)
    (tmp_path / name / "benchmarks" / "step_worker.py").write_text(WORKER.format(seconds=seconds))
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  import two_trees

  monkeypatch.setattr(two_trees, "ROOT", tmp_path / "this")
  return two_trees


def test_benchmarks_of_two_trees_exclude_the_first_round(two_trees, tmp_path, capsys):
  two_trees.compare(tmp_path / "other", None, "demo", ["clip", "bad"], None, rounds=3)
  *_, clip, bad = capsys.readouterr().out.splitlines()
  assert clip.split() == ["clip", "0.0", "0.0", "1.0", "2.0", "0.500", "0.50-0.50", "0.500", "0.500"]
  assert bad.startswith("bad")
  assert "unknown method" in bad


def test_a_study_trains_every_method_on_nested_shares_with_equal_steps(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  import data_efficiency

  of = {"methods": ["clip", "declip:paper"], "shares": [5.0, 100.0], "seeds": 2, "steps": 12, "dataset": "fashion44k"}
  args = argparse.Namespace(**of, data=Path("/data"))
  cells = list(data_efficiency.cells(args))
  assert [cell.name for cell in cells[:5]] == [
    *("clip-5pct-0", "declip_paper-5pct-0", "clip-100pct-0", "declip_paper-100pct-0", "clip-5pct-1"),
  ]
  few, paper, all_pairs = (cell.config(args) for cell in cells[:3])
  assert few.data.train == ("heldout:5%:webdataset:/data/train-*.tar",)
  assert all_pairs.data.train == ("webdataset:/data/train-*.tar",)
  assert few.duration == all_pairs.duration
  assert paper.data.strong_scale is None  # that of the recipe
  assert data_efficiency.Cell("declip", 5.0, 1).config(args).data.strong_scale == (0.5, 1.0)


def test_the_accelerator_benchmark_halves_a_batch_until_it_fits(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  import accelerator

  tried = []

  def ours(row: accelerator.Row, c: ConfigDict) -> accelerator.Measured:
    pairs = c.batch_size // jax.device_count()
    tried.append((pairs, c.model.text.context_length))
    if pairs > 128:
      raise OutOfMemory(2.0**40)
    return accelerator.Measured(lambda: None, c.batch_size, 1.0, lambda: 2.0**31)

  monkeypatch.setattr(accelerator, "ours", ours)
  args = argparse.Namespace(pairs=None, dtype="bfloat16", steps=2, architectures=["ViT-B/32"], methods=["clip", "slip"])
  clip, slip, whole = list(accelerator.rows(args))[:3]
  assert [clip.method, slip.method, whole.name] == ["clip", "slip", "clip with ViT-B/32, whole texts"]
  cells = accelerator.measure(clip, args, 1e12).split(" | ")
  assert (cells[3], cells[-1]) == ("128", "2.0 |")
  assert tried == [(512, 16), (256, 16), (128, 16)]
  accelerator.measure(whole, args, 1e12)
  assert tried[-1] == (128, 77)
  declip = accelerator.make_config(accelerator.Row("ViT-B/32", "declip"), "bfloat16", 8)
  shapes, whole_shapes = (build.build(c).batch_shape(8) for c in (declip, config.default("declip")))
  assert shapes["text"].shape[-1] == 16
  assert shapes["mlm_position"] == whole_shapes["mlm_position"]
  assert capsys.readouterr().err.count("do not fit") == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_starts(name):
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  command = [sys.executable, str(ROOT / "benchmarks" / name), "--help"]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("usage: ")
