"""Files for the tests of storage: a cache folder for each test, and a folder on disk and at a URL."""

from pathlib import Path

import fsspec
import pytest

BODY = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
  """A cache folder for one test."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
  return folder / "declip_jax"


@pytest.fixture(params=["local", "url"])
def folder(request, tmp_path) -> str:
  """A folder with three files, on a disk and at a URL."""
  memory = fsspec.filesystem("memory")
  memory.store.clear()
  for name in ("a-08.bin", "a-09.bin", "a-10.bin"):
    (tmp_path / name).write_bytes(name.encode() + BODY)
    memory.pipe(f"/bucket/data/{name}", name.encode() + BODY)
  return str(tmp_path) if request.param == "local" else "memory://bucket/data"
