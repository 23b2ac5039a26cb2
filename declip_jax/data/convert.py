"""Writes any source as ArrayRecord files: python -m declip_jax.data.convert SPEC OUTPUT

For data that are read many times: whatever they were, thousands of image files, tables or tars, they become a few large
files with fast random access, of samples that can all be used. Train from them with arrayrecord:OUTPUT/*.array_record

  OUTPUT/data-00000-of-00064.array_record ...   the samples, in the order of the source
  OUTPUT/classnames.txt                         if the source has classes
  OUTPUT/dataset.json                           source, samples, shards, and what was left out, by kind

Every image is decoded once to see that it can be, and written as it was; pixels are written as PNG. Where the command
was interrupted, it goes on when it is given again.

OUTPUT may be a URL, such as gs://bucket/folder: each file is written to a local temporary folder (TMPDIR) and uploaded
when it is complete, which takes there the room of one file for each worker.
"""

import argparse
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
import contextlib
import fcntl
import io
import json
import math
import multiprocessing
import os
from pathlib import Path
import signal
import sys
import tempfile
import time
from typing import Any, NamedTuple

from array_record.python import array_record_module
import numpy as np
from PIL import Image

from declip_jax.data import images
from declip_jax.data.sources import BadSample, Example, Source, lists, open_source
from declip_jax.data.sources.arrayrecord import WRITER_OPTIONS, open_reader, pack
from declip_jax.data.storage import files, indexes, jobs, patterns, remote

_SHARD_BYTES = 512 * 2**20
_MAX_SHARDS = 1024  # by default: larger sources get larger files, for a process keeps a limited number open
_PROBES = 64  # samples whose sizes tell that of all
_NAMED = 3  # bad samples of each kind that the report names
_COUNT_EVERY = 64  # samples
_REPORT_EVERY = 5.0  # seconds, to a URL
_ABOUT, _DONE = "dataset.json", "progress.jsonl"


class _Shard(NamedTuple):
  """Samples `start` to `stop` of the source, in the file `path`."""

  path: str
  start: int
  stop: int


class _Interrupted(Exception):
  pass


