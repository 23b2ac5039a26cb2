"""Linear probe by logistic regression, with CLIP's sweep over its strength (Radford et al. 2021, A.3).

97 values of C (scikit-learn's inverse strength), 8 per decade: every second decade of 1e-6 to 1e6 is fitted first; then
the interval around the best value is halved four times: 15 fits. The best value fits training and validation split
together. The paper does not say which of equally good values wins; here it is the smallest, which regularises most.
Features are used as given, neither normalised nor standardised.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Float32, Int
import numpy as np

from declip_jax.evals import logistic_regression
from declip_jax.evals.logistic_regression import TOLERANCE, Axes, Data, Linear, principal_axes
from declip_jax.evals.rows import Labelled, Layout, ProbeData, Score
from declip_jax.runtime.hosts import gather_rows

GRID = np.logspace(-6, 6, 97)
_COARSE = range(0, 97, 16)
_HALVINGS = (8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class FitRecord:
  """How one fit went.

  Attributes:
    strength: C.
    score: score of the validation split; None if there was none.
    objective: mean loss plus |kernel|^2 / (2 C rows).
    gradient: largest entry of its gradient.
    iterations: steps of L-BFGS.
    passes: passes over the features.
    converged: whether the gradient is within the tolerance.
  """

  strength: float
  score: float | None
  objective: float
  gradient: float
  iterations: int
  passes: int
  converged: bool


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A linear classifier of features as given.

  Attributes:
    kernel, bias: weights of each class, float64; of two classes, the first has zeros.
    answered: classes that it answers, those with training data.
  """

  kernel: Float[np.ndarray, "f k"]
  bias: Float[np.ndarray, "k"]
  answered: Bool[np.ndarray, "k"]


@dataclasses.dataclass(frozen=True)
class ProbeResult:
  """A probe: its fits, the last classifier, and what that says about the test split.

  Attributes:
    fits: all fits of the training split, in order.
    chosen: the best of them.
    refit: the fit of training and validation split with the strength of `chosen`; None if there was none.
    classifier: weights of the last of these fits.
    scores: its logits of the test rows of all hosts; -inf for a class that is not answered.
    label: labels of these rows.
  """

  fits: tuple[FitRecord, ...]
  chosen: FitRecord
  refit: FitRecord | None
  classifier: Classifier
  scores: Float32[np.ndarray, "n k"]
  label: Int[np.ndarray, "n"] | Int[np.ndarray, "n k"]

  @property
  def converged(self) -> bool:
    """Whether the fits with the chosen strength converged."""
    return self.chosen.converged and (self.refit is None or self.refit.converged)


def sweep(data: ProbeData, *, refit: bool = True, tolerance: float = TOLERANCE) -> ProbeResult:
  """Chooses C on the validation split, fits training and validation split with it, and scores the test split.

  Every host has to call this.

  Args:
    data: splits, one for validation among them, and the metric that chooses C.
    refit: whether the last classifier is also fitted to the validation split.
    tolerance: see `logistic_regression.fit`.

  Raises:
    ValueError: a split is unusable, see `check_rows`; fewer than two classes have training data; the score is NaN.
  """
  data.check()
  if data.val is None:
    raise ValueError("val: no rows; the sweep chooses C on them")
  placed, placed_val = _Placed.make(data.train, data.mesh), _Placed.make(data.val, data.mesh)
  solver = _Solver.make(placed, data.classes, data.mesh, tolerance)
  tried = _try_strengths(solver, placed, placed_val, data.score)
  chosen = last = tried[_best(tried)]
  fitted_rows = placed.features.shape
  del placed, placed_val  # the devices hold the rows once
  if refit:
    both = _Placed.make(Labelled(*map(np.concatenate, zip(data.train, data.val, strict=True))), data.mesh)
    # Where both splits have as many rows, with padding, as one, the program of the halvings serves: one strength twice.
    fits = 2 if both.features.shape == fitted_rows else 1
    last = solver.fit(both, [chosen.record.strength] * fits, [chosen.linear] * fits)[0]
  return solver.result([fitted.record for fitted in tried.values()], chosen, last, data.test)


def fit(data: ProbeData, strength: float, *, tolerance: float = TOLERANCE) -> ProbeResult:
  """Fits the training split with a given C and scores the test split."""
  data.check()
  placed = _Placed.make(data.train, data.mesh)
  solver = _Solver.make(placed, data.classes, data.mesh, tolerance)
  (fitted,) = solver.fit(placed, (strength,))
  return solver.result([fitted.record], fitted, fitted, data.test)


class _Placed(NamedTuple):
  """A split on the devices: its layout, its features, the labels of this host and those of all hosts."""

  layout: Layout
  features: jax.Array
  local_label: np.ndarray
  label: np.ndarray

  @classmethod
  def make(cls, rows: Labelled, mesh: Mesh) -> "_Placed":
    layout = Layout.make(len(rows.features), mesh)
    features = layout.place(rows.features.astype(np.float32, copy=False))
    return cls(layout, features, rows.label, gather_rows(rows.label))


class _Task(NamedTuple):
  """What the columns of a classifier mean: the classes, or whether it is the second of two classes.

  Attributes:
    answered: classes with training data.
    pair: the two classes; None if there are more, or if each class is a yes-no question.
  """

  answered: np.ndarray
  pair: tuple[int, int] | None


class _Fitted(NamedTuple):
  """A fit on the devices."""

  record: FitRecord
  task: _Task
  linear: Linear


