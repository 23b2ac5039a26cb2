"""The jobs of suites on a user's data: which evaluators run on which data sets, with which classes and prompts."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
from dataclasses import replace
import os
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Int
import numpy as np

from declip_jax.data.sources import BadSample, Source, open_source, read_example
from declip_jax.data.sources.border import KIND
from declip_jax.data.storage.layouts import TEMPLATES
from declip_jax.evals import EVALUATORS, SPLITS, Evaluator, catalogue, data_files, defaults, parse_option, variant_of
from declip_jax.evals.catalogue import DataSet, Suite, TrainingSize, training_size
from declip_jax.evals.classes import align
from declip_jax.evals.data_files import Splits
from declip_jax.evals.feature_cache import json_hash
from declip_jax.evals.features import ParentClasses
from declip_jax.evals.jobs import DataSource, Job
from declip_jax.evals.options import check_values
from declip_jax.evals.own_prompts import NAME, read_prompts
from declip_jax.evals.prompts import check_templates
from declip_jax.evals.results import Result
from declip_jax.spelling import did_you_mean


class _Task(NamedTuple):
  """An evaluator and its options.

  Attributes:
    kind: a key of `EVALUATORS`.
    options: the options that were chosen.
  """

  kind: str
  options: Mapping[str, Any]

  @property
  def evaluator(self) -> Evaluator:
    """The entry of `EVALUATORS`."""
    return EVALUATORS[self.kind]

  @property
  def variant(self) -> str:
    """The options that differ from the defaults; see `evals.variant_of`."""
    return variant_of(self.kind, self.options)


class _Protocol(NamedTuple):
  """How a suite evaluates a data set.

  Attributes:
    metric: the metric that is reported, and by which probes choose their strength; empty for data without one.
    suite: name of the suite; empty for none.
    chance: value of the metric if all answers are guessed, None if unknown.
    others: names of the prompts and of the metric where they are not the data set's own; else empty.
    prompt_set, prompts: name of the prompt set, or of its file, and the prompts of each class; None without classes.
  """

  metric: str
  suite: str
  chance: float | None
  others: tuple[str, str]
  prompt_set: str = ""
  prompts: tuple[tuple[str, ...], ...] | None = None

  @property
  def variant(self) -> str:
    """Part of the name of a result; empty for the data set's own protocol."""
    return "-".join(other for other in self.others if other)

  def without_prompts(self) -> "_Protocol":
    """The protocol of an evaluator that compares no texts."""
    return self._replace(others=("", self.others[1]), prompt_set="", prompts=None)


def read_jobs(
  path: str | os.PathLike[str],
  suites: Sequence[str] = (),
  tasks: Sequence[str] = (),
  prompts: str = "",
  options: Sequence[str] = (),
) -> tuple[list[Job], list[str]]:
  """`make_jobs` for a data file and names of suites.

  Raises:
    OSError: the file cannot be read.
    ValueError: the file has a wrong line, or a suite does not exist; see also `make_jobs`.
  """
  return make_jobs(data_files.read_data(path), [catalogue.suite(name) for name in suites], tasks, prompts, options)


def make_jobs(
  data: Mapping[str, Splits],
  suites: Sequence[Suite] = (),
  tasks: Sequence[str] = (),
  prompts: str = "",
  options: Sequence[str] = (),
) -> tuple[list[Job], list[str]]:
  """Opens the data sets of suites, and returns the jobs of all tasks on them, and remarks on what is missing.

  Args:
    data: sources of the user's data sets, by their key in the catalogue.
    suites: suites, whose metrics and prompts are used, each in a job of its own; all of `data` by default.
    tasks: keys of `EVALUATORS`, by default those that need neither training nor a classifier of the model.
    prompts: name of a prompt set of all data sets, or a file with one, see `own_prompts`; by default, that of the
      suite.
    options: options of evaluators, such as "few_shot.method=ridge".

  Raises:
    ValueError: an unknown task or option, no data set of the suites is there, or a source is damaged or has other
      classes; the message names the data set and the source.
    OSError: a source cannot be opened; the message names its place in the data file.
  """
  chosen = _tasks(tasks, options)
  wanted = list(dict.fromkeys(key for suite in suites for key in suite.keys)) or list(data)
  places = {key: key if key in data else catalogue.data_set(key).images for key in wanted}
  found = {key: data[place] for key, place in places.items() if place in data}
  jobs, remarks = [], [remark for suite in suites for remark in _missing(suite, found)]
  sources: dict[str, Source] = {}
  for key, specs in found.items():
    own = [suite for suite in suites if key in suite.keys]
    for job in _jobs_of(key, specs, own, chosen, prompts, sources):
      if isinstance(job, str):
        remarks.append(job)
      else:
        jobs.append(job)
  if tasks or not jobs:
    remarks += _unfit(chosen, jobs, remarks)
  if not jobs:
    raise ValueError(f"nothing to evaluate: {'; '.join(remarks)}")
  return jobs, remarks


