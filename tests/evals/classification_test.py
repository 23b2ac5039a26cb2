"""Tests of `declip_jax.evals.classification`."""

import json

import numpy as np
import pytest
import references as reference

from declip_jax.evals import catalogue, classification, intervals, metrics
from declip_jax.evals.classification import any_label_scores, several_labels_scores, single_label_scores


@pytest.fixture(scope="module")
def golden():
  return reference.load("evaluation_metrics")


@pytest.fixture(scope="module")
def logits(golden):
  return golden["ties/logits"]


@pytest.fixture(scope="module")
def label(golden):
  return golden["ties/labels"].astype(int)


@pytest.mark.parametrize(
  ("metric", "name"),
  [
    ("top1", "ties/lower_index_first_top1"),
    ("mean_per_class", "absent/mean_per_class_over_present"),
    ("mean_top1_top5", "kinetics/mean_of_top1_top5_of_the_tied_logits"),
    ("macro_f1", "wilds/f1_macro"),
    ("worst_group", "groups/worst_group_of_those_with_examples"),
    ("worst_group_top5", "groups/worst_group_top5"),
  ],
)
def test_the_headline_comes_first_and_has_an_interval(golden, logits, label, metric, name):
  found = single_label_scores(logits, label, metric=metric, group=golden["groups/group"].astype(int))
  assert found.headline == metric
  np.testing.assert_allclose(found.metrics[metric], golden[name], rtol=1e-12)
  lower, upper = found.intervals[metric]
  assert lower < upper
  assert lower < found.metrics[metric]
  assert found.metrics[metric] < upper or metric.startswith("worst")  # the worst of resampled groups is worse
  assert {"top1", "top5", "mean_per_class", "majority_share", "ties", "images"} <= {*found.metrics}
  assert (found.metrics["ties"], found.metrics["images"]) == (golden["ties/rows_with_a_tie_for_first"], 400)


def test_intervals_of_classifiers(golden, logits, label):
  found = single_label_scores(logits, label, row=np.arange(400) + 7)
  assert found.intervals["top1"] == intervals.clopper_pearson(84, 400)
  correct = metrics.predict(logits, label).correct()
  lower, upper = found.intervals["mean_per_class"]
  error = intervals.mean_per_class_error(label, correct)
  np.testing.assert_allclose((upper - lower) / (2 * 1.96), error, rtol=0.05)
  assert found.predictions["row"].tolist() == [*range(7, 407)]
  assert found.predictions["predicted"].dtype == np.int16
  np.testing.assert_array_equal(found.predictions["predicted"], golden["absent/pred"])
  by_class = found.details["accuracy_by_class"]
  assert np.mean([*by_class.values()]) == pytest.approx(found.metrics["mean_per_class"])
  first = found.details["confusions"][0]
  assert first[2] == ((label == first[0]) & (golden["absent/pred"] == first[1])).sum() > 1
  json.dumps(found.details)


def test_classifiers_of_few_classes(logits, label):
  four = single_label_scores(logits[:, :4], label % 4)
  assert "top5" not in four.metrics
  two = single_label_scores(logits[:, :2], label % 2, metric="roc_auc")
  expected = metrics.roc_auc(label % 2 > 0, logits[:, 1] - logits[:, 0])
  np.testing.assert_allclose(two.metrics["roc_auc"], expected, rtol=1e-12)
  with pytest.raises(ValueError, match=r"metric 'roc_auc' needs the columns \['score'\]"):
    single_label_scores(logits, label, metric="roc_auc")
  with pytest.raises(ValueError, match=r"metric 'worst_group' needs the columns \['group'\]"):
    single_label_scores(logits, label, metric="worst_group")
  with pytest.raises(ValueError, match="metric 'recall': choose one of"):
    single_label_scores(logits, label, metric="recall")


def test_several_labels(golden):
  scores, labels = golden["voc/scores"][:, :3], golden["voc/present1_difficult0_absent-1"].astype(np.int8)[:, :3]
  found = several_labels_scores(scores, labels)
  expected = golden["voc/ap11_difficult_left_out"][:3]
  np.testing.assert_allclose(found.metrics["mean_average_precision_11"], expected.mean(), rtol=1e-12)
  np.testing.assert_allclose([*found.details["average_precision_by_class"].values()], expected, rtol=1e-12)
  expected = golden["voc/clipbench_ap_difficult_as_present"][:3].mean()
  np.testing.assert_allclose(found.metrics["mean_average_precision"], expected, atol=5e-4)
  for name in classification.METRICS.keys() & found.metrics.keys():
    lower, upper = found.intervals[name]
    assert lower < found.metrics[name] < upper
  assert found.predictions["labels"].dtype == np.int8


def test_any_of_several_labels_is_right():
  labels = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 0, 1]], bool)
  logits = np.eye(3)[[1, 0, 0, 2, 2]]
  logits[4] = np.nan
  found = any_label_scores(logits, labels, row=np.arange(5))
  assert found.metrics == {"any_label": 2 / 4, "images": 4}
  assert found.predictions["row"].tolist() == [0, 2, 3, 4]
  assert found.intervals["any_label"] == intervals.clopper_pearson(2, 4)


def test_two_classifiers_are_compared_on_the_same_examples(logits, label):
  other = np.random.default_rng(0).permuted(logits, axis=0) + 2 * np.eye(12)[label]
  a = single_label_scores(logits, label).predictions
  b = single_label_scores(other, label).predictions
  values = classification.resample_difference("top1", a, b)
  np.testing.assert_allclose(intervals.percentiles(values), intervals.compare(a["top1"], b["top1"]).interval)
  assert intervals.percentiles(values).upper < 0
  values = classification.resample_difference("mean_per_class", a, b)
  difference = classification.evaluate("mean_per_class", a) - classification.evaluate("mean_per_class", b)
  np.testing.assert_allclose(values.mean(), difference, atol=5e-3)
  apart = [classification.resample("mean_per_class", one, seed) for seed, one in enumerate((a, b))]
  assert values.std() < np.subtract(*apart).std()  # the examples that both have right do not count
  np.testing.assert_array_equal(classification.resample_difference("mean_per_class", a, a), 0)
  with pytest.raises(ValueError, match="the predictions differ in 'label'"):
    classification.resample_difference("top1", a, {**b, "label": b["label"][::-1]})


def test_every_classifier_of_the_catalogue_has_its_metric():
  entries = [
    entry for entry in map(catalogue.data_set, catalogue.keys()) if entry.task in ("classification", "multilabel")
  ]
  named = {entry.metric for entry in entries if entry.metric}
  named |= {suite.metric(entry.key) for suite in catalogue.suites().values() for entry in entries} - {None}
  assert {"top1", "mean_average_precision_11", "roc_auc"} < named <= {*classification.METRICS}
