"""Tests of `declip_jax.evals.robustness` against the ImageNet testbed's code and SciPy."""

import numpy as np
import pytest
import references as reference
from scipy import stats
from scipy.special import expit, logit

from declip_jax.evals import robustness
from declip_jax.evals.intervals import Interval
from declip_jax.evals.robustness import band, fit_line


@pytest.fixture(scope="module")
def golden():
  return reference.load("robustness")


@pytest.fixture(scope="module")
def standard(golden):
  return golden["standard_in_percent"] / 100, golden["standard_shift_percent"] / 100


@pytest.mark.parametrize("scale", ["linear", "probit", "logit"])
def test_line_and_effective_robustness(golden, standard, scale):
  line = fit_line(*standard, scale)
  # The source's intercept is in percent on the linear scale.
  unit = 100 if scale == "linear" else 1
  np.testing.assert_allclose(line.slope, golden[f"{scale}/slope"], rtol=1e-10)
  np.testing.assert_allclose(unit * line.intercept, golden[f"{scale}/intercept"], rtol=1e-10)
  np.testing.assert_allclose(line.r, golden[f"{scale}/r"], rtol=1e-10)
  np.testing.assert_allclose(line.slope_error, golden[f"{scale}/slope_standard_error"], rtol=1e-9)
  accuracy, shifted = golden["evaluated_in_percent"] / 100, golden["evaluated_shift_percent"] / 100
  expected = golden[f"{scale}/expected_shift_percent"]
  np.testing.assert_allclose(100 * line.expected(accuracy), expected, rtol=1e-10)
  found = 100 * line.effective_robustness(accuracy, shifted)
  np.testing.assert_allclose(found, golden[f"{scale}/effective_robustness_percent"], rtol=1e-9)
  np.testing.assert_array_equal(line.extrapolated(accuracy), golden["extrapolated"])
  assert line.models == 60


def test_bootstrap_band(golden, standard):
  grid = golden["bootstrap/grid_logit"]
  found = band(*standard, expit(grid), index=golden["bootstrap/resample_index"].astype(int))
  np.testing.assert_allclose(found.slope, golden["bootstrap/slope_95"], rtol=1e-9)
  np.testing.assert_allclose(found.intercept, golden["bootstrap/intercept_95"], rtol=1e-9)
  np.testing.assert_allclose(logit(found.lower), golden["bootstrap/band_lower_logit"], atol=1e-10)
  np.testing.assert_allclose(logit(found.upper), golden["bootstrap/band_upper_logit"], atol=1e-10)
  random = band(*standard, expit(grid))
  np.testing.assert_allclose(random.slope, golden["bootstrap/slope_95"], atol=0.01)
  assert (random.lower < fit_line(*standard).expected(expit(grid))).all()


def test_interval_of_effective_robustness(standard):
  line, at = fit_line(*standard), np.array([0.7])
  exact, above = (0.7, None), 0.05 + float(line.expected(0.7))
  found = robustness.effective_interval(*standard, exact, (above, None))
  near = band(*standard, at)  # without errors of the accuracies it is the band of the line
  np.testing.assert_allclose(found, [above - near.upper[0], above - near.lower[0]], atol=2e-4)
  half = 0.02
  noisy = robustness.effective_interval(*standard, exact, (above, Interval(above - half, above + half)))
  width = np.hypot(half, np.diff(found)[0] / 2)
  np.testing.assert_allclose(noisy, [0.05 - width, 0.05 + width], atol=3e-3)
  slope = float(line.expected(0.701) - line.expected(0.699)) / 0.002
  moved = robustness.effective_interval(*standard, (0.7, Interval(0.68, 0.72)), (above, None))
  width = np.hypot(0.02 * slope, np.diff(found)[0] / 2)
  np.testing.assert_allclose(moved, [0.05 - width, 0.05 + width], atol=3e-3)
  at_ends = robustness.effective_interval(*standard, (0.0, Interval(0.0, 0.01)), (1.0, Interval(0.99, 1.0)))
  assert 0.98 < at_ends.lower <= at_ends.upper <= 1


def test_interval_of_a_slope():
  x, y = logit(np.array([0.5, 0.6, 0.7, 0.8])), logit(np.array([0.3, 0.45, 0.5, 0.7]))
  found = fit_line(expit(x), expit(y)).slope_interval
  fit = stats.linregress(x, y)
  np.testing.assert_allclose(found, fit.slope + fit.stderr * stats.t.ppf([0.025, 0.975], 2))


def test_band_of_few_models_is_a_number():
  """Every ninth resample repeats one model, and more of them have one accuracy."""
  for accuracy in (np.array([0.5, 0.6, 0.7]), np.array([0.6, 0.6, 0.7])):
    found = band(accuracy, np.array([0.3, 0.4, 0.45]), np.array([0.2, 0.6]), resamples=200)
    assert np.isfinite([*found.lower, *found.upper, *found.intercept]).all()
    assert 0 < found.slope.lower < found.slope.upper < 2


def test_resamples_of_equally_accurate_models_have_no_line():
  x, y = logit(np.array([0.6] * 6 + [0.7])), np.linspace(0, 1, 7)
  times = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=100)
  lines = robustness._coefficients(x, y, times)
  np.testing.assert_array_equal(np.isnan(lines).all(axis=1), (times[:, -1] == 0) | (times[:, -1] == 7))


@pytest.mark.parametrize(
  ("shift", "models", "slope", "intercept", "r", "lowest", "highest"),
  [
    ("imagenet_v2", 87, 0.9233, -0.4982, 0.998, 56.5, 84.7),
    ("imagenet_sketch", 87, 1.0712, -2.3722, 0.932, 56.5, 84.7),
    ("imagenet_r", 82, 0.6372, -2.1104, 0.943, 76.9, 96.5),
    ("objectnet", 87, 0.9803, -1.9260, 0.976, 56.6, 88.3),
    ("imagenet_a", 86, 1.9973, -7.6733, 0.902, 76.2, 96.9),
    ("imagenet_vid_pm0", 87, 0.5331, -1.4590, 0.974, 93.5, 99.5),
  ],
)
def test_models_of_the_testbed(shift, models, slope, intercept, r, lowest, highest):
  points = robustness.baseline(shift)
  line = fit_line(points.accuracy, points.shifted)
  assert len(points.models) == line.models == models
  np.testing.assert_allclose([line.slope, line.intercept], [slope, intercept], atol=1e-4)
  np.testing.assert_allclose([line.r, line.lowest, line.highest], [r, lowest / 100, highest / 100], atol=7e-4)
  np.testing.assert_array_equal(line.extrapolated(np.array([lowest / 100 - 0.01, highest / 100 - 0.01])), [True, False])


def test_accuracies_that_are_not_on_the_scale_are_named():
  with pytest.raises(ValueError, match="accuracy 0.0 is not on the logit scale"):
    fit_line(np.array([0.5, 0.6, 0.7]), np.array([0.1, 0.0, 0.2]))
  assert fit_line(np.array([0.5, 0.6, 0.7]), np.array([0.0, 0.1, 0.2]), "linear").slope == pytest.approx(1)
  with pytest.raises(ValueError, match="three models of different accuracies"):
    fit_line(np.array([0.5, 0.6]), np.array([0.1, 0.2]))
  with pytest.raises(ValueError, match="shift 'imagenet_z': choose one of"):
    robustness.baseline("imagenet_z")
