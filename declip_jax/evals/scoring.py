"""The scores of a classifier of the test split, whatever its logits come from: prompts, a probe or neighbours."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Float, Int
import numpy as np

from declip_jax.evals import metrics
from declip_jax.evals.features import EvaluationData
from declip_jax.evals.intervals import Interval, bootstrap, clopper_pearson, percentiles
from declip_jax.evals.metrics import PREDICTION_METRICS, PredictionMetric, Predictions
from declip_jax.evals.results import Scores
from declip_jax.runtime.hosts import gather_rows

# Metrics of single labels, of which a data set with fewer than five classes has no `top5`, and of several labels.
METRICS = ("top1", "top5", "mean_per_class", "majority_share", "ties", "images", "unreadable")
SEVERAL_LABELS = ("mean_average_precision_11", "mean_average_precision")
_CONFUSIONS = 50  # pairs of classes that the details list
_NONE_DIFFICULT = (
  "the labels mark no object as difficult, so mean_average_precision_11 does not leave such objects out, as the rules "
  "of VOC demand; in the labels of CLIP_benchmark, they are present"
)
Columns = Mapping[str, np.ndarray]


def score(
  data: EvaluationData, logits: Float[np.ndarray, "n classes"], details: Mapping[str, Any] | None = None
) -> Scores:
  """Scores of the logits of all test images, the metric of the data set first; every host has to call this.

  Without such a metric, as for sets of faces that are reported by group, accuracies come first.
  Images without a label do not count; a row of NaN is wrong. Predictions have `row` in the source, `label`, `predicted`
  and `rank`, the number of classes that the classifier prefers to the true one; `group` where images have one; of two
  classes, `score`, the logit of the second minus that of the first; of several labels, `labels` and `scores`.
  A score that would be NaN is the infinity that is wrong. `remark` of the details says what is known to be wrong with a
  score.

  Args:
    data: the test split, its metric and the names of its classes.
    logits: scores of the classes for the images of all hosts; -inf for a class that is never answered.
    details: further details.

  Raises:
    ValueError: no image has a label, or the metric is not defined on these labels; the message names the source.
  """
  unreadable = int((~gather_rows(data.test.readable)).sum())
  try:
    names, predictions, counts, own = (_single_label if data.test.labels is None else _several_labels)(data, logits)
    return Scores(
      {name: _value(name, predictions) for name in names} | {**counts, "unreadable": unreadable},
      {name: _interval(name, predictions) for name in names},
      predictions,
      {**(details or {}), **own},
    )
  except ValueError as error:
    raise ValueError(f"{data.test.name}: {error}") from error


def criterion(metric: str) -> Callable[[np.ndarray, np.ndarray], float]:
  """A metric as a function of logits and labels, to choose hyperparameters by.

  It is the accuracy for a metric of groups or of several right answers, which a validation split need not have.
  """

  def value(logits: Float[np.ndarray, "n classes"], label: np.ndarray) -> float:
    if label.ndim == 2:
      name = metric if metric in SEVERAL_LABELS else SEVERAL_LABELS[0]
      return _value(name, {"labels": label, "scores": logits})
    return _value(single_label_criterion(metric), _columns(metrics.predict(logits, label), logits))

  return value


def single_label_criterion(metric: str) -> str:
  """The metric that `criterion` computes of images with one label each, in place of the metric of a data set."""
  return "top1" if metric.startswith("worst_group") or metric not in PREDICTION_METRICS else metric


# Names of metrics, the headline first; predictions; counts; details.
Found = tuple[list[str], dict[str, np.ndarray], dict[str, float], dict[str, Any]]


def _single_label(data: EvaluationData, logits: Float[np.ndarray, "n classes"]) -> Found:
  label = gather_rows(data.test.label)
  rows = _rows(label >= 0)
  logits, label = logits[rows], label[rows]
  found = metrics.predict(logits, label)
  predictions = {"row": rows, **_columns(found, logits)}
  name = _namer(data.classnames)
  details: dict[str, Any] = {
    "accuracy_by_class": [[name(k), value] for k, value in metrics.accuracy_by(label, found.correct()).items()],
    "confusions": [
      [name(own), name(other), n] for own, other, n in metrics.confusions(found.label, found.predicted)[:_CONFUSIONS]
    ],
  }
  for grouping, of in data.test.groups.items():
    group = gather_rows(of)[rows]
    group = np.where(np.isin(group, data.ignored_groups), -1, group).astype(np.int32)
    details[f"accuracy_by_{grouping}"] = metrics.accuracy_by(group, found.correct())
    kinds, number = np.unique(group[group >= 0], return_counts=True)
    details[f"images_by_{grouping}"] = dict(zip(kinds.tolist(), number.tolist(), strict=True))
    if grouping == (data.grouping or next(iter(data.test.groups))):
      predictions["group"] = group
  always = ["top1", *(["top5"] if found.classes >= 5 else []), "mean_per_class"]
  counts = {
    "majority_share": float(np.bincount(label).max() / len(label)),
    "ties": int(found.tied.sum()),
    "images": len(rows),
  }
  return list(dict.fromkeys([*([data.metric] if data.metric else []), *always])), predictions, counts, details


def _several_labels(data: EvaluationData, logits: Float[np.ndarray, "n classes"]) -> Found:
  labels = gather_rows(data.test.labels)
  if labels.shape[1] != logits.shape[1]:
    raise ValueError(f"its images have labels for {labels.shape[1]} classes; expected {logits.shape[1]}")
  used = gather_rows(data.test.readable) & (labels != 0).any(axis=1)
  if data.metric == "any_label":
    rows = _rows(used & (labels > 0).any(axis=1))
    predicted = metrics.predict(logits[rows], np.zeros(len(rows), np.int64)).predicted
    correct = metrics.any_label_correct(labels[rows] > 0, predicted)
    predictions = {"row": rows, "predicted": predicted.astype(_integers(logits.shape[1])), "correct": correct}
    return ["any_label"], predictions, {"images": len(rows)}, {}
  rows, name = _rows(used), _namer(data.classnames)
  scores = metrics.worst_if_nan(labels[rows] > 0, logits[rows]).astype(np.float32)
  predictions = {"row": rows, "labels": labels[rows], "scores": scores}
  by_class = metrics.average_precision_by_class(labels[rows], predictions["scores"])
  details: dict[str, Any] = {
    "average_precision_by_class": [[name(index), float(value)] for index, value in by_class.items()]
  }
  if data.has_difficult and labels[rows].all():
    details["remark"] = _NONE_DIFFICULT
  headline = [data.metric] if data.metric in SEVERAL_LABELS else []
  return list(dict.fromkeys([*headline, *SEVERAL_LABELS])), predictions, {"images": len(rows)}, details


def _columns(found: Predictions, logits: Float[np.ndarray, "n classes"]) -> dict[str, np.ndarray]:
  """The predictions, without rows."""
  integers = _integers(found.classes)
  columns = {
    "label": found.label.astype(integers),
    "predicted": found.predicted.astype(integers),
    "rank": np.minimum(found.rank, np.iinfo(integers).max).astype(integers),
  }
  if found.classes == 2:
    difference = logits[:, 1].astype(np.float64) - logits[:, 0]
    columns["score"] = metrics.worst_if_nan(found.label == 1, difference).astype(np.float32)
  return columns


def _integers(classes: int) -> type[np.integer]:
  """The type of predictions: int16, as long as it can number the classes."""
  return np.int16 if classes <= np.iinfo(np.int16).max else np.int32


def _value(name: str, predictions: Columns) -> float:
  return float(_metric(name).function(*_columns_of(name, predictions)))


def _interval(name: str, predictions: Columns) -> Interval:
  """The 95 % interval of a metric: Clopper and Pearson's if it is a share of the examples, else by a bootstrap."""
  function, _, within = _metric(name)
  columns = _columns_of(name, predictions)
  if function is metrics.accuracy:
    return clopper_pearson(int(columns[0].sum()), len(columns[0]))
  return percentiles(bootstrap(function, *columns, within=predictions[within] if within else None))


def _metric(name: str) -> PredictionMetric:
  if name not in PREDICTION_METRICS:
    raise ValueError(f"metric {name!r} is not one of a classifier, {', '.join(PREDICTION_METRICS)}")
  return PREDICTION_METRICS[name]


def _columns_of(name: str, predictions: Columns) -> tuple[np.ndarray, ...]:
  try:
    return _metric(name).columns(predictions)
  except KeyError as error:
    raise ValueError(f"metric {name!r} is not defined: there is no {error} of the images") from error


def _rows(used: np.ndarray) -> Int[np.ndarray, "m"]:
  if not used.any():
    raise ValueError("no readable image has a class label")
  return np.flatnonzero(used).astype(np.int32)


def _namer(classnames: Sequence[str]) -> Callable[[int], str]:
  return lambda index: classnames[index] if index < len(classnames) else str(index)
