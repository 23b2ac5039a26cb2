import concurrent.futures
import errno
import json
import multiprocessing
import os
from pathlib import Path
import select
import subprocess
import sys
import threading
import time

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import pytest

from declip_jax.data.storage import files

BODY = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
  """A cache folder of the test's own."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
  return folder / "declip_jax"


@pytest.fixture(params=["local", "url"])
def folder(request, tmp_path) -> str:
  """A folder with three files, on a disk and behind a URL."""
  memory = fsspec.filesystem("memory")
  memory.store.clear()
  for name in ("a-08.bin", "a-09.bin", "a-10.bin"):
    (tmp_path / name).write_bytes(name.encode() + BODY)
    memory.pipe(f"/bucket/data/{name}", name.encode() + BODY)
  return str(tmp_path) if request.param == "local" else "memory://bucket/data"


def names(folder: str, pattern: str) -> list[str]:
  return [path.rpartition("/")[2] for path in files.expand("::".join(f"{folder}/{one}" for one in pattern.split("::")))]


def test_patterns_find_files(folder):
  assert names(folder, "*.bin") == ["a-08.bin", "a-09.bin", "a-10.bin"]
  assert names(folder, "a-{08..09}.bin") == ["a-08.bin", "a-09.bin"]
  assert names(folder, "a-{09..09}.bin::a-1?.bin::a-08.bin") == ["a-09.bin", "a-10.bin", "a-08.bin"]
  assert names(folder.rpartition("/")[0], f"{folder.rpartition('/')[2]}/**/a-0[89].bin") == ["a-08.bin", "a-09.bin"]
  assert all(files.exists(path) for path in files.expand(f"{folder}/*.bin"))


@pytest.mark.parametrize(
  ("pattern", "expected"),
  [  # as bash expands them
    ("{b,a}-0", ["b-0", "a-0"]),
    ("{a-{08..10},val}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "val.tar"]),
    ("{a,{b,{c,d}}}{1..2}", ["a1", "a2", "b1", "b2", "c1", "c2", "d1", "d2"]),
    ("x{,-y}", ["x", "x-y"]),
    ("{x}-{a,b}", ["{x}-a", "{x}-b"]),
    ("{x{a,b}}", ["{xa}", "{xb}"]),
    ("{a-{1..2}", ["{a-1", "{a-2"]),
    ("a}b", ["a}b"]),
  ],
)
def test_braces_are_those_of_a_shell(pattern, expected):
  assert files._braces(pattern) == expected


def test_alternatives_find_files(folder):
  assert names(folder, "a-{10,08}.bin") == ["a-10.bin", "a-08.bin"]
  assert names(folder, "{a-0*,a-10}.bin") == ["a-08.bin", "a-09.bin", "a-10.bin"]
  with pytest.raises(FileNotFoundError, match="no file matches .*a-11.bin"):
    names(folder, "a-{10,11}.bin")


def test_a_local_path_that_exists_is_found_whatever_characters_it_has(tmp_path):
  inside = tmp_path / "[x] {a,b}"
  inside.mkdir()
  for name in ("v-0.tar", "v-1.tar", "w[1]*?{0..1}.tar"):
    (inside / name).write_bytes(b"")
  assert names(str(inside), "v-0.tar") == ["v-0.tar"]
  assert names(str(inside), "w[1]*?{0..1}.tar") == ["w[1]*?{0..1}.tar"]
  plain = tmp_path / "[x]"
  plain.mkdir()
  for number in range(2):
    (plain / f"v-{number}.tar").write_bytes(b"")
  assert names(str(plain), "v-{0..1}.tar") == ["v-0.tar", "v-1.tar"]
  assert names(str(plain), "v-*.tar") == ["v-0.tar", "v-1.tar"]


def test_a_range_lists_its_folder_once(tmp_path, monkeypatch):
  for number in range(50):
    (tmp_path / f"a-{number:02d}.bin").write_bytes(b"")
  asked = []
  isfile, globbed = os.path.isfile, files.glob.glob
  monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(path) or isfile(path))
  monkeypatch.setattr(files.glob, "glob", lambda *given, **more: asked.append(given) or globbed(*given, **more))
  assert len(files.expand(f"{tmp_path}/a-{{00..49}}.bin")) == 50
  assert asked == [f"{tmp_path}/a-{{00..49}}.bin"]


def test_the_names_in_a_folder(folder):
  assert files.names(folder) == files.names(f"{folder}/") == ["a-08.bin", "a-09.bin", "a-10.bin"]
  assert files.names(f"{folder}/nowhere") == []


@pytest.mark.parametrize("pattern", ["a-{08..11}.bin", "a-11.bin", "b-*.bin", "", "*/*.bin"])
def test_a_pattern_without_a_file_is_an_error_that_lists_what_is_there(folder, pattern):
  with pytest.raises(FileNotFoundError, match=r"no file matches .*; in .*: a-08.bin, a-09.bin, a-10.bin"):
    files.expand(f"{folder}/{pattern}")


def test_an_empty_range_and_an_empty_folder_are_errors(folder):
  with pytest.raises(ValueError, match=r"range \{3\.\.1\} is empty"):
    files.expand(f"{folder}/{{3..1}}.bin")
  with pytest.raises(FileNotFoundError, match=r"no file matches .*/nowhere/\*; in .*/nowhere: nothing"):
    files.expand(f"{folder}/nowhere/*")


def test_a_url_of_an_unknown_kind_or_without_its_package_is_an_error_of_the_users():
  with pytest.raises(ValueError, match="foo"):
    files.expand("foo://bucket/a.tar")
  assert not files.is_url("/a/b")
  assert not files.is_url("file:///a/b")
  assert files.is_url("gs://a/b")


def test_any_part_of_a_file_is_read(folder):
  path, body = f"{folder}/a-09.bin", b"a-09.bin" + BODY
  for start, size in [(0, 5), (1000, 300), (len(body) - 3, 100), (len(body) + 5, 10), (0, 10**6), (7, 0)]:
    assert files.read(path, start, size) == body[start : start + size]
  assert files.read(path) == body
  assert files.read(path, 4000) == body[4000:]
  with files.open_stream(path) as stream:
    assert stream.read(10) == body[:10]
    stream.seek(3000, os.SEEK_CUR)
    assert stream.read(4) == body[3010:3014]
    stream.seek(-4, os.SEEK_END)
    assert stream.read() == body[-4:]
  with files.open_stream(path) as stream:
    assert b"".join(stream) == body


@pytest.mark.parametrize("do", [files.stamp, files.read, lambda path: files.read(path, 1, 2), files.open_stream])
def test_a_missing_file_is_told_as_such(folder, do):
  with pytest.raises(FileNotFoundError, match="a-11.bin"):
    do(f"{folder}/a-11.bin")
  assert not files.exists(f"{folder}/a-11.bin")
  assert not files.exists(folder)


def test_the_stamp_follows_the_file(folder):
  path = f"{folder}/a-08.bin"
  before = files.stamp(path)
  assert before == files.stamp(path)
  assert json.loads(json.dumps(before)) == list(before)
  assert before[0] == len(BODY) + 8
  if files.is_url(path):
    fsspec.filesystem("memory").pipe("/bucket/data/a-08.bin", b"12345678" + BODY)
  else:
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
  after = files.stamp(path)
  assert after[0] == before[0]
  assert after[1] != before[1]


def test_a_replaced_file_is_read_after_its_stamp_was_taken(tmp_path):
  path, other = tmp_path / "a", tmp_path / "b"
  path.write_bytes(b"old")
  assert files.read(str(path), 0, 3) == b"old"
  other.write_bytes(b"new")
  other.replace(path)
  files.stamp(str(path))
  assert files.read(str(path), 0, 3) == b"new"


def test_many_files_stay_open_only_in_part_while_threads_read_them(tmp_path):
  for number in range(300):
    (tmp_path / str(number)).write_bytes(f"{number:08d}".encode())

  def work(seed: int) -> bool:
    order = [(seed * 7919 + 31 * step) % 300 for step in range(600)]
    return all(files.read(f"{tmp_path}/{number}", 3, 5) == f"{number:08d}"[3:].encode() for number in order)

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert all(pool.map(work, range(8)))
  if os.path.isdir("/proc/self/fd"):
    links = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert 100 < sum(link.startswith(str(tmp_path)) for link in links) <= 128


def test_a_spawned_process_reads(tmp_path):
  (tmp_path / "a").write_bytes(b"0123456789")
  assert files.read(f"{tmp_path}/a", 2, 4) == b"2345"
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    assert pool.apply(files.read, (f"{tmp_path}/a", 2, 4)) == b"2345"


def test_what_the_packages_below_raise_is_an_os_error_with_the_url(monkeypatch):
  class Unkind(Exception):
    pass

  def cat_file(*_, **__):
    raise Unkind("connection reset")

  monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
  monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0))
  with pytest.raises(OSError, match="memory://bucket/a: Unkind: connection reset"):
    files.read("memory://bucket/a", 0, 10)


def test_a_server_that_fails_is_asked_again(monkeypatch):
  asked = []

  def cat_file(self, path, start=None, end=None):
    asked.append((path, start, end))
    if len(asked) < 3:
      raise ConnectionError("busy")
    return BODY[start:end]

  monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
  monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0))
  assert files.read("memory://bucket/a", 5, 10) == BODY[5:15]
  assert asked == [("/bucket/a", 5, 15)] * 3


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("size", [4, None])
def test_a_network_disk_that_fails_is_asked_again_with_a_new_descriptor(tmp_path, monkeypatch, number, size):
  def fail(use):
    def failing(*given, **more):
      descriptors.append(given[0])
      if len(descriptors) < 3:
        raise OSError(number, os.strerror(number))
      return use(*given, **more)

    return failing

  path, descriptors = tmp_path / "a", []
  path.write_bytes(b"0123456789")
  files.read(str(path), 0, 1)
  before = files._OPEN.get(str(path))
  monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0))
  if size is None:
    monkeypatch.setattr(files, "open", fail(open), raising=False)
  else:
    monkeypatch.setattr(files.os, "pread", fail(os.pread))
  assert files.read(str(path), 2, size) == b"0123456789"[2:][:size]
  assert len(descriptors) == 3
  assert (files._OPEN.get(str(path)) is before) == (size is None)


@pytest.mark.parametrize(("name", "error"), [("nowhere", FileNotFoundError), ("", IsADirectoryError)])
def test_what_will_not_pass_is_told_at_once(tmp_path, monkeypatch, name, error):
  monkeypatch.setattr(files.time, "sleep", lambda _: pytest.fail("waited"))
  for size in (None, 3):
    with pytest.raises(error):
      files.read(f"{tmp_path}/{name}", 0, size)


def test_the_stamp_of_a_stale_file_is_taken_anew(tmp_path, monkeypatch):
  def stale(_):
    raise OSError(errno.ESTALE, "stale")

  path = tmp_path / "a"
  path.write_bytes(b"old")
  files.read(str(path), 0, 3)
  with monkeypatch.context() as patch:
    patch.setattr(files.os, "fstat", stale)
    stamp = files.stamp(str(path))
  assert stamp[0] == 3


def test_a_server_that_ignores_ranges_is_an_error(monkeypatch):
  monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **__: BODY)
  with pytest.raises(OSError, match="memory://bucket/a: the server ignores ranges"):
    files.read("memory://bucket/a", 5, 10)


def test_classnames_lie_beside_a_file(folder):
  assert files.classnames(f"{folder}/a-08.bin") == ()
  with fsspec.open(f"{folder}/classnames.txt", "wb") as file:
    file.write(b"dog\n hot dog \n\n")
  assert files.classnames(f"{folder}/a-08.bin") == ("dog", "hot dog", "")  # samples may be of class 2
  with fsspec.open(f"{folder}/classnames.txt", "wb") as file:
    file.write(b"dog\nhot dog")
  assert files.classnames(f"{folder}/a-08.bin") == ("dog", "hot dog")


def test_an_index_is_built_once_for_a_stamp(folder, cache, tmp_path):
  def index(stamp: object) -> Path:
    return files.index(stamp, f"{folder}/a-08.bin", lambda path: built.append(path.write_text("whole")), ".txt")

  built = []
  first = index([1, "a"])
  assert first.read_text() == "whole"
  assert index([1, "a"]) == first
  assert len(built) == 1
  assert index([2, "a"]) != first
  assert len(built) == 2
  assert first.parent == (cache if files.is_url(folder) else tmp_path / ".declip_jax")
  assert first.stat().st_mode & 0o777 == 0o644
  assert len(list(first.parent.iterdir())) == 2


def test_an_interrupted_build_leaves_nothing(tmp_path):
  def build(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    files.index(1, f"{tmp_path}/a", build, ".txt")
  assert list((tmp_path / ".declip_jax").iterdir()) == []


def test_what_a_killed_builder_left_is_deleted_after_a_day(tmp_path):
  folder = tmp_path / ".declip_jax"
  folder.mkdir()
  for name, age in [(".old0.npy", 25), (".new0.npy", 23), ("index.npy", 1000)]:
    (folder / name).write_bytes(b"half")
    os.utime(folder / name, (time.time() - 3600 * age,) * 2)
  files.index(1, f"{tmp_path}/a", lambda path: path.write_text("whole"), ".txt")
  assert sorted(path.name for path in folder.iterdir() if path.suffix == ".npy") == [".new0.npy", "index.npy"]


def test_an_index_goes_elsewhere_when_the_disk_is_full_but_not_when_the_data_are_bad(tmp_path, cache):
  def build(path: Path) -> None:
    if path.parent.name == ".declip_jax":
      raise OSError(number, "message of the build")
    path.write_text("whole")

  number = errno.ENOSPC
  assert files.index(1, f"{tmp_path}/a", build, ".txt").parent == cache
  number = errno.EIO
  with pytest.raises(OSError, match="message of the build"):
    files.index(2, f"{tmp_path}/a", build, ".txt")


def test_two_builders_at_once_agree(tmp_path):
  barrier = threading.Barrier(2)

  def build(path: Path) -> None:
    barrier.wait(10)
    path.write_text("whole")

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first, second = pool.map(lambda _: files.index(1, f"{tmp_path}/a", build, ".txt"), range(2))
  assert first == second
  assert first.read_text() == "whole"
  assert len(list(first.parent.iterdir())) == 1


@pytest.fixture
def remote(tmp_path) -> str:
  """A file behind a URL that other processes see too."""
  (tmp_path / "remote").mkdir()
  (tmp_path / "remote" / "a.bin").write_bytes(BODY)
  return f"local://{tmp_path}/remote/a.bin"


def test_a_local_file_is_its_own_copy(tmp_path, cache):
  assert files.local_copy("/nowhere/a", (1, 2)) == "/nowhere/a"
  assert not cache.exists()


def test_a_copy_is_made_once_and_anew_when_the_file_changes(remote, cache, tmp_path, monkeypatch):
  def read(path, start=0, size=None):
    requests.append((start, size))
    return read_before(path, start, size)

  read_before, requests = files.read, []
  monkeypatch.setattr(files, "read", read)
  monkeypatch.setattr(files, "_PIECE", 4096)
  old = files.stamp(remote)
  for _ in range(2):
    copy = Path(files.local_copy(remote, old))
    assert (copy.name, copy.read_bytes()) == ("a.bin", BODY)
  assert requests == [(0, 4096), (4096, 4096), (8192, 2048)]
  assert copy.parent.parent == cache / "copies"
  (tmp_path / "remote" / "a.bin").write_bytes(b"new")
  new = Path(files.local_copy(remote, files.stamp(remote)))
  assert new.read_bytes() == b"new"
  assert [path for path in cache.rglob("*") if path.is_file()] == [new]
  for _ in range(2):  # a process that opened the data before
    with pytest.raises(OSError, match="a.bin changed since it was opened"):
      files.local_copy(remote, old)
  assert new.read_bytes() == b"new"


def test_a_file_that_changes_while_it_is_copied_is_no_copy(remote, cache, tmp_path, monkeypatch):
  def read(path, start=0, size=None):
    data = read_before(path, start, size)
    (tmp_path / "remote" / "a.bin").write_bytes(BODY[::-1])
    return data

  read_before, stamp = files.read, files.stamp(remote)
  monkeypatch.setattr(files, "read", read)
  monkeypatch.setattr(files, "_PIECE", 4096)
  with pytest.raises(OSError, match="changed since it was opened"):
    files.local_copy(remote, stamp)
  assert not list(cache.rglob("a.bin*"))


FETCH = """
import sys
from declip_jax.data.storage import files
read = files.read
def slow(*given):
  print("read", flush=True)
  sys.stdin.readline()
  return read(*given)
