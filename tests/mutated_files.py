"""Random mutations of files, and bounds for what reads them."""

from collections.abc import Callable
from pathlib import Path
import time
from typing import Any

import numpy as np

SECONDS, BYTES = 1.0, 256 << 20
VALUES = (0, 1, 2, 9, 127, 128, 255)


def mutated(contents: bytes, rng: np.random.Generator) -> bytes:
  """The same with one to four changes: bytes, cuts, insertions, repetitions, and whole parts elsewhere."""
  changed = bytearray(contents)
  for _ in range(rng.integers(1, 5)):
    # Most changes are where the structure is: at the start or at the end.
    span = len(changed) if rng.random() < 0.3 else min(len(changed), 3000)
    start = int(rng.integers(span)) if rng.random() < 0.6 else len(changed) - 1 - int(rng.integers(span))
    start, length = max(start, 0), int(rng.integers(1, 9))
    part = bytes(changed[start : start + length])
    match rng.integers(7):
      case 0:
        changed[start : start + 1] = bytes([changed[start] ^ (1 << int(rng.integers(8)))])
      case 1:
        changed[start : start + length] = bytes(rng.choice(VALUES, length).tolist())
      case 2:
        del changed[start : start + length]
      case 3:
        changed[start:start] = rng.bytes(length)
      case 4:
        changed[start:start] = part * int(rng.integers(1, 50))
      case 5:
        other = int(rng.integers(len(changed)))
        changed[start : start + length] = changed[other : other + length]
      case _:
        del changed[int(rng.integers(len(changed))) :]
    changed = changed or bytearray(b"\0")
  return bytes(changed)


def memory(field: str) -> int:
  """Bytes of this process, now (VmRSS) or at most (VmHWM)."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def check_bounds(count: int, seed: int, try_one: Callable[[np.random.Generator], Any]) -> None:
  """Calls a function for many generators, and checks the time of each call and the memory of all."""
  Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
  before = memory("VmRSS")
  for index in range(count):
    for attempt in range(2):  # the first may trace a new model
      start = time.process_time()
      try_one(np.random.default_rng((seed, index)))
      if (elapsed := time.process_time() - start) < SECONDS:
        break
      assert attempt == 0, (index, elapsed)
  assert memory("VmHWM") - before < BYTES


def check_message(error: ValueError, path: Path) -> None:
  """An error is a short line that begins with the file or its folder."""
  message = str(error)
  assert message.startswith(str(path))
  assert len(message.removeprefix(str(path))) <= 300, message
  assert len(message.splitlines()) == 1, message