def _unfit(tasks: Sequence[_Task], jobs: Sequence[Job], remarks: Sequence[str]) -> Iterator[str]:
  """Remarks on the tasks that fit no data set."""
  for task in tasks:
    named = any(f": {task.kind} needs " in remark for remark in remarks)
    if not named and task.kind not in {job.kind for job in jobs}:
      yield f"{task.kind} fits none of the data sets: it needs {' or '.join(task.evaluator.of)} data"


def means(results: Mapping[str, Result], suites: Sequence[Suite]) -> dict[str, float]:
  """The means of suites, by task, of which no data set is missing; only results by the suite's protocol count.

  A mean of data sets with several tasks, such as DataComp's, has no task in its name: it is that of the tasks that need
  neither training nor a classifier, with their default options. Few shots are averaged at equal numbers of images, and
  so are nearest neighbours, see `Suite.averages`.

  Args:
    results: results by the names of their jobs.
    suites: the suites.
  """
  found = {}
  for suite in suites:
    values: dict[str, dict[str, float]] = {}
    sizes: dict[str, dict[str, TrainingSize]] = {}
    for result in results.values():
      if _follows(result.ours, suite):
        ours, kind = result.ours, result.ours["kind"]
        task = "/".join(part for part in (kind, variant_of(kind, ours.get("options", {}))) if part)
        values.setdefault(task, {})[ours["about"]["key"]] = ours["metrics"][ours["headline"]]
        if (size := training_size(kind, ours["headline"], ours.get("details", {}))) is not None:
          sizes.setdefault(task, {})[ours["about"]["key"]] = size
    averages = {task: suite.averages(own, sizes.get(task)) for task, own in values.items()}
    joined = {key: value for task in _without_training() for key, value in values.get(task, {}).items()}
    averages[""] = {
      name: value
      for name, value in suite.averages(joined).items()
      if not any(name in averages.get(task, ()) for task in _without_training())
    }
    for task, own in averages.items():
      found |= {"/".join(part for part in (suite.name, task, name) if part): value for name, value in own.items()}
  return found


def _without_training() -> list[str]:
  """The evaluators that need neither training nor a classifier of the model."""
  return [name for name, known in EVALUATORS.items() if known.of and not (known.needs_train or known.needs_classifier)]


def _follows(ours: Mapping[str, Any], suite: Suite) -> bool:
  """Whether a result has the metric of a suite, and its prompts if it has any."""
  key = ours["about"].get("key")
  if key not in suite.keys or ours["about"].get("metric") != (suite.metric(key) or ""):
    return False
  return ours["about"].get("prompts", suite.prompt_set(key)) == suite.prompt_set(key)


def table(suites: Sequence[Suite] = ()) -> str:
  """A table of all suites, or, if some are given, of their data sets."""
  if not suites:
    lines = [[name, str(len(suite.keys)), suite.title] for name, suite in catalogue.suites().items()]
    return _aligned([["suite", "sets", ""], *lines])
  rows = [["data set", "task", "metric", "classes", "chance", "prompts", "note"]]
  for suite in suites:
    for key in suite.keys:
      entry = catalogue.data_set(key)
      chance = "" if entry.chance is None else f"{entry.chance:.1%}"
      classes = str(len(entry.classes) or entry.num_classes or "")
      rows.append([key, entry.task, suite.metric(key) or "", classes, chance, ", ".join(entry.prompt_sets), entry.note])
  return _aligned(rows)


