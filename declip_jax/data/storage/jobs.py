"""Long work split into jobs: `run` does them in worker processes, `make_files` turns each into a file.

Workers are processes of `concurrent.futures` that end with this process, even if it is killed, and that ignore Ctrl-C.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
import contextlib
from functools import partial
import math
import multiprocessing
from multiprocessing import connection, parent_process
import os
from pathlib import Path
import random
import re
import signal
import sys
import tempfile
import threading
import types
from typing import Any, NamedTuple
import uuid

from absl import logging

from declip_jax.data.storage import files

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time, or "max", in a period
_THREADS = 2  # for jobs in this process
_PART = re.compile(r"([0-9]{1,9}|auto)(?:/([0-9]{1,9}))?")

Advance = Callable[[int], None]
Function = Callable[[Any, Advance], Any]
Write = Callable[[Path, Any, Advance], None]


class WorkerKilled(ChildProcessError):
  """A worker process ended before its job, for example because memory ran out."""


class _Stopped(Exception):
  """Ends a job of this process whose result is no longer needed."""


def run(
  function: Function,
  arguments: Sequence[Any],
  processes: int,
  *,
  threads: int = _THREADS,
  report: Callable[[int], None] = lambda steps: None,
  interval: float = 1.0,
  is_over: Callable[[], bool] = lambda: False,
  retry: bool = False,
) -> Generator[tuple[int, Any], None, None]:
  """Yields the number and the result of each job as it finishes; closing the generator stops the others.

  Args:
    function: called as `function(argument, advance)` for each job; calls `advance(n)` after `n` more steps. Processes
      import its module, unless that is a script.
    arguments: the argument of each job. Like `function` and the results they are pickled.
    processes: number of worker processes; 0 means threads of this process.
    threads: number of threads for jobs in this process.
    report: called with the number of steps done by all jobs.
    interval: seconds between two reports.
    is_over: whether the remaining jobs are no longer needed.
    retry: whether this process repeats a job that failed in a worker. It may know more than its workers do, such as
      memory:// and file systems that a program registered.

  Raises:
    Exception: whatever `function` raises.
    WorkerKilled: a worker process was killed, without `retry`.
  """
  if is_over() or not arguments:
    return
  pools, complete = _Pools(function, min(processes, len(arguments)), threads, retry), False
  try:
    with hold_interrupts():
      pending = {pools.submit(argument): (number, not processes) for number, argument in enumerate(arguments)}
    while pending and not is_over():
      ready, _ = wait(pending, interval, FIRST_COMPLETED)
      report(pools.steps.value)
      for future in sorted(ready, key=_failed):  # results first, since an error ends this generator
        number, here = pending.pop(future)
        error = future.exception()
        if error is None:
          yield number, future.result()
        elif here or not retry:
          raise WorkerKilled(_KILLED) if isinstance(error, BrokenProcessPool) else error
        else:
          message = " ".join(f"{type(error).__name__}: {error}".split())
          logging.warning("a worker process failed, so this process repeats its job: %s", message)
          pending[pools.submit(arguments[number], here=True)] = (number, True)
    complete = not pending
  finally:
    pools.close(complete)


class _Pools:
  """Worker processes, if any, and threads of this process.

  Attributes:
    steps: number of steps done by all jobs, as `value`.
  """

  def __init__(self, function: Function, processes: int, threads: int, retry: bool) -> None:
    context = multiprocessing.get_context("spawn")  # threads of array_record and fsspec do not survive a fork
    self._function, self._retry = function, retry
    lock, self._stop = threading.Lock(), threading.Event()
    self.steps: Any = context.Value("q", 0) if processes else types.SimpleNamespace(value=0, get_lock=lambda: lock)
    self._receiver, self._lifeline = context.Pipe(duplex=False)
    self._threads, self._workers = ThreadPoolExecutor(threads), None
    if processes:
      self._workers = ProcessPoolExecutor(processes, context, _start_worker, (self.steps, self._receiver))

  def submit(self, argument: Any, here: bool = False) -> Future:
    """Starts a job, in this process if there are no workers, if `here`, or if they are broken and may be replaced."""
    if self._workers and not here:
      with contextlib.suppress(BrokenProcessPool), hold_main_back():
        return self._workers.submit(_work, self._function, argument)
      if not self._retry:
        raise WorkerKilled(_KILLED)
    return self._threads.submit(self._function, argument, self._advance)

  def close(self, complete: bool) -> None:
    """Waits for the workers, or ends them at once unless all jobs are `complete`."""
    with hold_interrupts():
      self._stop.set()
      if not complete:
        self._lifeline.close()  # workers see it and exit at once
      for pool in filter(None, (self._workers, self._threads)):
        pool.shutdown(cancel_futures=True)
      self._lifeline.close()
      self._receiver.close()

  def _advance(self, count: int) -> None:
    _add(self.steps, count)
    if self._stop.is_set():
      raise _Stopped


def _failed(future: Future) -> bool:
  return future.exception() is not None


_KILLED = "a worker process was killed, perhaps because memory ran out: run the command again with fewer workers"


class Part(NamedTuple):
  """The part of some work that one of several machines does: each piece whose number is `index` modulo `count`."""

  index: int
  count: int

  @classmethod
  def of(cls, text: str, environment: Mapping[str, str]) -> "Part":
    """Parses "I/N", "auto" or "auto/N", with I from 0.

    Args:
      text: for "auto", I is the number of this task in a Slurm array or in an indexed job of Kubernetes, and N, unless
        it is given, the number of tasks in the Slurm array.
      environment: the environment variables.

    Raises:
      ValueError: it has another form, I is not below N, or the variables are not set.
    """
    match = _PART.fullmatch(text)
    if not match:
      raise ValueError(f"shard={text}: expected I/N with I from 0 to N - 1, such as 0/8, or auto, or auto/8")
    number, count = match.groups()
    if number == "auto":
      number = environment.get("SLURM_ARRAY_TASK_ID", environment.get("JOB_COMPLETION_INDEX", ""))
      if not number.isdecimal():
        set_by = "SLURM_ARRAY_TASK_ID by a Slurm array, JOB_COMPLETION_INDEX by an indexed job of Kubernetes"
        raise ValueError(f"shard={text}: expected one of these variables: {set_by}; or give I/N")
      if count is None:
        count = environment.get("SLURM_ARRAY_TASK_COUNT", "")
        if not count.isdecimal() or environment.get("SLURM_ARRAY_TASK_MIN") != "0":
          raise ValueError(f"shard={text}: only a Slurm array from 0 on sets the number of tasks N; give auto/N")
    if count is None or not int(number) < int(count):
      raise ValueError(f"shard={text}: {number} of {count}: expected I/N with I from 0 to N - 1")
    return cls(int(number), int(count))

  def check(self, pieces: int, noun: str) -> None:
    """Checks that this machine has something to do.

    Args:
      pieces: number of pieces of the work.
      noun: what they are, in the plural.

    Raises:
      ValueError: there are fewer pieces than machines.
    """
    if self.count > max(pieces, 1):
      raise ValueError(f"shard={self.index}/{self.count}: expected at most as many machines as {noun}, {pieces}")


WHOLE = Part(0, 1)


class Job(NamedTuple):
  """A file to make.

  Attributes:
    path: the path of the file.
    argument: everything that its contents depend on; pickled.
    steps: the amount of work.
  """

  path: Path
  argument: Any
  steps: int


def make_files(
  write: Write,
  jobs: Sequence[Job],
  processes: int,
  is_over: Callable[[], bool],
  report: Callable[[int], None],
  interval: float,
) -> None:
  """Makes the files that are missing, each completely or not at all.

  Interrupted work continues when it is started again, and hosts that share a folder share the work: each takes the
  jobs in a random order of its own, so that few files are made twice, which does no harm. There are no locks, and
  no process waits for another.

  Args:
    write: called as `write(path, argument, advance)` to write a file; calls `advance(n)` after `n` more steps.
    jobs: the files; their folders are created.
    processes: number of worker processes; see `run`.
    is_over: whether the files are no longer needed; called between jobs.
    report: called with the number of steps done, whoever did them.
    interval: seconds between two reports.

  Raises:
    Exception: whatever `write` raises; other files may exist.
  """
  shuffled = random.sample(jobs, len(jobs))
  token, total = uuid.uuid4().hex, sum(job.steps for job in jobs)
  running = run(
    partial(_make_file, write, token),
    shuffled,
    processes,
    report=lambda steps: report(min(steps, total)),  # a repeated job counts twice
    interval=interval,
    is_over=is_over,
    retry=True,
  )
  try:
    with contextlib.closing(running):
      for _ in running:
        pass
  finally:
    for folder in {job.path.parent for job in jobs}:  # files of killed workers
      for unfinished in folder.glob(f".{token}.*"):
        unfinished.unlink(missing_ok=True)


def _make_file(write: Write, token: str, job: Job, advance: Advance) -> None:
  if job.path.is_file():
    advance(job.steps)
    return
  job.path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=job.path.parent, prefix=f".{token}.", delete=False) as file:
    temporary = Path(file.name)
  try:
    write(temporary, job.argument, advance)
    files.commit(temporary, job.path)
  finally:
    temporary.unlink(missing_ok=True)


_worker: dict[str, Any] = {}  # in a worker process: the shared number of steps


def _start_worker(steps: Any, receiver: connection.Connection) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which stops its workers
  _worker["steps"] = steps
  end_with_parent(receiver)


def _work(function: Function, argument: Any) -> Any:
  return function(argument, partial(_add, _worker["steps"]))


def _add(steps: Any, count: int) -> None:
  with steps.get_lock():
    steps.value += count


_main_lock = threading.Lock()


@contextlib.contextmanager
def hold_main_back() -> Iterator[None]:
  """Keeps workers that start in it from importing `__main__`: a script without a main guard would run again."""
  with _main_lock:
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
      yield
    finally:
      sys.modules["__main__"] = main


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
  """Delays Ctrl-C; processes and threads that start in the context never receive it."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cores() -> int:
  """Returns the number of cores that this process may use, by its affinity and, in a container, by its quota."""
  allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  try:
    quota, period = _QUOTA.read_text().split()
    return max(1, min(allowed, math.ceil(int(quota) / int(period))))
  except (OSError, ValueError):  # no such file, or no quota
    return allowed


def end_with_parent(*lifelines: connection.Connection, before: Callable[[], None] = lambda: None) -> None:
  """Ends this process when its parent dies, even by SIGKILL, or closes a pipe of `lifelines`; calls `before` first."""
  threading.Thread(target=_wait_for_parent, args=(lifelines, before), daemon=True).start()


def _wait_for_parent(lifelines: Sequence[connection.Connection], before: Callable[[], None]) -> None:
  connection.wait([parent_process().sentinel, *lifelines])
  before()
  os._exit(1)
