"""Classification from a few training rows per class: logistic regression (CLIP) and ridge regression (big_vision).

Rows are drawn by seed, the first of a permutation of each class, so that more shots add rows and replace none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
import math

from jaxtyping import Bool, Float, Float64, Int
import numpy as np

from declip_jax.evals import linear_probe, metrics
from declip_jax.evals.rows import Labelled, ProbeData, first_row
from declip_jax.runtime.hosts import gather_rows

SEEDS = (0, 1, 2)
CLIP_SHOTS = (1, 2, 4, 8, 16)  # Radford et al. 2021, figure 6
BIG_VISION_SHOTS = (1, 5, 10, 25)
METHODS = ("logistic", "ridge")
STRENGTH = 0.316  # C; CLIP's is unpublished
L2 = 2.0**10
_TOLERANCE = 1e-6  # of the gradient of a mean over few rows
_BIAS = 100.0  # big_vision's constant column

# From scores `[n classes]` and labels to whether each answer is correct.
Correct = Callable[[np.ndarray, np.ndarray], Bool[np.ndarray, "n"]]


@dataclass(frozen=True)
class FewShotResult:
  """Scores of the test split by number of shots.

  Attributes:
    shots: rows per class.
    scores: score with the rows of each seed.
    correct: whether each labelled test row, of all hosts, is answered correctly.
    strengths: C of each fit, for logistic regression.
  """

  shots: tuple[int, ...]
  scores: Float64[np.ndarray, "seeds shots"]
  correct: Bool[np.ndarray, "n seeds shots"]
  strengths: Float64[np.ndarray, "seeds shots"] | None = None

  @property
  def mean(self) -> Float64[np.ndarray, "shots"]:
    """Mean over the seeds."""
    return self.scores.mean(axis=0)

  @property
  def std(self) -> Float64[np.ndarray, "shots"] | None:
    """Standard deviation over the seeds, estimated from a sample; None for a single seed."""
    return self.scores.std(axis=0, ddof=1) if len(self.scores) > 1 else None


def first_is_correct(scores: Float[np.ndarray, "n classes"], label: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
  """Whether the class with the largest score is the true one."""
  return metrics.predict(scores, label).correct()


def draw(label: Int[np.ndarray, "n"], classes: int, most: int, seed: int) -> Int[np.ndarray, "k most"]:
  """The rows that few-shot training uses: the first `most` of a permutation of each class.

  Raises:
    ValueError: a class has fewer rows.
  """
  rng, rows = np.random.default_rng(seed), []
  for index in range(classes):
    own = np.flatnonzero(label == index)
    if len(own) < most:
      raise ValueError(f"class {index} has {len(own)} training rows; expected at least {most}")
    rows.append(rng.permutation(own)[:most])
  return np.stack(rows)


def logistic(
  data: ProbeData,
  *,
  shots: Sequence[int] = CLIP_SHOTS,
  seeds: Sequence[int] = SEEDS,
  strength: float | None = STRENGTH,
  correct: Correct = first_is_correct,
) -> FewShotResult:
  """Logistic regression on a few rows per class, as in CLIP's figure 6, whose draws and C are unpublished.

  Args:
    data: splits with one label per row.
    shots: rows per class.
    seeds: seeds of the draws.
    strength: C; None chooses it, by the sweep of a linear probe, on as many further rows of each class.
    correct: which answers are correct.

  Raises:
    ValueError: a split is unusable, see `check_rows`; a class has too few rows.
  """
  label, most = _labels(data), max(shots)
  scores, strengths = np.zeros((2, len(seeds), len(shots)))
  answers = np.zeros((int((gather_rows(data.test.label) >= 0).sum()), *scores.shape), bool)
  for row, seed in enumerate(seeds):
    drawn = draw(label, data.classes, 2 * most if strength is None else most, seed)
    # Rows that do not count keep one shape for all numbers of shots, which then share their programs.
    for column, count in enumerate(shots):
      fitted = replace(data, train=_take(data.train, drawn[:, :most], count))
      if strength is None:
        further = _take(data.train, np.roll(drawn, -count, axis=1)[:, :most], count)
        result = linear_probe.sweep(replace(fitted, val=further), refit=False, tolerance=_TOLERANCE)
      else:
        result = linear_probe.fit(fitted, strength, tolerance=_TOLERANCE)
      used = result.label >= 0
      scores[row, column] = data.score(result.scores[used], result.label[used])
      answers[:, row, column] = correct(result.scores[used], result.label[used])
      strengths[row, column] = result.chosen.strength
  return FewShotResult(tuple(shots), scores, answers, strengths)


def _labels(data: ProbeData) -> Int[np.ndarray, "n"]:
  """The labels of all training rows, after a check of the splits."""
  data.check()
  if data.train.label.ndim == 2:
    raise ValueError("shots are counted per class: expected one label per row, not several")
  return gather_rows(data.train.label)


def _take(rows: Labelled, drawn: Int[np.ndarray, "k most"], count: int) -> Labelled:
  """The drawn rows of this host, of which only the first `count` of each class have a label."""
  first = first_row(len(rows.label))
  column_class, place = np.nonzero((drawn >= first) & (drawn < first + len(rows.label)))
  own = drawn[column_class, place] - first
  return Labelled(rows.features[own], np.where(place < count, rows.label[own], -1))


def ridge(
  data: ProbeData,
  *,
  shots: Sequence[int] = BIG_VISION_SHOTS,
  seeds: Sequence[int] = SEEDS,
  l2: float = L2,
  correct: Correct = first_is_correct,
) -> FewShotResult:
  """Least squares on a few rows per class, as big_vision evaluates its models, in float64.

  Args:
    data: splits with one label per row; no device is used.
    shots: rows per class.
    seeds: seeds of the draws.
    l2: strength of the penalty.
    correct: which answers are correct.

  Raises:
    ValueError: a split is unusable, see `check_rows`; a class has too few rows.
  """
  label, test = _labels(data), data.test
  used = test.label >= 0
  test_label = gather_rows(test.label[used])
  scores = np.zeros((len(seeds), len(shots)))
  answers = np.zeros((len(test_label), *scores.shape), bool)
  for row, seed in enumerate(seeds):
    drawn = draw(label, data.classes, max(shots), seed)
    for column, count in enumerate(shots):
      features, known = map(gather_rows, _take(data.train, drawn[:, :count], count))
      (logits,) = ridge_scores(features, known, test.features[used], data.classes, (l2,))
      logits = gather_rows(logits)
      scores[row, column] = data.score(logits, test_label)
      answers[:, row, column] = correct(logits, test_label)
  return FewShotResult(tuple(shots), scores, answers)


def ridge_scores(
  features: Float[np.ndarray, "n f"],
  label: Int[np.ndarray, "n"],
  queries: Float[np.ndarray, "q f"],
  classes: int,
  l2: Sequence[float],
) -> list[Float64[np.ndarray, "q k"]]:
  """Scores of queries by ridge regression to targets of 1 and -1, with each penalty, from one decomposition.

  Columns are standardised, and a column of 100 stands for the bias, whose weight is penalised, too (big_vision,
  `fewshot_lsr.py`; there in float32, which changes up to two answers in 400).
  """
  mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64) + 1e-5

  def columns(x: np.ndarray) -> Float64[np.ndarray, "_ columns"]:
    return np.concatenate([(x - mean) / std, np.full((len(x), 1), _BIAS)], axis=1)

  known, asked = columns(features), columns(queries)
  target = 2.0 * (label[:, None] == np.arange(classes)) - 1
  if len(known) < known.shape[1]:  # the same solution from the smaller of the two Gram matrices
    values, vectors = np.linalg.eigh(known @ known.T)
    left, right = asked @ (known.T @ vectors), vectors.T @ target
  else:
    values, vectors = np.linalg.eigh(known.T @ known)
    left, right = asked @ vectors, vectors.T @ (known.T @ target)
  return [(left / (values + strength)) @ right for strength in l2]


def crossing(shots: Sequence[int], scores: Float[np.ndarray, "shots"], zero_shot: float) -> float | None:
  """The number of shots with which a probe reaches a zero-shot score, interpolated in log2 (CLIP, figure 6).

  Returns:
    The first such number; the smallest number of shots if that already reaches it; None if none does.
  """
  reached = np.flatnonzero(scores >= zero_shot)
  if not len(reached):
    return None
  after = int(reached[0])
  if after == 0:
    return float(shots[0])
  low, high = math.log2(shots[after - 1]), math.log2(shots[after])
  share = (zero_shot - scores[after - 1]) / (scores[after] - scores[after - 1])
  return 2 ** (low + float(share) * (high - low))
