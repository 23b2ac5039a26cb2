"""Scaling of errors and scores with compute or data: fitted laws, frontier, and data efficiency."""

from dataclasses import dataclass

from jaxtyping import Float, Int
import numpy as np
import scipy
from scipy import optimize

from declip_jax.evals.intervals import RESAMPLES, Interval

_FLOORS = (0.0, 0.5, 0.9)  # shares of the smallest error from which the search for a floor starts


@dataclass(frozen=True)
class PowerLaw:
  """A line through the logarithms of errors and their cause: log10(error) = intercept + slope log10(x).

  Attributes:
    slope, intercept: its coefficients.
    slope_interval: interval of the slope, by Student's t.
    r2: coefficient of determination.
    residuals: measured minus fitted log10(error) of each run.
    level: level of the interval and of `band`.
    mean, spread, error: mean of log10(x), sum of squared deviations from it, and standard error of the residuals.
  """

  slope: float
  intercept: float
  slope_interval: Interval
  r2: float
  residuals: Float[np.ndarray, "runs"]
  level: float
  mean: float
  spread: float
  error: float

  def predict(self, x: float | Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """The error at `x`."""
    return np.asarray(10 ** (self.intercept + self.slope * np.log10(x)))

  def band(self, x: float | Float[np.ndarray, "*n"]) -> tuple[Float[np.ndarray, "*n"], Float[np.ndarray, "*n"]]:
    """Lower and upper end of the interval of the line at `x`; single runs scatter more widely."""
    runs = len(self.residuals)
    half = self.error * np.sqrt(1 / runs + (np.log10(x) - self.mean) ** 2 / self.spread)
    factor = 10 ** (scipy.stats.t.ppf((1 + self.level) / 2, runs - 2) * half)
    return np.asarray(self.predict(x) / factor), np.asarray(self.predict(x) * factor)

  def factor(self, share: float) -> float | None:
    """By how much `x` has to grow for the error to become this share of itself; None if it does not fall."""
    return float(share ** (1 / self.slope)) if self.slope < 0 else None


def fit_power_law(x: Float[np.ndarray, "runs"], error: Float[np.ndarray, "runs"], level: float = 0.95) -> PowerLaw:
  """Fits a line to logarithms by ordinary least squares (Radford et al. 2021, figure 9).

  Args:
    x: training FLOPs, pairs or parameters of at least three runs.
    error: their errors, such as 1 - accuracy.
    level: level of the intervals.

  Raises:
    ValueError: there are fewer than three runs, all have the same `x`, or a number is not positive.
  """
  _check(x, error, 3)
  u, v = np.log10(x), np.log10(error)
  found = scipy.stats.linregress(u, v)
  half = scipy.stats.t.ppf((1 + level) / 2, len(x) - 2) * found.stderr
  residuals = v - found.intercept - found.slope * u
  return PowerLaw(
    slope=float(found.slope),
    intercept=float(found.intercept),
    slope_interval=Interval(float(found.slope - half), float(found.slope + half)),
    r2=float(found.rvalue**2),
    residuals=residuals,
    level=level,
    mean=float(u.mean()),
    spread=float(((u - u.mean()) ** 2).sum()),
    error=float(np.sqrt((residuals**2).sum() / (len(x) - 2))),
  )


@dataclass(frozen=True)
class SaturatingLaw:
  """A power law above a floor: error = floor + scale (x / unit)^-exponent.

  Attributes:
    floor: error that no `x` removes; 0 if the errors show none.
    scale: error above the floor at `unit`.
    exponent: exponent of `x`.
    unit: the unit of `x`.
    residuals: natural logarithm of the measured error minus that of the fitted one, of each run.
  """

  floor: float
  scale: float
  exponent: float
  unit: float
  residuals: Float[np.ndarray, "runs"]

  def predict(self, x: float | Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """The error at `x`."""
    return np.asarray(self.floor + self.scale * (x / self.unit) ** -self.exponent)


def fit_saturating_law(
  x: Float[np.ndarray, "runs"], error: Float[np.ndarray, "runs"], unit: float | None = None
) -> SaturatingLaw:
  """Fits a power law with a floor by least squares of the logarithm of the error.

  Args:
    x, error: see `fit_power_law`; at least four runs.
    unit: unit of `x`, by default its geometric mean.

  Raises:
    ValueError: there are fewer than four runs, all have the same `x`, or a number is not positive; or the error does
      not fall with `x`.
  """
  _check(x, error, 4)
  line = fit_power_law(x, error)
  if line.slope >= 0:
    raise ValueError(f"the error grows with x, by a power of {line.slope:.3g}: it has no floor")
  centre = float(np.exp(np.log(x).mean()))  # where scale and exponent are least correlated
  z, target = np.log(x / centre), np.log(error)

  def residuals(parameters: Float[np.ndarray, "3"]) -> Float[np.ndarray, "runs"]:
    floor, log_scale, exponent = parameters
    return target - np.log(floor + np.exp(log_scale - exponent * z))

  def search(floor: float) -> optimize.OptimizeResult:
    above = fit_power_law(x, error - floor)
    start = [floor, np.log(above.predict(centre)), max(-above.slope, 1e-3)]
    bounds = ([0, -np.inf, 0], np.inf)
    return optimize.least_squares(residuals, start, bounds=bounds, xtol=1e-14, ftol=1e-14, gtol=1e-14, x_scale="jac")

  best = min((search(share * float(error.min())) for share in _FLOORS), key=lambda found: found.cost)
  floor, log_scale, exponent = map(float, best.x)
  unit = centre if unit is None else unit
  scale = float(np.exp(log_scale - exponent * np.log(unit / centre)))
  return SaturatingLaw(floor=floor, scale=scale, exponent=exponent, unit=unit, residuals=best.fun)


def frontier(x: Float[np.ndarray, "runs"], error: Float[np.ndarray, "runs"]) -> Int[np.ndarray, "best"]:
  """The runs than which none has a smaller or equal error with a smaller or equal `x`, by increasing `x`.

  Of runs that are equal in both, it has the first.
  """
  order = np.lexsort((np.arange(len(x)), error, x))
  before = np.minimum.accumulate(np.concatenate([[np.inf], error[order][:-1]]))
  return order[error[order] < before]


@dataclass(frozen=True)
class Efficiency:
  """How many pairs a method needs for a score that a baseline has reached.

  Attributes:
    pairs: number of pairs; None if the score is outside of those that were measured: not reached, or reached before
      the first measurement.
    factor: pairs of the baseline divided by those; None if `pairs` is None.
    interval: interval of the factor; an end that is outside of what was measured is None, and so is the interval
      without several seeds.
  """

  pairs: float | None
  factor: float | None
  interval: tuple[float | None, float | None] | None = None


def data_efficiency(
  pairs: Float[np.ndarray, "points"],
  scores: Float[np.ndarray, "seeds points"],
  baseline_pairs: float,
  baseline_scores: Float[np.ndarray, "baseline_seeds"],
  *,
  level: float = 0.95,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> Efficiency:
  """The data efficiency of a method (Li et al. 2022, section 1), interpolated linearly in the logarithm of pairs.

  The score of several seeds is their mean. If the score rises and falls, the pairs are those at which it is first
  reached. The interval is a bootstrap of the seeds of both.

  Args:
    pairs: increasing numbers of pairs at which the method was measured.
    scores: its scores, a row per seed; larger is better.
    baseline_pairs: pairs of the baseline.
    baseline_scores: its scores, one per seed.
    level: level of the interval.
    resamples, seed: number of resamples, and seed of their draws.

  Raises:
    ValueError: the numbers of pairs are not two or more increasing positive numbers.
  """
  if len(pairs) < 2 or not (pairs > 0).all() or not (np.diff(pairs) > 0).all():
    raise ValueError(f"pairs {pairs.tolist()} are not two or more increasing positive numbers")
  needed = _measured(_pairs_at(pairs, scores.mean(axis=0)[None], baseline_scores.mean()[None])[0])
  interval = None
  if min(len(scores), len(baseline_scores)) > 1:
    rng = np.random.default_rng(seed)
    own = scores[rng.integers(len(scores), size=(resamples, len(scores)))].mean(axis=1)
    other = baseline_scores[rng.integers(len(baseline_scores), size=(resamples, len(baseline_scores)))].mean(axis=1)
    with np.errstate(divide="ignore"):
      factors = np.sort(baseline_pairs / _pairs_at(pairs, own, other))
    tail = (1 - level) / 2
    # Actual values, the next ones outwards, since between a number and infinity there is nothing to interpolate.
    ends = (factors[int(np.floor(tail * (resamples - 1)))], factors[int(np.ceil((1 - tail) * (resamples - 1)))])
    interval = (_measured(ends[0]), _measured(ends[1]))
  return Efficiency(needed, None if needed is None else baseline_pairs / needed, interval)


def _pairs_at(
  pairs: Float[np.ndarray, "points"], scores: Float[np.ndarray, "r points"], target: Float[np.ndarray, "r"]
) -> Float[np.ndarray, "r"]:
  """Pairs at which each curve first reaches its target: infinity if it never does, 0 if before its first point."""
  reached = scores >= target[:, None]
  after = np.maximum(reached.argmax(axis=1), 1)
  row = np.arange(len(scores))
  low, high = scores[row, after - 1], scores[row, after]
  with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # where the result is not used
    share = (target - low) / (high - low)
    between = np.exp(np.log(pairs[after - 1]) + share * np.log(pairs[after] / pairs[after - 1]))
  between = np.where(scores[:, 0] == target, pairs[0], np.where(reached[:, 0], 0, between))
  return np.where(reached.any(axis=1), between, np.inf)


def _measured(value: float) -> float | None:
  return float(value) if 0 < value < np.inf else None


def _check(x: Float[np.ndarray, "runs"], error: Float[np.ndarray, "runs"], least: int) -> None:
  for name, values in (("x", x), ("error", error)):
    if not ((values > 0) & np.isfinite(values)).all():
      raise ValueError(f"{name} has {values[~((values > 0) & np.isfinite(values))][0]}: expected positive numbers")
  if len(x) < least or len({*x.tolist()}) < 2:
    raise ValueError(f"a law needs {least} runs of different x, not {x.tolist()}")
