"""The cache of compiled programs in a working directory, so that a restarted run need not compile.

Its entries are native code, so a folder that another user could have written to is not used. JAX writes entries in
place and never replaces them, so truncated or changed ones are removed when a run starts.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import importlib
import json
import os
from pathlib import Path
import stat
import zlib

from absl import logging
import jax

from declip_jax.runtime import records
from declip_jax.runtime.plain_paths import plain_path

_SUMS = "checksums.json"
_ENTRIES = "*-cache"  # as JAX names them
_ZSTANDARD = (
  b"\x28\xb5\x2f\xfd"  # the first bytes of an entry that JAX compressed with zstandard, if that package is installed
)


@contextlib.contextmanager
def compile_cache(folder: Path) -> Iterator[None]:
  """Caches compiled programs in a folder, which only this user can access, while the context is open.

  `JAX_COMPILATION_CACHE_DIR` overrides the folder.
  """
  if jax.config.jax_compilation_cache_dir:
    yield
    return
  new = [path for path in (folder, folder.parent) if not path.exists()]
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    reason = why_untrusted(folder)
    if not reason and jax.process_index() == 0:
      remove_damaged(folder)
  except OSError as error:
    reason = str(error)
  if reason:
    logging.warning("compiled programs are not cached: %s", reason)
    yield
    return
  jax.config.update("jax_compilation_cache_dir", str(plain_path(folder.parent) / folder.name))
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      if jax.process_index() == 0 and any(folder.glob(_ENTRIES)):
        _write_sums(folder)
    for path in new:  # if the run did not begin
      with contextlib.suppress(OSError):
        path.rmdir()


def why_untrusted(folder: Path) -> str:
  """Returns why another user could have written to a cache, "" if none could.

  Raises:
    OSError: it cannot be listed.
  """
  mode = folder.stat().st_mode
  for path in (folder, *sorted(folder.iterdir())):
    about = path.stat() if path == folder else path.lstat()
    if stat.S_ISLNK(about.st_mode):
      return f"{path} is a link"
    if about.st_uid not in (os.getuid(), 0):
      return f"{path}, which contains native code, belongs to another user"
    # No other user can access files inside a private folder.
    if about.st_mode & 0o022 and (path == folder or mode & 0o077):
      return f"{path}, which contains native code, can be written by other users: delete {folder}"
  return ""


def remove_damaged(folder: Path) -> None:
  """Removes the entries that differ from their checksums or, without one, cannot be decompressed.

  Raises:
    OSError: the folder or an entry cannot be read.
  """
  sums = _read_sums(folder)
  for path in folder.glob(_ENTRIES):
    content = path.read_bytes()
    expected = sums.get(path.name)
    whole = _decompresses(content) if expected is None else hashlib.sha256(content).hexdigest() == expected
    if not whole:
      logging.warning("%s is damaged and was removed: its program is compiled again", path)
      path.unlink(missing_ok=True)
  if any(folder.glob(_ENTRIES)):
    _write_sums(folder)


def _decompresses(content: bytes) -> bool:
  try:
    if content.startswith(_ZSTANDARD):
      importlib.import_module("zstandard").ZstdDecompressor().decompress(content)
    else:
      zlib.decompress(content)
  except Exception:  # zstandard's errors have a separate base class
    return False
  return True


def _read_sums(folder: Path) -> dict[str, str]:
  try:
    sums = json.loads((folder / _SUMS).read_text())
  except (OSError, ValueError):
    return {}
  return sums if isinstance(sums, dict) else {}


def _write_sums(folder: Path) -> None:
  """Writes the checksums of all entries; existing ones are kept, so that later damage is found."""
  sums, names = _read_sums(folder), sorted(path.name for path in folder.glob(_ENTRIES))
  found = {name: sums.get(name) or hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
  records.write(folder / _SUMS, json.dumps(found).encode())
