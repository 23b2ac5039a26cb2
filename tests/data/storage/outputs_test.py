"""Files that appear complete or not at all, whoever else writes them."""

from concurrent.futures import ThreadPoolExecutor
import errno
import os
from pathlib import Path

import pytest

from declip_jax.data.storage import outputs


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
  """Locks are those of open files, so threads meet as processes do."""
  path = tmp_path / "a.json"
  contents = [bytes([number]) * 1000 for number in range(4)]

  def work(content: bytes) -> None:
    for _ in range(25):
      outputs.write(path, content)
      assert path.read_bytes() in contents

  with ThreadPoolExecutor() as pool:
    list(pool.map(work, contents))
  assert os.listdir(tmp_path) == ["a.json"]


def test_a_write_deletes_what_a_killed_writer_left_and_nothing_else(tmp_path: Path) -> None:
  names = [".a.json.0123abcd.tmp", ".b.json.0123abcd.tmp", "a.json.bak"]
  for name in names:
    (tmp_path / name).write_bytes(b"cut")
  with outputs.temporary(tmp_path / "a.json") as theirs:
    outputs.write(tmp_path / "a.json", b"new")
    assert sorted(os.listdir(tmp_path)) == sorted([theirs.name, names[1], names[2], "a.json"])


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  outputs.write(tmp_path / "a", b"old")

  def full(_: int) -> None:
    raise OSError(errno.ENOSPC, "full")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="full"):
    outputs.write(tmp_path / "a", b"new")
  assert os.listdir(tmp_path) == ["a"]
  assert (tmp_path / "a").read_bytes() == b"old"