def _tasks(names: Sequence[str], options: Sequence[str]) -> list[_Task]:
  """The evaluators of some names, by default those that need neither training nor a classifier, with their options.

  Raises:
    ValueError: an evaluator or an option does not exist, or the value of an option is illegal; the message names the
      legal ones.
  """
  names = names or _without_training()
  for name in names:
    if name not in EVALUATORS or not EVALUATORS[name].of:
      legal = [name for name, evaluator in EVALUATORS.items() if evaluator.of]
      raise ValueError(f"--tasks={name}: choose some of {', '.join(legal)}{did_you_mean(name, legal)}")
  given: dict[str, dict[str, Any]] = {name: {} for name in names}
  for text in options:
    path, equals, value = text.partition("=")
    kind, dot, option = path.partition(".")
    if not (equals and dot):
      raise ValueError(f"--option={text}: expected TASK.OPTION=VALUE, such as few_shot.method=ridge")
    if kind not in given:
      raise ValueError(
        f"--option={text}: the option is for {kind!r}, but the tasks are {', '.join(given)}{did_you_mean(kind, given)}"
      )
    given[kind] |= parse_option(kind, option, value, f"--option={text}")
  for name, options in given.items():
    check_values({**defaults(name), **options}, f"--option={name}")
  return [_Task(name, given[name]) for name in given]


def _missing(suite: Suite, data: Mapping[str, Any]) -> list[str]:
  if not (missing := suite.missing(data)):
    return []
  share = f"{len(missing)} of its {len(suite.keys)}" if len(missing) < len(suite.keys) else f"all {len(missing)}"
  return [f"{suite.name}: {share} data sets are missing from the data file (see --print_data): {', '.join(missing)}"]


def _jobs_of(
  key: str, specs: Splits, suites: Sequence[Suite], tasks: Sequence[_Task], prompts: str, sources: dict[str, Source]
) -> list[Job | str]:
  """The jobs of a data set, or remarks in their place; `sources` are those that are open.

  A data set of the user's own whose images have classes and captions is also one for retrieval.

  There is one job for each different protocol of the suites, their metric and, if texts are compared, their prompts.
  """
  splits = specs.specs
  if border := catalogue.data_set(key).border:
    splits["test"] = _without_border(splits["test"], border)
  opened = {name: _open(spec, f"{specs.place or key}: {name}", sources) for name, spec in splits.items()}
  entry = _with_classes(catalogue.data_set(key), opened["test"])
  classes, parent = _classes(entry, opened, splits) if entry.classes else ({}, None)
  parts = {name: DataSource(source, classes.get(name)) for name, source in opened.items()}
  trained: dict[str, Any] = {"validation_per_class": (parent or entry).validation_per_class}
  if parent is not None:
    trained["parent"] = ParentClasses(parent.classes, entry.parent_ids)
  jobs = _jobs_with(entry, parts, trained, suites, tasks, prompts)
  if key.startswith(catalogue.OWN) and entry.task != "retrieval" and _first(opened["test"]).get("captions"):
    jobs += _jobs_with(entry.for_retrieval(), parts, {}, (), tasks, "")
  return jobs


def _jobs_with(
  entry: DataSet,
  parts: Mapping[str, DataSource],
  trained: Mapping[str, Any],
  suites: Sequence[Suite],
  tasks: Sequence[_Task],
  prompts: str,
) -> list[Job | str]:
  """The jobs of the tasks that fit a data set; `trained` are the facts for evaluators that train."""
  protocols = [_protocol(entry, suite, prompts) for suite in suites or [None]]
  jobs: list[Job | str] = []
  for task in (task for task in tasks if entry.task in task.evaluator.of):
    if task.evaluator.needs_train and "train" not in parts:
      jobs.append(f"{entry.key}: {task.kind} needs a split to train on: add | TRAIN to its line in the data file")
      continue
    used = parts if task.evaluator.needs_train else {"test": parts["test"]}
    facts = trained if task.evaluator.needs_train else {"key": entry.key} if task.evaluator.needs_classifier else {}
    own = [protocol if task.evaluator.needs_text else protocol.without_prompts() for protocol in protocols]
    if task.options:
      _check_options(task, parts["test"].source, entry)
    for variant in dict.fromkeys(protocol.variant for protocol in own):
      jobs.append(_job(entry, task, next(one for one in own if one.variant == variant), used, facts))
  return jobs


def _check_options(task: _Task, source: Source, entry: DataSet) -> None:
  """Rejects options with which an evaluator cannot run."""
  if "templates" in task.options:
    raise ValueError(f"--option={task.kind}.templates: the prompts of data sets are those of --prompts")
  if source.classnames or not entry.classes:  # without names, those of the catalogue are used
    task.evaluator.check(source, f"--option={task.kind}", **task.options)