def convert(
  spec: str, output: str | os.PathLike[str], shards: int | None = None, workers: int | None = None
) -> dict[str, Any]:
  """Writes a source as ArrayRecord files, in parallel processes; finished files of an earlier try are kept.

  Samples that cannot be used are left out and counted. The same source and number of shards give the same bytes.

  Args:
    spec: of the source.
    output: folder or its URL; created, or one in which the same conversion was interrupted.
    shards: number of files. By default so many that each has about 512 MB, 1,024 at most: few enough to list, to copy
      and to keep open, and many enough to be written in parallel.
    workers: number of processes, by default that of cores. A single one is a thread of this process.

  Returns:
    What dataset.json holds: `source`, `samples` of it, its `stamp`, `shards`, `count` of what was written, `skipped` by
    kind of `BAD`, and the first of these `named`.

  Raises:
    ValueError: the source cannot be opened or no sample can be used, or the folder holds anything else, such as a
      conversion of the source as it was before its files changed.
    OSError: the files cannot be written.
  """
  output = lists.absolute(os.fspath(output))
  source = open_source(spec)
  about = _plan(source, output, shards)
  shards, samples = about["shards"], about["samples"]
  bounds = [samples * number // shards for number in range(shards + 1)]
  names = [f"data-{number:05d}-of-{shards:05d}.array_record" for number in range(shards)]
  there = set(patterns.names(output))
  if "count" in about:
    _expect(names, there, f"{output} was complete and")
    return about
  _unlink_left(output)
  _write_classnames(source, output)
  done = {number: report for number, report in _finished(output, there).items() if names[number] in there}
  todo = {n: _Shard(f"{output}/{names[n]}", bounds[n], bounds[n + 1]) for n in range(shards) if n not in done}
  running = _run(source, todo, samples, workers or jobs.cores())
  with contextlib.closing(_Journal(output, done)) as journal, contextlib.closing(running) as reports:
    for number, report in reports:
      journal.add(number, report)
  _expect(names, set(patterns.names(output)), output)
  return _finish(source, output, about, done)


def _expect(names: list[str], there: set[str], where: str) -> None:
  missing = [name for name in names if name not in there]
  if missing:
    raise ValueError(f"{where} lacks {len(missing)} files now, such as {missing[0]}: delete it and convert again")


def _plan(source: Source, output: str, shards: int | None) -> dict[str, Any]:
  """What the folder holds or shall hold, of this source; written to it if it is new.

  Raises:
    ValueError: it holds something else.
  """
  plan = {"source": source.name, "samples": len(source), "stamp": source.stamp}
  url = remote.is_url(output)
  there = sorted(os.listdir(output)) if not url and os.path.isdir(output) else patterns.names(output)
  if not len(source):
    raise ValueError(f"{source.name} has no sample; left out: {source.skipped or 'none'}")
  if _ABOUT in there:
    try:
      about = dict(json.loads(files.read(f"{output}/{_ABOUT}")))
    except (ValueError, TypeError):
      raise ValueError(f"{output}/{_ABOUT} is not of this command: choose another folder") from None
    wanted = plan | ({"shards": shards} if shards else {})
    other = {name: value for name, value in wanted.items() if about.get(name) != value}
    if other.keys() == {"stamp"}:
      raise ValueError(
        f"{output} holds {source.name} as it was before its files changed: delete {output} or choose another folder"
      )
    if other:
      differing = "; ".join(f"{name} {about.get(name)!r}, not {value!r}" for name, value in other.items())
      raise ValueError(f"{output} holds another conversion: {differing}. Choose another folder")
    return about
  if there:
    raise ValueError(f"{output} is not empty, it holds {', '.join(there[:5])}: choose another folder")
  if shards is None:
    shards = min(len(source), _MAX_SHARDS, max(1, math.ceil(_mean_bytes(source) * len(source) / _SHARD_BYTES)))
  if not 0 < shards <= min(len(source), 99_999):
    raise ValueError(f"{shards} shards: expected 1 to {min(len(source), 99_999)}, for {len(source)} samples")
  if not url:
    Path(output).mkdir(parents=True, exist_ok=True)
  _write_text(f"{output}/{_ABOUT}", json.dumps(plan | {"shards": shards}))
  return plan | {"shards": shards}


def _mean_bytes(source: Source) -> float:
  sizes = [0]
  for index in np.linspace(0, len(source) - 1, min(_PROBES, len(source)), dtype=int).tolist():
    try:
      sizes.append(len(_record(source, index)))
    except BadSample:
      continue
  return sum(sizes) / max(1, len(sizes) - 1)


def _write_classnames(source: Source, output: str) -> None:
  if source.classnames:
    lines = [" ".join(name.split()) for name in source.classnames]  # one line each
    _write_text(f"{output}/classnames.txt", "".join(f"{line}\n" for line in lines))


class _Journal:
  """What was reported of the finished shards, kept for a later try: a line for each.

  To a file behind a URL nothing can be appended. It is written anew, every few seconds and at the end.
  """

  def __init__(self, output: str, done: dict[int, dict[str, Any]]):
    self._path, self._done, self._next, self._unwritten = f"{output}/{_DONE}", done, 0.0, False

  def add(self, number: int, report: dict[str, Any]) -> None:
    self._done[number] = report
    if not remote.is_url(self._path):
      with open(self._path, "a") as file:
        file.write(self._line(number))
      return
    self._unwritten = True
    if time.monotonic() >= self._next:
      self.close()

  def close(self) -> None:
    if self._unwritten:
      _write_text(self._path, "".join(map(self._line, self._done)))
      self._next, self._unwritten = time.monotonic() + _REPORT_EVERY, False

  def _line(self, number: int) -> str:
    return json.dumps({"shard": number, **self._done[number]}) + "\n"


def _finished(output: str, there: set[str]) -> dict[int, dict[str, Any]]:
  """What was reported of the shards that an earlier try finished."""
  found = {}
  for line in files.read(f"{output}/{_DONE}").decode().splitlines() if _DONE in there else ():
    try:
      report = json.loads(line)
    except ValueError:
      continue  # the disk was full, or the power failed: that shard is written again
    found[report.pop("shard")] = report
  return found


def _finish(source: Source, output: str, about: dict[str, Any], done: dict[int, dict[str, Any]]) -> dict[str, Any]:
  skipped, named = Counter(source.skipped), {}
  for _, report in sorted(done.items()):
    skipped.update(report["skipped"])
    for kind, messages in report["named"].items():
      named[kind] = (named.get(kind, []) + messages)[:_NAMED]
  count = sum(report["count"] for report in done.values())
  if not count:
    raise ValueError(f"{source.name}: none of {about['samples']} samples can be used: {dict(skipped)}, such as {named}")
  about = {**about, "count": count, "skipped": dict(skipped), "named": named}
  _write_text(f"{output}/{_ABOUT}", json.dumps(about, indent=2, ensure_ascii=False) + "\n")
  files.remove(f"{output}/{_DONE}")
  return about


def _write_text(path: str, text: str) -> None:
  with _committed(path) as temporary:
    temporary.write_text(text, "utf-8", errors="replace")


@contextlib.contextmanager
def _committed(path: str) -> Iterator[Path]:
  """A local file to write to, which becomes the one at a path or URL, whole, unless something is raised."""
  folder, _, name = path.rpartition("/")
  local = _left_in(folder)[0] / f"{_left_in(folder)[1]}{name}"
  with _temporary(local) as temporary:
    yield temporary
    files.upload(temporary, path) if remote.is_url(path) else files.commit(temporary, local)


def _left_in(output: str) -> tuple[Path, str]:
  """Where temporary files for a folder lie, and how their names begin, after the dot."""
  if remote.is_url(output):
    return Path(tempfile.gettempdir()), f"declip_jax-{indexes.digest(output)}-"
  return Path(output), ""


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
  """A file to write to before it becomes `path`, locked, so that no other process takes it for left behind."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with temporary.open("wb") as file:
      with contextlib.suppress(OSError):  # of file systems without locks
        fcntl.flock(file, fcntl.LOCK_EX)
      yield temporary
  finally:
    temporary.unlink(missing_ok=True)


def _unlink_left(output: str) -> None:
  """Deletes temporary files unless a process is writing to them: locks end with the process, even if it was killed."""
  folder, prefix = _left_in(output)
  for temporary in folder.glob(f".{prefix}*.tmp"):
    with contextlib.suppress(OSError), temporary.open("rb+") as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      temporary.unlink(missing_ok=True)


def _run(
  source: Source, todo: dict[int, _Shard], total: int, workers: int
) -> Generator[tuple[int, dict[str, Any]], None, None]:
  """Yields number and report of each shard as it is finished, and shows the progress."""
  if not todo:
    return
  context = multiprocessing.get_context("spawn")  # threads of array_record and fsspec do not survive a fork
  before = total - sum(shard.stop - shard.start for shard in todo.values())
  stop, written = context.Event(), context.Value("q", before)
  if min(workers, len(todo)) == 1:
    pool = ThreadPoolExecutor(1, initializer=_start_worker, initargs=(source, stop, written))
  else:
    pool = ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, (source, stop, written))
  progress = _Progress(before, total)
  try:
    with holding_interrupts():
      pending: dict[Future, int] = {pool.submit(_write, shard): number for number, shard in todo.items()}
    while pending:
      ready, _ = wait(pending, timeout=progress.interval, return_when=FIRST_COMPLETED)
      progress.show(written.value)
      for future in ready:
        yield pending.pop(future), future.result()
  except BrokenProcessPool:
    message = "a process was killed, perhaps for want of memory: give the command again, with fewer --workers"
    raise OSError(message) from None
  finally:
    with holding_interrupts():
      stop.set()
      pool.shutdown(cancel_futures=True)
      progress.close()


@contextlib.contextmanager
def holding_interrupts() -> Iterator[None]:
  """Lets Ctrl-C wait; for processes and threads that start within, for ever."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Progress:
  """A line that is written over, or one every half minute where nobody sits at the screen."""

  def __init__(self, before: int, total: int):
    self._before, self._total, self._start, self._next = before, total, time.monotonic(), 0.0
    self._terminal = sys.stderr.isatty()
    self.interval = 0.5 if self._terminal else 5.0

  def show(self, count: int) -> None:
    now = time.monotonic()
    if now < self._next:
      return
    self._next = now + (0.5 if self._terminal else 30.0)
    rate = (count - self._before) / max(now - self._start, 1e-9)
    left = f", {(self._total - count) / rate / 60:.0f} min left" if rate else ""
    line = f"{count:,} of {self._total:,} samples, {rate:,.0f}/s{left}"
    print(f"\r{line:<78}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._terminal:
      print(file=sys.stderr)


_worker: dict[str, Any] = {}  # what a worker process was started with


def _start_worker(source: Source, stop: Any, written: Any) -> None:
  """Workers leave Ctrl-C to the main process, which tells them to stop, and end when it is killed."""
  _worker.update(source=source, stop=stop, written=written)
  if multiprocessing.parent_process():
    jobs.end_with_parent()


def _write(shard: _Shard) -> dict[str, Any]:
  """Writes one file; returns how many samples it has, and those left out, counted and the first ones named by kind."""
  source, stop, written = _worker["source"], _worker["stop"], _worker["written"]
  skipped, named, count = Counter(), {}, 0
  try:
    with _committed(shard.path) as temporary:
      writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), WRITER_OPTIONS)
      for index in range(shard.start, shard.stop):
        try:
          writer.write(_record(source, index))
          count += 1
        except BadSample as error:
          skipped[error.kind] += 1
          named.setdefault(error.kind, []).extend([str(error)] * (skipped[error.kind] <= _NAMED))
        if (index + 1 - shard.start) % _COUNT_EVERY == 0 or index + 1 == shard.stop:
          with written.get_lock():
            written.value += (index - shard.start) % _COUNT_EVERY + 1
          if stop.is_set():
            raise _Interrupted
      writer.close()
      if open_reader(os.fspath(temporary)).num_records() != count:
        raise OSError(f"{shard.path} could not be written completely: is the disk of {temporary.parent} full?")
  except RuntimeError as error:  # of array_record
    raise OSError(f"{shard.path} could not be written: {error}") from error
  return {"count": count, "skipped": dict(skipped), "named": named}


