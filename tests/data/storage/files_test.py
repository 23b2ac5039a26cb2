from collections.abc import AsyncIterator
import concurrent.futures
import contextlib
import errno
import json
import multiprocessing
import os
import time

import fsspec
import fsspec.asyn
from fsspec.implementations.memory import MemoryFileSystem
import pytest

from declip_jax.data.storage import files, patterns, remote

BODY = bytes(range(256)) * 40


def test_any_range_of_a_file_is_read(folder):
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
def test_a_missing_file_is_reported_as_such(folder, do):
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
  if remote.is_url(path):
    fsspec.filesystem("memory").pipe("/bucket/data/a-08.bin", b"12345678" + BODY)
  else:
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
  after = files.stamp(path)
  assert after[0] == before[0]
  assert after[1] != before[1]


def test_the_stamp_follows_a_file_whose_size_and_time_remain(tmp_path):
  path = tmp_path / "table.csv"
  path.write_bytes(b"old")
  before, stat = files.stamp(str(path)), path.stat()
  time.sleep(0.01)  # more than the resolution of the clock of a file system
  path.write_bytes(b"new")
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert files.stamp(str(path)) != before


def test_a_replaced_file_is_read_after_its_stamp_was_taken(tmp_path):
  path, other = tmp_path / "a", tmp_path / "b"
  path.write_bytes(b"old")
  assert files.read(str(path), 0, 3) == b"old"
  other.write_bytes(b"new")
  other.replace(path)
  files.stamp(str(path))
  assert files.read(str(path), 0, 3) == b"new"


def test_a_limited_number_of_files_is_open_while_threads_read_many(tmp_path):
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


def test_errors_of_storage_packages_become_os_errors_with_the_url(monkeypatch):
  class Unkind(Exception):
    pass

  def cat_file(*_, **__):
    raise Unkind("connection reset")

  monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
  monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0))
  with pytest.raises(OSError, match="memory://bucket/a: Unkind: connection reset"):
    files.read("memory://bucket/a", 0, 10)


def test_requests_to_a_failing_server_are_retried(monkeypatch):
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
def test_reads_from_a_failing_network_disk_are_retried_with_a_new_descriptor(tmp_path, monkeypatch, number, size):
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
    monkeypatch.setattr(files.os, "open", fail(os.open))
  else:
    monkeypatch.setattr(files.os, "pread", fail(os.pread))
  assert files.read(str(path), 2, size) == b"0123456789"[2:][:size]
  assert len(descriptors) == 3
  assert (files._OPEN.get(str(path)) is before) == (size is None)


@pytest.mark.parametrize(("name", "error"), [("nowhere", FileNotFoundError), ("", IsADirectoryError)])
def test_permanent_errors_are_reported_at_once(tmp_path, monkeypatch, name, error):
  monkeypatch.setattr(files.time, "sleep", lambda _: pytest.fail("waited"))
  for size in (None, 3):
    with pytest.raises(error):
      files.read(f"{tmp_path}/{name}", 0, size)


def test_the_stamp_of_a_stale_handle_is_read_again(tmp_path, monkeypatch):
  def stale(_):
    raise OSError(errno.ESTALE, "stale")

  path = tmp_path / "a"
  path.write_bytes(b"old")
  files.read(str(path), 0, 3)
  with monkeypatch.context() as patch:
    patch.setattr(files.os, "fstat", stale)
    stamp = files.stamp(str(path))
  assert stamp[0] == 3


class Server:
  """A web file system and its session, response and body at once: a server that ignores ranges and never ends."""

  def __init__(self, status: int):
    self.status, self.sent, self.kwargs, self.content, self.loop = status, 0, {}, self, fsspec.asyn.get_loop()

  async def set_session(self) -> "Server":
    return self

  def encode_url(self, url: str) -> str:
    return url

  def get(self, url: str, headers: dict[str, str]) -> "Server":
    self.range = headers["Range"]
    return self

  async def __aenter__(self) -> "Server":
    return self

  async def __aexit__(self, *_: object) -> None:
    pass

  def raise_for_status(self) -> None:
    pass

  async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
    while True:
      self.sent += size
      yield bytes(size)


def test_no_more_is_kept_of_a_web_address_than_may_be(monkeypatch):
  url, limit, server = "https://endless.example/a.jpg", 2**21, Server(200)
  monkeypatch.setattr(remote, "filesystem", lambda url: contextlib.nullcontext((server, url)))
  monkeypatch.setattr(files, "_PAUSES", ())
  with pytest.raises(files.TooLarge, match="more than 2,097,152 bytes"):
    files.read(url, limit=limit)
  assert server.range == f"bytes=0-{limit}"
  assert limit < server.sent <= 2 * limit
  with pytest.raises(OSError, match=f"{url}.*ignores ranges"):
    files.read(url, 0, 100)
  server.sent = 0
  with pytest.raises(OSError, match=f"{url}.*ignores ranges"):
    files.read(url, 100, 100)
  assert not server.sent
  server.status = 404
  with pytest.raises(FileNotFoundError, match=url):
    files.read(url)
  assert files.read(url, 5, 0) == b""


def test_a_server_that_ignores_ranges_is_an_error(monkeypatch):
  monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **__: BODY)
  with pytest.raises(OSError, match="memory://bucket/a: the server ignores ranges"):
    files.read("memory://bucket/a", 5, 10)


@pytest.mark.parametrize("url", ["memory://bucket/up/a", "local://{}/up/a"])
def test_an_upload_is_atomic_and_replaces_the_file(tmp_path, url):
  url = url.format(tmp_path)
  for body in (BODY, b"new"):
    (tmp_path / "source").write_bytes(body)
    files.upload(tmp_path / "source", url)
    assert files.read(url) == body
    assert patterns.names(url.rpartition("/")[0]) == ["a"]
  files.remove(url)
  files.remove(url)
  assert not files.exists(url)


def test_a_failed_upload_is_retried(tmp_path, monkeypatch):
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
