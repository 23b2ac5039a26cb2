"""Seals of checkpoints: size and CRC-32 of every file, so that later damage, even to a single bit, is noticed.

Each host seals what it wrote, in `checksums.HOST.json`. The seal is written last: a checkpoint lacks it if the run was
killed just before, and gets it when a run has restored it.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
import json
import os
from pathlib import Path
import re
import time
import zlib

from absl import logging
import jax

from declip_jax.runtime import records

_SEAL = "checksums.{}.json"
# Also while they are written: the temporary file of another host is gone before this one can read it.
_LATER = re.compile(r"\.?(checksums\.\d+\.json|scores\.).*")
_CHUNK = 2**24  # bytes read at once
_REPORT_SECONDS = 10.0  # seconds between messages about a long check


def write_seal(folder: Path) -> None:
  """Writes the checksums of this host's files atomically: its own arrays, and on host 0 all files without a number."""
  host, hosts = jax.process_index(), jax.process_count()

  def owner(name: str) -> int:
    number = re.search(r"process_(\d+)", name)
    return int(number[1]) if number and int(number[1]) < hosts else 0

  names = [name for name in _names(folder) if owner(name) == host]
  with ThreadPoolExecutor(_threads()) as pool:
    sums = dict(zip(names, pool.map(lambda name: _checksum(folder / name), names), strict=True))
  records.write(folder / _SEAL.format(host), json.dumps(sums).encode())


def is_sealed(folder: Path) -> bool:
  """Whether the seals name every file of a checkpoint."""
  return set(_names(folder)) <= read_seals(folder)[0].keys()


def _names(folder: Path) -> list[str]:
  """The files of a checkpoint; not the seals, nor the metrics, which are written later."""
  names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
  return [name for name in names if not _LATER.fullmatch(name)]


def read_seals(folder: Path) -> tuple[dict[str, tuple[int, int]], str]:
  """Returns size and checksum of every sealed file, and an error if a seal cannot be read, otherwise ""."""
  expected: dict[str, tuple[int, int]] = {}
  for path in sorted(folder.glob(_SEAL.format("*"))):
    try:
      expected |= {name: (int(size), int(checksum)) for name, (size, checksum) in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
      return expected, f"{path}: {error}"
  return expected, ""


def find_damage(folder: Path, expected: Mapping[str, tuple[int, int]]) -> str:
  """Returns which file differs from its seal and how, "" if none does; reads the files in several threads."""
  # Sizes first: they cost nothing, and most damage is a file that is truncated or missing.
  for name, (size, _) in expected.items():
    try:
      found = (folder / name).stat().st_size
    except OSError:
      return f"{folder / name} is missing"
    if found != size:
      return f"{folder / name} has {found:,} bytes, not {size:,}"
  total, done, reported = sum(size for size, _ in expected.values()), 0, time.monotonic()
  pool = ThreadPoolExecutor(_threads())
  try:
    running = {pool.submit(_checksum, folder / name): name for name in expected}
    for future in as_completed(running):
      name = running[future]
      try:
        same = future.result() == expected[name]
      except OSError as error:
        return f"{folder / name}: {error}"
      if not same:
        return f"{folder / name} does not match its checksum"
      done += expected[name][0]
      if time.monotonic() - reported > _REPORT_SECONDS:
        reported = time.monotonic()
        logging.warning("%s: checked %.1f of %.1f GB", folder, done / 1e9, total / 1e9)
    return ""
  finally:
    pool.shutdown(cancel_futures=True)


def _checksum(path: Path) -> tuple[int, int]:
  """Returns size and CRC-32 of a file; zlib releases Python's lock."""
  size, checksum = 0, 0
  with path.open("rb", buffering=0) as file:
    while chunk := file.read(_CHUNK):
      size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
  return size, checksum


def _threads() -> int:
  return min(16, 2 * (os.cpu_count() or 1))
