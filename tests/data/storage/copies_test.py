import concurrent.futures
import errno
from pathlib import Path
import select
import subprocess
import sys
import threading

import pytest

from declip_jax.data.storage import copies, files

BODY = bytes(range(256)) * 40


@pytest.fixture
def remote_file(tmp_path) -> str:
  """A file at a URL that other processes can read too."""
  (tmp_path / "remote").mkdir()
  (tmp_path / "remote" / "a.bin").write_bytes(BODY)
  return f"local://{tmp_path}/remote/a.bin"


def test_a_local_file_is_its_own_copy(tmp_path, cache):
  assert copies.local_copy("/nowhere/a", (1, 2)) == "/nowhere/a"
  assert not cache.exists()


def test_a_copy_is_made_once_and_again_after_a_change(remote_file, cache, tmp_path, monkeypatch):
  def read(path, start=0, size=None):
    requests.append((start, size))
    return read_before(path, start, size)

  read_before, requests = files.read, []
  monkeypatch.setattr(files, "read", read)
  monkeypatch.setattr(copies, "_PIECE", 4096)
  old = files.stamp(remote_file)
  for _ in range(2):
    copy = Path(copies.local_copy(remote_file, old))
    assert (copy.name, copy.read_bytes()) == ("a.bin", BODY)
  assert requests == [(0, 4096), (4096, 4096), (8192, 2048)]
  assert copy.parent.parent == cache / "copies"
  (tmp_path / "remote" / "a.bin").write_bytes(b"new")
  new = Path(copies.local_copy(remote_file, files.stamp(remote_file)))
  assert new.read_bytes() == b"new"
  assert [path for path in cache.rglob("*") if path.is_file()] == [new]
  for _ in range(2):  # a process that opened the data before
    with pytest.raises(OSError, match="a.bin changed since it was opened"):
      copies.local_copy(remote_file, old)
  assert new.read_bytes() == b"new"


def test_a_file_that_changes_while_it_is_copied_is_rejected(remote_file, cache, tmp_path, monkeypatch):
  def read(path, start=0, size=None):
    data = read_before(path, start, size)
    (tmp_path / "remote" / "a.bin").write_bytes(BODY[::-1])
    return data

  read_before, stamp = files.read, files.stamp(remote_file)
  monkeypatch.setattr(files, "read", read)
  monkeypatch.setattr(copies, "_PIECE", 4096)
  with pytest.raises(OSError, match="changed since it was opened"):
    copies.local_copy(remote_file, stamp)
  assert not list(cache.rglob("a.bin*"))


FETCH = """
import sys
from declip_jax.data.storage import copies, files, indexes, patterns, remote
read = files.read
def slow(*given):
  print("read", flush=True)
  sys.stdin.readline()
  return read(*given)
files.read = slow
print(open(copies.local_copy(sys.argv[1], files.stamp(sys.argv[1])), "rb").read().hex(), flush=True)
"""


def fetching(url: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", FETCH, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
  )


def test_one_of_two_processes_copies_a_file_and_a_killed_one_is_replaced(remote_file, cache):
  killed = fetching(remote_file)
  assert killed.stdout.readline() == "read\n"
  others = [fetching(remote_file) for _ in range(2)]
  assert not select.select([process.stdout for process in others], [], [], 1.0)[0]  # they wait
  killed.kill()
  killed.communicate()
  (first,), *_ = select.select([process.stdout for process in others], [], [], 30.0)
  assert first.readline() == "read\n"
  assert len(list(cache.rglob(".a.bin.*.tmp"))) == 1  # the files of the killed one are gone
  for process in others:
    process.stdin.write("\n")
    process.stdin.flush()
  assert [process.communicate(timeout=30)[0] for process in others] == [f"{BODY.hex()}\n"] * 2  # only one has read


def test_without_locks_each_process_copies_and_one_copy_is_kept(remote_file, cache, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOLCK, "no locks")

  def read(*given):
    barrier.wait(10)
    return read_before(*given)

  barrier, read_before, stamp = threading.Barrier(2), files.read, files.stamp(remote_file)
  monkeypatch.setattr(copies.fcntl, "flock", flock)
  monkeypatch.setattr(files, "read", read)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first, second = pool.map(lambda _: copies.local_copy(remote_file, stamp), range(2))
  assert first == second
  assert Path(first).read_bytes() == BODY
  assert [path for path in cache.rglob("*") if path.is_file()] == [Path(first)]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_full_disk_is_reported_with_the_place_and_the_bytes_needed(remote_file, cache, monkeypatch, when):
  def read(*_):
    raise OSError(errno.ENOSPC, "no space")

  usage = copies.shutil.disk_usage
  if when == "before":
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    monkeypatch.setattr(files, "read", lambda *_: pytest.fail("read"))
  else:
    monkeypatch.setattr(files, "read", read)
  with pytest.raises(OSError, match=rf"remote/a.bin: its copy needs 10,240 bytes in {cache}/copies/.* free"):
    copies.local_copy(remote_file, files.stamp(remote_file))
  assert not list(cache.rglob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_reported(remote_file, monkeypatch, tmp_path):
  (tmp_path / "file").write_bytes(b"")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  with pytest.raises(OSError, match="cannot store a copy of .*a.bin: .*set XDG_CACHE_HOME"):
    copies.local_copy(remote_file, files.stamp(remote_file))
