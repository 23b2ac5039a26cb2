"""Tests of `benchmarks/`: two source trees are compared, and every benchmark starts."""

import os
from pathlib import Path
import subprocess
import sys
from types import ModuleType

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_starts(name):
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  command = [sys.executable, str(ROOT / "benchmarks" / name), "--help"]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("usage: ")
