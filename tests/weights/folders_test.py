"""What an error says about a path without weights: the runs nearby, and the flag."""

from pathlib import Path

import pytest

from declip_jax.command_line import naming
from declip_jax.weights.folders import nearby_runs
from declip_jax.weights.read import read


def test_a_path_that_does_not_exist_is_named_with_its_flag_and_the_runs_nearby(tmp_path: Path) -> None:
  for name in ("a", "b", "demo-slip", "demo"):
    (tmp_path / name / "checkpoints").mkdir(parents=True)
  (tmp_path / "other").mkdir()
  runs = f"; runs nearby: {tmp_path}/demo, {tmp_path}/a, {tmp_path}/b ..."
  with pytest.raises(FileNotFoundError) as missing, naming("--workdir"):
    read(tmp_path / "deemo")
  assert str(missing.value) == f"--workdir: {tmp_path}/deemo does not exist{runs}"
  with pytest.raises(FileNotFoundError, match=f"has no weights: .*; runs nearby: {tmp_path}/a, "):
    read(tmp_path)
  assert nearby_runs(tmp_path / "demo" / "checkpoints" / "8") == nearby_runs(tmp_path / "a" / "x") == ""
