"""Results of several methods side by side: their scores, and which differences are larger than chance explains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
import re
from typing import Any, NamedTuple

from jaxtyping import Float
import numpy as np

from declip_jax.evals import intervals, metrics, results
from declip_jax.evals.intervals import Interval
from declip_jax.evals.ranks import RECALL_AT
from declip_jax.evals.results import Result

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
  def details(self) -> Mapping[str, Any]:
    """Details of the evaluator."""
    return self.result.ours["details"]

  @property
  def key(self) -> str:
    """Key of the data set in the catalogue, an empty text without one."""
    return self.result.ours.get("about", {}).get("key", "")

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


def read_methods(folders: Sequence[Path]) -> list[Method]:
  """Reads all results in some folders.

  Models whose names differ only in a final number, as clip-0 and clip-1, are seeds of one method. Several checkpoints
  of a run are methods of their own.

  Args:
    folders: folders of results, or working directories with a folder `results`.

  Raises:
    FileNotFoundError: a folder has no result.
  """
  runs: dict[tuple[str, str], dict[Task, Scored]] = {}
  for folder in folders:
    inner = folder / "results"
    found = results.read_all([inner if inner.is_dir() else folder])
    if not found:
      raise FileNotFoundError(f"{folder}: no result of declip_jax.evaluate in it")
    for path, result in found:
      task = Task(result.dataset, result.ours["kind"], result.ours.get("variant", ""))
      runs.setdefault((result.model, result.pretrained), {})[task] = Scored(path, result)
  return [Method(label, tuple(own)) for label, own in _by_label(runs).items()]


def _by_label(runs: Mapping[tuple[str, str], dict[Task, Scored]]) -> dict[str, list[dict[Task, Scored]]]:
  """Runs by the label of their method; that of one of several checkpoints of a model names the checkpoint."""
  models = [model for model, _ in runs]
  found: dict[str, list[dict[Task, Scored]]] = {}
  for (model, pretrained), own in runs.items():
    seeds = re.sub(r"-\d+$", "", model)
    label = f"{model} {pretrained}" if models.count(model) > 1 else seeds
    found.setdefault(label, []).append(own)
  single = {label: runs for label, runs in found.items() if len(runs) == 1}
  full = {label: model for (model, _), own in runs.items() for label, (only,) in single.items() if only is own}
  return {full[label] if label in full and " " not in label else label: own for label, own in found.items()}


def tasks(methods: Sequence[Method]) -> list[Task]:
  """All tasks that any method has a result of, by evaluator and then by data set."""
  found = {task for method in methods for run in method.runs for task in run}
  kinds = [*dict.fromkeys([*ORDER, *sorted(task.kind for task in found)])]
  return sorted(found, key=lambda task: (kinds.index(task.kind), task.dataset, task.variant))


def cell(scored: Sequence[Scored], metric: str) -> Cell | None:
  """The score of a method by a metric, None if none of its runs has it."""
  having = [one for one in scored if metric in one.metrics]
  if not having:
    return None
  if len(having) == 1:
    return Cell(float(having[0].metrics[metric]), having[0].interval(metric), 1)
  values = np.array([one.metrics[metric] for one in having], np.float64)
  return Cell(float(values.mean()), intervals.student(values), len(values))


def difference(scored: Sequence[Scored], baseline: Sequence[Scored], metric: str) -> Difference | None:
  """Compares a method with the baseline by a metric, None if one of the two does not have it.

  One run each is compared on the same images, by a bootstrap of pairs, and by McNemar's exact test if the metric is a
  share of the images; several runs each are compared by Welch's test over seeds.

  Raises:
    ValueError: the two have been evaluated on different data; the message names their files.
  """
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
  pairs = _paired(scored[0], baseline[0], metric)
  if pairs is None:
    return plain
  once, values = np.ones((1, len(pairs.columns[0])), np.int64), pairs.resample()
  single = _answers(scored[0].predictions, metric)
  exact = single is not None and single.metric is metrics.accuracy
  p = intervals.mcnemar(*pairs.columns) if exact else _p_value(values)
  return Difference(float(pairs.metric(*pairs.columns, once)[0]), intervals.percentiles(values), p, "paired")


def suite_means(
  methods: Sequence[Method], keys: Sequence[str], kind: str, metric: Callable[[str], str | None]
) -> list[Cell | None]:
  """The mean of a method's scores over the data sets of a suite, None where one of them is missing.

  The interval of one run is that of the mean over resampled images of every set; that of several runs is over seeds.

  Args:
    methods: the methods.
    keys: keys of the data sets in the catalogue.
    kind: evaluator.
    metric: function from a key to the metric of the suite, None for data without a single score.
  """
  return [_suite_mean(method, keys, kind, metric) for method in methods]


def _suite_mean(method: Method, keys: Sequence[str], kind: str, metric: Callable[[str], str | None]) -> Cell | None:
  means, resampled = [], []
  for run in method.runs:
    own = {scored.key: scored for task, scored in run.items() if task.kind == kind and not task.variant}
    names = {key: metric(key) or (own[key].headline if key in own else "") for key in keys}
    if not all(key in own and names[key] in own[key].metrics for key in keys):
      return None
    means.append(float(np.mean([own[key].metrics[names[key]] for key in keys])))
    resampled.append([_resample(own[key], names[key], seed=(0, index)) for index, key in enumerate(keys)])
  if len(means) > 1:
    return Cell(float(np.mean(means)), intervals.student(np.array(means)), len(means))
  known = [values for values in resampled[0] if values is not None]
  interval = intervals.percentiles(np.mean(known, axis=0)) if len(known) == len(keys) else None
  return Cell(means[0], interval, 1)


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


def _resample(scored: Scored, metric: str, seed: int | tuple[int, ...]) -> Float[np.ndarray, "r"] | None:
  """Resampled values of a metric, None if the predictions do not determine it."""
  found = _answers(scored.predictions, metric)
  return None if found is None else found.resample(seed)


def _paired(a: Scored, b: Scored, metric: str) -> _Answers | None:
  """The difference of a metric as a function of both models' answers, None if these do not determine it.

  Raises:
    ValueError: the labels of the two differ.
  """
  own, theirs = _answers(a.predictions, metric), _answers(b.predictions, metric)
  if own is None or theirs is None:
    return None
  _, first, second = np.intersect1d(a.predictions["row"], b.predictions["row"], return_indices=True)
  for name in _SAME:
    if name in a.predictions and not np.array_equal(a.predictions[name][first], b.predictions[name][second]):
      raise ValueError(f"{a.path} and {b.path}: {name} differs, so they are results of different data")
  split = len(own.columns)
  columns = (*(column[first] for column in own.columns), *(column[second] for column in theirs.columns))

  def minus(*arguments: np.ndarray) -> np.ndarray:
    *both, times = arguments
    return own.metric(*both[:split], times) - own.metric(*both[split:], times)

  return _Answers(minus, columns, None if own.within is None else own.within[first])


_SAME = ("label", "labels", "group")  # predictions that do not depend on the model


def _answers(predictions: Mapping[str, np.ndarray], metric: str) -> _Answers | None:
  """A metric as a function of predictions, None if these do not determine it."""
  if {"image_rank", "text_rank", "image_of_text"} <= set(predictions):
    return _recall_answers(predictions, metric)
  try:
    function, columns, within = metrics.PREDICTION_METRICS[metric]
    return _Answers(function, columns(predictions), predictions[within] if within else None)
  except KeyError:  # another metric, or a column that is not there
    return None


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


def _p_value(values: Float[np.ndarray, "r"]) -> float:
  """Two-sided p-value of a bootstrapped difference: twice the share of resamples on the rarer side of 0."""
  side = min(float(np.mean(values <= 0)), float(np.mean(values >= 0)))
  return min(1.0, 2 * max(side, 1 / len(values)))


def adjusted(differences: Mapping[Any, Difference]) -> Mapping[Any, float]:
  """p-values of several differences, adjusted for their number by Holm's method; those without one are left out."""
  known = {name: found.p for name, found in differences.items() if found.p is not None}
  if not known:
    return {}
  return dict(zip(known, intervals.holm(np.array([*known.values()])).tolist(), strict=True))
