"""Tests of `declip_jax.evals.intervals` against SciPy, statsmodels and the ImageNet testbed."""

import numpy as np
import pytest
import references as reference

from declip_jax.evals import intervals, metrics
from declip_jax.evals.intervals import Interval, bootstrap, percentiles


@pytest.fixture(scope="module")
def golden():
  arrays = reference.load("intervals")
  return {name: a.astype(int) if a.dtype.kind in "iu" and a.ndim else a for name, a in arrays.items()}


@pytest.mark.parametrize("alpha", [0.05, 0.005])
def test_intervals_of_proportions(golden, alpha):
  pairs = zip(golden["proportion/successes"], golden["proportion/trials"], strict=True)
  found = np.array([intervals.clopper_pearson(int(k), int(n), 1 - alpha) for k, n in pairs])
  np.testing.assert_allclose(found, golden[f"proportion/clopper_pearson_alpha{alpha}"], rtol=1e-9, atol=1e-12)


def test_none_and_all_of_the_trials():
  assert intervals.clopper_pearson(0, 10).lower == 0
  assert intervals.clopper_pearson(10, 10).upper == 1
  with pytest.raises(ValueError, match="3 successes in 2 trials"):
    intervals.clopper_pearson(3, 2)
  with pytest.raises(ValueError, match="0 successes in 0 trials"):
    intervals.clopper_pearson(0, 0)


def test_intervals_of_the_imagenet_testbed():
  golden = reference.load("robustness")
  found = [intervals.clopper_pearson(int(k), int(n), 0.995) for k, n in golden["accuracy_interval/successes_trials"]]
  np.testing.assert_allclose(found, golden["accuracy_interval/clopper_pearson_99.5"], rtol=1e-9, atol=1e-12)


def test_comparison_of_two_models_on_the_same_examples(golden):
  a, b = golden["paired/correct_a"] > 0, golden["paired/correct_b"] > 0
  index = golden["paired/resample_index"]
  values = bootstrap(lambda a, b, times: metrics.accuracy(a, times) - metrics.accuracy(b, times), a, b, index=index)
  np.testing.assert_allclose(percentiles(values), golden["paired/difference_percentile_2.5_97.5"], rtol=1e-12)
  np.testing.assert_allclose(metrics.accuracy(a) - metrics.accuracy(b), golden["paired/difference"], rtol=1e-12)
  assert ((b & ~a).sum(), (a & ~b).sum()) == (golden["paired/a_wrong_b_right"], golden["paired/a_right_b_wrong"])
  np.testing.assert_allclose(intervals.mcnemar(a, b), golden["paired/mcnemar_exact_p"], rtol=1e-10)
  assert intervals.mcnemar(a, a) == 1
  alone = percentiles(bootstrap(metrics.accuracy, a, index=index))
  np.testing.assert_allclose(alone, golden["paired/accuracy_a_percentile_2.5_97.5"], rtol=1e-12)


def test_mean_per_class_is_resampled_within_classes(golden):
  label, correct = golden["per_class/labels"], golden["paired/correct_a"] > 0
  mean = golden["per_class/mean"]
  np.testing.assert_allclose(metrics.mean_per_class(label, correct), mean, rtol=1e-12)
  index = golden["per_class/resample_index_within_classes"]
  found = percentiles(bootstrap(metrics.mean_per_class, label, correct, index=index))
  np.testing.assert_allclose(found, golden["per_class/percentile_2.5_97.5"], rtol=1e-12)
  values = bootstrap(metrics.mean_per_class, label, correct, within=label)
  np.testing.assert_allclose(values.std(), golden["per_class/standard_error"], rtol=0.05)
  totals = bootstrap(lambda label, times: metrics.accuracy(label == 2, times), label, within=label)
  np.testing.assert_allclose(totals, (label == 2).mean())  # as many of each class in every resample


def test_images_are_resampled_with_their_captions(golden):
  images = golden["cluster/resample_images"].shape[1]
  trials = np.bincount(golden["cluster/owner"], minlength=images)
  hits = np.bincount(golden["cluster/owner"], golden["cluster/hit"], minlength=images).astype(int)
  recall = float(intervals.ratio(hits, trials, np.ones(images, int)))
  np.testing.assert_allclose(recall, golden["cluster/recall"], rtol=1e-12)
  found = percentiles(bootstrap(intervals.ratio, hits, trials, index=golden["cluster/resample_images"]))
  np.testing.assert_allclose(found, golden["cluster/percentile_2.5_97.5"], rtol=1e-12)


