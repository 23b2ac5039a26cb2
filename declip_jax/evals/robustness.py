"""Effective robustness to distribution shift (Taori et al. 2020, section 2), with the models of the ImageNet testbed.

Models with standard training lie on a line if their accuracies with and without the shift are drawn on a logit scale.
The effective robustness of a model is how far its accuracy under shift lies above that line. Linear probes, fine-tuned
models and interpolated weights (WiSE-FT, Wortsman et al. 2022) are points like any other.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from jaxtyping import Bool, Float, Int
import numpy as np
import scipy
from scipy import special

from declip_jax.evals.intervals import RESAMPLES, Interval, bootstrap, percentiles

Scale = Literal["linear", "probit", "logit"]
# From accuracies to the scale on which models lie on a line, and back.
_SCALES = {
  "linear": (np.asarray, np.asarray),
  "probit": (special.ndtri, special.ndtr),
  "logit": (special.logit, special.expit),
}
# Shift -> the images without shift with which it is compared: all of ImageNet's validation images, or those of the
# same classes, answered by a classifier of these classes alone.
WITHOUT_SHIFT = {
  "imagenet_v2": "imagenet",
  "imagenet_sketch": "imagenet",
  "imagenet_r": "imagenet_on_r",
  "imagenet_a": "imagenet_on_a",
  "objectnet": "imagenet_on_objectnet",
  "imagenet_vid_pm0": "imagenet_on_vid",
}


class Baseline(NamedTuple):
  """Models with standard training.

  Attributes:
    models: their names.
    accuracy: accuracy of each without shift, as a fraction.
    shifted: accuracy of each under shift.
  """

  models: list[str]
  accuracy: Float[np.ndarray, "models"]
  shifted: Float[np.ndarray, "models"]


def baseline(shift: str) -> Baseline:
  """The models with standard training of the ImageNet testbed, with accuracies above 56 % on ImageNet.

  ImageNet-A was made of images that a ResNet-50 gets wrong: its accuracy, 0 by construction, is left out, and the line
  through the others means nothing for models that are less accurate than it.

  Args:
    shift: a name in `WITHOUT_SHIFT`. That of ImageNet-V2 is matched frequency; that of ImageNet-Vid pm0.

  Raises:
    ValueError: the testbed has no such shift.
  """
  if shift not in WITHOUT_SHIFT:
    raise ValueError(f"shift {shift!r}: choose one of {sorted(WITHOUT_SHIFT)}")
  text = Path(__file__).with_name("imagenet_testbed.csv").read_text()
  rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
  columns = (WITHOUT_SHIFT[shift], shift)
  points = {
    row["model"]: [float(row[column]) / 100 for column in columns] for row in rows if all(map(row.get, columns))
  }
  points = {model: point for model, point in points.items() if min(point) > 0}
  accuracy, shifted = np.transpose([*points.values()])
  return Baseline([*points], accuracy, shifted)


@dataclass(frozen=True)
class Line:
  """The accuracy under shift that is expected of a model with standard training.

  Attributes:
    scale: the scale on which it is a straight line.
    slope, intercept: its coefficients there.
    slope_error: standard error of the slope.
    r: coefficient of correlation.
    models: number of models to which it was fitted.
    lowest, highest: their lowest and highest accuracy without shift.
  """

  scale: Scale
  slope: float
  intercept: float
  slope_error: float
  r: float
  models: int
  lowest: float
  highest: float

  @property
  def slope_interval(self) -> Interval:
    """The 95 % interval of the slope, by Student's t."""
    half = float(scipy.stats.t.ppf(0.975, self.models - 2)) * self.slope_error
    return Interval(self.slope - half, self.slope + half)

  def expected(self, accuracy: float | Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """The accuracy under shift that goes with an accuracy without shift; both are fractions."""
    forward, back = _SCALES[self.scale]
    return np.asarray(back(self.intercept + self.slope * forward(accuracy)))

  def effective_robustness(
    self, accuracy: float | Float[np.ndarray, "*n"], shifted: float | Float[np.ndarray, "*n"]
  ) -> Float[np.ndarray, "*n"]:
    """Accuracies under shift minus the expected ones."""
    return np.asarray(shifted - self.expected(accuracy))

  def extrapolated(self, accuracy: float | Float[np.ndarray, "*n"]) -> Bool[np.ndarray, "*n"]:
    """Whether no model of the line is as accurate, or none as inaccurate, so that the expectation is uncertain."""
    return np.asarray(np.less(accuracy, self.lowest) | np.greater(accuracy, self.highest))


def fit_line(
  accuracy: Float[np.ndarray, "models"], shifted: Float[np.ndarray, "models"], scale: Scale = "logit"
) -> Line:
  """Fits a line by ordinary least squares.

  Args:
    accuracy, shifted: accuracies of at least three models with standard training, as fractions.
    scale: the scale on which the line is straight.

  Raises:
    ValueError: there are fewer than three models or all have the same accuracy, or an accuracy is not on the scale.
  """
  x, y = _on_scale(accuracy, scale), _on_scale(shifted, scale)
  if len({*accuracy.tolist()}) < 2 or len(accuracy) < 3:
    raise ValueError(f"a line needs three models of different accuracies, not {accuracy.tolist()}")
  found = scipy.stats.linregress(x, y)
  return Line(
    scale=scale,
    slope=float(found.slope),
    intercept=float(found.intercept),
    slope_error=float(found.stderr),
    r=float(found.rvalue),
    models=len(accuracy),
    lowest=float(accuracy.min()),
    highest=float(accuracy.max()),
  )


class Band(NamedTuple):
  """A bootstrap of the models of a line.

  Attributes:
    lower, upper: band of the expected accuracy under shift at some accuracies without shift.
    slope, intercept: intervals of the coefficients.
  """

  lower: Float[np.ndarray, "points"]
  upper: Float[np.ndarray, "points"]
  slope: Interval
  intercept: Interval


def band(
  accuracy: Float[np.ndarray, "models"],
  shifted: Float[np.ndarray, "models"],
  at: Float[np.ndarray, "points"],
  scale: Scale = "logit",
  *,
  level: float = 0.95,
  resamples: int = RESAMPLES,
  index: Int[np.ndarray, "r models"] | None = None,
) -> Band:
  """Bootstraps the line that `fit_line` fits; resamples of equally accurate models are left out.

  Percentiles are values of resamples, as in the testbed: the next one outwards.

  Args:
    accuracy, shifted, scale: see `fit_line`.
    at: accuracies without shift of which to compute the band.
    level: level of the band at each point, and of the intervals.
    resamples, index: see `intervals.bootstrap`.
  """
  x, y = _on_scale(accuracy, scale), _on_scale(shifted, scale)
  lines = bootstrap(_coefficients, x, y, resamples=resamples, index=index)
  forward, back = _SCALES[scale]
  expected = lines[:, :1] * forward(at) + lines[:, 1:]
  values = np.concatenate([lines, back(expected)], axis=1)
  tail = 50 * (1 - level)
  lower = np.nanpercentile(values, tail, axis=0, method="lower")
  upper = np.nanpercentile(values, 100 - tail, axis=0, method="higher")
  slope, intercept = (Interval(float(lower[i]), float(upper[i])) for i in range(2))
  return Band(lower[2:], upper[2:], slope, intercept)


Known = tuple[float, Interval | None]  # an accuracy and its 95 % interval; None for an accuracy without error


def effective_interval(
  accuracy: Float[np.ndarray, "models"],
  shifted: Float[np.ndarray, "models"],
  without: Known,
  under: Known,
  scale: Scale = "logit",
  *,
  resamples: int = RESAMPLES,
) -> Interval:
  """The 95 % interval of an effective robustness.

  The models of the line are resampled as by `band`, and with each line both accuracies are drawn anew, independently,
  from normal distributions with their intervals, which may have sides of different lengths.

  Args:
    accuracy, shifted, scale: see `fit_line`.
    without, under: accuracy of the model without and under shift.
    resamples: number of resamples.
  """
  lines = bootstrap(_coefficients, _on_scale(accuracy, scale), _on_scale(shifted, scale), resamples=resamples)
  rng, (forward, back) = np.random.default_rng((0, 1)), _SCALES[scale]
  at, own = (_draws(known, rng, resamples) for known in (without, under))
  return percentiles(own - back(lines[:, 0] * forward(at) + lines[:, 1]))


def _draws(known: Known, rng: np.random.Generator, number: int) -> Float[np.ndarray, "r"]:
  value, ends = known
  normal = rng.standard_normal(number)
  if ends is None:
    return np.full(number, value)
  half = np.where(normal > 0, ends.upper - value, value - ends.lower)
  return np.clip(value + normal * half / scipy.stats.norm.ppf(0.975), 0, 1)


def _on_scale(accuracy: Float[np.ndarray, "models"], scale: Scale) -> Float[np.ndarray, "models"]:
  values = _SCALES[scale][0](accuracy)
  if not np.isfinite(values).all():
    raise ValueError(f"accuracy {accuracy[~np.isfinite(values)][0]} is not on the {scale} scale: leave this model out")
  return values


def _coefficients(
  x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], times: Int[np.ndarray, "r n"]
) -> Float[np.ndarray, "r 2"]:
  """Slope and intercept of the least-squares line of each resample; NaN if all its models are equally accurate."""
  share = times / times.sum(axis=1, keepdims=True)
  mean_x, mean_y = share @ x, share @ y
  deviation = x - mean_x[:, None]
  spread = (share * deviation**2).sum(axis=1)
  spread = np.where(np.sqrt(spread) > 1e-9 * np.abs(x).max(), spread, np.nan)  # and not a rounding error
  slope = (share * deviation * (y - mean_y[:, None])).sum(axis=1) / spread
  return np.stack([slope, mean_y - slope * mean_x], axis=1)
