import concurrent.futures
import errno
import os
from pathlib import Path
import threading
import time

import pytest

from declip_jax.data.storage import indexes, remote


def text(index: Path) -> str:
  return bytes(indexes.contents(index)).decode()


def test_an_index_is_built_once_for_a_stamp(folder, cache, tmp_path):
  def index(stamp: object) -> Path:
    return indexes.find_or_build(
      stamp, f"{folder}/a-08.bin", lambda path: built.append(path.write_text("whole")), ".txt"
    )

  built = []
  first = index([1, "a"])
  assert text(first) == "whole"
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
  assert text(first) == "whole"
  assert len(list(first.parent.iterdir())) == 1


def test_a_slower_builder_returns_the_index_of_the_faster_one(tmp_path):
  def late(path: Path) -> None:
    other = path.parent / f"{indexes.key(1)}.txt"
    other.write_text("whole")
    indexes.seal(other, indexes.key(1))
    raise FileNotFoundError("the parts are gone")

  assert text(indexes.find_or_build(1, f"{tmp_path}/a", late, ".txt")) == "whole"


WHOLE = bytes(range(256)) * 10


def build_whole(path: Path) -> None:
  path.write_bytes(WHOLE)


def test_an_index_that_is_damaged_anywhere_is_named_and_built_again(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(indexes, "_PIECE", 1000)
  monkeypatch.setattr(os, "fsync", lambda descriptor: None)
  index = indexes.find_or_build(1, f"{tmp_path}/a", build_whole, ".bin")
  good = index.read_bytes()
  for place in range(0, len(good), 7):
    for damaged in (good[:place], good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :], good + good[place:]):
      index.write_bytes(damaged)
      assert indexes.find_damage(index, index.stem)
  assert indexes.find_damage(index, indexes.key(2))
  assert f"{index} is not used, and is built again" not in caplog.text
  assert indexes.find_or_build(1, f"{tmp_path}/a", build_whole, ".bin") == index
  assert index.read_bytes() == good
  assert f"{index} is not used, and is built again" in caplog.text


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5000])
def test_contents_of_any_size_are_sealed(size, tmp_path, monkeypatch):
  monkeypatch.setattr(indexes, "_PIECE", 1000)
  path = tmp_path / "index"
  path.write_bytes(bytes(size))
  indexes.seal(path, indexes.key(1))
  assert indexes.find_damage(path, indexes.key(1)) == ""
  assert bytes(indexes.contents(path)) == bytes(size)


def test_the_index_of_other_data_is_not_used(tmp_path, caplog):
  first = indexes.find_or_build(1, f"{tmp_path}/a", build_whole, ".bin")
  first.rename(other := first.with_name(f"{indexes.key(2)}.bin"))
  assert text(indexes.find_or_build(2, f"{tmp_path}/a", lambda path: path.write_text("whole"), ".bin")) == "whole"
  assert f"{other} is not used, and is built again: it is the index {first.stem}" in caplog.text


@pytest.mark.parametrize("change", ["mode", "owner"])
def test_an_index_that_other_users_may_have_written_is_not_used(change, tmp_path, cache, caplog):
  (tmp_path / "a").touch()
  index = indexes.find_or_build(1, f"{tmp_path}/a", build_whole, ".bin")
  if change == "mode":
    index.chmod(0o664)
  elif os.geteuid():
    pytest.skip("only root can give a file away")
  else:
    os.chown(index, 12345, -1)
  own = indexes.find_or_build(1, f"{tmp_path}/a", build_whole, ".bin")
  assert own.parent == cache  # theirs remains
  assert index.exists()
  assert ("other users may write it" if change == "mode" else "it belongs to user 12345") in caplog.text
  assert indexes.find_or_build(1, f"{tmp_path}/a", lambda path: path.write_text("never"), ".bin") == own
  if change == "owner":  # unless they own the data, too
    os.chown(tmp_path / "a", 12345, -1)
    assert indexes.find_or_build(1, f"{tmp_path}/a", lambda path: path.write_text("never"), ".bin") == index