def test_roc_auc_is_resampled(golden):
  label, score = golden["auc/labels"] > 0, golden["auc/scores"]
  np.testing.assert_allclose(metrics.roc_auc(label, score), golden["auc/roc_auc"], rtol=1e-12)
  index = golden["paired/resample_index"][: golden["auc/resamples_used"]]
  found = percentiles(bootstrap(metrics.roc_auc, label, score, index=index))
  np.testing.assert_allclose(found, golden["auc/percentile_2.5_97.5_of_first_resamples"], rtol=1e-12)


def test_random_resamples_depend_on_nothing_but_the_seed(golden, monkeypatch):
  label, score = golden["auc/labels"] > 0, golden["auc/scores"]
  values = bootstrap(metrics.roc_auc, label, score)
  assert len(values) == 2000
  order = np.random.default_rng(1).permutation(len(label))
  np.testing.assert_array_equal(bootstrap(metrics.roc_auc, label[order], score[order]), values)
  monkeypatch.setattr(intervals, "_BLOCK", 10_000)
  np.testing.assert_array_equal(bootstrap(metrics.roc_auc, label, score), values)
  assert not np.array_equal(bootstrap(metrics.roc_auc, label, score, seed=(0, 1)), values)
  negative, positive = score[~label][:, None], score[label]
  below = (negative < positive) + (negative == positive) / 2  # DeLong et al. 1988
  error = np.sqrt(below.mean(axis=0).var(ddof=1) / label.sum() + below.mean(axis=1).var(ddof=1) / (~label).sum())
  np.testing.assert_allclose(values.std(), error, rtol=0.05)


def test_random_resamples_of_a_proportion_are_binomial():
  correct = np.arange(50_000) % 4 > 0
  values = bootstrap(metrics.accuracy, correct)
  np.testing.assert_allclose(values.mean(), 0.75, atol=2e-4)
  np.testing.assert_allclose(values.std(), np.sqrt(0.75 * 0.25 / 50_000), rtol=0.05)
  labels = np.array([[1, -1], [-1, 1], [1, 0]] * 20, np.int8)
  scores = np.arange(120.0).reshape(60, 2) % 7
  mean = bootstrap(lambda labels, scores, times: metrics.mean_average_precision(labels, scores, times=times),
    labels, scores, resamples=9)  # fmt: skip
  assert mean.shape == (9,)
  assert 0.3 < mean.min() < mean.max() < 1


def test_resamples_without_a_value_are_left_out():
  assert percentiles(np.array([np.nan, 1.0, 2.0, 3.0]), 0.5) == (1.5, 2.5)
  with pytest.raises(ValueError, match="undefined on all 2 resamples"):
    percentiles(np.full(2, np.nan))
  with pytest.raises(ValueError, match="no example to resample"):
    bootstrap(metrics.accuracy, np.zeros(0, bool))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_runs_with_several_seeds(golden, seeds):
  a, b = golden[f"seeds{seeds}/a"], golden[f"seeds{seeds}/b"]
  np.testing.assert_allclose(intervals.student(a), golden[f"seeds{seeds}/t_interval_95_of_a"], rtol=1e-10)
  found = intervals.welch(a, b)
  np.testing.assert_allclose(found.p, golden[f"seeds{seeds}/welch_p"], rtol=1e-10)
  np.testing.assert_allclose(found.interval, golden[f"seeds{seeds}/welch_interval_95_of_a_minus_b"], rtol=1e-10)
  np.testing.assert_allclose(found.difference, a.mean() - b.mean())


def test_runs_that_are_equal_or_too_few():
  with pytest.raises(ValueError, match="1 run: an interval over seeds needs at least two"):
    intervals.student(np.array([0.5]))
  with pytest.raises(ValueError, match="1 run"):
    intervals.welch(np.array([0.5, 0.6]), np.array([0.5]))
  half, third = np.array([0.5, 0.5]), np.array([0.25, 0.25])
  assert intervals.welch(half, half) == (0, Interval(0, 0), 1)
  assert intervals.welch(half, third) == (0.25, Interval(0.25, 0.25), 0)


def test_p_values_of_many_data_sets():
  p = np.array([0.04, 0.01, 0.03, 0.5])
  np.testing.assert_allclose(intervals.bonferroni(p), [0.16, 0.04, 0.12, 1])
  np.testing.assert_allclose(intervals.holm(p), [0.09, 0.04, 0.09, 0.5])  # R: p.adjust(p, "holm")
