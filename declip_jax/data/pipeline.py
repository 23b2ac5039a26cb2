"""Streams of batches on grain: shuffled and augmented for training, in order and padded for evaluation.

A training stream depends only on the seed and the position in it, not on workers, threads, hosts or restarts. Its state
is `{"next_index": N}`, the number of examples that the whole run has consumed, the same on every host.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
import contextlib
from dataclasses import dataclass, field
import errno
from functools import cache
import hashlib
import json
from pathlib import Path
import queue
import tempfile
import threading
from typing import Any, NamedTuple

from absl import logging
from jaxtyping import Int, Int8
import numpy as np

from declip_jax.data import hangs, images
from declip_jax.data.deaths import Deaths
from declip_jax.data.mixture import Mixture, Position, hashed
from declip_jax.data.readers import Chunks, Sample, chunk_size, close, evaluation_reader_counts, read, recovered
from declip_jax.data.sources import BAD, OF_MEDIA, BadSample, Example, Source, bad_sample, read_example
from declip_jax.extras import grain
from declip_jax.spelling import counted

BAD_COUNTS = "bad_counts"  # field of a sample: how many examples of each kind of `BAD` were skipped for it
_MAX_TRIES = 100
_ERROR = "error"  # field of a row of an evaluation: why it cannot be read
_MAX_DEATHS = 10  # of workers, within one batch
_TRIES = 2  # of evaluations to read an example that is too slow
_NAMED = 20  # bad examples of each kind that a process names in the log
_SECOND_STREAM = 1


@dataclass(frozen=True)
class _MakeSample:
  """Makes the sample of a position, from another example of the same source if its own is bad."""

  mixtures: tuple[Mixture, ...]
  make_views: Callable[[Example, np.random.Generator], Sample]
  max_pixels: int
  deaths: Deaths

  def __call__(self, positions: Any, rng: np.random.Generator) -> Sample:
    positions = list(positions) if len(self.mixtures) > 1 else [positions]
    errors: list[BadSample] = []
    while True:
      state = rng.bit_generator.state
      made = self._make(positions, rng)
      if isinstance(made, dict):
        for error in errors:
          _warn(error)
        kinds = [BAD.index(error.kind) for error in errors]
        made[BAD_COUNTS] = np.bincount(kinds, minlength=len(BAD)).astype(np.int32)
        return made
      rng.bit_generator.state = state  # the replacement does not depend on where the bad example failed
      stream, error = made
      errors.append(error)
      mixture, position = self.mixtures[stream], positions[stream]
      if len(errors) == _MAX_TRIES:
        # Workers can send built-in exceptions; another class may hang them.
        source = mixture.sources[position[0]]
        draws = f"none of {_MAX_TRIES} random draws from {counted(len(source), 'sample')} can be used"
        message = f"{source.name}: {draws}; the first one: {errors[0]}"
        if 2 * sum(error.kind in OF_MEDIA for error in errors) > _MAX_TRIES:
          raise OSError(errno.EIO, message)
        raise ValueError(f"{message}; python -m declip_jax.data.inspect counts what is wrong with the data")
      positions[stream] = mixture.replacement(position, rng)

  def _make(self, positions: Sequence[Position], rng: np.random.Generator) -> "_Made | tuple[int, BadSample]":
    """Returns the sample, or the number of the stream whose example is bad and what is wrong with it."""
    stream, examples = 0, []
    names = [mixture.name(position) for mixture, position in zip(self.mixtures, positions, strict=True)]
    try:
      keys = [mixture.key(position) for mixture, position in zip(self.mixtures, positions, strict=True)]
      for stream, key in enumerate(keys):
        hangs.check(key, names[stream])
        self.deaths.check(key, names[stream])
      with self.deaths.reading(dict(zip(keys, names, strict=True))) as record, hangs.reading(keys, record.leave):
        for stream, mixture in enumerate(self.mixtures):
          examples.append(mixture.read(positions[stream]))
          names[stream] = examples[stream]["id"]
        record.write(dict(zip(keys, names, strict=True)))
        fields = examples[0] if stream == 0 else {**examples[0], "ssl_image": examples[1]["image"]}
        stream = 0
        views = self.make_views(fields, rng).items()
        return _Made(((field, _array(value)) for field, value in views), place=names[0])
    except BaseException as error:
      if isinstance(error, BadSample) and len(examples) < len(self.mixtures):
        return stream, error  # names the example
      if len(examples) == 2 and not _decodes(examples[1]["image"], self.max_pixels):
        stream = 1
      return stream, bad_sample(error, names[stream])


class _Made(dict[str, np.ndarray]):
  """A sample with the name of its example, for messages."""

  def __init__(self, fields: Iterable[tuple[str, Any]], place: str):
    super().__init__(fields)
    self.place = place


def _array(value: Any) -> np.ndarray | np.generic:
  return value if isinstance(value, np.ndarray | np.generic) else np.asarray(value)


def _decodes(image: Any, max_pixels: int) -> bool:
  try:
    images.decode(image, max_pixels)
  except BaseException as error:
    bad_sample(error, "")
    return False
  return True


_warned: defaultdict[tuple[str, str], set[str]] = defaultdict(set)  # messages of this process, by kind


def _warn(error: BadSample, skipped: str = "skipped") -> None:
  """Logs the first bad examples of each kind, each once; a large data set may have too many to read."""
  warned, text = _warned[skipped, error.kind], str(error)
  if len(warned) < _NAMED and text not in warned:
    warned.add(text)
    more = "; further ones of this kind are only counted" if len(warned) == _NAMED else ""
    logging.warning("%s (%s) %s%s", skipped, error.kind, text, more)


def training_samples(
  mixture: Mixture,
  make_views: Callable[[Example, np.random.Generator], Sample],
  seed: int,
  ssl_mixture: Mixture | None = None,
  max_pixels: int = images.MAX_PIXELS,
  deaths: Deaths | None = None,
) -> "grain.MapDataset":
  """Returns all samples of a run, endless and with random access; each epoch of a source is a new permutation of it.

  With `ssl_mixture` each example gets a second image, `ssl_image`, from a stream that is shuffled independently: the
  decoupled setting of SLIP (Mu et al. 2021), in which self-supervision sees images other than those with captions.

  Args:
    mixture: the sources to read.
    make_views: makes a sample from an example, with a generator that depends on seed and position. If the example
      cannot be read or `make_views` raises, another example of the same source, drawn with that generator, replaces it;
      so the stream still depends only on seed and position.
    seed: the seed of shuffling and augmentation.
    ssl_mixture: the sources of the second stream, whose captions are ignored.
    max_pixels: largest number of pixels of an image for `make_views`.
    deaths: samples to skip, since processes died while they read them.

  Returns:
    Samples of `make_views` with `bad_counts`, int32 `[len(BAD)]`: how many examples of each kind were skipped for this
    sample, in both streams together. Reading one raises ValueError after 100 skipped examples, and an error that is not
    the fault of an example as it is, see `bad_sample`.
  """
  positions = mixture.positions(seed)
  if ssl_mixture:
    positions = grain.experimental.ZipMapDataset([positions, ssl_mixture.positions(hashed(seed, _SECOND_STREAM))])
  mixtures = (mixture, ssl_mixture) if ssl_mixture else (mixture,)
  return positions.random_map(_MakeSample(mixtures, make_views, max_pixels, deaths or Deaths()), seed=seed)


def check_readable(source: Source, max_pixels: int, deaths: Deaths, seconds: float = hangs.SECONDS) -> None:
  """Looks for one sample of a source whose image can be read.

  Args:
    source: the source.
    max_pixels: largest number of pixels of an image.
    deaths: samples to skip, since processes died while they read them.
    seconds: seconds for reading one sample; 0 means no limit.

  Raises:
    ValueError, OSError: there is none among 100 random ones; the message names the first of these.
  """

  def decode(example: Example, rng: np.random.Generator) -> Sample:
    del rng
    return {"image": images.decode(example["image"], max_pixels)}

  make = _MakeSample((Mixture((source,), needs_caption=False),), decode, max_pixels, deaths)
  hangs.make_all(lambda number: make((number, 0), np.random.default_rng(0)), 1, seconds)


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
    seconds: seconds for reading one sample, after which it is bad; 0 means no limit. A library that hangs and holds
      Python's lock ends its worker process; in this process nothing can end it.
    deaths: where samples that kill a worker are remembered, the same as for `training_samples`. The workers are then
      started again, and a sample is skipped once two have died in it.
  """

  def __init__(
    self,
    samples: "grain.MapDataset",
    batch_size: int,
    *,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    threads: int = 4,
    state: Mapping[str, int] | None = None,
    seconds: float = hangs.SECONDS,
    deaths: Deaths | None = None,
  ):
    self._batch_size, local = batch_size, batch_size // hosts
    self._next_index = state["next_index"] if state else 0
    size = chunk_size(local)
    self._chunks, self._deaths = local // size, deaths or Deaths()

    def start() -> Iterator[Sample]:
      chunks = Chunks(samples[self._next_index :], size, self._chunks, host, hosts, seconds)
      return read(chunks, 0, workers, threads, seconds)

    self._start, self._iterator = start, start()

  def __iter__(self) -> Iterator[Sample]:
    return self

  def __next__(self) -> Sample:
    """Returns the next batch.

    Raises:
      ChildProcessError: worker processes died, and not in a sample that is known or too often.
    """
    for _ in range(_MAX_DEATHS):
      try:
        chunks = [next(self._iterator) for _ in range(self._chunks)]
        break
      except RuntimeError as error:
        death = recovered(error, self._deaths)
        close(self._iterator)
        self._deaths.forget()
        self._iterator = self._start()
    else:
      raise death
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
    close(self._iterator)
    self._deaths.forget()


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
      self._put(StopIteration())
    except BaseException as error:  # raised again in the thread that trains
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
    if isinstance(item, BaseException):
      raise item
    return item

  def close(self) -> None:
    """Stops the thread and closes the stream."""
    self._stopped.set()
    self._thread.join(timeout=10)
    self._stream.close()