def read(source: Source, index: int) -> tuple[Example, images.Pixels]:
  """A sample and its pixels.

  Raises:
    BadSample: it cannot be used, by the rules of training; the message names it.
  """
  try:
    example = source[index]
  except OSError as error:
    raise BadSample("missing file", f"{source.name}: sample {index}: {error}") from error
  try:
    return example, images.decode(example["image"])
  except BadSample as error:
    raise BadSample(error.kind, f"{example['id']}: {error}") from error


def _record(source: Source, index: int) -> bytes:
  example, pixels = read(source, index)
  return pack(example if isinstance(example["image"], bytes) else {**example, "image": _png(pixels)})


def _png(pixels: np.ndarray) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


def _report(about: dict[str, Any], output: str) -> str:
  written = [f"{output}/{name}" for name in patterns.names(output) if name.endswith(".array_record")]
  size = sum(size for size, _ in files.stamps(written))
  lines = [f"{output}: {about['count']:,} samples in {about['shards']:,} files, {size / 2**20:,.1f} MiB"]
  for kind, count in sorted(about["skipped"].items()):
    lines += [f"left out {count:,}: {kind}", *(f"  {message}" for message in about["named"].get(kind, ()))]
  return "\n".join([*lines, f"train from it with arrayrecord:{output}/*.array_record"])


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m declip_jax.data.convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("spec", help="source to read, such as webdataset:/data/train-*.tar")
  parser.add_argument("output", help="folder to write, or its URL")
  parser.add_argument("--shards", type=int, help="number of files; by default of about 512 MB each, 1,024 at most")
  parser.add_argument(
    "--workers",
    type=int,
    help="processes that write, by default as many as cores; for a URL each has one file in the temporary folder",
  )
  given = parser.parse_args(arguments)
  if given.workers is not None and given.workers < 1:
    parser.error(f"--workers={given.workers}: expected at least 1")
  try:
    about = convert(given.spec, given.output, given.shards, given.workers)
  except (ValueError, OSError, ImportError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("interrupted; give the same command again to go on", file=sys.stderr)
    return 130
  print(_report(about, lists.absolute(given.output)))
  return 0


if __name__ == "__main__":
  sys.exit(main())
