"""The cache of compiled programs: damage is removed, and what another user could have written is not used."""

from collections.abc import Iterator
import os
from pathlib import Path
import zlib

import jax
import pytest

from declip_jax.runtime.compile_cache import compile_cache, why_untrusted


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
  """The folder of a cache, while no other one is configured."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  yield tmp_path / "run" / "compiled"
  jax.config.update("jax_compilation_cache_dir", before)


def use(folder: Path) -> str | None:
  """Opens the cache as the start of a run does; returns the folder that JAX is given."""
  jax.config.update("jax_compilation_cache_dir", None)
  with compile_cache(folder):
    return jax.config.jax_compilation_cache_dir


def entry(folder: Path, name: str, content: bytes = b"code") -> Path:
  path = folder / f"{name}-cache"
  path.write_bytes(zlib.compress(content * 100))
  return path


def test_programs_are_cached_with_the_run_unless_there_is_another_cache(folder: Path) -> None:
  with compile_cache(folder):
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    entry(folder, "program")
  jax.config.update("jax_compilation_cache_dir", "elsewhere")
  with compile_cache(folder):
    assert jax.config.jax_compilation_cache_dir == "elsewhere"


def test_a_run_that_does_not_begin_leaves_no_folder(folder: Path) -> None:
  with pytest.raises(ValueError, match="config"), compile_cache(folder):
    raise ValueError("config")
  assert not folder.parent.exists()


def test_damaged_entries_are_removed_and_whole_ones_stay(folder: Path) -> None:
  with compile_cache(folder):
    whole, flipped = entry(folder, "whole"), entry(folder, "flipped")
  cut = entry(folder, "cut")  # by a run that was killed, so it has no checksum
  cut.write_bytes(cut.read_bytes()[:10])
  new = entry(folder, "new")
  flipped.write_bytes(zlib.compress(b"c0de" * 100))
  assert use(folder) == str(folder)
  assert whole.exists()
  assert new.exists()
  assert not cut.exists()
  assert not flipped.exists()
  (folder / "checksums.json").write_text("{")
  assert use(folder) == str(folder)
  assert whole.exists()


def test_what_another_user_could_write_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  with compile_cache(folder):
    path = entry(folder, "program")
  folder.chmod(0o755)
  assert not why_untrusted(folder)
  path.chmod(0o664)
  assert "program-cache, which contains native code, can be written" in why_untrusted(folder)
  folder.chmod(0o700)  # no other user can access the file
  assert use(folder) == str(folder)
  folder.chmod(0o775)
  assert use(folder) is None
  folder.chmod(0o700)
  path.unlink()
  path.symlink_to("/etc/passwd")
  assert "is a link" in why_untrusted(folder)
  path.unlink()
  entry(folder, "program")
  os.chown(folder, 12345, -1) if os.getuid() == 0 else monkeypatch.setattr(os, "getuid", lambda: 12345)
  assert "belongs to another user" in why_untrusted(folder)
  assert use(folder) is None
