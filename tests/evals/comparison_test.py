"""Tests of `declip_jax.evals.comparison` against the metrics of scikit-learn and CLIP_benchmark."""

import numpy as np
import pytest
import references as reference

from declip_jax.evals import comparison, intervals, metrics


@pytest.fixture(scope="module")
def golden():
  return reference.load("evaluation_metrics")


def predictions(logits, label):
  found = metrics.predict(logits, label)
  return {"row": np.arange(len(label)), "label": label, "predicted": found.predicted, "rank": found.rank}


@pytest.fixture(scope="module")
def ties(golden):
  stored = predictions(golden["ties/logits"], golden["ties/labels"].astype(int))
  return {**stored, "group": golden["groups/group"].astype(int)}


@pytest.fixture(scope="module")
def voc(golden):
  labels = golden["voc/present1_difficult0_absent-1"].astype(np.int8)
  return {"scores": golden["voc/scores"], "labels": labels}


@pytest.mark.parametrize(
  ("metric", "name"),
  [
    ("top1", "ties/lower_index_first_top1"),
    ("top5", "ties/lower_index_first_top5"),
    ("mean_per_class", "absent/mean_per_class_over_present"),
    ("mean_top1_top5", "kinetics/mean_of_top1_top5_of_the_tied_logits"),
    ("macro_f1", "wilds/f1_macro"),
    ("worst_group", "groups/worst_group_of_those_with_examples"),
    ("worst_group_top5", "groups/worst_group_top5"),
  ],
)
def test_metrics_of_one_label(golden, ties, metric, name):
  value, (lower, upper) = comparison.evaluate(metric, ties), comparison.interval(metric, ties)
  np.testing.assert_allclose(value, golden[name], rtol=1e-12)
  assert lower < min(value, upper)
  assert value < upper or metric.startswith("worst")  # the worst of resampled groups is worse


def test_metric_of_two_classes(golden):
  stored = {"label": golden["auc_with_ties/labels"].astype(int), "score": golden["auc_with_ties/scores"]}
  np.testing.assert_allclose(comparison.evaluate("roc_auc", stored), golden["auc_with_ties/roc_auc"], rtol=1e-12)


def test_metrics_of_several_labels(golden, voc):
  found = comparison.evaluate("mean_average_precision_11", voc)
  np.testing.assert_allclose(found, golden["voc/ap11_difficult_left_out"].mean(), rtol=1e-12)
  found = comparison.evaluate("mean_average_precision", voc)
  np.testing.assert_allclose(found, golden["voc/clipbench_ap_difficult_as_present"].mean(), atol=5e-4)


def test_shares_have_exact_intervals_and_means_are_resampled_within_classes(ties):
  assert comparison.interval("top1", ties) == intervals.clopper_pearson(84, 400)
  lower, upper = comparison.interval("mean_per_class", ties)
  error = intervals.mean_per_class_error(ties["label"], ties["rank"] < 1)
  np.testing.assert_allclose((upper - lower) / (2 * 1.96), error, rtol=0.05)


def test_two_classifiers_are_compared_on_the_same_examples(golden, ties):
  label = ties["label"]
  other = np.random.default_rng(0).permuted(golden["ties/logits"], axis=0) + 2 * np.eye(12)[label]
  better = {**predictions(other, label), "group": ties["group"]}
  values = comparison.resample_difference("top1", ties, better)
  expected = intervals.compare(ties["rank"] < 1, better["rank"] < 1).interval
  np.testing.assert_allclose(intervals.percentiles(values), expected, rtol=1e-12)
  values = comparison.resample_difference("mean_per_class", ties, better)
  difference = comparison.evaluate("mean_per_class", ties) - comparison.evaluate("mean_per_class", better)
  np.testing.assert_allclose(values.mean(), difference, atol=5e-3)
  apart = [comparison.resample("mean_per_class", one, seed) for seed, one in enumerate((ties, better))]
  assert values.std() < np.subtract(*apart).std()  # what both have right makes no difference
  np.testing.assert_array_equal(comparison.resample_difference("mean_per_class", ties, ties), 0)


def test_predictions_that_cannot_be_compared_are_named(ties, voc):
  with pytest.raises(ValueError, match="the predictions differ in 'label'"):
    comparison.resample_difference("top1", ties, {**ties, "label": ties["label"][::-1]})
  with pytest.raises(ValueError, match="the predictions differ in 'row'"):
    comparison.resample_difference("top1", ties, {**ties, "row": ties["row"] + 1})
  with pytest.raises(ValueError, match="metric 'roc_auc' needs the column 'score'"):
    comparison.evaluate("roc_auc", ties)
  with pytest.raises(ValueError, match="metric 'recall': choose one of"):
    comparison.evaluate("recall", voc)
