"""What killed processes leave in shared memory is removed; what living ones use is not."""

from pathlib import Path
import subprocess
import sys

import pytest

from declip_jax.data.storage import shared_memory

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is not a folder here")

SCRIPT = """
import sys
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from declip_jax.data.storage import shared_memory

resource_tracker.register = lambda *_: None  # it is killed together with the process
shared_memory.use_prefix(shared_memory.prefix())
block = SharedMemory(create=True, size=100)
print(block.name, flush=True)
sys.stdin.readline()
"""


def test_the_blocks_of_a_process_are_removed_once_it_is_killed() -> None:
  pipe = subprocess.PIPE
  process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=pipe, stdout=pipe, text=True)
  assert process.stdout is not None
  block = Path("/dev/shm", process.stdout.readline().strip())
  lock = block.with_name(block.name[: len("declip_jax-") + 16] + ".lock")
  shared_memory.remove_abandoned()
  assert block.exists()
  assert lock.exists()
  process.kill()
  process.communicate()
  assert block.exists()
  shared_memory.remove_abandoned()
  assert not block.exists()
  assert not lock.exists()


def test_the_blocks_of_this_process_and_files_of_others_are_kept() -> None:
  own = Path("/dev/shm", f"{shared_memory.prefix()}block")
  other = Path("/dev/shm", "declip_jax-other-block")
  try:
    for path in (own, other):
      path.touch()
    shared_memory.remove_abandoned()
    assert own.exists()
    assert other.exists()
  finally:
    for path in (own, other):
      path.unlink(missing_ok=True)
