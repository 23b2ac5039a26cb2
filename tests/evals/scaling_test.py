"""Tests of `declip_jax.evals.scaling` against SciPy."""

import numpy as np
import pytest
import references as reference
from scipy import optimize

from declip_jax.evals.scaling import data_efficiency, fit_power_law, fit_saturating_law, frontier


@pytest.fixture(scope="module")
def golden():
  return reference.load("scaling")


def test_power_law(golden):
  compute, error = golden["loglog/compute"], golden["loglog/error"]
  law = fit_power_law(compute, error)
  np.testing.assert_allclose(law.slope, golden["loglog/slope"], rtol=1e-10)
  np.testing.assert_allclose(law.intercept, golden["loglog/intercept"], rtol=1e-10)
  np.testing.assert_allclose(law.r2, golden["loglog/r2"], rtol=1e-10)
  np.testing.assert_allclose(law.slope_interval, golden["loglog/slope_95"], rtol=1e-10)
  found = law.predict(10 * compute.max())
  np.testing.assert_allclose(found, golden["loglog/predicted_error_at_10x_largest"], rtol=1e-10)
  np.testing.assert_allclose(law.factor(0.5), golden["loglog/factor_of_compute_for_half_the_error"], rtol=1e-9)
  np.testing.assert_allclose(law.predict(compute) * 10**law.residuals, error, rtol=1e-12)
  # The band is that of SciPy's own covariance of the coefficients.
  _, covariance = optimize.curve_fit(lambda u, a, b: a + b * u, np.log10(compute), np.log10(error))
  at = np.array([1e16, 1e18, 1e23])
  u = np.stack([np.ones(3), np.log10(at)])
  half = 2.1199052992 * np.sqrt(np.einsum("in,ij,jn->n", u, covariance, u))  # Student's t, 16 degrees of freedom
  lower, upper = law.band(at)
  np.testing.assert_allclose(lower, law.predict(at) / 10**half, rtol=1e-5)
  np.testing.assert_allclose(upper, law.predict(at) * 10**half, rtol=1e-5)


def test_power_law_with_a_floor(golden):
  compute, error = golden["loglog/compute"], golden["saturating/error"]
  law = fit_saturating_law(compute, error, float(golden["saturating/reference_compute"]))
  found = [law.floor, law.scale, law.exponent]
  np.testing.assert_allclose(found, golden["saturating/floor_scale_exponent"], rtol=1e-3)
  squares = float((law.residuals**2).sum())
  np.testing.assert_allclose(squares, golden["saturating/sum_of_squared_log_residuals"], rtol=1e-6)
  np.testing.assert_allclose(np.log(error / law.predict(compute)), law.residuals, atol=1e-12)
  without = fit_saturating_law(compute, compute**-0.1)
  np.testing.assert_allclose([without.floor, without.exponent], [0, 0.1], atol=1e-4)


def test_data_efficiency(golden):
  pairs, method, baseline = (golden[f"efficiency/{name}"] for name in ("pairs", "method", "baseline"))
  found = [data_efficiency(pairs, method[None], p, score[None]) for p, score in zip(pairs, baseline, strict=True)]
  assert golden["efficiency/factor"][0] == golden["efficiency/pairs_that_the_method_needs"][0] == -1
  assert (found[0].pairs, found[0].factor, found[0].interval) == (None, None, None)
  needed = [efficiency.pairs for efficiency in found[1:]]
  np.testing.assert_allclose(needed, golden["efficiency/pairs_that_the_method_needs"][1:], rtol=1e-10)
  factor = [efficiency.factor for efficiency in found[1:]]
  np.testing.assert_allclose(factor, golden["efficiency/factor"][1:], rtol=1e-10)


def test_scores_outside_of_what_was_measured():
  pairs, scores = np.array([1e6, 1e7, 1e8]), np.array([[0.1, 0.3, 0.2]])
  needed = [data_efficiency(pairs, scores, 1e8, np.array([score])).pairs for score in (0.05, 0.1, 0.2, 0.3, 0.31)]
  np.testing.assert_allclose([n or 0 for n in needed], [0, 1e6, 10**6.5, 1e7, 0])
  with pytest.raises(ValueError, match=r"pairs \[2.0, 1.0\] are not two or more increasing"):
    data_efficiency(np.array([2.0, 1.0]), np.ones((1, 2)), 1.0, np.ones(1))


def test_interval_of_data_efficiency():
  """Against all resamples of two seeds each."""
  pairs = np.array([1e6, 1e7, 1e8])
  scores, baseline = np.array([[0.1, 0.3, 0.5], [0.1, 0.34, 0.54]]), np.array([0.3, 0.32])
  found = data_efficiency(pairs, scores, 1e8, baseline, level=0.9)
  means = [(scores[[i, j]].mean(axis=0), baseline[[k, m]].mean()) for i, j, k, m in np.ndindex(2, 2, 2, 2)]
  factors = sorted(1e8 / 10 ** np.interp(target, curve, np.log10(pairs)) for curve, target in means)
  assert found.interval is not None
  np.testing.assert_allclose(found.interval, [factors[0], factors[-1]])  # each with probability 1 / 16
  assert factors[0] < found.factor < factors[-1]
  some = data_efficiency(pairs, scores, 1e8, np.array([0.5, 0.53]))
  assert some.pairs is not None  # the mean of the baseline is reached, but not by every resample
  assert some.interval is not None
  assert some.interval[0] is None
  assert some.interval[1] > some.factor


def test_frontier():
  x, error = np.array([1, 1, 2, 3, 3, 4, 1.0]), np.array([0.5, 0.4, 0.4, 0.3, 0.35, 0.2, 0.4])
  assert frontier(x, error).tolist() == [1, 3, 5]


def test_runs_that_no_law_fits_are_named():
  x = np.array([1.0, 2.0, 3.0, 4.0])
  with pytest.raises(ValueError, match="error has 0.0: expected positive numbers"):
    fit_power_law(x, np.array([0.3, 0.2, 0.1, 0.0]))
  with pytest.raises(ValueError, match="a law needs 3 runs of different x"):
    fit_power_law(x[:2], x[:2])
  with pytest.raises(ValueError, match="a law needs 4 runs"):
    fit_saturating_law(x[:3], x[:3])
  with pytest.raises(ValueError, match="the error grows with x"):
    fit_saturating_law(x, x)
  assert fit_power_law(x, x).factor(0.5) is None
