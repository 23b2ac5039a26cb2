"""Files wherever they lie: local paths, and URLs of any kind that fsspec knows (gs://, s3://, https://, memory://).

Everything here may be called from several threads and from spawned processes. fsspec needs a package for most kinds of
URL, such as gcsfs for gs://, and says which one is missing.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import errno
import fcntl
from functools import lru_cache
import glob
import hashlib
import io
import itertools
import json
import os
from pathlib import Path
import re
import shutil
import tempfile
import threading
import time
from typing import Any, BinaryIO
import uuid
import weakref

from absl import logging
import fsspec
import fsspec.core

_OPEN_FILES = 128  # per process: far below the usual limit of 1024 descriptors, for any number of shards
_READ_AHEAD = 2**20  # of a URL's stream, in bytes: a request takes as long as it takes to transfer about this much
_PIECE = 2**25  # of a file that is copied, in bytes: what a request asks for, and what is asked for again if it fails
_THREADS = 32
_PAUSES = (0.5, 2.0, 8.0)  # in seconds, before a URL is tried again
_FOLDER = ".declip_jax"  # of indexes, beside the data
_COPIES = "copies"  # of files behind URLs, in the user's cache folder
_LEFT_BEHIND = 24 * 3600  # seconds: no index takes so long to build
# What a network's file system raises for a while; any other error of a local path stays as it is.
_PASSING = {errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EAGAIN, errno.EBUSY}
# What tells that a file behind a URL changed: the first of these that its file system knows.
_CHANGES = ("ETag", "etag", "md5Hash", "generation", "Content-MD5", "Digest", "content_md5", "LastModified")
_CHANGES += ("Last-Modified", "last_modified", "updated", "mtime", "modified", "created")
# Where a file appears when its upload is complete, and to rename one is to copy it.
_OBJECT_STORES = {"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "oss", "oci", "obs", "memory"}

# Of the images that `images.decode` knows, in lower case; where a sample has several, the first of these counts.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".jfif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
IMAGE_SUFFIXES += (".jp2", ".avif")

Stamp = tuple[int, int | str | None]


def is_url(path: str) -> bool:
  """Whether fsspec reads it; file:// is a local path."""
  return "://" in path and not path.startswith("file://")


def expand(location: str) -> list[str]:
  """Files that a location names: absolute local paths, or URLs.

  Args:
    location: a path or URL with glob characters (`train-*.tar`), ranges (`train-{0000..0012}.tar`), alternatives
      (`{val,test}.tar`), all or none of them; `::` joins several, as in webdataset. Ranges and alternatives give their
      files in the order written, glob characters in alphabetical order. A local path that exists as it is written is
      that file, whatever characters it has.

  Raises:
    FileNotFoundError: a pattern matches no file, or a file of a range is missing; lists what is there.
    ValueError: a range is empty, or fsspec does not know the kind of URL or lacks the package for it.
  """
  found = []
  for given in location.split("::"):
    if not is_url(given) and os.path.isfile(_local(given)):
      found.append(_local(given))
      continue
    patterns = _braces(given)
    match = _matching_urls if is_url(given) else _matching_paths
    for pattern, paths in zip(patterns, match(patterns), strict=True):
      if not paths:
        raise FileNotFoundError(f"{location}: no file matches {pattern}; {_neighbours(pattern)}")
      found += paths
  return found


def names(folder: str) -> list[str]:
  """Names of the files in a folder, sorted; none where it is no folder or cannot be listed."""
  if is_url(folder):
    with _remote(folder) as (system, _):
      system.invalidate_cache()  # of listings
    return sorted(path.rpartition("/")[2] for path in _listing(folder.rstrip("/")))
  return sorted(map(os.path.basename, _entries(_local(folder))))


def beside(path: str, name: str) -> str:
  """Another file in the folder of a file."""
  return path.rpartition("/")[0] + "/" + name


def exists(path: str) -> bool:
  """Whether there is such a file, and no folder."""
  if not is_url(path):
    return os.path.isfile(_local(path))
  with _remote(path) as (system, name):
    return system.isfile(name)


