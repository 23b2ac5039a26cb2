"""Metrics of stored predictions: intervals of one classifier, and differences of two on the same examples.

The predictions of a classifier are columns with one row per example: `row` in its source, `label`, `predicted`, and
`rank`, the number of classes that the classifier prefers to the true one. Some metrics need others: `group`; of two
classes, `score`, the logit of the second minus that of the first; of several labels, `labels` (1 present, 0 difficult,
-1 absent) and `scores` of all classes.

Values of several data sets, resampled with different seeds, are averaged before `intervals.percentiles` is taken.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxtyping import Float
import numpy as np

from declip_jax.evals import metrics
from declip_jax.evals.intervals import Interval, bootstrap, clopper_pearson, percentiles
from declip_jax.evals.metrics import Times

Predictions = Mapping[str, np.ndarray]
_SAME = ("row", "label", "labels", "group")  # columns that do not depend on the classifier


class Metric(NamedTuple):
  """A metric of predictions.

  Attributes:
    function: a function of columns, and of the times that each example counts; see `metrics`.
    columns: makes these columns of the predictions.
    within: the column whose classes keep their number of examples in every resample; empty for none.
  """

  function: Callable[..., Float[np.ndarray, "*r"]]
  columns: Callable[[Predictions], tuple[np.ndarray, ...]]
  within: str = ""


def _mean_top1_top5(top1: np.ndarray, top5: np.ndarray, times: Times = None) -> np.ndarray:
  return np.asarray((metrics.accuracy(top1, times) + metrics.accuracy(top5, times)) / 2)


def _average_precision(labels: np.ndarray, scores: np.ndarray, times: Times = None) -> np.ndarray:
  return metrics.mean_average_precision(labels, scores, metrics.average_precision, times)


def _top(k: int) -> Callable[[Predictions], np.ndarray]:
  return lambda predictions: predictions["rank"] < k


_top1, _top5 = _top(1), _top(5)
# Name of a metric, as in `catalogue.METRICS`.
METRICS = {
  "top1": Metric(metrics.accuracy, lambda p: (_top1(p),)),
  "top5": Metric(metrics.accuracy, lambda p: (_top5(p),)),
  "mean_per_class": Metric(metrics.mean_per_class, lambda p: (p["label"], _top1(p)), within="label"),
  "mean_top1_top5": Metric(_mean_top1_top5, lambda p: (_top1(p), _top5(p))),
  "macro_f1": Metric(metrics.macro_f1, lambda p: (p["label"], p["predicted"])),
  "worst_group": Metric(metrics.worst_group, lambda p: (p["group"], _top1(p))),
  "worst_group_top5": Metric(metrics.worst_group, lambda p: (p["group"], _top5(p))),
  "roc_auc": Metric(metrics.roc_auc, lambda p: (p["label"] == 1, p["score"])),
  "mean_average_precision_11": Metric(metrics.mean_average_precision, lambda p: (p["labels"], p["scores"])),
  # Difficult objects count as present, as in CLIP_benchmark.
  "mean_average_precision": Metric(_average_precision, lambda p: (np.where(p["labels"] < 0, -1, 1), p["scores"])),
}


def evaluate(name: str, predictions: Predictions) -> float:
  """The value of a metric.

  Raises:
    ValueError: there is no such metric, or the predictions lack a column that it needs; or see `metrics`.
  """
  return float(_metric(name).function(*_columns(name, predictions)))


def resample(name: str, predictions: Predictions, seed: int | tuple[int, ...] = 0) -> Float[np.ndarray, "r"]:
  """The values of a metric on resamples of the examples, see `intervals.bootstrap`.

  Raises:
    ValueError: see `evaluate`.
  """
  columns, within = _columns(name, predictions), _metric(name).within
  return bootstrap(_metric(name).function, *columns, within=predictions[within] if within else None, seed=seed)


def interval(name: str, predictions: Predictions) -> Interval:
  """The 95 % interval of a metric: Clopper and Pearson's if it is a share of the examples, else by a bootstrap.

  Raises:
    ValueError: see `evaluate`.
  """
  if _metric(name).function is metrics.accuracy:
    (correct,) = _columns(name, predictions)
    return clopper_pearson(int(correct.sum()), len(correct))
  return percentiles(resample(name, predictions))


def resample_difference(
  name: str, a: Predictions, b: Predictions, seed: int | tuple[int, ...] = 0
) -> Float[np.ndarray, "r"]:
  """The differences of a metric, that of A minus that of B, on resamples of the same examples.

  Raises:
    ValueError: the examples or their labels are not the same; or see `evaluate`.
  """
  for column in _SAME:
    if not np.array_equal(a.get(column, ()), b.get(column, ())):
      raise ValueError(f"the predictions differ in {column!r}: two models are compared on the same examples")
  metric, columns = _metric(name), _columns(name, a)

  def difference(*both: np.ndarray) -> Float[np.ndarray, "r"]:
    first, second, times = both[: len(columns)], both[len(columns) : -1], both[-1]
    return metric.function(*first, times) - metric.function(*second, times)

  within = a[metric.within] if metric.within else None
  return bootstrap(difference, *columns, *_columns(name, b), within=within, seed=seed)


def _metric(name: str) -> Metric:
  if name not in METRICS:
    raise ValueError(f"metric {name!r}: choose one of {sorted(METRICS)}")
  return METRICS[name]


def _columns(name: str, predictions: Predictions) -> tuple[np.ndarray, ...]:
  try:
    return _metric(name).columns(predictions)
  except KeyError as error:
    raise ValueError(f"metric {name!r} needs the column {error}; there are {sorted(predictions)}") from error
