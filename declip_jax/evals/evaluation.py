"""The evaluation of one model by many jobs: it skips those whose results are there, and writes those of the others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
from dataclasses import dataclass, field
from functools import partial
import json
import os
from pathlib import Path
import platform
import time
from typing import Any

import jax
import numpy as np

import declip_jax
from declip_jax.command_line import together
from declip_jax.data.sources import Source
from declip_jax.evals import EVALUATORS, catalogue, features, results
from declip_jax.evals.encoders import Encoders, encode_texts
from declip_jax.evals.feature_cache import FeatureCache, json_hash, numerics
from declip_jax.evals.features import Features, Read, host_rows, read_batches, surely
from declip_jax.evals.jobs import DataSource, Job, run_jobs
from declip_jax.evals.results import Result, Scores
from declip_jax.evals.text_cache import TextCache
from declip_jax.reporting.metrics import score_text
from declip_jax.reporting.progress import Bar, message
from declip_jax.reporting.trackers.tensorboard import TENSORBOARD, TensorBoard
from declip_jax.runtime.hosts import from_first, sum_over_hosts
from declip_jax.runtime.records import add_line
from declip_jax.spelling import counted

_VERSION = 5  # of what a result of the same model, data and options is


@dataclass(frozen=True)
class ModelFacts:
  """What results say about a model.

  Attributes:
    name, pretrained: names of the model and of its weights.
    weights: `path`, `origin`, `step` and `hash` of the weights, and the number of their `parameters`; see `Result`.
    view: preprocessing of images.
    dtype: compute dtype.
    training: returns facts on the training of a run, see `planning.training_facts`; called once results are computed.
    fields: all fields of the model, `config.model`, and whether it compares tokens.
  """

  name: str
  pretrained: str
  weights: Mapping[str, Any]
  view: Mapping[str, Any]
  dtype: str
  training: Callable[[], Mapping[str, Any]] = dict
  fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
  """The evaluation of one model; every host has to make the same calls.

  Attributes:
    model: what results say about the model.
    encoders: its encode functions.
    output: folder of the results.
    cache: features of images on disk, None for none.
    text_cache: embeddings of texts on disk, None for none.
    run_folder: working directory of the run that the model is from, whose TensorBoard shows the results; None for none.
  """

  model: ModelFacts
  encoders: Encoders
  output: Path
  cache: FeatureCache | None = None
  text_cache: TextCache | None = None
  run_folder: Path | None = None

  def run(self, jobs: Sequence[Job]) -> dict[str, Result]:
    """Runs the jobs that have no result yet, writes their results, and returns those of all jobs, by name.

    Raises:
      ValueError: before anything runs, a result would replace that of other weights, or two results have one file;
        or some jobs cannot run, after all others have run; the message names them.
      OSError: a result cannot be written, or some jobs cannot run now, such as one whose disk fails.
    """
    self._check_names(jobs)
    found = self._finished(jobs)
    todo = [job for job in jobs if found[job.name] is None]
    if len(todo) < len(jobs):
      message(f"{len(jobs) - len(todo)} of {counted(len(jobs), 'result')} found in {self.output}")
    training = self.model.training() if todo else {}  # by all hosts: it opens checkpoints
    start, failed, contents = time.monotonic(), {}, {}
    total, images = self._images_to_encode(todo), _Images()
    with Bar("encoding images", total or None, "images") as bar, self._events(todo) as events:
      bar.pause()
      ran = run_jobs(
        todo,
        self.encoders,
        self._picture,
        encode=partial(self._encode, images),
        encode_texts=encode_texts if self.text_cache is None else self.text_cache.encode,
        read=_reader(bar, total, images),
        seen=lambda job, test: contents.update({job.name: test.content}),
      )
      for number, (job, scores) in enumerate(ran, 1):
        if isinstance(scores, Exception):
          failed[job.name] = scores
          continue
        found[job.name] = self._result(job, scores, training, contents[job.name])
        seconds, start = time.monotonic() - start, time.monotonic()
        if jax.process_index() == 0:
          path = results.write(self.output, found[job.name], scores.predictions)
          self._log(job, path, scores, {"seconds": round(seconds, 3), **vars(images)})
          if events is not None:
            events.log(self.model.weights["step"], job.curves(scores))
          shown = describe(scores.headline, scores.metrics, scores.intervals)
          chance = "".join(f"; chance: {value:.1%}" for value in _chance(job, scores).values())
          message(f"[{number}/{len(todo)}] {job.name}: {shown}{chance} ({seconds:.1f} s)")
          if remark := scores.details.get("remark"):
            message(f"{job.name}: {remark}")
        images.encoded = images.cached = 0
    with contextlib.suppress(OSError):  # if it has pictures
      (self.output / results.PICTURES).rmdir()
    if failed:
      raise together(failed)
    return found

  def plan(self, jobs: Sequence[Job]) -> list[str]:
    """Describes what `run` would do, in lines of text: sources, what is there, and an estimate of the time.

    All hosts have to call this, and get about the same lines: numbers of images are those of all hosts.
    """
    todo = {name for name, found in self._finished(jobs).items() if found is None}
    lines = []
    for job in jobs:
      sources = (f"{name} {split.source.name} ({len(split.source):,})" for name, split in job.splits.items())
      lines.append(f"{job.name}: {', '.join(sources)}{_prompts(job)}{'' if job.name in todo else ', done'}")
    new, again = self._to_encode([job for job in jobs if job.name in todo])
    left = sum_over_hosts(np.array([count for _, count in (*new, *again)], np.int64))
    images = int(left.sum())
    new = [source for (source, _), count in zip(new, left, strict=False) if count]
    lines.append(f"{len(todo)} of {counted(len(jobs), 'result')} to compute, {counted(images, 'image')} to encode")
    if images and self.cache is not None:
      lines.append(
        f"their features take {sum(self.cache.num_bytes(one, self.encoders) for one in new) / 2**20:,.1f} MiB"
      )
    if images:
      rate = jax.process_count() * self._images_per_second(max(new or [source for source, _ in again], key=len))
      lines.append(
        f"encoding them takes about {images / rate:,.0f} s, at {rate:,.0f} images/s; texts and fits are extra"
      )
    return lines

  def _finished(self, jobs: Sequence[Job]) -> dict[str, Result | None]:
    """The results of jobs that are there, as the first host reads them; None for those that have to be computed.

    Raises:
      ValueError: on every host; a result would replace one of other weights.
    """
    found: dict[str, Result | None] = {}
    for job in jobs:
      old = self._stored(job)
      found[job.name] = old if old is not None and old.ours.get("key") == self._key(job) else None
      if old is not None and found[job.name] is None:
        self._check_replaced(job, old)
    return found

  def _stored(self, job: Job) -> Result | None:
    """The result in the file of a job, of whatever; all hosts get what the first one reads."""
    content = b""
    if jax.process_index() == 0:
      with contextlib.suppress(ValueError, FileNotFoundError):
        results.read(self._path(job))
        content = self._path(job).read_bytes()
    content = from_first(content)
    return results.parse(content) if content else None

  def _path(self, job: Job) -> Path:
    return self.output / f"{self._result_of(job, {}).stem}.json"

  def _check_replaced(self, job: Job, old: Result) -> None:
    """Rejects the replacement of a result of weights at another path; says if the weights or the data have changed.

    The results in the folder of a run are its own, wherever it was before.
    """
    before, now, path = old.ours.get("weights", {}), self.model.weights, self._path(job)
    is_other, is_own = before.get("hash") != now["hash"], self.run_folder in path.parents
    if is_other and not is_own and _paths(before) != _paths(now):
      raise ValueError(
        f"{path} is the result of {before.get('path')}, and that of {now['path']} would replace it: choose another "
        "--output"
      )
    data, own = old.ours.get("data", {}), _data(job)
    is_same = data.keys() == own.keys() and all(own[name].items() <= about.items() for name, about in data.items())
    what = f"earlier weights at {before.get('path')}" if is_other else "" if is_same else _named(data)
    if what and jax.process_index() == 0:
      message(f"{job.name}: replaces the result of {what}, {path}")

  def _check_names(self, jobs: Sequence[Job]) -> None:
    """Rejects jobs whose results would have the same file."""
    names: dict[str, str] = {}
    for job in jobs:
      stem = self._result_of(job, {}).stem
      if stem in names:
        raise ValueError(f"{names[stem]} and {job.name} have results of the same name, {stem}: evaluate one of them")
      names[stem] = job.name

  def _encode(self, images: "_Images", source: Source, encoders: Encoders, rows: range, read: Read) -> Features:
    function, before = features.encode if self.cache is None else self.cache.encode, images.encoded
    found = function(source, encoders, rows, read)
    images.cached += len(rows) - (images.encoded - before)
    return found

  def _to_encode(self, jobs: Sequence[Job]) -> tuple[list[tuple[Source, int]], list[tuple[Source, int]]]:
    """The different sources of some jobs, each with the number of this host's images that are not in the cache yet.

    Then those that models that compare tokens encode once more, for each job that compares images with texts.
    """
    sources = {id(split.source): split.source for job in jobs for split in job.splits.values()}.values()
    tokens = self.encoders.image_tokens is not None
    again = [job.splits["test"].source for job in jobs if tokens and EVALUATORS[job.kind].needs_text]
    cache, encoders = self.cache, self.encoders
    left = [len(_rows(one)) if cache is None else cache.rows_left(one, encoders, _rows(one)) for one in sources]
    return [*zip(sources, left, strict=True)], [(source, len(_rows(source))) for source in again]

  def _images_to_encode(self, jobs: Sequence[Job]) -> int:
    """Of this host."""
    return sum(count for sources in self._to_encode(jobs) for _, count in sources)

  def _images_per_second(self, source: Source) -> float:
    rows = range(min(len(source), 2 * len(self.encoders.batch_rows)))
    features.encode(source, self.encoders, rows)  # compiles
    start = time.monotonic()
    features.encode(source, self.encoders, rows)
    return len(rows) / (time.monotonic() - start)

  def _picture(self, job: Job) -> Path | None:
    """Beside the results: the picture of an evaluation never replaces that of a training."""
    if jax.process_index():
      return None
    path = results.picture_path(self._path(job))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

  def _events(self, todo: Sequence[Job]) -> contextlib.AbstractContextManager[TensorBoard | None]:
    """A file for the run's TensorBoard, apart from those of its training, which a second writer would confuse."""
    if self.run_folder is None or not todo or jax.process_index():
      return contextlib.nullcontext()
    folder = self.run_folder / TENSORBOARD / "results"
    try:
      return contextlib.closing(TensorBoard(folder))
    except OSError as error:  # the run is another user's
      message(f"{folder} cannot be written, so TensorBoard will not show the results: {error}")
      return contextlib.nullcontext()

  def _key(self, job: Job) -> str:
    """A hash of everything that the result depends on."""
    limits = self.encoders.reading.max_pixels, self.encoders.reading.seconds
    model = [self.model.weights["hash"], self.model.fields, self.model.view, self.model.dtype, numerics(), *limits]
    data = {name: [_about(split), _listed(split.classes)] for name, split in job.splits.items()}
    half = [] if self.encoders.features_dtype == "float32" else [self.encoders.features_dtype]
    return json_hash([_VERSION, model, job.kind, job.options, data, job.data, *half])

  def _result_of(self, job: Job, ours: Mapping[str, Any]) -> Result:
    evaluator, metrics = EVALUATORS[job.kind], ours.get("metrics", {})
    theirs = {name: metrics[own] for own, name in evaluator.names.items() if own in metrics}
    ours = {"variant": job.variant, **ours}
    return Result(job.dataset, self.model.name, self.model.pretrained, evaluator.task or job.kind, theirs, ours)

  def _result(self, job: Job, scores: Scores, training: Mapping[str, Any], content: Mapping[str, Any]) -> Result:
    data = _data(job)
    return self._result_of(
      job,
      {
        "key": self._key(job),
        "kind": job.kind,
        "headline": scores.headline,
        "metrics": scores.metrics,
        "intervals": scores.intervals,
        "details": scores.details,
        "about": {**_chance(job, scores), **job.about},
        "options": job.options,
        "data": {**data, "test": {**data["test"], **content}},
        "weights": self.model.weights,
        **({"training": training} if training else {}),
        "view": self.model.view,
        "dtype": self.model.dtype,
        "model": self.model.fields,
        "numerics": numerics(),
        "features_dtype": self.encoders.features_dtype,
        "versions": {"declip_jax": declip_jax.__version__, "jax": jax.__version__, "numpy": np.__version__},
      },
    )

  def _log(self, job: Job, path: Path, scores: Scores, cost: Mapping[str, float]) -> None:
    """Adds a line about what does not belong into a result: when, where and how fast.

    Args:
      job, path, scores: what was evaluated, the file of its result, and its metrics.
      cost: `seconds`, and of this host how many images were `encoded` and how many came from the cache (`cached`).
    """
    metrics = {f"eval/{job.name}/{name}": value for name, value in scores.metrics.items()}
    step = self.model.weights["step"]
    line = {
      **({"weights": self.model.weights["path"]} if step is None else {"step": step}),
      "time": round(time.time(), 3),
      "file": path.name,
      **cost,
      "machine": f"{platform.node()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    add_line(self.output / results.LOG, json.loads(json.dumps({**line, **metrics}, default=float)))


def describe(name: str, metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]]) -> str:
  """A metric with its interval, for people."""
  return score_text(name, metrics[name]) + (" [{:.1%}, {:.1%}]".format(*intervals[name]) if name in intervals else "")


