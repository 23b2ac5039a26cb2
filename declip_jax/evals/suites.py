"""The jobs of suites on a user's data: which evaluators run on which data sets, with which classes and prompts."""

from collections.abc import Mapping, Sequence
import contextlib
import os
from pathlib import Path
from typing import Any

from jaxtyping import Int
import numpy as np

from declip_jax.data.sources import BadSample, Source, open_source, read_example
from declip_jax.data.storage.layouts import TEMPLATES
from declip_jax.evals import EVALUATORS, SPLITS, catalogue, data_files
from declip_jax.evals.catalogue import DataSet, Suite
from declip_jax.evals.classes import align
from declip_jax.evals.data_files import Splits
from declip_jax.evals.feature_cache import json_hash
from declip_jax.evals.features import ParentClasses
from declip_jax.evals.jobs import DataSource, Job
from declip_jax.evals.own_prompts import NAME, read_prompts
from declip_jax.evals.prompts import check_templates
from declip_jax.evals.results import Result
from declip_jax.spelling import did_you_mean


def read_jobs(
  path: str | os.PathLike[str], suites: Sequence[str] = (), tasks: Sequence[str] = (), prompts: str = ""
) -> tuple[list[Job], list[str]]:
  """`make_jobs` for a data file and names of suites.

  Raises:
    OSError: the file cannot be read.
    ValueError: the file has a wrong line, or a suite does not exist; see also `make_jobs`.
  """
  return make_jobs(data_files.read_data(path), [catalogue.suite(name) for name in suites], tasks, prompts)


def make_jobs(
  data: Mapping[str, Splits], suites: Sequence[Suite] = (), tasks: Sequence[str] = (), prompts: str = ""
) -> tuple[list[Job], list[str]]:
  """Opens the data sets of suites, and returns the jobs of all tasks on them, and remarks on what is missing.

  Args:
    data: sources of the user's data sets, by their key in the catalogue.
    suites: suites, whose metrics and prompts are used; all of `data` by default.
    tasks: keys of `EVALUATORS`, by default those that need neither training nor a classifier of the model.
    prompts: name of a prompt set of all data sets, or a file with one, see `own_prompts`; by default, that of the
      suite.

  Raises:
    ValueError: an unknown task, no data set of the suites is there, or a source cannot be opened or has other classes;
      the message names the data set and the source.
  """
  tasks = tasks or [
    name for name, known in EVALUATORS.items() if known.of and not (known.needs_train or known.needs_classifier)
  ]
  for task in tasks:
    if task not in EVALUATORS or not EVALUATORS[task].of:
      legal = [name for name, evaluator in EVALUATORS.items() if evaluator.of]
      raise ValueError(f"--tasks={task}: choose some of {', '.join(legal)}{did_you_mean(task, legal)}")
  wanted = list(dict.fromkeys(key for suite in suites for key in suite.keys)) or list(data)
  places = {key: key if key in data else catalogue.data_set(key).images for key in wanted}
  found = {key: data[place] for key, place in places.items() if place in data}
  jobs, remarks = [], [remark for suite in suites for remark in _missing(suite, found)]
  sources: dict[str, Source] = {}
  for key, specs in found.items():
    suite = next((suite for suite in suites if key in suite.keys), None)
    for job in _jobs_of(key, specs, suite, tasks, prompts, sources):
      if isinstance(job, str):
        remarks.append(job)
      else:
        jobs.append(job)
  if not jobs:
    raise ValueError(f"nothing to evaluate: {'; '.join(remarks) or 'no task fits the data sets'}")
  return jobs, remarks


def means(results: Mapping[str, Result], suites: Sequence[Suite]) -> dict[str, float]:
  """The means of suites, by task, of which no data set is missing.

  Args:
    results: results by the names of their jobs.
    suites: the suites.
  """
  found = {}
  for suite in suites:
    for kind in dict.fromkeys(result.ours["kind"] for result in results.values()):
      own = [result.ours for result in results.values() if result.ours["kind"] == kind]
      values = {ours["about"]["key"]: ours["metrics"][ours["headline"]] for ours in own if ours["about"].get("key")}
      means = suite.averages({key: value for key, value in values.items() if key in suite.keys})
      found |= {f"{suite.name}/{kind}/{name}": value for name, value in means.items()}
  return found


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


