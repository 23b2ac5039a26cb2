import concurrent.futures
import errno
import os
from pathlib import Path
import threading
import time

import pytest

from declip_jax.data.storage import indexes, remote


def test_an_index_is_built_once_for_a_stamp(folder, cache, tmp_path):
  def index(stamp: object) -> Path:
    return indexes.find_or_build(
      stamp, f"{folder}/a-08.bin", lambda path: built.append(path.write_text("whole")), ".txt"
    )

  built = []
  first = index([1, "a"])
  assert first.read_text() == "whole"
  assert index([1, "a"]) == first
  assert len(built) == 1
  assert index([2, "a"]) != first
  assert len(built) == 2
  assert first.parent == (cache if remote.is_url(folder) else tmp_path / ".declip_jax")
  assert first.stat().st_mode & 0o777 == 0o644
  assert len(list(first.parent.iterdir())) == 2


def test_an_interrupted_build_leaves_nothing(tmp_path):
  def build(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    indexes.find_or_build(1, f"{tmp_path}/a", build, ".txt")
  assert list((tmp_path / ".declip_jax").iterdir()) == []


def test_files_left_by_a_killed_builder_are_deleted_after_a_day(tmp_path):
  folder = tmp_path / ".declip_jax"
  folder.mkdir()
  for name, age in [(".old0.npy", 25), (".new0.npy", 23), ("index.npy", 1000)]:
    (folder / name).write_bytes(b"half")
    os.utime(folder / name, (time.time() - 3600 * age,) * 2)
  indexes.find_or_build(1, f"{tmp_path}/a", lambda path: path.write_text("whole"), ".txt")
  assert sorted(path.name for path in folder.iterdir() if path.suffix == ".npy") == [".new0.npy", "index.npy"]


def test_an_index_goes_elsewhere_when_the_disk_is_full_but_not_when_the_data_are_bad(tmp_path, cache):
  def build(path: Path) -> None:
    if path.parent.name == ".declip_jax":
      raise OSError(number, "message of the build")
    path.write_text("whole")

  number = errno.ENOSPC
  assert indexes.find_or_build(1, f"{tmp_path}/a", build, ".txt").parent == cache
  number = errno.EIO
  with pytest.raises(OSError, match="message of the build"):
    indexes.find_or_build(2, f"{tmp_path}/a", build, ".txt")


def test_two_builders_at_once_agree(tmp_path):
  barrier = threading.Barrier(2)

  def build(path: Path) -> None:
    barrier.wait(10)
    path.write_text("whole")

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first, second = pool.map(lambda _: indexes.find_or_build(1, f"{tmp_path}/a", build, ".txt"), range(2))
  assert first == second
  assert first.read_text() == "whole"
  assert len(list(first.parent.iterdir())) == 1


def test_a_slower_builder_returns_the_index_of_the_faster_one(tmp_path):
  def late(path: Path) -> None:
    (path.parent / f"{indexes.digest(1)}.txt").write_text("whole")
    raise FileNotFoundError("the parts are gone")

  assert indexes.find_or_build(1, f"{tmp_path}/a", late, ".txt").read_text() == "whole"