def _job(
  entry: DataSet, task: _Task, protocol: _Protocol, splits: Mapping[str, DataSource], facts: Mapping[str, Any]
) -> Job:
  key = entry.key
  variant = "-".join(part for part in (protocol.variant, task.variant) if part)
  name = "/".join(part for part in (key, task.kind, variant) if part)
  about = {"key": key, "title": entry.title, "chance": protocol.chance, "note": entry.note, "metric": protocol.metric}
  classes = {"classnames": entry.classes} if entry.classes else {}
  of = {"metric": protocol.metric, "grouping": entry.grouping, "ignored_groups": entry.ignored_groups, **classes}
  if entry.has_difficult:
    of["has_difficult"] = True
  if protocol.prompts is not None:
    of["prompts"] = protocol.prompts
    about |= {"prompts": protocol.prompt_set, "prompts_hash": json_hash(protocol.prompts)}
  parts = [protocol.suite, key, task.kind if task.evaluator.needs_train else "", task.variant]
  curve = "/".join(part for part in parts if part)
  return Job(name, entry.clip_benchmark, task.kind, splits, task.options, {**of, **facts}, variant, about, curve)


def _protocol(entry: DataSet, suite: Suite | None, prompts: str) -> _Protocol:
  """How a suite evaluates a data set, or, for None, its own protocol; `prompts` replace those of the suite."""
  metric = suite.metric(entry.key) if suite else entry.metric
  of = suite.name if suite else "", replace(entry, metric=metric).chance
  other = metric or "" if metric != entry.metric else ""
  if not entry.classes:
    return _Protocol(metric or "", *of, ("", other))
  if prompts.endswith((".txt", ".json")):
    path = Path(prompts)
    return _Protocol(metric or "", *of, (path.stem, other), path.name, read_prompts(prompts, entry).prompts(NAME))
  own = entry.prompt_sets[0]
  chosen = prompts or (suite.prompt_set(entry.key) if suite else own)
  return _Protocol(metric or "", *of, (chosen if chosen != own else "", other), chosen, entry.prompts(chosen))


def _classes(
  entry: DataSet, sources: Mapping[str, Source], specs: Mapping[str, str]
) -> tuple[dict[str, Int[np.ndarray, "labels"]], DataSet | None]:
  """The class of each label of the sources, and the data set whose classes the splits to train on have, if another.

  A classifier for ImageNet-R that is trained on ImageNet knows all of ImageNet's classes, as one for ImageNet does.
  """
  found = {name: align(entry, source.classnames, specs[name]) for name, source in sources.items()}
  parent = catalogue.data_set(entry.parent) if entry.parent else entry
  trained = [name for name in SPLITS if name in sources]
  if len(parent.classes) == len(entry.classes) or any(len(found[name]) != len(parent.classes) for name in trained):
    return found, None
  return found | {name: align(parent, sources[name].classnames, specs[name]) for name in trained}, parent


def _open(spec: str, place: str, sources: dict[str, Source]) -> Source:
  """The source of a split of a data set; `place` is where it is written."""
  if spec not in sources:
    sources[spec] = open_source(spec, place)
  return sources[spec]


def _without_border(spec: str, border: int) -> str:
  """The spec of a source without the border of its images, unless it says itself which border they have."""
  return spec if spec.startswith(f"{KIND}:") else f"{KIND}:{border}:{spec}"


def _with_classes(entry: DataSet, source: Source) -> DataSet:
  """The entry with the classes of its source if it has none of its own."""
  if entry.classes or not (entry.key.startswith(catalogue.OWN) or source.classnames):
    return entry
  templates = getattr(source, "templates", ())
  if templates:
    check_templates(templates, f"{source.name}: {TEMPLATES}")
  first = _first(source)
  if not source.classnames and first.get("label", -1) >= 0 and not first["captions"]:
    raise ValueError(
      f"{entry.key}: {source.name}: its images have labels, but the names of the classes are not known; put a "
      "classnames.txt, with one name per line, next to its first file"
    )
  return entry.with_classes(source.classnames, templates, several="labels" in first)


def _first(source: Source) -> Mapping[str, Any]:
  """The first example that can be read; empty if there is none."""
  for index in range(len(source)):
    with contextlib.suppress(BadSample):
      return read_example(source, index)
  return {}


def _aligned(rows: Sequence[Sequence[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
  )
