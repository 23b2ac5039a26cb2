"""Long work that is cut into files, each made whole or not at all, by all processes and hosts that see their folder.

What is there is not made again: work that was interrupted goes on, and hosts that share a folder share the work. Each
takes the files in a random order of its own, so that few are made twice, which does no harm. There are no locks, and
nobody waits for anybody.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
import importlib
import json
import math
from multiprocessing import connection, parent_process
import os
from pathlib import Path
import queue
import random
import subprocess
import sys
import tempfile
import threading
from typing import Any, NamedTuple

from absl import logging

from declip_jax.data.storage import files

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time, or "max", in a period
_THREADS = 2  # where there are no processes
_TOLD, _DONE = ".\n", "done\n"  # lines of a process: one for each step of its work, one at its end

Tell = Callable[[], None]
Make = Callable[[Path, Any, Tell], None]


class Job(NamedTuple):
  """A file to make: `argument`, in JSON, is all that its contents depend on, and `steps` says how much work it is."""

  path: Path
  argument: Any
  steps: int


def make(
  function: Make,
  parts: Sequence[Job],
  processes: int,
  over: Callable[[], bool],
  report: Callable[[int], None],
  interval: float,
) -> None:
  """Makes the files that are missing.

  Args:
    function: of a module. Writes a file: `function(path, argument, tell)` calls `tell` after each step.
    parts: the files, of one folder, which is created.
    processes: to start beside this one; with 0 it works itself, as it does where one of them fails, for it may know
      more than they do, such as memory:// and file systems that a program registered.
    over: whether the files are no longer needed; asked between them.
    report: is called with the number of steps that are done, whoever did them.
    interval: between two reports, in seconds.

  Raises:
    Exception: of `function`; other files may be there.
  """
  waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
  for part in random.sample(parts, len(parts)):
    waiting.put(part)
  done, stop = dict.fromkeys((part.path for part in parts), 0), threading.Event()
  helpers = [_Helper(function) for _ in range(min(processes, len(parts)))] or [None] * _THREADS
  pool = ThreadPoolExecutor(len(helpers))
  try:
    futures = [
      pool.submit(_work, function, waiting, done, lambda: stop.is_set() or over(), helper) for helper in helpers
    ]
    while (state := wait(futures, interval, FIRST_EXCEPTION)).not_done:
      if any(future.exception() for future in state.done):
        break
      report(sum(done.values()))
    for future in state.done:
      future.result()
  finally:
    stop.set()
    started = [helper for helper in helpers if helper]
    for helper in started:
      helper.kill()
    pool.shutdown()
    for helper in started:
      helper.close()
      for folder in {part.path.parent for part in parts}:  # what it was killed over
        for unfinished in folder.glob(f".{helper.pid}.*"):
          unfinished.unlink(missing_ok=True)


def _work(
  function: Make,
  waiting: "queue.SimpleQueue[Job]",
  done: dict[Path, int],
  ended: Callable[[], bool],
  helper: "_Helper | None",
) -> None:
  while not ended():
    try:
      part = waiting.get_nowait()
    except queue.Empty:
      return

    def tell(part: Job = part) -> None:
      done[part.path] = min(done[part.path] + 1, part.steps)

    if not part.path.is_file() and not (helper and helper.make(part, tell)) and not ended():
      helper = None
      _make(function, part.path, part.argument, tell)
    done[part.path] = part.steps


def _make(function: Make, path: Path, argument: Any, tell: Tell) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{os.getpid()}.", delete=False) as file:
    temporary = Path(file.name)
  try:
    function(temporary, argument, tell)
    files.commit(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


class _Helper:
  """A process that makes files.

  It is no process of `multiprocessing`, which would run a script without `if __name__ == "__main__"` once more.
  """

  def __init__(self, function: Make):
    command = [sys.executable, "-c", f"from {__name__} import serve; serve()", function.__module__, function.__name__]
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,  # Ctrl-C is for this process alone
      env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )

  def make(self, part: Job, tell: Tell) -> bool:
    """Whether it made the file."""
    line = ""
    try:
      self._process.stdin.write(json.dumps([os.fspath(part.path), part.argument]) + "\n")
      self._process.stdin.flush()
      while (line := self._process.stdout.readline()) == _TOLD:
        tell()
    except OSError:  # it was killed
      pass
    if line and line != _DONE:
      logging.warning("%s: a process could not make it, so this one does: %s", part.path, line.strip())
    return line == _DONE

  @property
  def pid(self) -> int:
    return self._process.pid

  def kill(self) -> None:
    self._process.kill()

  def close(self) -> None:
    self._process.communicate()


def serve() -> None:
  """What a helper does: makes the files that lines of standard input describe."""
  module, name = sys.argv[1:]
  waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
  threading.Thread(target=_listen, args=(waiting,), daemon=True).start()
  function = getattr(importlib.import_module(module), name)
  while True:
    path, argument = json.loads(waiting.get())
    try:
      _make(function, Path(path), argument, lambda: print(_TOLD, end="", flush=True))
      print(_DONE, end="", flush=True)
    except Exception as error:
      print(" ".join(f"{type(error).__name__}: {error}".split()), flush=True)


def _listen(waiting: "queue.SimpleQueue[str]") -> None:
  for line in sys.stdin:
    waiting.put(line)
  os._exit(0)  # who started this process has ended, perhaps by SIGKILL


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
