"""Reads chunks of samples ahead, in threads of this process or of worker processes, and reports workers that die."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
import itertools
import multiprocessing
from multiprocessing import connection
import signal
import threading
import time
from typing import Any

from absl import flags, logging
import cv2
import numpy as np

from declip_jax.data import deaths as deaths_lib
from declip_jax.data import hangs
from declip_jax.data.deaths import Deaths
from declip_jax.data.storage import jobs, shared_memory
from declip_jax.extras import grain, is_installed

Sample = dict[str, np.ndarray]
_AHEAD = 2  # chunks that a thread reads ahead
_CHUNK = 32  # largest number of samples that one thread puts together
_START_SECONDS = 60  # limit for starting all worker processes
_ENDED = 255  # exit code of a worker that ended by itself
_WORTH_PROCESSES = 8192  # images that four threads read in the time that processes take to start


@dataclass(frozen=True)
class Chunks:
  """A host's share of each global batch, in `count` chunks of `size` samples, with random access."""

  samples: Sequence[Sample]
  size: int
  count: int
  host: int
  hosts: int
  seconds: float

  def __len__(self) -> int:
    return len(self.samples) // (self.size * self.count * self.hosts) * self.count

  def __getitem__(self, index: int) -> Sample:
    batch, chunk = divmod(index, self.count)
    first = ((batch * self.hosts + self.host) * self.count + chunk) * self.size
    try:
      samples = hangs.make_all(lambda offset: self.samples[first + offset], self.size, self.seconds)
    except (KeyboardInterrupt, SystemExit) as error:
      logging.error("%s %s", type(error).__name__, " ".join(getattr(error, "__notes__", ())))
      if multiprocessing.parent_process() is None:
        raise
      raise RuntimeError(f"{type(error).__name__} {' '.join(getattr(error, '__notes__', ()))}") from error
    return _stacked(samples)


def _stacked(samples: Sequence[Sample]) -> Sample:
  """Joins samples to a batch.

  Raises:
    ValueError: the fields or shapes of a sample differ from those of most others; the message names the sample.
  """
  forms = [tuple((name, value.shape) for name, value in sorted(sample.items())) for sample in samples]
  if len(counts := Counter(forms)) > 1:
    most = counts.most_common(1)[0][0]
    odd = next(number for number, form in enumerate(forms) if form != most)
    place = getattr(samples[odd], "place", f"sample {odd} of the batch")
    raise ValueError(f"{place}: views {dict(set(forms[odd]) - set(most))}, but {dict(most)} of most samples")
  return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def chunk_size(batch_size: int) -> int:
  """The largest number of samples of a chunk of which a batch has a whole number."""
  return max(size for size in range(1, min(batch_size, _CHUNK) + 1) if batch_size % size == 0)