def _missing(suite: Suite, data: Mapping[str, Any]) -> list[str]:
  if not (missing := suite.missing(data)):
    return []
  return [
    f"{suite.name}: the data file lacks {len(missing)} of {len(suite.keys)} data sets (see --print_data): "
    + ", ".join(missing)
  ]


def _jobs_of(
  key: str, specs: Splits, suite: Suite | None, tasks: Sequence[str], prompts: str, sources: dict[str, Source]
) -> list[Job | str]:
  """The jobs of a data set, or remarks in their place; `sources` are those that are open."""
  splits = {name: spec for name, spec in specs._asdict().items() if spec}
  opened = {name: _open(key, name, spec, sources) for name, spec in splits.items()}
  entry = _with_classes(catalogue.data_set(key), opened["test"])
  facts: dict[str, Any] = {"metric": (suite.metric(key) if suite else entry.metric) or ""}
  facts |= {"grouping": entry.grouping, "ignored_groups": entry.ignored_groups}
  about: dict[str, Any] = {"key": key, "title": entry.title, "chance": entry.chance, "note": entry.note}
  prompted, variant, classes, parent = {}, "", {}, None
  if entry.classes:
    classes, parent = _classes(entry, opened, splits)
    default = suite.prompt_set(key) if suite else entry.prompt_sets[0]
    chosen, variant = prompts or default, prompts if prompts != default else ""
    if prompts.endswith((".txt", ".json")):
      entry, chosen, variant = read_prompts(prompts, entry), NAME, Path(prompts).stem
    facts["classnames"] = entry.classes
    prompted = {"prompts": entry.prompts(chosen)}
    about |= {"prompts": chosen, "prompts_hash": json_hash(prompted["prompts"])}
  trained = {"validation_per_class": (parent or entry).validation_per_class}
  if parent is not None:
    trained["parent"] = ParentClasses(parent.classes, entry.parent_ids)
  parts = {name: DataSource(source, classes.get(name)) for name, source in opened.items()}
  jobs: list[Job | str] = []
  for task in (task for task in tasks if entry.task in EVALUATORS[task].of):
    needs_train, needs_text = EVALUATORS[task].needs_train, EVALUATORS[task].needs_text
    if needs_train and "train" not in parts:
      jobs.append(f"{key}: {task} needs a split to train on: add | TRAIN to its line in the data file")
      continue
    used = parts if needs_train else {"test": parts["test"]}
    data = {**facts, **(trained if needs_train else {}), **(prompted if needs_text else {})}
    of = variant if needs_text else ""
    curve = "/".join([*([suite.name] if suite else []), key, *([task] if needs_train else [])])
    jobs.append(Job(f"{key}/{task}", entry.clip_benchmark, task, used, {}, data, of, about, curve))
  return jobs


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


def _open(key: str, split: str, spec: str, sources: dict[str, Source]) -> Source:
  """The source of a split of a data set."""
  if spec not in sources:
    try:
      sources[spec] = open_source(spec)
    except (OSError, ValueError) as error:
      raise ValueError(f"{key}: {split}: {error}") from error
  return sources[spec]


def _with_classes(entry: DataSet, source: Source) -> DataSet:
  """The entry with the classes of its source if it has none of its own."""
  if entry.classes or not (entry.key.startswith(catalogue.OWN) or source.classnames):
    return entry
  templates = getattr(source, "templates", ())
  if templates:
    check_templates(templates, f"{source.name}: {TEMPLATES}")
  several = False
  for index in range(len(source)):
    with contextlib.suppress(BadSample):
      several = "labels" in read_example(source, index)
      break
  return entry.with_classes(source.classnames, templates, several=several)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
  )
