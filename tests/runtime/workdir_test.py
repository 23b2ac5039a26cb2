"""The working directory: its lock, the record of its starts, and the compile cache."""

import errno
from pathlib import Path
import subprocess
import sys

import jax
import pytest
from tiny import tiny_config

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
  with pytest.raises(ValueError, match=rf"{tmp_path} cannot be written to: .*denied"), workdir_lib.lock(tmp_path):
    pass


def test_an_address_is_not_a_directory() -> None:
  with pytest.raises(ValueError, match="gs://bucket/run.*mount"):
    workdir_lib.local_path("gs://bucket/run")
  with pytest.raises(ValueError, match="--workdir is empty"):
    workdir_lib.local_path("")


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


def test_a_change_of_a_field_that_had_another_name_is_reported(tmp_path: Path) -> None:
  """The file is what 6279b88 wrote for tiny_config("declip")."""
  old = Path(__file__).parents[1] / "fixtures" / "config_6279b88.json"
  (tmp_path / "config.json").write_bytes(old.read_bytes())
  config, mesh = tiny_config("declip"), sharding.make_mesh(-1, 1)
  config.contrast.method, config.safety.max_rollbacks = "ring", 7
  changed = workdir_lib.record(config.to_json_best_effort(), mesh, tmp_path, {})
  assert changed == ["config.contrast.method: 'auto' -> 'ring'", "config.safety.max_rollbacks: 3 -> 7"]


def test_programs_are_cached_with_the_run_unless_there_is_another_cache(tmp_path: Path) -> None:
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    workdir_lib.use_compile_cache(tmp_path)
    assert jax.config.jax_compilation_cache_dir == "elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    workdir_lib.use_compile_cache(tmp_path)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
