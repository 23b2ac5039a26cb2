"""What an error says about a path without weights: the runs nearby, and the flag."""

from pathlib import Path

import pytest

from declip_jax.command_line import naming
from declip_jax.weights.folders import nearby_runs
from declip_jax.weights.read import read


def test_a_path_that_does_not_exist_is_named_with_its_flag_and_the_runs_nearby(tmp_path: Path) -> None:
  runs = tmp_path / "runs"  # whose neighbours are no other tests'
  for name in ("a", "b", "demo-slip", "demo"):
    (runs / name / "checkpoints").mkdir(parents=True)
  (runs / "other").mkdir()
  nearby = f"; runs nearby: {runs}/demo, {runs}/a, {runs}/b ..."
  with pytest.raises(FileNotFoundError) as missing, naming("--workdir"):
    read(runs / "deemo")
  assert str(missing.value) == f"--workdir: {runs}/deemo does not exist{nearby}"
  with pytest.raises(FileNotFoundError, match=f"has no weights: .*; runs nearby: {runs}/a, "):
    read(runs)
  assert nearby_runs(runs / "demo" / "checkpoints" / "8") == nearby_runs(runs / "a" / "x") == ""
