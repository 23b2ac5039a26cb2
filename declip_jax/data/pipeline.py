"""Streams of batches on grain: shuffled and augmented for training, in order and padded for evaluation.

A training stream depends on seed and position alone: not on workers, threads, hosts or restarts. Its state is
`{"next_index": N}`, the number of examples that the whole run has consumed, the same on every host.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
import logging
import queue
import signal
import threading
from typing import Any

from absl import flags
import cv2
import grain
import numpy as np

from declip_jax.data import images
from declip_jax.data.mixture import Mixture, Place, hashed
from declip_jax.data.sources import BAD, BadSample, Example, Source
from declip_jax.data.storage import jobs

Row = dict[str, np.ndarray]
BAD_COUNTS = "bad_counts"  # field of a sample: how many examples of each kind of `BAD` were skipped for it
_MAX_TRIES = 100
_NAMED = 20  # bad samples of each kind that a process names
_SECOND_STREAM = 1
_CHUNK = 32  # rows, at most, that one thread puts together


@dataclass(frozen=True)
class _MakeRow(grain.transforms.RandomMap):
  """Reads the example of a place and makes a row of it, or of another one that can be used."""

  first: Mixture
  second: Mixture | None
  make_views: Callable[[Example, np.random.Generator], Row]

  def random_map(self, places: Any, rng: np.random.Generator) -> Row:
    first, second = places if self.second else (places, None)
    passed = np.zeros(len(BAD), np.int32)
    while True:
      try:
        example = self.first.read(first)
      except BadSample as error:
        first = self._pass_over(self.first, first, error, passed, rng)
        continue
      try:
        other = self.second.read(second) if self.second else None
      except BadSample as error:
        second = self._pass_over(self.second, second, error, passed, rng)
        continue
      try:
        row = self.make_views(example if other is None else {**example, "ssl_image": other["image"]}, rng)
      except BadSample as error:
        if other is not None and not _decodes(other["image"]):
          second = self._pass_over(self.second, second, _named(error, other), passed, rng)
        else:
          first = self._pass_over(self.first, first, _named(error, example), passed, rng)
        continue
      return row | {BAD_COUNTS: passed}

  def _pass_over(
    self, mixture: Mixture, place: Place, error: BadSample, passed: np.ndarray, rng: np.random.Generator
  ) -> Place:
    passed[BAD.index(error.kind)] += 1
    _warn(error)
    if passed.sum() == _MAX_TRIES:
      # A built-in exception crosses from a worker process; one of an unknown class may hang it.
      name = mixture.sources[place[0]].name
      raise ValueError(f"{name}: {_MAX_TRIES} examples in a row cannot be used, the last one: {error}")
    return mixture.another(place, rng)


def _named(error: BadSample, example: Example) -> BadSample:
  return BadSample(error.kind, f"{example['id']}: {error}")


def _decodes(image: Any) -> bool:
  try:
    images.decode(image)
  except BadSample:
    return False
  return True


_warned: Counter[str] = Counter()  # of this process, by kind


def _warn(error: BadSample) -> None:
  """Names the first bad samples of each kind: of a large data set with a share of them nobody reads them all."""
  _warned[error.kind] += 1
  if _warned[error.kind] <= _NAMED:
    more = "; further ones of this kind are only counted" if _warned[error.kind] == _NAMED else ""
    logging.getLogger(__name__).warning("passed over (%s) %s%s", error.kind, error, more)


def training_samples(
  mixture: Mixture,
  make_views: Callable[[Example, np.random.Generator], Row],
  seed: int,
  ssl_mixture: Mixture | None = None,
) -> grain.MapDataset:
  """All rows of a run, endless and with random access: each pass over a source is another permutation of all of it.

  With `ssl_mixture` each example gets one more image, `ssl_image`, from a second stream that is shuffled by itself: the
  decoupled study of SLIP (Mu et al. 2021), where self-supervision sees other images than the captions belong to.

  Args:
    mixture: what to read.
    make_views: makes a row from an example, with a generator that depends on seed and position; raises `BadSample` if
      the image cannot be used. Then, as when the example cannot be read, another one of its source takes its place,
      which one is drawn by the same generator: the stream stays what seed and position say.
    seed: of shuffle and augmentation.
    ssl_mixture: of the second stream, whose captions are not looked at.

  Returns:
    Rows of `make_views` with `bad_counts`, int32 `[len(BAD)]`: how many examples of each kind could not be used for
    this one, in both streams together. Reading one raises ValueError if there are 100.
  """
  places = mixture.places(seed)
  if ssl_mixture:
    places = grain.experimental.ZipMapDataset([places, ssl_mixture.places(hashed(seed, _SECOND_STREAM))])
  return places.random_map(_MakeRow(mixture, ssl_mixture, make_views), seed=seed)


def reader_counts(workers: int | None, threads: int | None, cores: int | None = None) -> tuple[int, int]:
  """Processes, and threads in each, to read with; None chooses by the cores that this process may use.

  The work is done by libraries that let go of Python's lock, so up to four threads in a process are nearly as fast as
  processes, which take 200 MB and some seconds to start each. Two cores are left to the training itself.
  """
  cores = cores or jobs.cores()
  if workers is None:
    workers = 0 if cores <= 4 else max((cores - 2) // (threads or 4), 1)
  return workers, threads or min(cores, 4)


class TrainStream:
  """Iterates over this host's part of the global batches: the same rows of each, one behind the other.

  A thread makes a chunk of a batch, not all of it: so the first batch comes soon, and what is read ahead is little.

  Args:
    rows: of `training_samples`, the same on every host.
    batch_size: global.
    host, hosts: which part of each batch is this host's.
    workers: processes to read with; 0 reads in threads of this one.
    threads: in each process.
    state: of an earlier stream, to go on from; its number of workers and hosts does not matter.
  """

  def __init__(
    self,
    rows: grain.MapDataset,
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
    chunks = grain.MapDataset.source(_Chunks(rows[self._next_index :], size, self._chunks, host, hosts))
    # grain's default reads 500 elements ahead, which here are chunks.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    if not workers:
      _start_worker()
    else:
      if not flags.FLAGS.is_parsed():  # grain reads one of its flags, also in a notebook, where nobody parses them
        flags.FLAGS.mark_as_parsed()
    stream = chunks.to_iter_dataset(options)
    if workers:
      stream = stream.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2), worker_init_fn=_start_worker
      )
    self._iterator = iter(stream)

  def __iter__(self) -> Iterator[Row]:
    return self

  def __next__(self) -> Row:
    """The next batch.

    Raises:
      ChildProcessError: a worker process died.
    """
    try:
      chunks = [next(self._iterator) for _ in range(self._chunks)]
    except RuntimeError as error:  # grain has no class of its own for it
      if "terminated unexpectedly" not in str(error):
        raise
      raise ChildProcessError(
        f"{error}. Was it killed for want of memory (of this machine, or of /dev/shm, through which batches come)? "
        "config.data.workers and config.data.threads say how many read"
      ) from error
    self._next_index += self._batch_size
    return (
      chunks[0] if len(chunks) == 1 else {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    )

  @property
  def state(self) -> dict[str, int]:
    """Where the batch after the latest one starts."""
    return {"next_index": self._next_index}

  def close(self) -> None:
    """Ends the worker jobs."""
    if close := getattr(self._iterator, "close", None):
      close()


@dataclass(frozen=True)
class _Chunks:
  """A host's rows of each global batch, in `count` chunks of `size`; random access, for grain."""

  rows: grain.MapDataset
  size: int
  count: int
  host: int
  hosts: int

  def __len__(self) -> int:
    return len(self.rows) // (self.size * self.count * self.hosts) * self.count

  def __getitem__(self, index: int) -> Row:
    batch, chunk = divmod(index, self.count)
    first = ((batch * self.hosts + self.host) * self.count + chunk) * self.size
    rows = [self.rows[first + row] for row in range(self.size)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Prefetch:
  """Reads a stream ahead in a thread, two batches deep, and places each batch on the devices.

  Yields `(batch, state of the stream behind it, examples passed over for it by kind, int [len(BAD)])`.

  Args:
    stream: to read; closed with this.
    place: from host arrays to device arrays.
  """

  def __init__(self, stream: TrainStream, place: Callable[[Row], Any]):
    self._stream, self._place = stream, place
    self._queue: queue.Queue = queue.Queue(maxsize=2)
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def _run(self) -> None:
    try:
      for batch in self._stream:
        passed_over = batch.pop(BAD_COUNTS).sum(axis=0)
        self._put((self._place(batch), self._stream.state, passed_over))
        if self._stopped.is_set():
          return
    except Exception as error:  # whatever it is belongs to the thread that trains
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

  The last batch is padded with rows whose mask is False, and so are examples that cannot be read. Every host gets the
  same number of batches, its own rows of each global batch.

  Args:
    source: to read.
    batch_size: global.
    view: how images are preprocessed.
    batch_rows: indices of this host's rows in each global batch, `[b]`.
    threads: number of reading threads.
  """

  source: Source
  batch_size: int
  view: images.EvalView
  batch_rows: np.ndarray
  threads: int = 4

  def __iter__(self) -> Iterator[Row]:
    count = -(-len(self.source) // self.batch_size)
    options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
    return iter(grain.MapDataset.range(count).map(self._batch).to_iter_dataset(options))

  def _batch(self, index: int) -> Row:
    rows = [self._row(index * self.batch_size + int(row)) for row in self.batch_rows]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def _row(self, index: int) -> Row:
    blank = {
      "image": np.zeros((self.view.size, self.view.size, 3), np.uint8),
      "label": np.int32(-1),
      "mask": np.bool_(False),
    }
    if index >= len(self.source):
      return blank
    try:
      example = self.source[index]
      pixels = images.decode(example["image"])
    except (BadSample, OSError) as error:
      logging.getLogger(__name__).warning(
        "left out of the evaluation: %s, example %d: %s", self.source.name, index, error
      )
      return blank
    image = images.eval_view(pixels, self.view)
    return {"image": image, "label": np.int32(example["label"]), "mask": np.bool_(True)}


def _start_worker(index: int = 0, count: int = 0) -> None:
  """Workers leave signals to the main process, which saves a checkpoint first; OpenCV's threads would only compete."""
  cv2.setNumThreads(0)
  if count:
    jobs.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