def stamp(path: str) -> Stamp:
  """Size in bytes, and something that changes when the file does; both go into JSON.

  The second is the modification time in ns; for a URL its ETag or time of change, None where the server tells neither.

  Raises:
    FileNotFoundError: there is no such file.
    OSError: the server does not tell the size.
  """
  if not is_url(path):
    stat = os.stat(_local(path))
    _OPEN.forget_unless(_local(path), stat)
    return stat.st_size, stat.st_mtime_ns
  with _remote(path) as (system, name):
    about = system.info(name)
  if about.get("size") is None or about.get("type") == "directory":
    raise OSError(f"{path}: {'a folder' if about.get('type') == 'directory' else 'the server does not tell its size'}")
  changed = next((about[name] for name in _CHANGES if about.get(name) is not None), None)
  return int(about["size"]), None if changed is None else str(changed)


def stamps(paths: Sequence[str]) -> list[Stamp]:
  """The `stamp` of each; threads hide the latency of a server."""
  if not any(map(is_url, paths)):
    return [stamp(path) for path in paths]
  with ThreadPoolExecutor(min(_THREADS, len(paths))) as pool:
    return list(pool.map(stamp, paths))


def digest(value: Any) -> str:
  """24 hexadecimal digits that depend on all of `value`, which goes into JSON."""
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


def read(path: str, start: int = 0, size: int | None = None) -> bytes:
  """Reads a whole file, or `size` bytes from `start` on; fewer where the file ends before.

  A local file of which parts are read stays open, 128 of them in a process. What fails for a busy server or network, a
  URL or a path, is tried again for some ten seconds: to take another sample instead would change the stream.

  Raises:
    OSError: it cannot be read, or a web server ignores ranges.
  """
  for pause in (*_PAUSES, None):
    try:
      data = _read_url(path, start, size) if is_url(path) else _read_path(_local(path), start, size)
      break
    except (FileNotFoundError, PermissionError):
      raise
    except OSError as error:
      if pause is None or not (is_url(path) or error.errno in _PASSING):
        raise
      time.sleep(pause)
  if size is not None and len(data) > size:
    raise OSError(f"{path}: the server ignores ranges and sends the whole file; download it first")
  return data


def _read_url(url: str, start: int, size: int | None) -> bytes:
  with _remote(url) as (system, name):
    return system.cat_file(name, start=start or None, end=None if size is None else start + size)


def _read_path(path: str, start: int, size: int | None) -> bytes:
  if size is None:
    with open(path, "rb") as file:
      file.seek(start)
      return file.read()
  try:
    return _OPEN.get(path).read(start, size)
  except OSError:
    _OPEN.forget(path)  # a stale descriptor stays so for ever
    raise


def open_stream(path: str) -> BinaryIO:
  """Opens a file to be read from its start on, buffered; seeking is allowed.

  A URL is read in requests of 1 MiB or more. To seek beyond what is buffered costs no transfer of what lies between.

  Raises:
    OSError: it cannot be read.
  """
  if not is_url(path):
    return open(_local(path), "rb")
  return io.BufferedReader(_Ranges(path), _READ_AHEAD)


def upload(file: Path, url: str) -> None:
  """Copies a complete local file to a URL, so that nobody ever sees half of it there; what fails is tried again.

  To an object store it is put, which shows it when it is complete. Elsewhere it is put under a temporary name in its
  folder, which is created if there is none, and renamed.

  Raises:
    OSError: it cannot be written.
  """
  for pause in (*_PAUSES, None):
    try:
      return _upload(file, url)
    except (FileNotFoundError, PermissionError):  # there is no such bucket, for one
      raise
    except OSError:
      if pause is None:
        raise
      time.sleep(pause)


def _upload(file: Path, url: str) -> None:
  with _remote(url) as (system, name):
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
      with contextlib.suppress(Exception):  # perhaps it never came to be
        system.rm_file(temporary)
      raise


def remove(path: str) -> None:
  """Deletes a file, if it is there."""
  with contextlib.suppress(FileNotFoundError):
    if is_url(path):
      with _remote(path) as (system, name):
        system.rm_file(name)
    else:
      os.unlink(_local(path))


def classnames(path: str) -> tuple[str, ...]:
  """Line i of classnames.txt in the folder of a file is class i, blank or not; empty where there is no such file."""
  file = beside(path, "classnames.txt")
  return tuple(map(str.strip, read(file).decode().splitlines())) if exists(file) else ()


