"""Streams of batches on grain: shuffled and augmented for training, in order and padded for evaluation.

A training stream depends only on the seed and the position in it, not on workers, threads, hosts or restarts. Its state
is `{"next_index": N}`, the number of examples that the whole run has consumed, the same on every host.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
import queue
import signal
import threading
from typing import Any

from absl import flags, logging
import cv2
import grain
import numpy as np

from declip_jax.data import images
from declip_jax.data.mixture import Mixture, Position, hashed
from declip_jax.data.sources import BAD, BadSample, Example, Source
from declip_jax.data.storage import jobs, shared_memory

Sample = dict[str, np.ndarray]
BAD_COUNTS = "bad_counts"  # field of a sample: how many examples of each kind of `BAD` were skipped for it
_MAX_TRIES = 100
_NAMED = 20  # bad examples of each kind that a process names in the log
_SECOND_STREAM = 1
_CHUNK = 32  # samples, at most, that one thread puts together
_WORTH_PROCESSES = 8192  # images that four threads read in the seconds that processes take to start


@dataclass(frozen=True)
class _MakeSample(grain.transforms.RandomMap):
  """Makes the sample of a position, from another example of the same source if its own is bad."""

  first: Mixture
  second: Mixture | None
  make_views: Callable[[Example, np.random.Generator], Sample]
  max_pixels: int

  def random_map(self, positions: Any, rng: np.random.Generator) -> Sample:
    first, second = positions if self.second else (positions, None)
    bad_counts = np.zeros(len(BAD), np.int32)
    while True:
      try:
        example = self.first.read(first)
      except BadSample as error:
        first = self._skip(self.first, first, error, bad_counts, rng)
        continue
      try:
        other = self.second.read(second) if self.second else None
      except BadSample as error:
        second = self._skip(self.second, second, error, bad_counts, rng)
        continue
      try:
        sample = self.make_views(example if other is None else {**example, "ssl_image": other["image"]}, rng)
      except BadSample as error:
        if other is not None and not _decodes(other["image"], self.max_pixels):
          second = self._skip(self.second, second, _with_id(error, other), bad_counts, rng)
        else:
          first = self._skip(self.first, first, _with_id(error, example), bad_counts, rng)
        continue
      return sample | {BAD_COUNTS: bad_counts}

  def _skip(
    self, mixture: Mixture, position: Position, error: BadSample, bad_counts: np.ndarray, rng: np.random.Generator
  ) -> Position:
    """Counts a bad example and returns the position of its replacement."""
    bad_counts[BAD.index(error.kind)] += 1
    _warn(error)
    if bad_counts.sum() == _MAX_TRIES:
      # Workers can send built-in exceptions; one of an unknown class may hang them.
      name = mixture.sources[position[0]].name
      raise ValueError(f"{name}: {_MAX_TRIES} examples in a row cannot be used; the last one: {error}")
    return mixture.replacement(position, rng)


def _with_id(error: BadSample, example: Example) -> BadSample:
  return BadSample(error.kind, f"{example['id']}: {error}")


def _decodes(image: Any, max_pixels: int) -> bool:
  try:
    images.decode(image, max_pixels)
  except BadSample:
    return False
  return True


_warned: Counter[str] = Counter()  # warnings of this process, by kind


def _warn(error: BadSample) -> None:
  """Names the first bad examples of each kind; too many to read in a large data set."""
  _warned[error.kind] += 1
  if _warned[error.kind] <= _NAMED:
    more = "; further ones of this kind are only counted" if _warned[error.kind] == _NAMED else ""
    logging.warning("skipped (%s) %s%s", error.kind, error, more)


def training_samples(
  mixture: Mixture,
  make_views: Callable[[Example, np.random.Generator], Sample],
  seed: int,
  ssl_mixture: Mixture | None = None,
  max_pixels: int = images.MAX_PIXELS,
) -> grain.MapDataset:
  """Returns all samples of a run, endless and with random access; each epoch of a source is a new permutation of it.

  With `ssl_mixture` each example gets a second image, `ssl_image`, from a stream that is shuffled independently: the
  decoupled setting of SLIP (Mu et al. 2021), in which self-supervision sees images other than those with captions.

  Args:
    mixture: the sources to read.
    make_views: makes a sample from an example, with a generator that depends on seed and position. If the example
      cannot be read or `make_views` raises `BadSample`, another example of the same source, drawn with that generator,
      replaces it; so the stream still depends only on seed and position.
    seed: the seed of shuffling and augmentation.
    ssl_mixture: the sources of the second stream, whose captions are ignored.
    max_pixels: largest number of pixels of an image for `make_views`.

  Returns:
    Samples of `make_views` with `bad_counts`, int32 `[len(BAD)]`: how many examples of each kind were skipped for this
    sample, in both streams together. Reading one raises ValueError after 100 skipped examples.
  """
  positions = mixture.positions(seed)
  if ssl_mixture:
    positions = grain.experimental.ZipMapDataset([positions, ssl_mixture.positions(hashed(seed, _SECOND_STREAM))])
  return positions.random_map(_MakeSample(mixture, ssl_mixture, make_views, max_pixels), seed=seed)


def reader_counts(workers: int | None, threads: int | None, cores: int | None = None) -> tuple[int, int]:
  """Returns the numbers of reader processes and of threads in each; None means a number that fits the cores.

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

  Args:
    num_images: number of images to read.
    workers, threads, cores: see `reader_counts`.
  """
  workers, threads = reader_counts(workers, threads, cores)
  return workers if num_images >= _WORTH_PROCESSES else 0, threads


def _read(dataset: grain.MapDataset, workers: int, threads: int) -> Iterator[Any]:
  """Iterates over a dataset that is read in threads of `workers` processes, or of this one if there are none."""
  # By default grain reads 500 elements ahead, which here are batches or chunks of them.
  stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
  if not workers:
    return iter(stream)
  if not flags.FLAGS.is_parsed():  # grain reads one of its flags, also in a notebook, where flags are not parsed
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
  shared_memory.remove_abandoned()
  start = partial(_start_worker, shared_memory.prefix())
  batches = iter(stream.mp_prefetch(options, worker_init_fn=start))
  batches.get_state()  # makes the iterators of all workers, which start with the first batch otherwise
  with jobs.hold_main_back():
    batches.start_prefetch()
  return batches


class TrainStream:
  """Iterates over this host's share of the global batches: the same positions of every batch.

  A thread makes a chunk of a batch rather than a whole one, so that the first batch is ready soon and little is read
  ahead.

  Args:
    samples: see `training_samples`; the same on every host.
    batch_size: global batch size.
    host, hosts: number of this host, and how many there are.
    workers: number of processes to read with; 0 reads in threads of this process.
    threads: number of threads in each process.
    state: the state of an earlier stream to resume, whose numbers of workers and hosts may differ.
  """

  def __init__(
    self,
    samples: grain.MapDataset,
    batch_size: int,
    *,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    threads: int = 4,
    state: Mapping[str, int] | None = None,
  ):
    self._batch_size, local = batch_size, batch_size // hosts
    self._next_index = state["next_index"] if state else 0
    size = max(size for size in range(1, min(local, _CHUNK) + 1) if local % size == 0)
    self._chunks = local // size
    chunks = grain.MapDataset.source(_Chunks(samples[self._next_index :], size, self._chunks, host, hosts))
    self._iterator = _read(chunks, workers, threads)

  def __iter__(self) -> Iterator[Sample]:
    return self

  def __next__(self) -> Sample:
    """Returns the next batch.

    Raises:
      ChildProcessError: a worker process died.
    """
    try:
      chunks = [next(self._iterator) for _ in range(self._chunks)]
    except RuntimeError as error:  # grain has no error class for this
      if "terminated unexpectedly" not in str(error):
        raise
      raise ChildProcessError(
        f"{error}. Was it killed because memory ran out (of this machine, or of /dev/shm, which passes batches)? "
        "config.data.workers and config.data.threads set the number of readers"
      ) from error
    self._next_index += self._batch_size
    return (
      chunks[0] if len(chunks) == 1 else {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    )

  @property
  def state(self) -> dict[str, int]:
    """The position after the latest batch, from which another stream can resume."""
    return {"next_index": self._next_index}

  def close(self) -> None:
    """Ends the worker processes."""
    _close(self._iterator)


@dataclass(frozen=True)
class _Chunks:
  """A host's share of each global batch, in `count` chunks of `size` samples, with random access."""

  samples: grain.MapDataset
  size: int
  count: int
  host: int
  hosts: int

  def __len__(self) -> int:
    return len(self.samples) // (self.size * self.count * self.hosts) * self.count

  def __getitem__(self, index: int) -> Sample:
    batch, chunk = divmod(index, self.count)
    first = ((batch * self.hosts + self.host) * self.count + chunk) * self.size
    samples = [self.samples[first + offset] for offset in range(self.size)]
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