@dataclasses.dataclass(frozen=True)
class _Solver:
  """What all fits of a probe share."""

  classes: int
  mesh: Mesh
  tolerance: float
  axes: Axes

  @classmethod
  def make(cls, train: _Placed, classes: int, mesh: Mesh, tolerance: float) -> "_Solver":
    axes = principal_axes(_data(train, _task(train, classes)), mesh)
    return cls(classes, mesh, tolerance, axes)

  def fit(self, rows: _Placed, strengths: Sequence[float], starts: Sequence[Linear] = ()) -> list[_Fitted]:
    """Fits rows with each strength, each from its start if there are any."""
    task = _task(rows, self.classes)
    columns = np.ones(1, bool) if task.pair else task.answered
    linear = jax.tree.map(lambda *each: np.stack(each), *starts) if starts else None
    if linear is not None and linear.bias.shape[1] != len(columns):  # further rows are of a third class
      linear = None
    fits = logistic_regression.fit(
      _data(rows, task),
      self.axes,
      strengths,
      columns,
      self.mesh,
      linear,
      tolerance=self.tolerance,
    )
    fits = jax.tree.map(np.asarray, fits)
    return [
      _Fitted(
        FitRecord(
          strength=float(strength),
          score=None,
          objective=float(fits.objective[index]),
          gradient=float(fits.gradient[index]),
          iterations=int(fits.iterations[index]),
          passes=int(fits.passes[index]),
          converged=bool(fits.gradient[index] <= self.tolerance),
        ),
        task,
        jax.tree.map(lambda x, index=index: x[index], fits.linear),
      )
      for index, strength in enumerate(strengths)
    ]

  def scores(self, rows: _Placed, fitted: _Fitted) -> Float32[np.ndarray, "n k"]:
    """Logits of the rows of all hosts."""
    logits = rows.layout.fetch(logistic_regression.logits(rows.features, self.axes, fitted.linear, self.mesh))
    task = fitted.task
    if task.pair is None:
      return np.where(task.answered, logits, np.float32(-np.inf))
    scores = np.full((len(logits), self.classes), -np.inf, np.float32)
    scores[:, task.pair[0]], scores[:, task.pair[1]] = 0, logits[:, 0]
    return scores

  def result(self, fits: Sequence[FitRecord], chosen: _Fitted, last: _Fitted, test: Labelled) -> ProbeResult:
    """Scores the test split by the last fit."""
    placed = _Placed.make(test, self.mesh)
    return ProbeResult(
      fits=tuple(fits),
      chosen=chosen.record,
      refit=None if last is chosen else last.record,
      classifier=self.classifier(last),
      scores=self.scores(placed, last),
      label=placed.label,
    )

  def classifier(self, fitted: _Fitted) -> Classifier:
    """Weights of features that are not centred."""
    kernel, bias = (x.astype(np.float64) for x in fitted.linear)
    bias = bias - self.axes.mean.astype(np.float64) @ kernel
    answered = fitted.task.answered
    if fitted.task.pair is not None:
      column = np.arange(self.classes) == fitted.task.pair[1]
      kernel, bias = kernel * column, bias * column
    return Classifier(kernel, bias, answered)


def _task(rows: _Placed, classes: int) -> _Task:
  """The task of fitting rows.

  Raises:
    ValueError: fewer than two classes have data.
  """
  label = rows.label
  if label.ndim == 2:
    answered = (label == 1).any(axis=0) & (label == -1).any(axis=0)
    if not answered.any():
      raise ValueError("train: no class is present in some rows and absent in others")
    return _Task(answered, None)
  answered = np.bincount(label[label >= 0], minlength=classes) > 0
  present = np.flatnonzero(answered).tolist()
  if len(present) < 2:
    raise ValueError(f"train: rows of the classes {present}, of {classes}; a probe needs two classes")
  return _Task(answered, tuple(present) if len(present) == 2 else None)


def _data(part: _Placed, task: _Task) -> Data:
  label = part.local_label
  if task.pair is not None:
    first, second = task.pair
    return Data(part.features, part.layout.place(((label == second).astype(np.int8) - (label == first))[:, None]))
  if label.ndim == 2:
    return Data(part.features, part.layout.place(label.astype(np.int8)))
  return Data(part.features, part.layout.place(label.astype(np.int32), fill=-1))


def _try_strengths(solver: _Solver, train: _Placed, val: _Placed, score: Score) -> Mapping[int, _Fitted]:
  """Fits along CLIP's path, by the index of the strength in the grid."""
  tried: dict[int, _Fitted] = {}
  labelled = slice(None) if val.label.ndim == 2 else val.label >= 0
  if not len(val.label[labelled]):
    raise ValueError("val: no labelled rows")

  def attempt(indices: Sequence[int], starts: Sequence[Linear] = ()) -> None:
    for index, fitted in zip(indices, solver.fit(train, GRID[list(indices)].tolist(), starts), strict=True):
      value = float(score(solver.scores(val, fitted)[labelled], val.label[labelled]))
      if math.isnan(value):
        raise ValueError(f"the score of the validation split is NaN at C = {GRID[index]:.3g}")
      tried[index] = fitted._replace(record=dataclasses.replace(fitted.record, score=value))

  def between(best: int, step: int) -> Linear:
    """Where to look for the optimum at `best + step`: the mean of those at both sides."""
    ends = [tried[index].linear for index in (best, best + 2 * step) if index in tried]
    return jax.tree.map(lambda *each: sum(each) / len(each), *ends)

  attempt(_COARSE)
  for step in _HALVINGS:
    best = _best(tried)
    # One strength twice at an end of the grid: two fits share a pass, and one program serves all halvings.
    moves = [move for move in (-step, step) if 0 <= best + move < len(GRID)]
    moves = (moves * 2)[:2]
    attempt([best + move for move in moves], [between(best, move) for move in moves])
  return tried


def _best(tried: Mapping[int, _Fitted]) -> int:
  return max(tried, key=lambda index: (tried[index].record.score, -index))
