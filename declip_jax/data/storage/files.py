"""Single files, local or remote: reading, opening as a stream, stamps that change with their contents.

Everything here may be called from several threads and from spawned processes.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import errno
import io
import os
from pathlib import Path
import stat as modes
import threading
import time
from typing import Any, BinaryIO
import uuid
import weakref

from declip_jax.data.storage import remote

MAX_BYTES = 2**28  # of one read, and so of one sample: 8192 x 8192 pixels with transparency, without compression
_OPEN_FILES = (
  128  # files kept open per process, for any number of shards: far below the usual limit of 1024 descriptors
)
_READ_AHEAD = 2**20  # bytes of a remote stream: the latency of a request is about the time to transfer this much
_THREADS = 32
_PAUSES = (0.5, 2.0, 8.0)  # seconds before each retry
# Temporary errors of network file systems; any other error of a local path is permanent.
PASSING = {errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EAGAIN, errno.EBUSY}

# Fields that change with a remote file; the first that its file system knows is used.
_CHANGES = ("ETag", "etag", "md5Hash", "generation", "Content-MD5", "Digest", "content_md5", "LastModified")
_CHANGES += ("Last-Modified", "last_modified", "updated", "mtime", "modified", "created")

# Here a file appears only once its upload is complete, and renaming is copying.
_OBJECT_STORES = {"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "oss", "oci", "obs", "memory"}


# Suffixes of the images that `images.decode` knows, in lower case; if a sample has several, the first of these counts.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".jfif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
IMAGE_SUFFIXES += (".jp2", ".avif")
# Suffixes of the captions of an image, in lower case, after its stem or its name; the first that exists counts.
CAPTION_SUFFIXES = (".txt", ".caption")

Stamp = tuple[int, int | str | None]
_SUFFIXES = 6  # to name in a message


class TooLarge(OSError):
  """More bytes than are read at once."""


def local_path(path: str) -> str:
  """The absolute path of a local file."""
  return os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


def beside(path: str, name: str) -> str:
  """The path of another file in the same folder."""
  return path.rpartition("/")[0] + "/" + name


def suffixes(names: Iterable[str]) -> Counter[str]:
  """Numbers of files by the suffix of their names."""
  return Counter(os.path.splitext(name)[1] or "no suffix" for name in names)


def in_words(counts: Mapping[str, int]) -> str:
  """Numbers by suffix in words, such as "1,200 .HEIC, 3 .jxl"; the largest come first, and the smallest are summed."""
  first = Counter(counts).most_common(_SUFFIXES)
  rest = sum(counts.values()) - sum(count for _, count in first)
  return ", ".join(f"{count:,} {suffix}" for suffix, count in first) + (f" and {rest:,} others" if rest else "")


def exists(path: str) -> bool:
  """Whether the path exists and is a file."""
  if not remote.is_url(path):
    return os.path.isfile(local_path(path))
  with remote.filesystem(path) as (system, name):
    return system.isfile(name)


def is_folder(entry: os.DirEntry[str]) -> bool:
  """Whether an entry is a folder or a link to one; a link that leads to itself is not."""
  return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def stamp(path: str) -> Stamp:
  """Returns the size in bytes and a value that changes with the file, both JSON.

  The value has the times in ns at which the contents and the inode were changed: a copy may keep the former, and nobody
  can set the latter. For a URL it is the ETag or time of change, None if the server reports neither.

  Raises:
    FileNotFoundError: the file does not exist.
    OSError: the server does not report the size.
  """
  if not remote.is_url(path):
    stat = os.stat(local_path(path))
    _OPEN.forget_unless(local_path(path), stat)
    return stat.st_size, f"{stat.st_mtime_ns}, {stat.st_ctime_ns}"
  with remote.filesystem(path) as (system, name):
    about = system.info(name)
  if about.get("size") is None or about.get("type") == "directory":
    is_folder = about.get("type") == "directory"
    raise OSError(f"{path}: {'a folder' if is_folder else 'the server does not report its size'}")
  changed = next((about[name] for name in _CHANGES if about.get(name) is not None), None)
  return int(about["size"]), None if changed is None else str(changed)


def stamps(paths: Sequence[str]) -> list[Stamp]:
  """The `stamp` of each file; threads hide the latency of servers."""
  if not any(map(remote.is_url, paths)):
    return [stamp(path) for path in paths]
  with ThreadPoolExecutor(min(_THREADS, len(paths))) as pool:
    return list(pool.map(stamp, paths))


def read(path: str, start: int = 0, size: int | None = None, limit: int = MAX_BYTES) -> bytes:
  """Reads a whole file, or `size` bytes from `start`; fewer if the file is shorter.

  Local files stay open after a partial read, up to 128 per process. If a busy server or network makes a read fail, of a
  URL or a path, it is retried for about ten seconds: using another sample instead would change the stream.

  Raises:
    TooLarge: more than `limit` bytes, before they are read; of a URL without `size`, after the first `limit`.
    OSError: the file cannot be read or is not a regular file (a device or a pipe may have no end), or a web server
      ignores ranges.
  """
  if size is not None and size > limit:
    raise TooLarge(errno.EFBIG, f"{size:,} bytes are more than {limit:,}", path)
  for pause in (*_PAUSES, None):
    try:
      data = _read_url(path, start, size, limit) if remote.is_url(path) else _read_path(path, start, size, limit)
      break
    except (FileNotFoundError, PermissionError, TooLarge):
      raise
    except OSError as error:
      if pause is None or not (remote.is_url(path) or error.errno in PASSING):
        raise
      time.sleep(pause)
  if size is not None and len(data) > size:
    raise OSError(f"{path}: the server ignores ranges and sends the whole file; download it first")
  return data


def _read_url(url: str, start: int, size: int | None, limit: int) -> bytes:
  data = remote.read_range(url, start, start + (limit + 1 if size is None else size))
  if len(data) > limit:
    raise TooLarge(errno.EFBIG, f"more than {limit:,} bytes", url)
  return data


def _read_path(path: str, start: int, size: int | None, limit: int) -> bytes:
  path = local_path(path)
  if size is None:
    file = _File(path)
    if (size := max(file.size - start, 0)) > limit:
      raise TooLarge(errno.EFBIG, f"{size:,} bytes are more than {limit:,}", path)
    return file.read(start, size)
  try:
    return _OPEN.get(path).read(start, size)
  except OSError:
    _OPEN.forget(path)  # a stale descriptor never recovers
    raise


def open_stream(path: str) -> BinaryIO:
  """Opens a file for buffered sequential reading; seeking is allowed.

  A URL is read in requests of at least 1 MiB. Seeking past the buffer transfers nothing in between.

  Raises:
    OSError: the file cannot be read.
  """
  if not remote.is_url(path):
    return open(local_path(path), "rb")
  return io.BufferedReader(_Ranges(path), _READ_AHEAD)


def upload(file: Path, url: str) -> None:
  """Copies a complete local file to a URL, so that no reader ever sees a partial file; failures are retried.

  An object store shows a file only once it is complete. Elsewhere the file is written under a temporary name in its
  folder, which is created if needed, and renamed.

  Raises:
    OSError: the URL cannot be written.
  """
  for pause in (*_PAUSES, None):
    try:
      return _upload(file, url)
    except (FileNotFoundError, PermissionError):  # the bucket does not exist, for example
      raise
    except OSError:
      if pause is None:
        raise
      time.sleep(pause)


def _upload(file: Path, url: str) -> None:
  with remote.filesystem(url) as (system, name):
    if url.partition("://")[0] in _OBJECT_STORES:
      system.put_file(os.fspath(file), name)
      return
    folder, _, last = name.rpartition("/")
    temporary = f"{folder}/.{last}.{uuid.uuid4().hex}.tmp"
    system.makedirs(folder, exist_ok=True)
    try:
      system.put_file(os.fspath(file), temporary)
      system.mv(temporary, name)
    except BaseException:
      with contextlib.suppress(Exception):  # it may never have been created
        system.rm_file(temporary)
      raise


def remove(path: str) -> None:
  """Deletes a file if it exists."""
  with contextlib.suppress(FileNotFoundError):
    if remote.is_url(path):
      with remote.filesystem(path) as (system, name):
        system.rm_file(name)
    else:
      os.unlink(local_path(path))


def commit(temporary: Path, path: Path) -> None:
  """Renames a complete temporary file, so that no reader ever sees a partial file under its final name."""
  with temporary.open("rb+") as file:
    os.fsync(file.fileno())  # otherwise an empty file may have the name after a power cut
  temporary.chmod(0o644)  # temporary files are private to their owner; others may use the data
  temporary.replace(path)


class _File:
  """An open local file. Its descriptor is closed when the last thread that reads from it is done.

  Attributes:
    size: size in bytes when it was opened.

  Raises:
    OSError: it cannot be opened, or it is not a regular file.
  """

  def __init__(self, path: str):
    self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # otherwise opening a pipe waits for its other end
    weakref.finalize(self, os.close, self._descriptor)
    stat = os.fstat(self._descriptor)
    if modes.S_ISDIR(stat.st_mode):
      raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not modes.S_ISREG(stat.st_mode):
      raise OSError(errno.EINVAL, "not a regular file", path)
    self.size = stat.st_size

  def read(self, start: int, size: int) -> bytes:
    pieces = []
    while size and (piece := os.pread(self._descriptor, size, start)):  # one call returns at most 2 GiB
      pieces.append(piece)
      start, size = start + len(piece), size - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)

  def is_at(self, stat: os.stat_result) -> bool:
    try:
      return os.path.samestat(os.fstat(self._descriptor), stat)
    except OSError:  # stale
      return False


class _OpenFiles:
  """The files that this process read most recently."""

  def __init__(self) -> None:
    self._files: OrderedDict[str, _File] = OrderedDict()
    self._lock = threading.Lock()

  def get(self, path: str) -> _File:
    with self._lock:
      file = self._files.get(path)
      if file is not None:
        self._files.move_to_end(path)
        return file
    file = _File(path)  # without the lock, since it may take long over a network
    with self._lock:
      self._files[path] = file
      if len(self._files) > _OPEN_FILES:
        self._files.popitem(last=False)
    return file

  def forget(self, path: str) -> None:
    with self._lock:
      self._files.pop(path, None)

  def forget_unless(self, path: str, stat: os.stat_result) -> None:
    """Closes a file that has been replaced since it was opened."""
    with self._lock:
      file = self._files.get(path)
      if file is not None and not file.is_at(stat):
        del self._files[path]


_OPEN = _OpenFiles()


class _Ranges(io.RawIOBase):
  """A remote file, read range by range."""

  def __init__(self, path: str):
    self._path, self._place = path, 0
    self._size = stamp(path)[0]

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._place

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
    return self._place

  def readinto(self, buffer: Any) -> int:
    size = max(0, min(len(buffer), self._size - self._place))
    data = read(self._path, self._place, size) if size else b""
    buffer[: len(data)] = data
    self._place += len(data)
    return len(data)