class Prefetch:
  """Reads a stream ahead in a thread, up to two batches, and places each batch on the devices.

  Yields `(batch, state of the stream after it, examples skipped for it by kind, int [len(BAD)])`. Not grain's
  `ThreadPrefetchDatasetIterator`: closing that waits for its thread without limit, so a run whose storage hangs could
  not stop.

  Args:
    stream: the stream to read; closed together with this.
    place: converts host arrays to device arrays.
  """

  def __init__(self, stream: TrainStream, place: Callable[[Sample], Any]):
    self._stream, self._place = stream, place
    self._queue: queue.Queue = queue.Queue(maxsize=2)
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def _run(self) -> None:
    try:
      for batch in self._stream:
        bad_counts = batch.pop(BAD_COUNTS).sum(axis=0)
        self._put((self._place(batch), self._stream.state, bad_counts))
        if self._stopped.is_set():
          return
    except Exception as error:  # raised again in the thread that trains
      self._put(error)

  def _put(self, item: Any) -> None:
    while not self._stopped.is_set():
      try:
        return self._queue.put(item, timeout=0.1)
      except queue.Full:
        continue

  def __iter__(self) -> Iterator[tuple[Any, dict[str, int], np.ndarray]]:
    return self

  def __next__(self) -> tuple[Any, dict[str, int], np.ndarray]:
    item = self._queue.get()
    if isinstance(item, Exception):
      raise item
    return item

  def close(self) -> None:
    """Stops the thread and closes the stream."""
    self._stopped.set()
    self._thread.join(timeout=10)
    self._stream.close()


