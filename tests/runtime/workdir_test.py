"""The working directory: its lock, the record of its starts, and the compile cache."""

import errno
import json
import os
from pathlib import Path
import re
import subprocess
import sys

import jax
import pytest
from record_files import damages
from tiny import tiny_config

import declip_jax
from declip_jax import sharding
from declip_jax.runtime import workdir as workdir_lib


def test_a_directory_in_use_is_rejected_until_its_run_is_gone(tmp_path: Path) -> None:
  script = (
    "import pathlib, sys, time\nfrom declip_jax.runtime import workdir\n"
    "with workdir.lock(pathlib.Path(sys.argv[1])):\n  print('locked', flush=True)\n  time.sleep(600)"
  )
  holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
  assert holder.stdout.readline() == "locked\n"
  with (
    pytest.raises(ValueError, match=rf"in use by another run: .+, process {holder.pid}, since \d{{4}}-"),
    workdir_lib.lock(tmp_path),
  ):
    pass
  holder.kill()
  holder.wait()
  with workdir_lib.lock(tmp_path) as message:
    assert message == ""


def test_without_locks_a_run_warns_and_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def flock(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(workdir_lib.fcntl, "flock", flock)
  with workdir_lib.lock(tmp_path) as message:
    assert "No locks available" in message
    assert "not protected" in message


def test_a_directory_without_write_permission_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def open_file(*_: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(Path, "open", open_file)
  with pytest.raises(ValueError, match=rf"{tmp_path} is not writable: .*denied"), workdir_lib.lock(tmp_path):
    pass


def test_an_address_or_a_file_is_not_a_directory(tmp_path: Path) -> None:
  with pytest.raises(ValueError, match="gs://bucket/run.*mount"):
    workdir_lib.local_path("gs://bucket/run")
  with pytest.raises(ValueError, match="--workdir=hf-hub:org/model is a model on the .* hub: pass it as --weights"):
    workdir_lib.local_path("hf-hub:org/model")
  with pytest.raises(ValueError, match="--workdir is empty"):
    workdir_lib.local_path("")
  (tmp_path / "run").write_text("")
  with pytest.raises(ValueError, match=r"--workdir=.*run is a file: expected a directory"):
    workdir_lib.local_path(tmp_path / "run")


def test_changes_of_config_and_data_are_reported_at_the_next_start(tmp_path: Path) -> None:
  config, mesh = tiny_config("clip"), sharding.make_mesh(-1, 1)

  def record(**samples: int) -> list[str]:
    return workdir_lib.record(config.to_json_best_effort(), mesh, tmp_path, samples)

  assert record(a=1000, b=5) == []
  (changed,) = record(a=1200, c=7)
  assert changed.startswith("a had 1,000 samples and now has 1,200")
  config.batch_size = 32
  assert record(a=1200, c=7) == ["config.batch_size: 16 -> 32"]
  assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 3


def test_data_with_another_stamp_and_as_many_samples_are_reported(tmp_path: Path) -> None:
  config, mesh = tiny_config("clip").to_json_best_effort(), sharding.make_mesh(-1, 1)

  def record(a: str, **more: str) -> list[str]:
    return workdir_lib.record(config, mesh, tmp_path, {"a": 5}, {"a": a, **more})

  workdir_lib.record(config, mesh, tmp_path, {"a": 5})  # as older versions did, without stamps
  assert record("1") == record("1", b="2") == []
  (changed,) = record("3")
  assert changed.startswith("a has as many samples as before, but its files have changed")


def test_a_start_has_the_versions(tmp_path: Path) -> None:
  workdir_lib.record(tiny_config("clip").to_json_best_effort(), sharding.make_mesh(-1, 1), tmp_path, {})
  versions = json.loads((tmp_path / "starts.jsonl").read_text())["versions"]
  assert (versions["declip_jax"], versions["jax"]) == (declip_jax.__version__, jax.__version__)


def test_a_finished_run_keeps_its_config(tmp_path: Path) -> None:
  config, mesh = tiny_config("clip"), sharding.make_mesh(-1, 1)
  workdir_lib.record(before := config.to_json_best_effort(), mesh, tmp_path, {})
  config.seed = 7
  again = workdir_lib.record(config.to_json_best_effort(), mesh, tmp_path, {}, total_steps=9, finished=True)
  assert again == ["config.seed: 0 -> 7"]
  assert [start.total_steps for start in workdir_lib.read_starts(tmp_path)] == [0, 9]
  assert (tmp_path / "config.json").read_text() == before + "\n"


def test_a_list_of_starts_that_is_cut_off_or_garbled_anywhere_stops_no_start(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config, mesh = tiny_config("clip").to_json_best_effort(), sharding.make_mesh(-1, 1)
  monkeypatch.setattr(workdir_lib, "_git_revision", lambda: "unknown")
  monkeypatch.setattr(workdir_lib, "_PACKAGES", ())  # so that the line is short
  monkeypatch.setattr(os, "fsync", lambda descriptor: None)
  monkeypatch.setattr(sys, "argv", ["train"])
  for _ in range(2):
    workdir_lib.record(config, mesh, tmp_path, {"a": 5}, {"a": "1"})
  path = tmp_path / "starts.jsonl"
  whole = path.read_bytes()
  for number, damaged in enumerate(damages(whole)):
    path.write_bytes(damaged)
    assert workdir_lib.read_starts(tmp_path)[0][:3] == (["train"], {"a": 5}, {"a": "1"})
    if number % 10:
      continue
    workdir_lib.record(config, mesh, tmp_path, {"a": 5}, {"a": "1"})
    assert path.read_bytes().startswith(damaged)  # nothing is lost that could be read
    assert json.loads(path.read_bytes().splitlines()[-1])["samples"] == {"a": 5}


def test_a_config_that_is_cut_off_or_garbled_anywhere_stops_no_start(
  tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
  config, mesh = tiny_config("clip").to_json_best_effort(indent=2), sharding.make_mesh(-1, 1)
  workdir_lib.record(config, mesh, tmp_path, {})
  path = tmp_path / "config.json"
  for damaged in [*damages(whole := path.read_bytes()), *(whole[:size] for size in range(0, len(whole) - 2, 29))]:
    path.write_bytes(damaged)
    assert workdir_lib.read_config(tmp_path) is None or json.loads(damaged) == json.loads(config)
  path.write_bytes(b"")
  caplog.clear()
  assert workdir_lib.record(config, mesh, tmp_path, {}) == []
  assert f"{path} is damaged and is not used" in caplog.text
  assert json.loads(path.read_text()) == json.loads(config)


def test_a_change_of_a_field_that_had_another_name_is_reported(tmp_path: Path) -> None:
  """The file is what 6279b88 wrote for tiny_config("declip")."""
  old = Path(__file__).parents[1] / "fixtures" / "config_6279b88.json"
  (tmp_path / "config.json").write_bytes(old.read_bytes())
  config, mesh = tiny_config("declip"), sharding.make_mesh(-1, 1)
  config.contrast.method, config.safety.max_rollbacks = "ring", 7
  changed = workdir_lib.record(config.to_json_best_effort(), mesh, tmp_path, {})
  assert changed == [
    "config.contrast.method: 'auto' -> 'ring'",
    "config.model.text.buckets: () -> (16, 24, 32, 40, 48, 64)",
    "config.safety.max_rollbacks: 3 -> 7",
  ]


def test_the_revision_is_that_of_the_package_and_not_of_a_repository_around_it(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  git = ["git", "-C", str(tmp_path), "-c", "user.email=a@b", "-c", "user.name=a"]
  installed = tmp_path / "site-packages" / "workdir.py"
  installed.parent.mkdir()
  installed.touch()
  subprocess.run([*git, "init", "-q"], check=True)
  subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "their own work"], check=True)
  monkeypatch.setattr(workdir_lib, "__file__", str(installed))
  assert workdir_lib._git_revision() == "unknown"
  subprocess.run([*git, "add", "site-packages"], check=True)
  subprocess.run([*git, "commit", "-q", "-m", "the package"], check=True)
  assert re.fullmatch("[0-9a-f]{12}", workdir_lib._git_revision())


def test_stages_evaluations_and_trackers_that_only_one_config_has_are_differences() -> None:
  before = {"stages": {}, "evals": {"a": 1}, "trackers": {}, "objective": {"clip": 1}}
  after = {"stages": {"low": 2}, "evals": {}, "trackers": {"mine": "f"}, "objective": {"clip": 1, "new": 0}}
  assert workdir_lib.differences(before, after) == [
    "config.evals.a: 1 -> None",
    "config.stages.low: None -> 2",
    "config.trackers.mine: None -> 'f'",
  ]


def test_a_directory_of_another_method_or_model_is_described_in_a_line(tmp_path: Path) -> None:
  saved = tiny_config("clip")
  (tmp_path / "config.json").write_text(saved.to_json_best_effort())

  def about(**changes: int) -> str:
    c = saved.copy_and_resolve_references()
    c.update_from_flattened_dict(changes)
    return workdir_lib.about_other_run(tmp_path, c.to_json_best_effort())

  method = workdir_lib.about_other_run(tmp_path, tiny_config("declip").to_json_best_effort())
  assert f"{tmp_path} has a run of the method clip, but the config asks for declip: choose another --workdir" in method
  assert str(tmp_path / "config.json") in method
  assert "(config.model.image.width: 32 -> 64; config.model.text.depth: 2 -> 3)" in about(
    **{"model.image.width": 64, "model.text.depth": 3, "seed": 1}
  )
  assert about(seed=1) == ""
  assert "\n" not in method
