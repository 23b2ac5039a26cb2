"""Writes any source as ArrayRecord files: python -m declip_jax.data.convert SPEC OUTPUT

  SPEC      the source to read, such as webdataset:/data/train-*.tar, or a path whose kind is detected
  OUTPUT    the folder to write, or its URL, such as gs://bucket/folder

For data that is read many times: thousands of image files, tables or tars become a few large files with fast random
access and without unusable samples. Train with arrayrecord:OUTPUT/*.array_record

  OUTPUT/data-00000-of-00064.array_record ...   the samples, in the order of the source
  OUTPUT/classnames.txt                         if the source has classes
  OUTPUT/dataset.json                           source, numbers of samples and shards, and skipped samples by kind

Every image is decoded once to check it, and stored unchanged; raw pixels are stored as PNG. Run the same command again
to resume a conversion that was interrupted.

Several machines that share OUTPUT can convert a source together: run the command with --shard=0/8 to --shard=7/8, or
with --shard=auto in a Slurm array from 0, as in sbatch --array=0-7, or with --shard=auto/8 in an indexed job of
Kubernetes with 8 completions. Whichever is the last completes the conversion.

Files for a URL are written to the local temporary folder (TMPDIR) and uploaded when complete; the folder needs space
for one file per worker.
"""

from collections import Counter
from collections.abc import Callable, Iterator
import contextlib
from functools import partial
import json
import math
import os
from pathlib import Path
import re
import sys
import time
from typing import Any

from absl import flags
import numpy as np

from declip_jax import command_line
from declip_jax.data import images, records
from declip_jax.data.guess import read_as
from declip_jax.data.records import Shard
from declip_jax.data.sources import BadSample, Source, lists, open_source
from declip_jax.data.storage import files, jobs, outputs, patterns, remote
from declip_jax.extras import import_package
from declip_jax.reporting import progress
from declip_jax.spelling import counted

_SHARD_BYTES = 512 * 2**20
_MAX_SHARDS = 1024  # by default; a larger source gets larger files, since a process keeps a limited number open
_PROBES = 64  # samples from which the size of all is estimated
_JOURNAL_SECONDS = 5.0  # between two versions of the journal at a URL
_ABOUT = "dataset.json"
_TEMPORARY = re.compile(r"\..*\.tmp")  # of another machine that is starting
_JOURNAL = re.compile(r"progress(-\d+-of-\d+)?\.jsonl")  # one for each machine