@dataclass(frozen=True)
class EvaluationBatches:
  """A source in order, once: `image` uint8 `[b h w 3]`, `label` int32 `[b]`, `mask` bool `[b]`, for this host.

  The mask is False for padding in the last batch and for examples that cannot be read. Every host yields the same
  number of batches, its share of each global batch. (The last share of a host may be padding alone, so samples are
  padded here and not by grain's `batch_and_pad`.)

  Args:
    source: the source to read.
    batch_size: global batch size.
    view: the view of every image.
    batch_rows: which rows of a global batch belong to this host, `[b]`.
    workers, threads: see `evaluation_reader_counts`.
    max_pixels: largest number of pixels of an image, see `images.open_photo`.
  """

  source: Source
  batch_size: int
  view: images.EvalView
  batch_rows: np.ndarray
  workers: int | None = None
  threads: int | None = None
  max_pixels: int = images.MAX_PIXELS

  def __iter__(self) -> Iterator[Sample]:
    local, num_batches = len(self.batch_rows), -(-len(self.source) // self.batch_size)
    samples = grain.MapDataset.range(num_batches * local).map(self._sample)
    counts = evaluation_reader_counts(num_batches * local, self.workers, self.threads)
    batches = _read(samples.batch(local), *counts)
    try:
      yield from batches
    finally:
      _close(batches)

  def _sample(self, number: int) -> Sample:
    batch, row = divmod(number, len(self.batch_rows))
    index = batch * self.batch_size + int(self.batch_rows[row])
    size = self.view.size
    blank = {"image": np.zeros((size, size, 3), np.uint8), "label": np.int32(-1), "mask": np.bool_(False)}
    if index >= len(self.source):
      return blank
    try:
      example = self.source[index]
      pixels = images.decode(example["image"], self.max_pixels)
    except (BadSample, OSError) as error:
      logging.warning("skipped in the evaluation: %s, example %d: %s", self.source.name, index, error)
      return blank
    image = images.eval_view(pixels, self.view)
    return {"image": image, "label": np.int32(example["label"]), "mask": np.bool_(True)}


def _close(batches: Iterator[Any]) -> None:
  """Ends the worker processes of an iterator, if it has any."""
  if close := getattr(batches, "close", None):
    close()


def _start_worker(prefix: str, index: int, count: int) -> None:
  """Prepares a process that reads, whose shared memory has names with this prefix.

  Workers ignore signals, which the main process handles: it saves a checkpoint first.
  """
  del index, count
  shared_memory.use_prefix(prefix)
  disable_opencv_threads()
  jobs.end_with_parent()
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGHUP, signal.SIG_IGN)


def disable_opencv_threads() -> None:
  """Makes OpenCV use the calling thread only, in this whole process: where threads of ours read, more would compete."""
  cv2.setNumThreads(0)