def reader_counts(workers: int | None, threads: int | None, cores: int | None = None) -> tuple[int, int]:
  """Returns the numbers of reader processes and of threads in each; None means a number that depends on the cores.

  The libraries that do the work release Python's lock, so up to four threads in a process are nearly as fast as
  processes, which take 200 MB and some seconds to start each. Two cores remain for the training itself. (grain's
  `pick_performance_config` chooses by memory alone and reads samples to do so.)

  Args:
    workers: number of processes; 0 means threads of this process.
    threads: number of threads in each process.
    cores: number of cores, by default those that this process may use.
  """
  cores = cores or jobs.cores()
  if workers is None:
    workers = 0 if cores <= 4 else max((cores - 2) // (threads or 4), 1)
  return workers, threads or min(cores, 4)


def evaluation_reader_counts(
  num_images: int, workers: int | None, threads: int | None, cores: int | None = None
) -> tuple[int, int]:
  """`reader_counts` for images that are read once: processes for few of them would take longer to start than to read.

  Without processes there is one thread per core, since nothing else runs meanwhile. grain starts the processes, so
  there are none where it is not installed.

  Args:
    num_images: number of images to read.
    workers, threads, cores: see `reader_counts`.
  """
  workers, counted = reader_counts(workers, threads, cores)
  if workers and num_images >= _WORTH_PROCESSES and is_installed("grain"):
    return workers, counted
  return 0, threads or cores or jobs.cores()


def read(chunks: Chunks, start: int, workers: int, threads: int, seconds: float) -> Iterator[Sample]:
  """Iterates over chunks from `start` on, read in threads of `workers` processes, or of this one if there are none."""
  return _in_processes(chunks, start, workers, threads, seconds) if workers else _InThreads(chunks, start, threads)


class _InThreads(Iterator[Any]):
  """Chunks from `start` on, in order, that threads of this process read ahead.

  Not a generator: another thread can close this while it waits for a chunk.
  """

  def __init__(self, chunks: Chunks, start: int, threads: int):
    self._chunks, self._indices, self._most = chunks, iter(range(start, len(chunks))), _AHEAD * threads
    self._pool, self._pending = ThreadPoolExecutor(threads, "read"), deque[Future[Sample]]()

  def __next__(self) -> Sample:
    self._submit()
    if not self._pending:
      raise StopIteration
    chunk = self._pending.popleft()
    self._submit()
    return chunk.result()

  def _submit(self) -> None:
    for index in itertools.islice(self._indices, self._most - len(self._pending)):
      self._pending.append(self._pool.submit(self._chunks.__getitem__, index))

  def close(self) -> None:
    self._pool.shutdown(wait=False, cancel_futures=True)


def _in_processes(chunks: Chunks, start: int, workers: int, threads: int, seconds: float) -> Iterator[Sample]:
  # By default grain reads 500 elements ahead, which here are batches or chunks of them.
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD * threads)
  stream = grain.MapDataset.source(chunks)[start:].to_iter_dataset(options)
  if not flags.FLAGS.is_parsed():  # grain reads one of its flags, also in a notebook, where flags are not parsed
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
  shared_memory.remove_abandoned()
  prepare = partial(_start_worker, shared_memory.prefix(), seconds)
  batches = iter(stream.mp_prefetch(options, worker_init_fn=prepare))
  batches.get_state()  # makes the iterators of all workers, which start with the first batch otherwise
  before = set(multiprocessing.active_children())
  with jobs.hold_main_back():
    batches.start_prefetch()
    # grain starts each process in a thread of its own. If a process cannot start, the first batch raises the error.
    give_up = time.monotonic() + _START_SECONDS
    while len(started := set(multiprocessing.active_children()) - before) < workers and time.monotonic() < give_up:
      time.sleep(0.01)
  threading.Thread(target=_report_exits, args=(started,), daemon=True).start()
  return batches


def _report_exits(processes: Iterable[Any]) -> None:
  """Waits until worker processes end; one that ends with exit code 0 gets another one.

  grain takes 0 for the end that it asked for itself, and would wait forever if a library has ended the process.
  """
  running = {process.sentinel: process for process in processes}
  while running:
    for sentinel in connection.wait(list(running)):
      process = running.pop(sentinel)
      process.join()
      if process.exitcode == 0:
        process._popen.returncode = _ENDED


def recovered(error: RuntimeError, deaths: Deaths) -> Exception:
  """Records the samples in which a worker died, and returns the error about its death.

  Raises:
    ChildProcessError: no sample is known in which it died.
    RuntimeError: the error itself, if it is about something else.
  """
  death = _death(error)
  if death is error or not (known := deaths.recover()):
    raise death from error
  for line in known:
    logging.warning("%s (%s)", line, error)
  return death


def _death(error: RuntimeError) -> Exception:
  """Replaces grain's error about a dead worker, which has no class of its own; returns other errors unchanged."""
  if "terminated unexpectedly" not in str(error):
    return error
  return ChildProcessError(
    f"{error}. Was it killed because memory ran out (of this machine, or of /dev/shm, which passes batches)? "
    "In a training, config.data.workers and config.data.threads set the number of readers"
  )


def close(batches: Iterator[Any]) -> None:
  """Ends the worker processes of an iterator, if it has any."""
  if close := getattr(batches, "close", None):
    close()


def _start_worker(prefix: str, seconds: float, index: int, count: int) -> None:
  """Prepares a process that reads, whose shared memory has names with this prefix.

  Workers ignore signals, which the main process handles: it saves a checkpoint first.
  """
  del index, count
  shared_memory.use_prefix(prefix)
  disable_opencv_threads()
  jobs.end_with_parent(before=deaths_lib.clear_journals)
  hangs.end_if_stuck(seconds)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGHUP, signal.SIG_IGN)


def disable_opencv_threads() -> None:
  """Makes OpenCV use only the calling thread, in the whole process: our own threads already use all cores."""
  cv2.setNumThreads(0)