@cache
def _folder_of_deaths() -> tempfile.TemporaryDirectory:
  """A temporary folder, which is deleted when this process ends."""
  return tempfile.TemporaryDirectory(prefix="declip_jax-")


@cache
def _evaluation_deaths() -> Deaths:
  """The examples in which workers died during evaluations in this process."""
  return Deaths(Path(_folder_of_deaths().name))


@dataclass(frozen=True)
class Reading:
  """How the images of evaluations are read.

  Attributes:
    workers, threads: see `evaluation_reader_counts`.
    max_pixels: largest number of pixels of an image, see `images.open_photo`.
    seconds: seconds for reading one example, which is tried twice, since the machine may have been busy, and then
      skipped; 0 means no limit.
    deaths: where examples that kill a process are remembered, by default in this process only. As in training, workers
      are started again, and an example is skipped once two processes have died in it.
  """

  workers: int | None = None
  threads: int | None = None
  max_pixels: int = images.MAX_PIXELS
  seconds: float = hangs.SECONDS
  deaths: Deaths = field(default_factory=_evaluation_deaths)


@dataclass(frozen=True)
class EvaluationBatches:
  """Rows of a source in order, once, in batches of `batch_size` that are padded at the end.

  `image` is uint8 `[b h w 3]`, `label` int32 `[b]`, `id` text `[b]`, `readable` bool `[b]`: False for padding and for
  examples that cannot be read, for which `error`, text `[b]`, is the kind and the reason. `annotations` is text `[b]`,
  see `parse_annotations`. (A host's last batches may be
  nothing but padding, so samples are padded here and not by grain's `batch_and_pad`.)

  As in training, iteration raises OSError if a disk, a mount or a network fails: if 100 examples in a row cannot be
  read, or all of them, and most of these for that reason. A score that is computed later is better than one without
  these images.

  Args:
    source: the source to read.
    rows: adjacent rows to read.
    batch_size: rows of a batch.
    num_batches: number of batches, which may be more than `rows` fill.
    view: the view of every image.
    reading: how images are read.
  """

  source: Source
  rows: range
  batch_size: int
  num_batches: int
  view: images.EvalView
  reading: Reading = field(default_factory=Reading)

  def __iter__(self) -> Iterator[Sample]:
    count = self.num_batches * self.batch_size
    size = chunk_size(self.batch_size)
    reader = _read_all(Chunks(_Rows(self), size, 1, 0, 1, self.reading.seconds), count, self.reading)
    left, in_a_row = len(self.rows), list[str]()
    with contextlib.closing(reader):
      for _ in range(self.num_batches):
        parts = [next(reader) for _ in range(self.batch_size // size)]
        batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for error in batch[_ERROR][:left].tolist():
          in_a_row = [*in_a_row, error] if error else []
          self._check(in_a_row)
        left = max(left - self.batch_size, 0)
        yield batch

  def _check(self, errors: Sequence[str]) -> None:
    """Raises OSError if these errors of examples in a row mean that a medium fails."""
    failed = sum(error.startswith(OF_MEDIA) for error in errors)
    if len(errors) == min(_MAX_TRIES, len(self.rows)) and 2 * failed > len(errors):
      message = f"{self.source.name}: {len(errors)} examples in a row cannot be used; the last one: {errors[-1]}"
      raise OSError(errno.EIO, message)

  def sample(self, number: int) -> Sample:
    """Row `number` of all batches, before they are put together."""
    size = self.view.size
    blank = {
      "image": np.zeros((size, size, 3), np.uint8),
      "label": np.int32(-1),
      "id": np.str_(""),
      "readable": np.bool_(False),
      "annotations": np.str_(""),
      _ERROR: np.str_(""),
    }
    if number >= len(self.rows):
      return blank
    index = self.rows[number]
    try:
      return blank | self._read(index) | {"readable": np.bool_(True)}
    except BadSample as error:
      _warn(error, "skipped in the evaluation")
      return blank | {"id": np.str_(f"sample {index}"), _ERROR: np.str_(f"{error.kind}: {error}")}

  def _read(self, index: int) -> Sample:
    key, name = hangs.key_of(self.source, index), f"{self.source.name}: sample {index}"
    hangs.check(key, name, tries=_TRIES)
    self.reading.deaths.check(key, name)
    with self.reading.deaths.reading({key: name}) as record, hangs.reading([key], record.leave):
      example = read_example(self.source, index)
      record.write({key: f"{self.source.name}: {example['id']}"})
      try:
        image = images.eval_view(images.decode(example["image"], self.reading.max_pixels), self.view)
      except BaseException as error:
        raise bad_sample(error, f"{self.source.name}: {example['id']}") from error
    return {
      "image": image,
      "label": np.int32(example["label"]),
      "id": np.str_(example["id"]),
      "annotations": np.str_(_annotations(example)),
    }


@dataclass(frozen=True)
class _Rows(Sequence[Sample]):
  """The rows of all batches together."""

  batches: EvaluationBatches

  def __len__(self) -> int:
    return self.batches.num_batches * self.batches.batch_size

  def __getitem__(self, number: int) -> Sample:
    return self.batches.sample(number)


def _annotations(example: Example) -> str:
  """The labels, groups, captions and hash of an example as text, empty if it has none; see `parse_annotations`."""
  found: dict[str, Any] = {}
  if "labels" in example:
    labels = np.asarray(example["labels"])
    found |= {"classes": len(labels), **{str(value): np.flatnonzero(labels == value).tolist() for value in (0, 1)}}
  if "groups" in example:
    found["groups"] = {name: int(group) for name, group in example["groups"].items()}
  if example["captions"]:
    found["captions"] = list(example["captions"])
  if isinstance(image := example["image"], bytes):
    found["image_hash"] = hashlib.blake2b(image, digest_size=16).hexdigest()
  return json.dumps(found) if found else ""


class Annotations(NamedTuple):
  """What evaluations read of examples besides images and single labels.

  Attributes:
    labels: as in `Example`, 0 for an example without labels; None if no example has any.
    groups: by the name of the grouping, -1 for an example without one.
    captions: captions of each example.
    image_hash: a hash of each encoded image, "" for images that are not encoded.
  """

  labels: Int8[np.ndarray, "n classes"] | None
  groups: dict[str, Int[np.ndarray, "n"]]
  captions: list[Sequence[str]]
  image_hash: list[str]


def parse_annotations(texts: Sequence[str]) -> Annotations:
  """Reads the `annotations` of `EvaluationBatches`."""
  found = {row: json.loads(text) for row, text in enumerate(texts) if text}
  classes = max((entry.get("classes", 0) for entry in found.values()), default=0)
  labels = np.zeros((len(texts), classes), np.int8) if classes else None
  groups = {name: np.full(len(texts), -1, np.int32) for entry in found.values() for name in entry.get("groups", {})}
  for row, entry in found.items():
    if labels is not None and "classes" in entry:
      labels[row] = -1
      labels[row, entry["0"]], labels[row, entry["1"]] = 0, 1
    for name, group in entry.get("groups", {}).items():
      groups[name][row] = group
  of_rows = [found.get(row, {}) for row in range(len(texts))]
  captions = [entry.get("captions", ()) for entry in of_rows]
  return Annotations(labels, groups, captions, [entry.get("image_hash", "") for entry in of_rows])


def _read_all(chunks: Chunks, num_images: int, reading: Reading) -> Generator[Sample, None, None]:
  """Reads all chunks once, and continues in other workers after one died in a sample that is known."""
  counts = evaluation_reader_counts(num_images, reading.workers, reading.threads)
  number = died = 0  # chunks that were read, and deaths in the next one
  while number < len(chunks):
    reader = read(chunks, number, *counts, reading.seconds)
    try:
      for chunk in reader:
        yield chunk
        number, died = number + 1, 0
    except RuntimeError as error:
      death, died = recovered(error, reading.deaths), died + 1
      if died == _MAX_DEATHS:
        raise death from error
    finally:
      close(reader)
      reading.deaths.forget()