def _prompts(job: Job) -> str:
  """The prompts of the first class, for people; empty for a job without any."""
  if not job.data.get("prompts"):
    return ""
  first, *others = job.data["prompts"][0]
  more = f" and {len(others)} more" if others else ""
  return f", prompts {job.about.get('prompts', '')}: {first!r}{more}"


@dataclass
class _Images:
  """How many images a job has encoded, and how many it had in the cache."""

  encoded: int = 0
  cached: int = 0


def _reader(bar: Bar, total: int, images: _Images) -> Read:
  """`surely(read_batches)` that counts images and advances a bar, whose clock only runs meanwhile, up to its total."""
  left = total

  def read(source: Any, encoders: Encoders, rows: range) -> Iterator[dict[str, np.ndarray]]:
    nonlocal left
    of_rows = len(rows)
    bar.resume()
    for batch in surely(read_batches)(source, encoders, rows):
      yield batch
      count = min(of_rows, len(batch["label"]))
      images.encoded += count
      bar.update(min(count, left))
      of_rows, left = of_rows - count, max(left - count, 0)
    bar.pause()

  return read


def _chance(job: Job, scores: Scores) -> dict[str, float]:
  """The chance of the headline metric, by the number of classes; nothing where it depends on more than these."""
  classes = len(job.data.get("classnames") or job.splits["test"].source.classnames)
  found = catalogue.chance(scores.details.get("metric") or scores.headline, classes)
  return {} if found is None else {"chance": found}


def _rows(source: Source) -> range:
  return host_rows(len(source), jax.process_index(), jax.process_count())


def _about(split: DataSource) -> dict[str, Any]:
  source = split.source
  return {"source": source.name, "stamp": source.stamp, "samples": len(source), "skipped": source.skipped}


def _data(job: Job) -> dict[str, dict[str, Any]]:
  return {name: _about(split) for name, split in job.splits.items()}


def _named(data: Mapping[str, Mapping[str, Any]]) -> str:
  """The splits of a result in words."""
  return "other data, " + ", ".join(f"{name} {about['source']} ({about['samples']:,})" for name, about in data.items())


def _paths(weights: Mapping[str, Any]) -> list[str]:
  """Where weights, and those with which they are mixed, are."""
  parts = [weights, weights.get("interpolated_with") or {}]
  return [os.path.abspath(one["path"]) if one.get("path") else "" for one in parts]


def _listed(classes: np.ndarray | None) -> list[int] | None:
  return None if classes is None else classes.tolist()
