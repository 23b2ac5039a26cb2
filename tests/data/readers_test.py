import threading
import time
from typing import Any

import numpy as np
import pytest

from declip_jax.data import readers


class Numbers:
  """Samples that can be read while `gate` is open."""

  def __init__(self, count: int):
    self.count, self.read, self.gate = count, [], threading.Event()
    self.gate.set()

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> dict[str, Any]:
    self.read.append(index)
    self.gate.wait()
    if index == 40:
      raise OSError("the disk fails")
    return {"number": np.int32(index)}


def start(samples: Numbers, first: int, threads: int = 2) -> Any:
  return readers.read(readers.Chunks(samples, 2, 1, 0, 1, 0.0), first, 0, threads, 0.0)


def test_threads_read_in_order_from_the_start_up_to_the_first_error_and_only_a_little_ahead() -> None:
  samples = Numbers(60)
  chunks = start(samples, 3)
  assert next(chunks)["number"].tolist() == [6, 7]
  time.sleep(0.05)
  assert max(samples.read) <= 7 + 2 * 2 * 2  # two chunks of two samples for each of two threads
  assert [next(chunks)["number"][0] for _ in range(16)] == list(range(8, 40, 2))
  with pytest.raises(OSError, match="the disk fails"):
    next(chunks)
  assert [chunk["number"][0] for chunk in start(samples, 21)] == list(range(42, 60, 2))


def test_threads_are_closed_while_another_thread_waits_for_them() -> None:
  samples = Numbers(60)
  chunks = start(samples, 0)
  next(chunks)
  samples.gate.clear()
  waiting = threading.Thread(target=lambda: [None for _ in chunks], daemon=True)
  threading.excepthook, hook = (lambda _: None), threading.excepthook  # of the cancelled chunks
  try:
    waiting.start()
    started = time.monotonic()
    chunks.close()
    assert time.monotonic() - started < 5
    samples.gate.set()
    waiting.join(timeout=10)
    assert not waiting.is_alive()
  finally:
    threading.excepthook = hook
  assert max(samples.read) < 20
