"""What processes that read data share: how many cores there are for them, and that they end with who started them."""

import math
from multiprocessing import connection, parent_process
import os
from pathlib import Path
import threading

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time, or "max", in a period


def cores() -> int:
  """Cores that this process may use: by its affinity and, in a container, by its quota."""
  allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  try:
    quota, period = _QUOTA.read_text().split()
    return max(1, min(allowed, math.ceil(int(quota) / int(period))))
  except (OSError, ValueError):  # no such file, or no quota
    return allowed


def end_with_parent() -> None:
  """Ends this process when the one that started it dies, even by SIGKILL: nobody else would end it."""
  threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
  connection.wait([parent_process().sentinel])
  os._exit(1)