def index(stamp: Any, near: str, build: Callable[[Path], Any], suffix: str) -> Path:
  """The file of an index, built if there is none.

  It lies in `.declip_jax/` beside the data, or in the user's cache folder, $XDG_CACHE_HOME/declip_jax or else
  ~/.cache/declip_jax, where that cannot be written or the data are behind a URL. Its name is the `digest` of `stamp`,
  so with the `stamp` of the data inside it is never older than they are. It appears whole or not at all, whatever
  happens while it is built; where several processes build it, one wins. What processes that were killed have left in
  the folder is deleted after a day.

  Args:
    stamp: JSON of all that the index depends on: paths and stamps of files, and the version of the index's format.
    near: one of the data files.
    build: writes the index to the path that it is given. It may keep parts of its work beside that path, under names
      with a dot in front, and may end with an OSError when it sees that another process has built the index.
    suffix: of the file's name, such as ".npy".

  Raises:
    OSError: no folder takes the index, or what `build` raises.
  """
  name, cache = digest(stamp) + suffix, _cache()
  folders = [cache] if is_url(near) else [Path(_local(near)).parent / _FOLDER, cache]
  found = next((folder / name for folder in folders if os.path.isfile(folder / name)), None)
  if found is not None:
    return found
  failure = None
  for folder in folders:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=name, delete=False) as file:
        temporary = Path(file.name)
    except OSError as error:
      failure = error
      continue
    try:
      _clear(folder)
      build(temporary)
      commit(temporary, folder / name)
      return folder / name
    except OSError as error:
      if (folder / name).is_file():  # another process was first
        return folder / name
      if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      failure = error
    finally:
      temporary.unlink(missing_ok=True)
  raise OSError(f"no place for the index of {near}: {failure}; set XDG_CACHE_HOME to a folder that can be written")


def _cache() -> Path:
  return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "declip_jax"


def _clear(folder: Path) -> None:
  """Deletes what builders that were killed have left in a folder of indexes."""
  for path in folder.glob(".*"):
    with contextlib.suppress(OSError):  # another process was first, or it is another user's
      if path.stat().st_mtime < time.time() - _LEFT_BEHIND:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def local_copy(path: str, stamp: Stamp) -> str:
  """A local file with the contents of a file: itself if it is local, else a copy that is made when first asked for.

  Raises:
    OSError: as for `fetch`.
  """
  if not is_url(path):
    return path
  copy = copies(path, {"": stamp}) / path.rpartition("/")[2]
  fetch(path, stamp, copy)
  return os.fspath(copy)


def copies(url: str, stamps: Mapping[str, Stamp]) -> Path:
  """The folder for copies of a file, or of files in a folder, behind a URL; `fetch` puts them there.

  For readers that open local files only. It lies in `declip_jax/copies/` of the user's cache folder, beside indexes of
  data behind URLs, and is one for all data sets and processes that read these files. Copies of their former states are
  deleted, others never.

  Args:
    url: of the file or the folder.
    stamps: by name, of all files that matter: another state of any has another folder.
  """
  return _cache() / _COPIES / f"{digest(url)}-{digest(sorted(stamps.items()))}"


def fetch(url: str, stamp: Stamp, path: Path) -> None:
  """Copies a file from behind a URL to a folder of `copies`, unless it is there; it appears whole or not at all.

  Of several processes and threads that want it, one copies it, and the others wait. A lock that the system releases
  with its process sees to that; where the disk has no locks, each makes a copy of its own, and one of them stays.

  Raises:
    OSError: it cannot be read or changed since `stamp` was taken; or no room, with the bytes that are needed.
  """
  if path.is_file():
    return
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    place = "set XDG_CACHE_HOME to a folder that can be written"
    raise OSError(f"no place for a copy of {url}: {error}; {place}") from None
  with _turn(path) as locked:
    if path.is_file():
      return
    if locked:  # so these are of processes that were killed
      for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)
    try:
      _copy(url, stamp, path)
    except OSError as error:
      if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      room = f"{shutil.disk_usage(path.parent).free:,} are free; set XDG_CACHE_HOME to a folder on a larger disk"
      message = f"{url}: no room for its copy of {stamp[0]:,} bytes in {path.parent}: {room}"
      raise OSError(error.errno, message) from error
  for former in path.parent.parent.glob(f"{path.parent.name.partition('-')[0]}-*"):
    if former != path.parent:
      shutil.rmtree(former, ignore_errors=True)


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[bool]:
  """Waits until no other thread or process has its turn at a file; False where the disk has no locks."""
  lock = path.with_name(f".{path.name}.lock")
  with lock.open("wb") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX)
      locked = True
    except OSError:
      locked = False
    yield locked
    lock.unlink(missing_ok=True)  # only now: those that still wait for it find that the file is there


