"""Confidence intervals of metrics, and comparisons of models, runs and data sets.

The noise of a test set and the noise of training are different things: bootstrap, Clopper-Pearson and McNemar are
about the examples of one test set, Student's and Welch's t about the random seeds of several runs.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Bool, Float, Int, Shaped
import numpy as np
import scipy  # its stats are imported where they are used first, since that takes most of a second
from scipy import special

RESAMPLES = 2000
_BLOCK = 1 << 22  # counts in memory at once

Columns = Shaped[np.ndarray, "n ..."]


class Interval(NamedTuple):
  """A confidence interval."""

  lower: float
  upper: float


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> Interval:
  """The exact interval of a proportion (Clopper & Pearson 1934); none ends at 0, all at 1.

  Raises:
    ValueError: not 0 <= successes <= trials, or there is no trial.
  """
  if not 0 <= successes <= trials or not trials:
    raise ValueError(f"{successes} successes in {trials} trials are not a proportion")
  tail, failures = (1 - level) / 2, trials - successes
  lower = special.betaincinv(successes, failures + 1, tail) if successes else 0.0
  upper = special.betaincinv(successes + 1, failures, 1 - tail) if failures else 1.0
  return Interval(float(lower), float(upper))


def bootstrap(
  metric: Callable[..., Float[np.ndarray, "r ..."]],
  *columns: Columns,
  within: Int[np.ndarray, "n"] | None = None,
  resamples: int = RESAMPLES,
  seed: int | tuple[int, ...] = 0,
  index: Int[np.ndarray, "r m"] | None = None,
) -> Float[np.ndarray, "r ..."]:
  """The values of a metric on resamples of the examples, drawn with replacement.

  Only how often distinct examples occur is drawn, so that accuracies of large sets are resampled as fast as those of
  small ones, and the values do not depend on the order of the examples. Two models are compared by a metric of the
  columns of both, such as the difference of their accuracies. For captions, an example is an image with all its
  captions: see `ratio`.

  Args:
    metric: a function of the columns, of length `k`, and the number of times `[r k]` that each of their entries counts,
      such as `metrics.mean_per_class`. NaN means that a resample has no value.
    columns: what the metric needs of the `n` examples.
    within: class of each example, to draw the number of examples that each class has from that class.
    resamples: number of resamples.
    seed: seed of the draws. Sets whose means are averaged need different ones, such as `(0, position)`.
    index: examples of each resample, in place of random ones.

  Raises:
    ValueError: there is no example.
  """
  if not len(columns[0]):
    raise ValueError("no example to resample")
  strata = np.zeros(len(columns[0]), np.int64) if within is None else within
  first, kind, number = _distinct(strata, *columns)
  examples = [column[first] for column in columns]
  if index is not None:
    resamples = len(index)
  rng = np.random.default_rng(seed)
  values = []
  block = max(1, _BLOCK // len(first))
  for start in range(0, resamples, block):
    size = min(block, resamples - start)
    if index is None:
      times = _draw(rng, number, strata[first], size)
    else:
      times = np.stack([np.bincount(kind[row], minlength=len(first)) for row in index[start : start + size]])
    values.append(metric(*examples, times))
  return np.concatenate(values)


def percentiles(values: Float[np.ndarray, "r"], level: float = 0.95) -> Interval:
  """The interval between percentiles of bootstrapped values, without resamples that have no value.

  Raises:
    ValueError: no resample has a value.
  """
  defined = values[~np.isnan(values)]
  if not len(defined):
    raise ValueError(f"the metric is undefined on all {len(values)} resamples")
  tail = 50 * (1 - level)
  return Interval(*map(float, np.percentile(defined, [tail, 100 - tail])))


def ratio(
  hits: Int[np.ndarray, "n"], trials: Int[np.ndarray, "n"], times: Int[np.ndarray, "*r n"]
) -> Float[np.ndarray, "*r"]:
  """A metric for `bootstrap`: the share of hits where each example has several trials, such as an image's captions."""
  return np.asarray((times @ hits) / (times @ trials))


def mcnemar(correct_a: Bool[np.ndarray, "n"], correct_b: Bool[np.ndarray, "n"]) -> float:
  """Two-sided p-value of McNemar's exact test of two models on the same examples (McNemar 1947)."""
  only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
  return float(scipy.stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def student(values: Float[np.ndarray, "seeds"], level: float = 0.95) -> Interval:
  """The interval of the mean of runs that differ in their random seed (Student 1908).

  Raises:
    ValueError: there are fewer than two runs.
  """
  _check_runs(values)
  half = scipy.stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
  return Interval(float(values.mean() - half), float(values.mean() + half))


class SeedComparison(NamedTuple):
  """Several runs of A and of B, which differ in their random seed.

  Attributes:
    difference: mean of A minus mean of B.
    interval: its interval.
    p: two-sided p-value.
  """

  difference: float
  interval: Interval
  p: float


def welch(a: Float[np.ndarray, "seeds_a"], b: Float[np.ndarray, "seeds_b"], level: float = 0.95) -> SeedComparison:
  """Compares the means of runs without assuming equal variances (Welch 1947).

  Raises:
    ValueError: A or B has fewer than two runs.
  """
  _check_runs(a)
  _check_runs(b)
  difference = float(a.mean() - b.mean())
  if a.std() == b.std() == 0:
    return SeedComparison(difference, Interval(difference, difference), float(difference == 0))
  result = scipy.stats.ttest_ind(a, b, equal_var=False)
  interval = result.confidence_interval(level)
  return SeedComparison(difference, Interval(float(interval.low), float(interval.high)), float(result.pvalue))


def bonferroni(p: Float[np.ndarray, "tests"]) -> Float[np.ndarray, "tests"]:
  """p-values adjusted for their number: at most 1, and below a level with at most that probability of any error."""
  return np.minimum(p * len(p), 1.0)


def holm(p: Float[np.ndarray, "tests"]) -> Float[np.ndarray, "tests"]:
  """p-values adjusted as by `bonferroni`, but never larger than those (Holm 1979)."""
  order = np.argsort(p, kind="stable")
  adjusted = np.empty_like(p)
  adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
  return adjusted


def _distinct(*columns: Columns) -> tuple[Int[np.ndarray, "k"], Int[np.ndarray, "n"], Int[np.ndarray, "k"]]:
  """Sorts out the distinct examples: the first one of each kind, the kind of each, and the number of each kind."""
  table = np.column_stack([column.reshape(len(column), -1).astype(np.float64) for column in columns])
  _, first, kind, number = np.unique(table, axis=0, return_index=True, return_inverse=True, return_counts=True)
  return first, kind.reshape(-1), number


def _draw(
  rng: np.random.Generator, number: Int[np.ndarray, "k"], stratum: Int[np.ndarray, "k"], size: int
) -> Int[np.ndarray, "r k"]:
  """How often each kind of example is drawn, of the number of examples in its stratum; kinds of a stratum adjoin."""
  ends = np.flatnonzero(np.diff(stratum, append=stratum[-1] + 1)) + 1
  parts = [rng.multinomial(part.sum(), part / part.sum(), size=size) for part in np.split(number, ends[:-1])]
  return np.concatenate(parts, axis=1)


def _check_runs(values: Float[np.ndarray, "seeds"]) -> None:
  if len(values) < 2:
    raise ValueError(f"{len(values)} run: an interval over seeds needs at least two")
