"""Metrics of evaluations, as pure functions of arrays, in float64.

A metric of `n` examples takes columns of length `n` and returns an array without dimensions. Its argument after them,
`times` `[... n]`, says how often each example counts, by default once; with one row per resample it returns one value
per resample, which is how `intervals.bootstrap` calls it. In a resample without an example that the metric needs, the
value is NaN.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Bool, Float, Int, Num, Shaped
import numpy as np
from scipy import sparse

_RECALLS = np.linspace(0, 1, 11) - 1e-12  # of VOC 2007; the slack keeps 0.3 <= 3 / 10
Times = Int[np.ndarray, "*r n"] | None


@dataclass(frozen=True)
class Predictions:
  """The answers of a classifier.

  Attributes:
    label: true class of each example.
    predicted: class with the largest logit, of equal ones the first; -1 if all logits are NaN.
    rank: number of classes that the classifier prefers to the true one; that of all classes if its logit is NaN.
    tied: whether several classes share the largest logit.
    classes: number of classes of the classifier.
  """

  label: Int[np.ndarray, "n"]
  predicted: Int[np.ndarray, "n"]
  rank: Int[np.ndarray, "n"]
  tied: Bool[np.ndarray, "n"]
  classes: int

  def correct(self, k: int = 1) -> Bool[np.ndarray, "n"]:
    """Whether the true class is among the first `k` answers."""
    return self.rank < k


def predict(logits: Float[np.ndarray, "n classes"], label: Int[np.ndarray, "n"]) -> Predictions:
  """Ranks the classes of each example; of equal logits the lower class comes first, and NaN comes last.

  Raises:
    ValueError: there is no example, or a label is not a class.
  """
  classes = logits.shape[1]
  if not label.size:
    raise ValueError("no example has a label")
  if wrong := sorted({*label.tolist()} - {*range(classes)}):
    raise ValueError(f"label {wrong[0]}: expected one of the {classes} classes 0 to {classes - 1}")
  own = np.take_along_axis(logits, label[:, None], axis=1)
  before = (logits > own) | ((logits == own) & (np.arange(classes) < label[:, None]))
  best = np.fmax.reduce(logits, axis=1, keepdims=True)
  first = logits == best
  return Predictions(
    label=label,
    predicted=np.where(np.isnan(best[:, 0]), -1, first.argmax(axis=1)),
    rank=np.where(np.isnan(own[:, 0]), classes, before.sum(axis=1)),
    tied=first.sum(axis=1) > 1,
    classes=classes,
  )


def merge_classes(logits: Float[np.ndarray, "n classes"], ids: Sequence[Sequence[int]]) -> Float[np.ndarray, "n k"]:
  """The largest logit of the classes that make up each new class (ObjectNet, Barbu et al. 2019).

  With one class each, it restricts a classifier to some of its classes (ImageNet-A and -R).

  Args:
    logits: those of the classes of the classifier.
    ids: the classes of the classifier that make up each new class; a new class without any is never predicted.
  """
  merged = np.full((len(logits), len(ids)), -np.inf, logits.dtype)
  for new, own in enumerate(ids):
    merged[:, new] = logits[:, list(own)].max(axis=1, initial=-np.inf)
  return merged


def accuracy(correct: Bool[np.ndarray, "n"], times: Times = None) -> Float[np.ndarray, "*r"]:
  """Share of the examples that are correct."""
  times = _once(correct, times)
  return np.asarray((times @ correct) / times.sum(axis=-1))


def mean_of(
  values: Float[np.ndarray, "n"], counted: Bool[np.ndarray, "n"], times: Times = None
) -> Float[np.ndarray, "*r"]:
  """Mean of the values of those examples that are counted."""
  times = _once(values, times)
  with np.errstate(invalid="ignore"):
    return np.asarray((times @ (values * counted)) / (times @ counted))


def mean_per_class(
  label: Int[np.ndarray, "n"], correct: Bool[np.ndarray, "n"], times: Times = None
) -> Float[np.ndarray, "*r"]:
  """Mean, over the classes that occur among the labels, of the share that is correct.

  SLIP's script divides by zero for a class that is predicted but does not occur.
  """
  hits, totals = _by_category(label, correct, times)
  present = totals > 0
  return np.asarray((hits / np.maximum(totals, 1)).sum(axis=-1) / present.sum(axis=-1))


def accuracy_by(category: Int[np.ndarray, "n"], correct: Bool[np.ndarray, "n"]) -> dict[int, float]:
  """Share of the examples of each category, a class or a group, that is correct; those of category -1 do not count."""
  hits, totals = _by_category(category, correct, None)
  return {int(index): float(hits[index] / totals[index]) for index in np.flatnonzero(totals)}


def worst_group(
  group: Int[np.ndarray, "n"], correct: Bool[np.ndarray, "n"], times: Times = None
) -> Float[np.ndarray, "*r"]:
  """The lowest share that is correct, of the groups that have examples; those of group -1 do not count.

  Raises:
    ValueError: no example has a group.
  """
  if not (group >= 0).any():
    raise ValueError("no example has a group")
  hits, totals = _by_category(group, correct, times)
  worst = np.where(totals > 0, hits / np.maximum(totals, 1), np.inf).min(axis=-1)
  return np.asarray(np.where(np.isinf(worst), np.nan, worst))


def macro_f1(
  label: Int[np.ndarray, "n"], predicted: Int[np.ndarray, "n"], times: Times = None
) -> Float[np.ndarray, "*r"]:
  """Mean, over the classes that occur among the labels, of the harmonic mean of precision and recall (WILDS)."""
  classes = 1 + int(max(label.max(), predicted.max()))
  times = _once(label, times)
  hits, totals = _by_category(label, label == predicted, times, classes)
  answered = _sums(predicted, times, classes)
  f1 = 2 * hits / np.maximum(totals + answered, 1)
  return np.asarray(f1.sum(axis=-1) / (totals > 0).sum(axis=-1))


def confusions(label: Int[np.ndarray, "n"], predicted: Int[np.ndarray, "n"]) -> list[tuple[int, int, int]]:
  """Pairs of a true class and the class predicted instead, with their number, the most frequent first.

  Examples without a prediction, -1, are left out; pairs of equal number are in the order of their classes.
  """
  wrong = (predicted != label) & (predicted >= 0)
  pairs = np.stack([label[wrong], predicted[wrong]], axis=1)
  found, number = np.unique(pairs, axis=0, return_counts=True)
  order = np.argsort(-number, kind="stable")
  return [(int(true), int(other), int(n)) for (true, other), n in zip(found[order], number[order], strict=True)]


def any_label_correct(labels: Bool[np.ndarray, "n classes"], predicted: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
  """Whether the prediction is any of the labels (ImageNet-ReaL, Beyer et al. 2020, section 3); -1 is wrong.

  Leave out examples without a label: none of their predictions is right.
  """
  return labels[np.arange(len(labels)), predicted] & (predicted >= 0)


def roc_auc(
  present: Bool[np.ndarray, "n"], score: Float[np.ndarray, "n"], times: Times = None
) -> Float[np.ndarray, "*r"]:
  """Share of the pairs of a positive and a negative in which the positive has the larger score; ties count half.

  Raises:
    ValueError: all examples are positive, or all are negative.
  """
  if present.all() or not present.any():
    raise ValueError(f"all {len(present)} examples are {'positive' if present.all() else 'negative'}")
  times = _once(present, times)
  level = np.unique(worst_if_nan(present, score), return_inverse=True)[1]
  positives, negatives = _sums(level, times * present), _sums(level, times * ~present)
  lower = np.cumsum(negatives, axis=-1) - negatives
  with np.errstate(invalid="ignore"):
    return np.asarray(
      (positives * (lower + negatives / 2)).sum(axis=-1) / (positives.sum(axis=-1) * negatives.sum(axis=-1))
    )


def average_precision(
  present: Bool[np.ndarray, "n"], score: Float[np.ndarray, "n"], times: Times = None
) -> Float[np.ndarray, "*r"]:
  """Mean, over the positives, of the precision among the examples whose score is at least as large.

  CLIP_benchmark orders equal scores arbitrarily instead.

  Raises:
    ValueError: no example is positive.
  """
  times, positives, precision = _precisions(present, score, times, together=True)
  with np.errstate(invalid="ignore"):
    return np.asarray((precision * times).sum(axis=-1) / positives[..., -1])


def average_precision_11(
  present: Bool[np.ndarray, "n"], score: Float[np.ndarray, "n"], times: Times = None
) -> Float[np.ndarray, "*r"]:
  """Mean of the largest precision at a recall of at least 0, 0.1, ..., 1 (VOC 2007, Everingham et al. 2010, 4.2).

  Examples of equal score keep their order.

  Raises:
    ValueError: no example is positive.
  """
  _, positives, precision = _precisions(present, score, times, together=False)
  with np.errstate(invalid="ignore"):
    recalls = positives / positives[..., -1:]
  best = [np.where(recalls >= least, precision, 0).max(axis=-1) for least in _RECALLS]
  return np.asarray(np.where(positives[..., -1] > 0, np.mean(best, axis=0), np.nan))


def worst_if_nan(present: Bool[np.ndarray, "*n"], score: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
  """Scores in float64; NaN becomes the score that is wrong."""
  return np.where(np.isnan(score), np.where(present, -np.inf, np.inf), score.astype(np.float64))


AveragePrecision = Callable[..., Float[np.ndarray, "*r"]]


def average_precision_by_class(
  labels: Int[np.ndarray, "n classes"],
  scores: Float[np.ndarray, "n classes"],
  times: Times = None,
  average: AveragePrecision = average_precision_11,
) -> dict[int, Float[np.ndarray, "*r"]]:
  """Average precision of each class that has a positive.

  Args:
    labels: 1 where the class is present, -1 where it is absent, and 0 where it is difficult: the example is then left
      out of the ranking of this class, as VOC's rules say. CLIP_benchmark counts difficult ones as present.
    scores: scores of the classes. CLIP's are those after a softmax over the classes.
    times: see above.
    average: `average_precision_11` or `average_precision`.
  """
  times = _once(labels, times)
  found = {}
  for index in np.flatnonzero((labels > 0).any(axis=0)):
    kept = labels[:, index] != 0
    found[int(index)] = average(labels[kept, index] > 0, scores[kept, index], times[..., kept])
  return found


def mean_average_precision(
  labels: Int[np.ndarray, "n classes"],
  scores: Float[np.ndarray, "n classes"],
  times: Times = None,
  average: AveragePrecision = average_precision_11,
) -> Float[np.ndarray, "*r"]:
  """Mean of the average precision over the classes that have a positive; see `average_precision_by_class`.

  Raises:
    ValueError: no class has a positive.
  """
  found = average_precision_by_class(labels, scores, times, average)
  if not found:
    raise ValueError(f"none of {labels.shape[1]} classes has a positive example")
  values = np.stack([*found.values()])
  defined = (~np.isnan(values)).sum(axis=0)
  return np.asarray(np.where(defined > 0, np.nansum(values, axis=0) / np.maximum(defined, 1), np.nan))


class PredictionMetric(NamedTuple):
  """A metric of stored predictions.

  Attributes:
    function: a function of columns, and of the times that each example counts.
    columns: makes these columns of the predictions; raises KeyError if they lack one.
    within: the column whose classes keep their number of examples in every resample; empty for none.
  """

  function: Callable[..., Float[np.ndarray, "*r"]]
  columns: Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, ...]]
  within: str = ""


def _mean_top1_top5(top1: np.ndarray, top5: np.ndarray, times: Times = None) -> np.ndarray:
  return np.asarray((accuracy(top1, times) + accuracy(top5, times)) / 2)


def _average_precision_at_positives(labels: np.ndarray, scores: np.ndarray, times: Times = None) -> np.ndarray:
  return mean_average_precision(labels, scores, times, average_precision)


def _top(k: int) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
  return lambda predictions: predictions["rank"] < k


_top1, _top5 = _top(1), _top(5)
# The metrics of `catalogue.METRICS` that classifiers have. Predictions have `label`, `predicted` and `rank` of
# `Predictions`, and, where a metric needs them, `group`; of two classes, `score`, the logit of the second minus that of
# the first; of several labels, `labels` and `scores`, or whether the first answer is `correct`.
PREDICTION_METRICS = {
  "top1": PredictionMetric(accuracy, lambda p: (_top1(p),)),
  "top5": PredictionMetric(accuracy, lambda p: (_top5(p),)),
  "mean_per_class": PredictionMetric(mean_per_class, lambda p: (p["label"], _top1(p)), within="label"),
  "mean_top1_top5": PredictionMetric(_mean_top1_top5, lambda p: (_top1(p), _top5(p))),
  "macro_f1": PredictionMetric(macro_f1, lambda p: (p["label"], p["predicted"])),
  "worst_group": PredictionMetric(worst_group, lambda p: (p["group"], _top1(p))),
  "worst_group_top5": PredictionMetric(worst_group, lambda p: (p["group"], _top5(p))),
  "roc_auc": PredictionMetric(roc_auc, lambda p: (p["label"] == 1, p["score"])),
  "any_label": PredictionMetric(accuracy, lambda p: (p["correct"],)),
  "mean_average_precision_11": PredictionMetric(mean_average_precision, lambda p: (p["labels"], p["scores"])),
  # Difficult objects count as present, as in CLIP_benchmark.
  "mean_average_precision": PredictionMetric(
    _average_precision_at_positives, lambda p: (np.where(p["labels"] < 0, -1, 1), p["scores"])
  ),
}
# Means over the instances of WinoGAViL, whose predictions have their Jaccard index and their number of candidates, by
# that number as in DataComp; the first is its score.
JACCARD_METRICS = {
  "jaccard": PredictionMetric(mean_of, lambda p: (p["jaccard"], p["candidates"] >= 10)),
  "jaccard_5_6": PredictionMetric(mean_of, lambda p: (p["jaccard"], p["candidates"] <= 6)),
  "jaccard_all": PredictionMetric(mean_of, lambda p: (p["jaccard"], p["candidates"] > 0)),
}


def _once(column: Shaped[np.ndarray, "n ..."], times: Times) -> Int[np.ndarray, "*r n"]:
  if not len(column):
    raise ValueError("a metric of no example is undefined")
  return np.ones(len(column), np.int64) if times is None else times


def _precisions(
  present: Bool[np.ndarray, "n"], score: Float[np.ndarray, "n"], times: Times, *, together: bool
) -> tuple[Int[np.ndarray, "*r p"], Int[np.ndarray, "*r p"], Float[np.ndarray, "*r p"]]:
  """How often each positive counts, how many positives there are down to it, and the precision down to it.

  The positives are those in `present`, by falling score. Examples of equal score are counted `together`, or in their
  order.

  Raises:
    ValueError: no example is positive.
  """
  if not present.any():
    raise ValueError(f"none of {len(present)} examples is positive")
  score = -worst_if_nan(present, score)
  order = np.argsort(score, kind="stable")
  places = np.flatnonzero(present[order])
  last, last_positive = places, np.arange(len(places))
  if together:
    sought = score[order][places]
    last, last_positive = (np.searchsorted(scores, sought, "right") - 1 for scores in (score[order], sought))
  times = _once(present, times)[..., order]
  positives = np.cumsum(times[..., places], axis=-1)[..., last_positive]
  precision = positives / np.maximum(np.cumsum(times, axis=-1)[..., last], 1)
  return times[..., places], positives, precision


def _sums(
  category: Int[np.ndarray, "n"], values: Num[np.ndarray, "*r n"], size: int | None = None
) -> Float[np.ndarray, "*r k"]:
  """Sum of the values of each category; those of category -1 belong to none."""
  kept = np.flatnonzero(category >= 0)
  shape = (len(category), int(size or category.max(initial=-1) + 1))
  return values @ sparse.csr_array((np.ones(len(kept)), (kept, category[kept])), shape=shape)


def _by_category(
  category: Int[np.ndarray, "n"], correct: Bool[np.ndarray, "n"], times: Times, size: int | None = None
) -> tuple[Float[np.ndarray, "*r k"], Float[np.ndarray, "*r k"]]:
  """For each category, how often its examples count and are correct, and how often they count."""
  times = _once(category, times)
  return _sums(category, times * correct, size), _sums(category, times, size)