def _copy(url: str, stamp: Stamp, path: Path) -> None:
  _expect(url, stamp)
  if shutil.disk_usage(path.parent).free < stamp[0]:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # before the transfer rather than after most of it
  logging.info("copying %s, %.1f MiB, to %s", url, stamp[0] / 2**20, path)
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
    temporary = Path(file.name)
    try:
      for start in range(0, stamp[0], _PIECE):
        file.write(read(url, start, min(_PIECE, stamp[0] - start)))
      file.close()
      _expect(url, stamp)  # else the pieces may be of two states
      commit(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)


def _expect(url: str, expected: Stamp) -> None:
  with _remote(url) as (system, name):
    system.invalidate_cache(system._parent(name))
  found = stamp(url)
  if found != tuple(expected):
    raise OSError(f"{url} changed since it was opened: {found}, not {tuple(expected)} (bytes, state); open it again")


def commit(temporary: Path, path: Path) -> None:
  """Gives a complete local file its name, so that nobody ever sees half of it under that name."""
  with temporary.open("rb+") as file:
    os.fsync(file.fileno())  # else, after a power cut, an empty file may bear the name
  temporary.chmod(0o644)  # a temporary file is for its owner alone; others may use the data too
  temporary.replace(path)


class _File:
  """An open local file. The descriptor closes when the last thread that reads from it lets go."""

  def __init__(self, path: str):
    self._descriptor = os.open(path, os.O_RDONLY)
    weakref.finalize(self, os.close, self._descriptor)

  def read(self, start: int, size: int) -> bytes:
    parts = []
    while size and (part := os.pread(self._descriptor, size, start)):  # one call gives at most 2 GiB
      parts.append(part)
      start, size = start + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)

  def is_at(self, stat: os.stat_result) -> bool:
    try:
      return os.path.samestat(os.fstat(self._descriptor), stat)
    except OSError:  # stale
      return False


class _OpenFiles:
  """The files that this process read last."""

  def __init__(self) -> None:
    self._files: OrderedDict[str, _File] = OrderedDict()
    self._lock = threading.Lock()

  def get(self, path: str) -> _File:
    with self._lock:
      file = self._files.get(path)
      if file is not None:
        self._files.move_to_end(path)
        return file
    file = _File(path)  # without the lock, for it may take long over a network
    with self._lock:
      self._files[path] = file
      if len(self._files) > _OPEN_FILES:
        self._files.popitem(last=False)
    return file

  def forget(self, path: str) -> None:
    with self._lock:
      self._files.pop(path, None)

  def forget_unless(self, path: str, stat: os.stat_result) -> None:
    """Closes a file that another one has replaced since."""
    with self._lock:
      file = self._files.get(path)
      if file is not None and not file.is_at(stat):
        del self._files[path]


_OPEN = _OpenFiles()


class _Ranges(io.RawIOBase):
  """A file behind a URL, read range by range."""

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


def _local(path: str) -> str:
  return os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


@lru_cache
def _filesystem(root: str) -> fsspec.AbstractFileSystem:
  """One for all threads, where fsspec's own cache has one for each, with connections and listings of its own."""
  try:
    return fsspec.core.url_to_fs(root)[0]
  except ImportError as error:
    raise ValueError(f"{root}: {error}") from None