def convert(
  spec: str,
  output: str | os.PathLike[str],
  shards: int | None = None,
  workers: int | None = None,
  max_pixels: int = images.MAX_PIXELS,
  part: jobs.Part = jobs.WHOLE,
) -> dict[str, Any]:
  """Writes a source as ArrayRecord files, in parallel processes; complete files of an earlier attempt are kept.

  Samples that cannot be used are skipped and counted. The same source and number of shards give the same bytes. If
  several machines write a part of the files each, the last one completes the conversion.

  Args:
    spec: the source.
    output: the folder or its URL; it is created, or is that of an interrupted conversion of the same source.
    shards: number of files. By default files have about 512 MB each, and there are at most 1,024: few enough to list,
      copy and keep open, enough to be written in parallel; but at least one for each machine.
    workers: number of processes, by default the number of cores; 1 means a thread of this process.
    max_pixels: largest number of pixels of an image, see `images.open_photo`; larger ones are skipped.
    part: the files that this machine writes, by default all.

  Returns:
    The contents of dataset.json: `source`, its number of `samples` and `stamp`, `max_pixels`, number of `shards`,
    and, unless files of other machines are missing, `count` of samples written, number `skipped` by kind of `BAD`, and
    the first messages about these, `named`.

  Raises:
    ValueError: the source cannot be opened or has no usable sample, or the folder contains other files, such as a
      conversion of the source before its files changed.
    OSError: the files cannot be written, or a worker was killed.
    ModuleNotFoundError: the extra `train` is not installed.
  """
  import_package("array_record.python.array_record_module")  # before anything is written
  output = lists.absolute(os.fspath(output))
  source = open_source(spec)
  about = _settings(source, output, shards, max_pixels, part)
  shards = about["shards"]
  bounds = [about["samples"] * number // shards for number in range(shards + 1)]
  names = [f"data-{number:05d}-of-{shards:05d}.array_record" for number in range(shards)]
  if "count" in about:
    _check_complete(names, set(patterns.names(output)), f"{output} was complete and")
    return about
  _write_classnames(source, output)
  if part == jobs.WHOLE:  # else other machines may be writing
    outputs.remove_leftovers(output)
  done = _finished(output, names)
  own = {n: Shard(f"{output}/{names[n]}", bounds[n], bounds[n + 1]) for n in range(part.index, shards, part.count)}
  write = partial(records.write, source, max_pixels)
  running = _write_shards(write, own, set(done), workers or jobs.cores())
  journal = "progress.jsonl" if part == jobs.WHOLE else f"progress-{part.index}-of-{part.count}.jsonl"
  try:
    with contextlib.closing(_Journal(f"{output}/{journal}", done)) as reported, contextlib.closing(running) as reports:
      for number, report in reports:
        reported.add(number, report)
  finally:
    if part == jobs.WHOLE:
      outputs.remove_leftovers(output)  # of workers that were stopped
  if part == jobs.WHOLE:
    _check_complete(names, set(patterns.names(output)), output)
  done = _finished(output, names) | done
  if len(done) < shards:  # unless another machine has completed the conversion just now
    return _settings(source, output, shards, max_pixels, part)
  return _finish(source, output, about, done)


def _check_complete(names: list[str], existing: set[str], subject: str) -> None:
  missing = [name for name in names if name not in existing]
  if missing:
    raise ValueError(
      f"{subject} now lacks {counted(len(missing), 'file')}, such as {missing[0]}: delete it and convert again"
    )


def _settings(
  source: Source, output: str, shards: int | None, max_pixels: int, part: jobs.Part = jobs.WHOLE
) -> dict[str, Any]:
  """Returns the contents of dataset.json for this source, and writes it if the folder is new.

  Raises:
    ValueError: the folder contains something else, or there are fewer files than machines.
  """
  settings = {"source": source.name, "samples": len(source), "stamp": source.stamp, "max_pixels": max_pixels}
  local = not remote.is_url(output)
  existing = sorted(os.listdir(output)) if local and os.path.isdir(output) else patterns.names(output)
  if not len(source):
    raise ValueError(f"{source.name} has no sample; skipped: {source.skipped or 'none'}")
  if _ABOUT in existing:
    about = _checked(settings | ({"shards": shards} if shards else {}), output)
    part.check(about["shards"], "files")
    return about
  if existing := [name for name in existing if not _TEMPORARY.fullmatch(name)]:
    raise ValueError(f"{output} is not empty, it contains {', '.join(existing[:5])}: choose another folder")
  if shards is None:
    size = _mean_bytes(source, max_pixels) * len(source)
    shards = min(len(source), max(part.count, min(_MAX_SHARDS, math.ceil(size / _SHARD_BYTES)), 1))
  if not 0 < shards <= min(len(source), 99_999):
    raise ValueError(f"shards={shards}: expected 1 to {min(len(source), 99_999)}, for {counted(len(source), 'sample')}")
  part.check(shards, "files")
  if local:
    Path(output).mkdir(parents=True, exist_ok=True)
  outputs.write_text(f"{output}/{_ABOUT}", json.dumps(settings | {"shards": shards}))
  return settings | {"shards": shards}


def _checked(wanted: dict[str, Any], output: str) -> dict[str, Any]:
  """Returns the contents of an existing dataset.json.

  Raises:
    ValueError: it does not match the `wanted` settings.
  """
  try:
    about = dict(json.loads(files.read(f"{output}/{_ABOUT}")))
    about.setdefault("max_pixels", images.MAX_PIXELS)
  except (ValueError, TypeError):
    raise ValueError(f"{output}/{_ABOUT} was not written by this command: choose another folder") from None
  other = {name: value for name, value in wanted.items() if about.get(name) != value}
  if other.keys() == {"stamp"}:
    name = wanted["source"]
    raise ValueError(
      f"{output} is a conversion of {name} from before its files changed: delete {output} or choose another folder"
    )
  if other:
    differing = "; ".join(f"{name} {about.get(name)!r}, not {value!r}" for name, value in other.items())
    raise ValueError(f"{output} contains another conversion: {differing}. Choose another folder")
  return about


def _mean_bytes(source: Source, max_pixels: int) -> float:
  sizes = [0]
  for index in np.linspace(0, len(source) - 1, min(_PROBES, len(source)), dtype=int).tolist():
    with contextlib.suppress(BadSample):
      sizes.append(len(records.make_record(source, index, max_pixels)))
  return sum(sizes) / max(1, len(sizes) - 1)


def _write_classnames(source: Source, output: str) -> None:
  if source.classnames:
    # One line per class; a class without a name gets its number, since blank lines at the end are not classes.
    lines = [" ".join(name.split()) or str(number) for number, name in enumerate(source.classnames)]
    outputs.write_text(f"{output}/classnames.txt", "".join(f"{line}\n" for line in lines))


class _Journal:
  """The reports about finished shards, kept for a later attempt, one line each.

  A file at a URL cannot be appended to; it is rewritten every few seconds and at the end.
  """

  def __init__(self, path: str, done: dict[int, dict[str, Any]]):
    self._path, self._done, self._next, self._unwritten = path, done, 0.0, False

  def add(self, number: int, report: dict[str, Any]) -> None:
    self._done[number] = report
    if not remote.is_url(self._path):
      with open(self._path, "a") as file:
        file.write("\n" + self._line(number))  # the last line may have been cut off
      return
    self._unwritten = True
    if time.monotonic() >= self._next:
      self.close()

  def close(self) -> None:
    if self._unwritten:
      outputs.write_text(self._path, "".join(map(self._line, self._done)))
      self._next, self._unwritten = time.monotonic() + _JOURNAL_SECONDS, False

  def _line(self, number: int) -> str:
    return json.dumps({"shard": number, **self._done[number]}) + "\n"


def _finished(output: str, names: list[str]) -> dict[int, dict[str, Any]]:
  """The reports about files that exist, from the journals of this and other machines.

  Args:
    output: the folder.
    names: the names of all files.
  """
  existing, found = set(patterns.names(output)), {}
  for journal in sorted(filter(_JOURNAL.fullmatch, existing)):
    try:
      text = files.read(f"{output}/{journal}").decode()
    except FileNotFoundError:  # another machine has completed the conversion
      continue
    for line in text.splitlines():
      try:
        report = json.loads(line)
      except ValueError:
        continue  # the disk was full, or the power failed: that file is written again
      found[report.pop("shard")] = report
  return {number: report for number, report in found.items() if names[number] in existing}


def _finish(source: Source, output: str, about: dict[str, Any], done: dict[int, dict[str, Any]]) -> dict[str, Any]:
  skipped, named = Counter(source.skipped), {}
  for _, report in sorted(done.items()):
    skipped.update(report["skipped"])
    for kind, messages in report["named"].items():
      named[kind] = (named.get(kind, []) + messages)[: records.NAMED]
  count = sum(report["count"] for report in done.values())
  if not count:
    raise ValueError(f"{source.name}: no usable sample among {about['samples']:,}: {dict(skipped)}, such as {named}")
  about = {**about, "count": count, "skipped": dict(skipped), "named": named}
  outputs.write_text(f"{output}/{_ABOUT}", json.dumps(about, indent=2, ensure_ascii=False) + "\n")
  for journal in filter(_JOURNAL.fullmatch, patterns.names(output)):
    files.remove(f"{output}/{journal}")
  outputs.remove_leftovers(output)
  return about


def _write_shards(
  write: Callable[[Shard, jobs.Advance], dict[str, Any]], shards: dict[int, Shard], done: set[int], workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields number and report of each shard that is not done as it is finished, and shows the progress."""
  todo = {number: shard for number, shard in shards.items() if number not in done}
  numbers, processes = list(todo), min(workers, len(todo))
  total, left = (sum(shard.stop - shard.start for shard in some.values()) for some in (shards, todo))
  before = total - left
  with progress.Bar("converting", total, "samples", initial=before) as bar:
    running = jobs.run(
      write,
      list(todo.values()),
      processes if processes > 1 else 0,
      threads=1,
      report=lambda steps: bar.set(before + steps),
      interval=0.5,
    )
    with contextlib.closing(running):
      for job, report in running:
        yield numbers[job], report


def _summary(about: dict[str, Any], output: str) -> str:
  written = [f"{output}/{name}" for name in patterns.names(output) if name.endswith(".array_record")]
  if "count" not in about:
    return (
      f"{output}: {len(written):,} of {counted(about['shards'], 'file')}; the last machine completes the conversion"
    )
  size = sum(size for size, _ in files.stamps(written))
  lines = [
    f"{output}: {counted(about['count'], 'sample')} in {counted(about['shards'], 'file')}, {size / 2**20:,.1f} MiB"
  ]
  for kind, count in sorted(about["skipped"].items()):
    lines += [f"skipped {count:,}: {kind}", *(f"  {message}" for message in about["named"].get(kind, ()))]
  return "\n".join([*lines, f"train with arrayrecord:{output}/*.array_record"])


def _command(arguments: list[str]) -> int:
  spec, output = arguments
  try:
    part = jobs.Part.of(flags.FLAGS.shard, os.environ)
    about = convert(
      read_as(spec, "SPEC"), output, flags.FLAGS.shards, flags.FLAGS.workers, flags.FLAGS.max_pixels, part
    )
  except KeyboardInterrupt:
    print("interrupted; run the same command again to resume", file=sys.stderr)
    return 130
  print(_summary(about, lists.absolute(output)))
  return 0


def main() -> None:
  """Runs the command."""
  flags.DEFINE_integer("shards", None, "Number of files; by default about 512 MB each, at most 1,024.", lower_bound=1)
  flags.DEFINE_string("shard", "0/1", "I/N, auto or auto/N: this machine writes part I of N, with I from 0.")
  flags.DEFINE_integer("workers", None, "Number of processes that write; by default the number of cores.", 1)
  flags.DEFINE_integer(
    "max_pixels", images.MAX_PIXELS, "Largest number of pixels of an image.", 1, images.LARGEST_LIMIT
  )
  command_line.run(_command, __doc__, positional=("SPEC", "OUTPUT"))


if __name__ == "__main__":
  main()
