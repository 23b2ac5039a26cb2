"""Results of several methods side by side: their scores, and which differences are larger than chance explains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from pathlib import Path
import re
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
import numpy as np
import scipy

from declip_jax.evals import intervals, metrics, results
from declip_jax.evals.intervals import Interval
from declip_jax.evals.ranks import RECALL_AT
from declip_jax.evals.results import Result
from declip_jax.weights.folders import nearby_runs

# Evaluators in the order of a report; others follow.
ORDER = ("zero_shot", "retrieval", "composition", "linear_probe", "few_shot", "knn", "nearest_mean")


class Task(NamedTuple):
  """What a result is of: the same for every model.

  Attributes:
    dataset: name of the data set.
    kind: evaluator.
    variant: tells apart results of the same evaluator on the same data set.
  """

  dataset: str
  kind: str
  variant: str

  def __str__(self) -> str:
    return f"{self.dataset} ({self.variant})" if self.variant else self.dataset


@dataclass(frozen=True)
class Scored:
  """A result, and its predictions, which are read when they are first needed.

  Attributes:
    path: its file.
    result: its content.
  """

  path: Path
  result: Result

  @property
  def headline(self) -> str:
    """Name of the headline metric."""
    return self.result.ours["headline"]

  @property
  def metrics(self) -> Mapping[str, float]:
    """All metrics."""
    return self.result.ours["metrics"]

  @property
  def examples(self) -> int:
    """Number of images, or of examples of compositionality, which may have two."""
    return int(self.metrics.get("images", self.metrics.get("examples", 0)))

  @property
  def details(self) -> Mapping[str, Any]:
    """Details of the evaluator."""
    return self.result.ours["details"]

  @property
  def about(self) -> Mapping[str, Any]:
    """What else the evaluation says about the data set, such as its key in the catalogue and the prompts."""
    return self.result.ours.get("about", {})

  @property
  def key(self) -> str:
    """Key of the data set in the catalogue, an empty text without one."""
    return self.about.get("key", "")

  @property
  def data(self) -> Mapping[str, Mapping[str, Any]]:
    """What the result says about each split."""
    return self.result.ours.get("data", {})

  @property
  def training(self) -> Mapping[str, Any]:
    """How the model was trained, see `planning.training_facts`; nothing where that is not known."""
    return self.result.ours.get("training", {})

  @property
  def weights(self) -> Mapping[str, Any]:
    """Facts on the weights."""
    return self.result.ours.get("weights", {})

  @property
  def share(self) -> float | None:
    """The share of these weights in a mixture with others, as in WiSE-FT; None for weights that are no mixture."""
    return self.weights.get("share")

  def interval(self, metric: str) -> Interval | None:
    """The interval of a metric, None if it has none."""
    ends = self.result.ours["intervals"].get(metric)
    return None if ends is None else Interval(*ends)

  @cached_property
  def predictions(self) -> Mapping[str, np.ndarray]:
    """The predictions; none if they are not there."""
    path = results.predictions_path(self.path)
    if not path.exists():
      return {}
    with np.load(path, allow_pickle=False) as arrays:
      return dict(arrays)


@dataclass(frozen=True)
class Method:
  """Runs that differ only in their random seed, or a single run.

  Attributes:
    label: their name without the seed.
    runs: for each run its results.
  """

  label: str
  runs: tuple[Mapping[Task, Scored], ...]

  def of(self, task: Task) -> list[Scored]:
    """The results of a task by the runs that have one."""
    return [run[task] for run in self.runs if task in run]

  @property
  def first(self) -> list[Scored]:
    """One result of each run, for what all results of a run say."""
    return [_telling(run) for run in self.runs]

  @property
  def share(self) -> float | None:
    """The share of the weights in a mixture with others; None for weights that are no mixture."""
    return self.first[0].share


class Cell(NamedTuple):
  """A score of a method.

  Attributes:
    value: the score; of several runs, their mean.
    interval: of one run, the interval due to the test images; of several, that due to the random seeds.
    runs: number of runs.
  """

  value: float
  interval: Interval | None
  runs: int


class Difference(NamedTuple):
  """The score of a method minus that of the baseline.

  Attributes:
    value: the difference; on the same images, that of the images which both have.
    interval: its interval, None if the results do not allow one.
    p: two-sided p-value of no difference, None without an interval.
    test: "paired" on the same images, "Welch" over seeds, or "" without an interval.
  """

  value: float
  interval: Interval | None
  p: float | None
  test: str

  @property
  def is_significant(self) -> bool:
    """Whether the interval excludes 0."""
    return self.interval is not None and not self.interval.lower <= 0 <= self.interval.upper


Run = dict[Task, Scored]
_Name = tuple[str, str, str]  # of a model, of its weights, and hash of the weights


def read_methods(folders: Sequence[Path]) -> list[Method]:
  """Reads all results in some folders.

  Runs whose names differ only in a final number, as clip-0 and clip-1, are seeds of one method, unless they have been
  trained in different ways, such as on different numbers of pairs. Weights that are not a checkpoint of a run are never
  seeds, and neither are runs of one name in several folders, which are told apart by the names of the folders. Several
  checkpoints of a run are methods of their own.

  Args:
    folders: folders of results, or working directories with a folder `results`.

  Raises:
    FileNotFoundError: a folder does not exist, or has no result.
    ValueError: there are two different results of one task by the same weights; the message names their files.
  """
  runs: dict[_Name, Run] = {}
  for folder in folders:
    if not folder.is_dir():
      raise FileNotFoundError(f"{folder}: no such folder{nearby_runs(folder)}")
    if not (found := results_in(folder)):
      raise FileNotFoundError(f"{folder}: no result of declip_jax.evaluate in it")
    for path, result in found:
      scored = Scored(path, result)
      task = Task(result.dataset, result.ours["kind"], result.ours.get("variant", ""))
      run = runs.setdefault((result.model, result.pretrained, scored.weights.get("hash", "")), {})
      if task in run and not _is_same(run[task].result, result):
        raise ValueError(f"{run[task].path} and {path} are different results of {task} by the same weights: omit one")
      run[task] = scored
  return _grouped(runs)


def _is_same(a: Result, b: Result) -> bool:
  """Whether two results depend on the same; those of older versions do not say on what."""
  keys = [one.ours.get("key", "") for one in (a, b)]
  return keys[0] == keys[1] if all(keys) else a == b


def results_in(folder: Path) -> list[tuple[Path, Result]]:
  """The results, with their paths, in a folder of results or a working directory with a folder `results`."""
  inner = folder / "results"
  return results.read_all([inner if inner.is_dir() else folder])


def _grouped(runs: Mapping[_Name, Run]) -> list[Method]:
  """Methods of runs: those that differ only in their seed are together."""
  several = {model for model, _, _ in runs if len({weights for own, weights, _ in runs if own == model}) > 1}
  groups: dict[Any, list[_Name]] = {}
  for name, run in runs.items():
    model, pretrained, _ = name
    weights, one = pretrained if model in several else "", _telling(run)
    is_run = one.weights.get("step") is not None or bool(one.training)
    alone = None if is_run else name
    groups.setdefault((re.sub(r"-\d+$", "", model), weights, _trained(one), alone), []).append(name)
  found = [(key, own) for key, names in groups.items() for own in _apart(names, runs)]
  labels = [_labels(stem, weights, names, runs) for (stem, weights, *_), names in found]
  others = [*zip(*labels, strict=True)]
  shortest = (
    next((text for text, same in zip(own, others, strict=True) if same.count(text) == 1), own[-1]) for own in labels
  )
  return [Method(label, tuple(runs[name] for name in names)) for label, (_, names) in zip(shortest, found, strict=True)]


def _apart(names: Sequence[_Name], runs: Mapping[_Name, Run]) -> list[list[_Name]]:
  """Splits a group in which several runs have the same name: by their folder, and one by one if that is the same."""
  if len({model for model, _, _ in names}) == len(names):
    return [list(names)]
  folders: dict[Path, list[_Name]] = {}
  for name in names:
    folders.setdefault(_path_of(runs[name]).parent, []).append(name)
  return [own for part in folders.values() for own in (_apart(part, runs) if len(folders) > 1 else [[n] for n in part])]


def _path_of(run: Run) -> Path:
  """Where the weights of a run were; the current folder if its results do not say that."""
  return Path(str(next(iter(run.values())).weights.get("path", "")))


def _telling(run: Run) -> Scored:
  """A result that says what all results of a run say; those of older versions do not say how it was trained."""
  return next((scored for scored in run.values() if scored.training), next(iter(run.values())))


def _trained(scored: Scored) -> tuple[Any, ...]:
  """What runs that are seeds of one method have in common."""
  facts = [scored.training.get(name) for name in ("method", "unique_pairs", "pairs_seen", "flops")]
  return (*facts, *(scored.weights.get(name) for name in ("parameters", "average")), scored.share)


def _labels(stem: str, weights: str, names: Sequence[_Name], runs: Mapping[_Name, Run]) -> tuple[str, ...]:
  """Labels of a method, the shortest first; the last one is unique among all."""
  models, after = [model for model, _, _ in names], f" {weights}" if weights else ""
  full = ", ".join(models)
  folders = [_path_of(runs[name]).parent.name for name in names]
  within = ", ".join(f"{folder}/{model}" for folder, model in zip(folders, models, strict=True))
  short = stem if len(names) > 1 else full
  return tuple(text + after for text in (short, full, within, f"{within} ({names[0][2][:8]})"))


def tasks(methods: Sequence[Method]) -> list[Task]:
  """All tasks that any method has a result of, by evaluator and then by data set."""
  found = {task for method in methods for run in method.runs for task in run}
  kinds = [*dict.fromkeys([*ORDER, *sorted(task.kind for task in found)])]
  return sorted(found, key=lambda task: (kinds.index(task.kind), task.dataset, task.variant))


def cell(scored: Sequence[Scored], metric: str) -> Cell | None:
  """The score of a method by a metric, None if none of its runs has it."""
  having = _having(scored, metric)
  if not having:
    return None
  if len(having) == 1:
    return Cell(float(having[0].metrics[metric]), having[0].interval(metric), 1)
  values = np.array([one.metrics[metric] for one in having], np.float64)
  return Cell(float(values.mean()), intervals.student(values), len(values))


def check_data(scored: Sequence[Scored]) -> None:
  """Rejects results of one task on different data: other numbers of samples, or other ids, labels, captions or images.

  The latter are compared of results with the same number of readable test images; `difference` compares the labels of
  others. Of splits to train on, only the number of samples is known.

  Raises:
    ValueError: the message names two of their files, and their data.
  """
  first: dict[Any, tuple[Any, Scored]] = {}
  for one in scored:
    for split, about in one.data.items():
      for name in ("samples", "content", "images"):
        fact, of = about.get(name), None if name == "samples" else about.get("readable")
        known, other = first.setdefault((split, name, of), (fact, one)) if fact is not None else (None, one)
        if known != fact:
          named = [f"{each.path} ({split} {_named(each.data[split])})" for each in (other, one)]
          what = "other images of the same names" if name == "images" else "different data under one name"
          raise ValueError(f"{' and '.join(named)} are results of {what}")


def _named(about: Mapping[str, Any]) -> str:
  return f"{about.get('source')}, {about.get('samples')} samples"


def _having(scored: Sequence[Scored], metric: str) -> list[Scored]:
  return [one for one in scored if metric in one.metrics]


def difference(scored: Sequence[Scored], baseline: Sequence[Scored], metric: str) -> Difference | None:
  """Compares a method with the baseline by a metric, None if one of the two does not have it.

  One run each is compared on the same images, by a bootstrap of pairs, and by McNemar's exact test if the metric is a
  share of the images; several runs each are compared by Welch's test over seeds.

  Raises:
    ValueError: the two have been evaluated on different data; the message names their files.
  """
  check_data([*scored, *baseline])
  own, theirs = (cell(side, metric) for side in (scored, baseline))
  if own is None or theirs is None:
    return None
  plain = Difference(own.value - theirs.value, None, None, "")
  if own.runs > 1 and theirs.runs > 1:
    a, b = (np.array([one.metrics[metric] for one in side if metric in one.metrics]) for side in (scored, baseline))
    found = intervals.welch(a.astype(np.float64), b.astype(np.float64))
    return Difference(found.difference, found.interval, found.p, "Welch")
  if own.runs > 1 or theirs.runs > 1:
    return plain
  pairs = _joint([_having(scored, metric)[0]], [_having(baseline, metric)[0]], metric)
  if pairs is None:
    return plain
  once, values = np.ones((1, len(pairs.columns[0])), np.int64), pairs.resample()
  one = _having(scored, metric)[0]
  single = _answers(one.predictions, metric, one.details)
  exact = single is not None and single.metric is metrics.accuracy
  p = intervals.mcnemar(*pairs.columns) if exact else _p_value(values, len(pairs.columns[0]))
  return Difference(float(pairs.metric(*pairs.columns, once)[0]), intervals.percentiles(values), p, "paired")


class Average(NamedTuple):
  """The mean of a method's scores over several data sets, or the difference of two such means.

  Attributes:
    value: the mean; of several runs, the mean over them.
    images: interval due to the choice of the test images, None if not all predictions are there.
    seeds: interval due to the random seeds, None for a single run.
    runs: number of runs.
  """

  value: float
  images: Interval | None
  seeds: Interval | None
  runs: int

  @property
  def is_significant(self) -> bool:
    """Whether all intervals that there are exclude 0."""
    known = [ends for ends in (self.images, self.seeds) if ends is not None]
    return bool(known) and all(not ends.lower <= 0 <= ends.upper for ends in known)


Items = Sequence[tuple[Task, str]]  # data sets, each with its metric


def average(method: Method, items: Items) -> Average | None:
  """The mean of a method's scores over some data sets, None if one of them is missing.

  Images of each set are resampled with the same draws for all runs; the sets have different draws. A single score of
  a single run keeps the interval of its result.
  """
  if (means := _means(method, items)) is None:
    return None
  if len(means) == len(items) == 1:
    ((task, metric),) = items
    if (found := cell(method.of(task), metric)) is not None and found.interval is not None:
      return Average(found.value, found.interval, None, 1)
  seeds = intervals.student(means) if len(means) > 1 else None
  return Average(float(means.mean()), _over_images(method, None, items), seeds, len(means))


def average_difference(method: Method, baseline: Method, items: Items) -> Average | None:
  """The difference of the means of two methods, None if one of their data sets is missing."""
  own, theirs = _means(method, items), _means(baseline, items)
  if own is None or theirs is None:
    return None
  seeds = intervals.welch(own, theirs).interval if min(len(own), len(theirs)) > 1 else None
  value = float(own.mean() - theirs.mean())
  return Average(value, _over_images(method, baseline, items), seeds, min(len(own), len(theirs)))


def _means(method: Method, items: Items) -> Float[np.ndarray, "runs"] | None:
  """The mean over the data sets of each run that has any of them."""
  runs = [run for run in method.runs if any(task in run for task, _ in items)]
  if (
    not items or not runs or not all(task in run and name in run[task].metrics for run in runs for task, name in items)
  ):
    return None
  return np.array([np.mean([run[task].metrics[name] for task, name in items]) for run in runs], np.float64)


def _over_images(method: Method, baseline: Method | None, items: Items) -> Interval | None:
  values = []
  for place, (task, metric) in enumerate(items):
    found = _joint(method.of(task), baseline.of(task) if baseline else (), metric)
    if found is None:
      return None
    values.append(found.resample((0, place)))
  return intervals.percentiles(np.mean(values, axis=0))


class _Answers(NamedTuple):
  """A metric as a function of what a model answered to each example, as `intervals.bootstrap` takes it.

  Attributes:
    metric: function of the columns, and of how often each example counts.
    columns: answers, one entry per example.
    within: class of each example if classes are resampled one by one.
  """

  metric: Callable[..., np.ndarray]
  columns: tuple[np.ndarray, ...]
  within: np.ndarray | None = None

  def resample(self, seed: int | tuple[int, ...] = 0) -> Float[np.ndarray, "r"]:
    """Values of the metric on resamples of the examples."""
    return intervals.bootstrap(self.metric, *self.columns, within=self.within, seed=seed)


def _joint(own: Sequence[Scored], theirs: Sequence[Scored], metric: str) -> _Answers | None:
  """The mean of a metric over some runs minus that over others, as a function of what all of them answered.

  Args:
    own: runs on the same images.
    theirs: runs to subtract, none for the mean itself.
    metric: name of the metric.

  Returns:
    A function of the images that all runs have; None if the predictions do not determine the metric.

  Raises:
    ValueError: the labels of two runs differ.
  """
  every = [*own, *theirs]
  answers = [found for one in every if (found := _answers(one.predictions, metric, one.details)) is not None]
  if len(answers) < len(every):
    return None
  rows = [one.predictions["row"] for one in every]
  shared = reduce(np.intersect1d, rows)
  places = [np.intersect1d(shared, row, return_indices=True)[2] for row in rows]
  first = every[0]
  for one, place in zip(every[1:], places[1:], strict=True):
    for name in _SEARCHED if "image_of_text" in first.predictions else ():
      if not np.array_equal(first.predictions[name], one.predictions[name]):
        raise ValueError(f"{first.path} and {one.path}: {name} differs, so other images or texts were searched")
    for name in _SAME:
      if name in first.predictions and not np.array_equal(
        first.predictions[name][places[0]], one.predictions[name][place]
      ):
        raise ValueError(f"{first.path} and {one.path}: {name} differs, so they are results of different data")
  columns = tuple(column[place] for found, place in zip(answers, places, strict=True) for column in found.columns)

  def combined(*arguments: np.ndarray) -> np.ndarray:
    *left, times = arguments
    values = []
    for found in answers:
      values.append(found.metric(*left[: len(found.columns)], times))
      left = left[len(found.columns) :]
    mean = np.mean(values[: len(own)], axis=0)
    return mean - np.mean(values[len(own) :], axis=0) if theirs else mean

  within = answers[0].within
  return _Answers(combined, columns, None if within is None else within[places[0]])


_SEARCHED = ("row", "image_of_text")  # predictions of retrieval that do not depend on the model
_SAME = ("label", "labels", "group")  # predictions that do not depend on the model


def _answers(
  predictions: Mapping[str, np.ndarray], metric: str, details: Mapping[str, Any] = MappingProxyType({})
) -> _Answers | None:
  """A metric as a function of predictions and details of a result, None if these do not determine it."""
  if {"image_rank", "text_rank", "image_of_text"} <= set(predictions):
    return _recall_answers(predictions, metric)
  if metric in _CHOICES and "correct" in predictions:
    return _Answers(metrics.accuracy, (predictions["correct"],))
  if f"correct_{metric}" in predictions:
    return _few_shot_answers(predictions["label"], predictions[f"correct_{metric}"], details["metric"])
  try:
    function, columns, within = {**metrics.PREDICTION_METRICS, **metrics.JACCARD_METRICS}[metric]
    return _Answers(function, columns(predictions), predictions[within] if within else None)
  except KeyError:  # another metric, or a column that is not there
    return None


_CHOICES = ("accuracy", "group_score")  # the headline metrics of compositionality, of which the answers are known


def _few_shot_answers(
  label: Int[np.ndarray, "n"], correct: Bool[np.ndarray, "n draws"], metric: str
) -> _Answers | None:
  """The mean over draws of training images of a metric, as a function of the test images."""
  if metric == "top1":
    return _Answers(lambda answers, times: _mean_over_draws(metrics.accuracy, answers, times), (correct,))
  if metric == "mean_per_class":
    return _Answers(
      lambda label, answers, times: _mean_over_draws(partial(metrics.mean_per_class, label), answers, times),
      (label, correct),
      label,
    )
  return None


def _mean_over_draws(
  metric: Callable[..., np.ndarray], correct: Bool[np.ndarray, "n draws"], times: np.ndarray
) -> np.ndarray:
  return np.mean([metric(own, times) for own in correct.T], axis=0)


def _recall_answers(predictions: Mapping[str, np.ndarray], metric: str) -> _Answers | None:
  """A recall as a function of the ranks of an image and of its texts, which are resampled together."""
  way, _, k = metric.rpartition("_r")
  image, text, owner = (predictions[name] for name in ("image_rank", "text_rank", "image_of_text"))
  size = len(image)
  texts = np.bincount(owner, minlength=size)
  if metric in _MEANS:
    counts, hits = (
      sum(np.bincount(whose, weights=rank < k, minlength=size) for k in _MEANS[metric]).astype(np.int64)
      for whose, rank in ((np.arange(size), image), (owner, text))
    )
    return _Answers(partial(_mean_recall, 2 * len(_MEANS[metric])), (counts, hits, texts))
  if way == "image_to_text" and k.isdecimal():
    return _Answers(metrics.accuracy, (image < int(k),))
  if way == "text_to_image" and k.isdecimal():
    return _Answers(
      intervals.ratio, (np.bincount(owner, weights=text < int(k), minlength=size).astype(np.int64), texts)
    )
  return None


# Means of recalls both ways -> at which ranks.
_MEANS = {"mean_recall": RECALL_AT, "mean_r1": (1,)}


def _mean_recall(
  number: int, images: np.ndarray, texts: np.ndarray, trials: np.ndarray, times: np.ndarray
) -> np.ndarray:
  """Mean of a number of recalls, half of them each way, from how many of them each image and each of its texts has."""
  return (intervals.ratio(images, np.ones_like(images), times) + intervals.ratio(texts, trials, times)) / number


def _p_value(values: Float[np.ndarray, "r"], examples: int) -> float:
  """Two-sided p-value of a bootstrapped difference: twice the share of resamples on the rarer side of 0.

  Resamples cannot tell how small p is if none of them is on that side. It is then that of a normal distribution with
  their standard deviation, and at least 2 / 2^n of n examples: of all ways to exchange the answers of two models, the
  most extreme ones are two. Resamples without a value do not count.
  """
  values = values[~np.isnan(values)]
  side = min(float(np.mean(values <= 0)), float(np.mean(values >= 0)))
  if side > 0:
    return min(1.0, 2 * side)
  deviation = float(np.std(values))
  normal = 2 * float(scipy.stats.norm.sf(abs(float(np.mean(values))) / deviation)) if deviation else 0.0
  return min(1.0, max(normal, 2.0 ** (1 - examples)))


def adjusted(differences: Mapping[Any, Difference]) -> Mapping[Any, float]:
  """p-values of several differences, adjusted for their number by Holm's method; those without one are left out."""
  known = {name: found.p for name, found in differences.items() if found.p is not None}
  if not known:
    return {}
  return dict(zip(known, intervals.holm(np.array([*known.values()])).tolist(), strict=True))
