"""Scores of classifiers, with the metric of each data set, intervals, and the predictions that comparisons need.

`METRICS` has every metric of a classification task as a function of stored predictions, so that all of them are
resampled and compared in the same way: `resample` for the interval of one model, `resample_difference` for two models
on the same examples. Values of several data sets are averaged before `intervals.percentiles` is taken.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
import numpy as np

from declip_jax.evals import metrics
from declip_jax.evals.intervals import Interval, bootstrap, clopper_pearson, percentiles
from declip_jax.evals.results import Scores

Predictions = Mapping[str, np.ndarray]
_CONFUSIONS = 50  # pairs of classes that the details list


class Metric(NamedTuple):
  """A metric as a function of predictions.

  Attributes:
    function: a function of columns, and of the times that each example counts; see `metrics`.
    columns: names of these columns.
    within: the column whose classes keep their number of examples in every resample; empty for none.
  """

  function: Callable[..., Float[np.ndarray, "*r"]]
  columns: tuple[str, ...]
  within: str = ""

  @property
  def is_proportion(self) -> bool:
    """Whether it is a share of the examples, whose interval is exact."""
    return self.function is metrics.accuracy


def _mean_top1_top5(top1: np.ndarray, top5: np.ndarray, times: metrics.Times = None) -> np.ndarray:
  return np.asarray((metrics.accuracy(top1, times) + metrics.accuracy(top5, times)) / 2)


def _roc_auc(label: np.ndarray, score: np.ndarray, times: metrics.Times = None) -> np.ndarray:
  return metrics.roc_auc(label == 1, score, times)


def _average_precision(labels: np.ndarray, scores: np.ndarray, times: metrics.Times = None) -> np.ndarray:
  present = np.where(labels == 0, 1, labels)  # difficult objects
  return metrics.mean_average_precision(present, scores, metrics.average_precision, times)


def _average_precision_11(labels: np.ndarray, scores: np.ndarray, times: metrics.Times = None) -> np.ndarray:
  return metrics.mean_average_precision(labels, scores, metrics.average_precision_11, times)


# Name of a metric -> what it is. Columns: `label`, `predicted` and `group` of each example; `top1` and `top5`, whether
# its label is among the first answers; `any_label`, whether the first answer is one of its labels; of two classes,
# `score`, the logit of the second minus that of the first; of several labels, `labels` (1 present, 0 difficult, -1
# absent) and `scores` of all classes.
METRICS = {
  "top1": Metric(metrics.accuracy, ("top1",)),
  "top5": Metric(metrics.accuracy, ("top5",)),
  "any_label": Metric(metrics.accuracy, ("any_label",)),
  "mean_per_class": Metric(metrics.mean_per_class, ("label", "top1"), within="label"),
  "mean_top1_top5": Metric(_mean_top1_top5, ("top1", "top5")),
  "macro_f1": Metric(metrics.macro_f1, ("label", "predicted")),
  "worst_group": Metric(metrics.worst_group, ("group", "top1")),
  "worst_group_top5": Metric(metrics.worst_group, ("group", "top5")),
  "roc_auc": Metric(_roc_auc, ("label", "score")),
  "mean_average_precision_11": Metric(_average_precision_11, ("labels", "scores")),
  "mean_average_precision": Metric(_average_precision, ("labels", "scores")),
}
_ALWAYS = ("top1", "top5", "mean_per_class", "mean_average_precision_11", "mean_average_precision")


def evaluate(name: str, predictions: Predictions) -> float:
  """The value of a metric of `METRICS`.

  Raises:
    ValueError: there is no such metric, or the predictions lack one of its columns; or see `metrics`.
  """
  return float(_metric(name).function(*_columns(name, predictions)))


def resample(name: str, predictions: Predictions, seed: int | tuple[int, ...] = 0) -> Float[np.ndarray, "r"]:
  """The values of a metric on resamples of the examples, see `intervals.bootstrap`."""
  within = _metric(name).within
  stratum = predictions[within] if within else None
  return bootstrap(_metric(name).function, *_columns(name, predictions), within=stratum, seed=seed)


def interval(name: str, predictions: Predictions) -> Interval:
  """The 95 % interval of a metric: Clopper and Pearson's of a share of the examples, else by a bootstrap."""
  columns = _columns(name, predictions)
  if _metric(name).is_proportion:
    return clopper_pearson(int(columns[0].sum()), len(columns[0]))
  return percentiles(resample(name, predictions))


def resample_difference(
  name: str, a: Predictions, b: Predictions, seed: int | tuple[int, ...] = 0
) -> Float[np.ndarray, "r"]:
  """The differences of a metric, that of A minus that of B, on resamples of the same examples.

  Raises:
    ValueError: the examples or their labels are not the same.
  """
  for column in {"row", "label", "labels", "group"} & {*a, *b}:
    if not np.array_equal(a.get(column, ()), b.get(column, ())):
      raise ValueError(f"the predictions differ in {column!r}: two models are compared on the same examples")
  metric, number = _metric(name), len(_metric(name).columns)

  def difference(*columns: np.ndarray) -> Float[np.ndarray, "r"]:
    *both, times = columns
    return metric.function(*both[:number], times) - metric.function(*both[number:], times)

  within = a[metric.within] if metric.within else None
  return bootstrap(difference, *_columns(name, a), *_columns(name, b), within=within, seed=seed)