@contextlib.contextmanager
def _remote(url: str) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
  """The file system of a URL and the file's name there; what the packages below raise, each its own, is an OSError."""
  system = _filesystem("/".join(url.split("/", 3)[:3]))
  try:
    yield system, system._strip_protocol(url)
  except FileNotFoundError:
    raise FileNotFoundError(errno.ENOENT, "no such file", url) from None
  except (OSError, ValueError):
    raise
  except Exception as error:
    raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def _braces(pattern: str) -> list[str]:
  """`a-{08..10}` -> `a-08`, `a-09`, `a-10`; `{val,test}-0` -> `val-0`, `test-0`; other braces stay, as in a shell."""
  for start in (place for place, character in enumerate(pattern) if character == "{"):
    depth, cuts = 0, [start]
    for stop in range(start, len(pattern)):
      depth += (pattern[stop] == "{") - (pattern[stop] == "}")
      if not depth:
        break
      if depth == 1 and pattern[stop] == ",":
        cuts.append(stop)
    else:
      continue  # without an end
    options = [pattern[first + 1 : last] for first, last in itertools.pairwise([*cuts, stop])]
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", pattern[start + 1 : stop]):
      first, last = match.groups()
      if int(first) > int(last):
        raise ValueError(f"{pattern}: the range {{{match.group()}}} is empty")
      options = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    elif len(options) == 1:
      continue
    return [path for option in options for path in _braces(pattern[:start] + option + pattern[stop + 1 :])]
  return [pattern]


def _matching_paths(patterns: list[str]) -> list[list[str]]:
  """Files of each pattern. A range is looked up in the listings of its folders, not file by file."""
  found = []
  for folder, group in itertools.groupby(map(_local, patterns), os.path.dirname):
    same = list(group)
    listed = _entries(folder) if len(same) > 1 else set()
    literal = glob.escape(folder) if os.path.isdir(folder) else folder
    for path in same:
      if path in listed or (not listed and os.path.isfile(path)):
        found.append([path])
      else:
        pattern = os.path.join(literal, os.path.basename(path))
        matches = glob.glob(pattern, recursive=True) if glob.has_magic(path) else []
        found.append(sorted(filter(os.path.isfile, matches)))
  return found


def _entries(folder: str) -> set[str]:
  """Paths of the files in a local folder; nothing where it cannot be listed."""
  try:
    return {os.path.join(folder, entry.name) for entry in os.scandir(folder) if entry.is_file()}
  except OSError:
    return set()


def _matching_urls(patterns: list[str]) -> list[list[str]]:
  """Files of each pattern. A range is looked up in the listings of its folders, not one request for each number."""
  found = []
  for folder, group in itertools.groupby(patterns, lambda pattern: pattern.rpartition("/")[0]):
    same = list(group)
    with _remote(folder) as (system, _):
      system.invalidate_cache()
    listed = _listing(folder) if len(same) > 1 else set()
    for pattern in same:
      with _remote(pattern) as (system, name):
        if _has_magic(pattern):
          about = system.glob(name, detail=True).items()
          found.append(sorted(system.unstrip_protocol(path) for path, info in about if info["type"] == "file"))
        else:
          found.append([pattern] if (name in listed if listed else system.isfile(name)) else [])
  return found


def _has_magic(url: str) -> bool:
  return glob.has_magic(url.replace("?", "") if url.startswith("http") else url)  # where ? begins a query


def _listing(folder: str) -> set[str]:
  """Files in a folder behind a URL, as its file system names them; nothing where it cannot be listed."""
  try:
    with _remote(folder) as (system, name):
      return {info["name"] for info in system.ls(name, detail=True) if info["type"] == "file"}
  except OSError:
    return set()


def _neighbours(pattern: str) -> str:
  """What lies where a pattern matches nothing, as text: files of the same suffix, or all if there are none."""
  if is_url(pattern):
    names, folder = _listing(pattern), pattern
    while not names and (glob.has_magic(folder) or folder == pattern):
      folder = folder.rpartition("/")[0]
    names = names or _listing(folder)
  else:
    path = _local(pattern)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    while glob.has_magic(folder):
      folder = os.path.dirname(folder)
    names = set(glob.glob("*", root_dir=folder))
  suffix = os.path.splitext(pattern)[1]
  alike = sorted(os.path.basename(name) for name in names if suffix and name.endswith(suffix))
  shown = alike or sorted(map(os.path.basename, names))
  return f"in {folder}: {', '.join(shown[:8]) or 'nothing'}" + (f" ... ({len(shown)})" if len(shown) > 8 else "")