files.read = slow
print(open(files.local_copy(sys.argv[1], files.stamp(sys.argv[1])), "rb").read().hex(), flush=True)
"""


def fetching(url: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", FETCH, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
  )


def test_of_two_processes_that_want_a_file_one_copies_it_and_a_killed_one_is_replaced(remote, cache):
  killed = fetching(remote)
  assert killed.stdout.readline() == "read\n"
  others = [fetching(remote) for _ in range(2)]
  assert not select.select([process.stdout for process in others], [], [], 3.0)[0]  # they wait
  killed.kill()
  killed.communicate()
  (first,), *_ = select.select([process.stdout for process in others], [], [], 30.0)
  assert first.readline() == "read\n"
  assert len(list(cache.rglob(".a.bin.*.tmp"))) == 1  # what the killed one left is gone
  for process in others:
    process.stdin.write("\n")
    process.stdin.flush()
  assert [process.communicate(timeout=30)[0] for process in others] == [f"{BODY.hex()}\n"] * 2  # only one has read


def test_without_locks_each_makes_its_copy_and_one_stays(remote, cache, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOLCK, "no locks")

  def read(*given):
    barrier.wait(10)
    return read_before(*given)

  barrier, read_before, stamp = threading.Barrier(2), files.read, files.stamp(remote)
  monkeypatch.setattr(files.fcntl, "flock", flock)
  monkeypatch.setattr(files, "read", read)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first, second = pool.map(lambda _: files.local_copy(remote, stamp), range(2))
  assert first == second
  assert Path(first).read_bytes() == BODY
  assert [path for path in cache.rglob("*") if path.is_file()] == [Path(first)]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_full_disk_is_told_with_the_place_and_the_bytes_needed(remote, cache, monkeypatch, when):
  def read(*_):
    raise OSError(errno.ENOSPC, "no space")

  usage = files.shutil.disk_usage
  if when == "before":
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    monkeypatch.setattr(files, "read", lambda *_: pytest.fail("read"))
  else:
    monkeypatch.setattr(files, "read", read)
  with pytest.raises(OSError, match=rf"remote/a.bin: no room for its copy of 10,240 bytes in {cache}/copies/.* free"):
    files.local_copy(remote, files.stamp(remote))
  assert not list(cache.rglob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_told(remote, monkeypatch, tmp_path):
  (tmp_path / "file").write_bytes(b"")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  with pytest.raises(OSError, match="no place for a copy of .*a.bin: .*set XDG_CACHE_HOME"):
    files.local_copy(remote, files.stamp(remote))


@pytest.mark.parametrize("url", ["memory://bucket/up/a", "local://{}/up/a"])
def test_an_upload_is_whole_and_replaces_what_was_there(tmp_path, url):
  url = url.format(tmp_path)
  for body in (BODY, b"new"):
    (tmp_path / "source").write_bytes(body)
    files.upload(tmp_path / "source", url)
    assert files.read(url) == body
    assert files.names(url.rpartition("/")[0]) == ["a"]
  files.remove(url)
  files.remove(url)
  assert not files.exists(url)


def test_an_upload_that_fails_is_tried_again(tmp_path, monkeypatch):
  def put_file(self, *given, **more):
    tries.append(given)
    if len(tries) < 3:
      raise ConnectionError("busy")
    return put(self, *given, **more)

  put, tries = MemoryFileSystem.put_file, []
  monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
  monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0))
  (tmp_path / "a").write_bytes(BODY)
  files.upload(tmp_path / "a", "memory://bucket/up/a")
  assert files.read("memory://bucket/up/a") == BODY


def test_a_builder_that_sees_that_it_is_late_gives_the_index_of_the_other(tmp_path):
  def late(path: Path) -> None:
    (path.parent / f"{files.digest(1)}.txt").write_text("whole")
    raise FileNotFoundError("the parts are gone")

  assert files.index(1, f"{tmp_path}/a", late, ".txt").read_text() == "whole"