def single_label_scores(
  logits: Float[np.ndarray, "n classes"],
  label: Int[np.ndarray, "n"],
  *,
  metric: str = "top1",
  group: Int[np.ndarray, "n"] | None = None,
  row: Int[np.ndarray, "n"] | None = None,
) -> Scores:
  """Scores of a classifier of examples with one label each.

  Top-1, top-5 and mean per class follow the headline; details have the accuracy of each class and the most frequent
  confusions.

  Args:
    logits, label: of the labelled examples.
    metric: the headline, one of `METRICS`.
    group: group of each example, -1 for one that does not count; needed by metrics of groups.
    row: row of each example in its source.

  Raises:
    ValueError: see `metrics.predict` and `evaluate`.
  """
  found = metrics.predict(logits, label)
  columns = {"label": label, "predicted": found.predicted, "top1": found.correct()}
  if found.classes >= 5:
    columns["top5"] = found.correct(5)
  if found.classes == 2:
    columns["score"] = logits[:, 1] - logits[:, 0]
  if group is not None:
    columns["group"] = group
  counts = {
    "majority_share": float(np.bincount(label).max() / len(label)),
    "ties": int(found.tied.sum()),
    "images": len(label),
  }
  details = {
    "accuracy_by_class": metrics.accuracy_by(label, found.correct()),
    "confusions": metrics.confusions(found)[:_CONFUSIONS],
  }
  if group is not None:
    details["accuracy_by_group"] = metrics.accuracy_by(group, found.correct())
  return _scores(metric, columns, counts, details, row)


def several_labels_scores(
  scores: Float[np.ndarray, "n classes"],
  labels: Int[np.ndarray, "n classes"],
  *,
  metric: str = "mean_average_precision_11",
  row: Int[np.ndarray, "n"] | None = None,
) -> Scores:
  """Scores of a classifier of examples with several labels each (VOC 2007).

  Args:
    scores: those of the classes; CLIP's are probabilities, which are comparable between images (openai/CLIP#153).
    labels: 1 where a class is present, 0 where it is difficult, -1 where it is absent.
    metric: the headline, one of the two mean average precisions.
    row: row of each example in its source.

  Raises:
    ValueError: see `metrics.mean_average_precision`.
  """
  found = metrics.average_precision_by_class(labels, scores)
  details = {"average_precision_by_class": {index: float(value) for index, value in found.items()}}
  return _scores(metric, {"labels": labels, "scores": scores}, {"images": len(labels)}, details, row)


def any_label_scores(
  logits: Float[np.ndarray, "n classes"],
  labels: Bool[np.ndarray, "n classes"],
  *,
  row: Int[np.ndarray, "n"] | None = None,
) -> Scores:
  """Scores of a classifier whose answer may be any of the labels (ImageNet-ReaL, Beyer et al. 2020, section 3).

  Examples without a label are left out.

  Args:
    logits, labels: of the examples.
    row: row of each example in its source.

  Raises:
    ValueError: no example has a label.
  """
  used = labels.any(axis=1)
  predicted, _ = metrics.answers(logits[used])
  right = (predicted >= 0) & labels[used][np.arange(len(predicted)), predicted]
  columns = {"predicted": predicted, "any_label": right}
  return _scores("any_label", columns, {"images": len(right)}, {}, None if row is None else row[used])


def _metric(name: str) -> Metric:
  if name not in METRICS:
    raise ValueError(f"metric {name!r}: choose one of {sorted(METRICS)}")
  return METRICS[name]


def _columns(name: str, predictions: Predictions) -> list[np.ndarray]:
  if missing := [column for column in _metric(name).columns if column not in predictions]:
    raise ValueError(f"metric {name!r} needs the columns {missing}; there are {sorted(predictions)}")
  return [predictions[column] for column in _metric(name).columns]


def _scores(
  headline: str,
  columns: Predictions,
  counts: Mapping[str, float],
  details: Mapping[str, Any],
  row: Int[np.ndarray, "n"] | None,
) -> Scores:
  names = [headline, *(name for name in _ALWAYS if name != headline and {*METRICS[name].columns} <= {*columns})]
  stored = {name: _small(column) for name, column in columns.items()}
  return Scores(
    metrics={**{name: evaluate(name, stored) for name in names}, **counts},
    intervals={name: interval(name, stored) for name in names},
    predictions=stored if row is None else {"row": row, **stored},
    details=details,
  )


def _small(column: np.ndarray) -> np.ndarray:
  """A column in float32, in a type of at most 32 bits, or in that which it has."""
  if column.dtype.kind == "f":
    return column.astype(np.float32)
  if column.dtype.kind == "i" and column.itemsize > 2:
    return column.astype(np.int16 if np.abs(column).max() < 2**15 else np.int32)
  return column
