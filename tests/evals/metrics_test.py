"""Tests of `declip_jax.evals.metrics` against scikit-learn, SLIP and CLIP_benchmark."""

import numpy as np
import pytest
import references as reference
from scipy.special import softmax

from declip_jax.evals import metrics
from declip_jax.evals.metrics import accuracy, mean_average_precision, predict


@pytest.fixture(scope="module")
def golden():
  return reference.load("evaluation_metrics")


@pytest.fixture(scope="module")
def ties(golden):
  return predict(golden["ties/logits"], golden["ties/labels"])


def test_equal_logits_are_answered_in_the_order_of_classes(golden, ties):
  assert accuracy(ties.correct()) == golden["ties/lower_index_first_top1"]
  assert accuracy(ties.correct(5)) == golden["ties/lower_index_first_top5"]
  assert golden["ties/against_the_model_top1"] < accuracy(ties.correct())  # the rule makes a difference
  assert ties.tied.sum() == golden["ties/rows_with_a_tie_for_first"]
  np.testing.assert_array_equal(ties.predicted, golden["absent/pred"])
  np.testing.assert_array_equal(ties.predicted == ties.label, ties.correct())
  mean = (accuracy(ties.correct()) + accuracy(ties.correct(5))) / 2
  np.testing.assert_allclose(mean, golden["kinetics/mean_of_top1_top5_of_the_tied_logits"], rtol=1e-12)


def test_classes_that_are_only_predicted_do_not_count(golden, ties):
  assert golden["absent/slip_mean_per_class_is_nan"]
  found = metrics.mean_per_class(ties.label, ties.correct())
  np.testing.assert_allclose(found, golden["absent/mean_per_class_over_present"], rtol=1e-12)
  np.testing.assert_allclose(found, golden["absent/sklearn_balanced_accuracy"], rtol=1e-12)
  np.testing.assert_allclose(found, golden["wilds/recall_macro"], rtol=1e-12)
  np.testing.assert_allclose(metrics.macro_f1(ties.label, ties.predicted), golden["wilds/f1_macro"], rtol=1e-12)
  np.testing.assert_allclose(accuracy(ties.correct()), golden["wilds/accuracy"], rtol=1e-12)
  # With a class before the others that does not occur.
  np.testing.assert_allclose(metrics.mean_per_class(ties.label + 1, ties.correct()), found, rtol=1e-12)
  np.testing.assert_allclose(metrics.macro_f1(ties.label + 1, ties.predicted + 1), golden["wilds/f1_macro"], rtol=1e-12)
  by_class = metrics.accuracy_by(ties.label, ties.correct())
  assert [*by_class] == [*np.unique(ties.label)]
  np.testing.assert_allclose(np.mean([*by_class.values()]), found, rtol=1e-12)


def test_groups_without_examples_never_count(golden, ties):
  group = golden["groups/group"].astype(int)
  found = metrics.accuracy_by(group, ties.correct())
  present = np.flatnonzero(golden["groups/count_per_group"])
  assert [*found] == [*present] == [0, 2, 3, 4]
  np.testing.assert_allclose([*found.values()], golden["groups/accuracy_per_group"][present], rtol=1e-12)
  worst = metrics.worst_group(group, ties.correct())
  np.testing.assert_allclose(worst, golden["groups/worst_group_of_those_with_examples"], rtol=1e-12)
  others = np.where(group == golden["groups/other_group"], -1, group)
  np.testing.assert_allclose(
    metrics.worst_group(others, ties.correct()), golden["groups/worst_without_the_other_group"], rtol=1e-12
  )
  np.testing.assert_allclose(metrics.worst_group(group, ties.correct(5)), golden["groups/worst_group_top5"], rtol=1e-12)
  with pytest.raises(ValueError, match="no example has a group"):
    metrics.worst_group(np.full(3, -1), np.ones(3, bool))


def test_top5_of_at_most_five_classes_is_1(golden, ties):
  few = predict(golden["ties/logits"][:, :4], ties.label % 4)
  assert accuracy(few.correct(5)) == golden["classes_fewer_than_5/top5"] == 1
  five = predict(golden["ties/logits"][:, :5], ties.label % 5)
  assert accuracy(five.correct(5)) == 1


def test_logits_that_are_not_numbers_are_wrong():
  logits = np.full((4, 3), np.nan)
  logits[1, 1:] = 1, 2
  logits[2] = 0, np.nan, 1
  found = predict(logits, np.array([0, 2, 1, 2]))
  assert found.predicted.tolist() == [-1, 2, 2, -1]
  assert found.rank.tolist() == [3, 0, 3, 3]
  assert accuracy(found.correct()) == 0.25
  assert metrics.confusions(found.label, found.predicted) == [(1, 2, 1)]
  np.testing.assert_allclose(metrics.macro_f1(found.label, found.predicted), (0 + 0 + 2 / 4) / 3)


def test_labels_that_are_not_classes_are_named():
  with pytest.raises(ValueError, match="label -1: expected one of the 3 classes 0 to 2"):
    predict(np.eye(3), np.array([0, -1, 2]))
  with pytest.raises(ValueError, match="label 3"):
    predict(np.eye(3), np.array([0, 3, 2]))
  with pytest.raises(ValueError, match="no example has a label"):
    predict(np.zeros((0, 3)), np.zeros(0, int))
  with pytest.raises(ValueError, match="no example is undefined"):
    accuracy(np.zeros(0, bool))


def test_a_restricted_classifier_answers_only_its_classes(golden):
  logits, ids = golden["subset/logits_of_all_classes"], golden["subset/class_ids"].astype(int)
  label = golden["subset/labels_within_subset"].astype(int)
  assert accuracy(predict(logits, ids[label]).correct()) == golden["subset/top1_unrestricted"]
  found = predict(metrics.merge_classes(logits, ids[:, None].tolist()), label)
  assert accuracy(found.correct()) == golden["subset/top1_restricted"]
  assert accuracy(found.correct(5)) == golden["subset/top5_restricted"]


def test_the_score_of_several_classes_is_the_largest(golden):
  logits, ids = golden["subset/logits_of_all_classes"], golden["mapped/imagenet_ids_per_class"].astype(int)
  label = golden["mapped/labels"].astype(int)
  members = [own[own >= 0].tolist() for own in ids]
  found = predict(metrics.merge_classes(logits, members), label)
  np.testing.assert_allclose(accuracy(found.correct()), golden["mapped/top1_max_over_mapped"], rtol=1e-12)
  members = [*([number for number in own if number != 39] for own in members), (), ()]
  merged = metrics.merge_classes(logits, members)  # of two classes without any of the classifier's
  np.testing.assert_array_equal(merged[:, 4], logits[:, [21, 30]].max(axis=1))
  assert predict(merged, label).predicted.max() == 4


def test_any_of_several_labels_is_right():
  labels = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1]], bool)
  assert metrics.any_label_correct(labels, np.array([1, 0, 0, -1])).tolist() == [True, False, False, False]


def test_confusions_are_sorted_by_number():
  label, predicted = np.array([2, 2, 0, 0, 1, 2, 1]), np.array([1, 1, 1, 2, 1, 2, 0])
  found = predict(np.eye(3)[predicted], label)
  assert metrics.confusions(found.label, found.predicted) == [(2, 1, 2), (0, 1, 1), (0, 2, 1), (1, 0, 1)]


def test_roc_auc_equals_slip_and_scikit_learn(golden):
  logits, label = golden["auc/logits"], golden["auc/labels"] > 0
  difference = logits[:, 1] - logits[:, 0]
  np.testing.assert_allclose(100 * metrics.roc_auc(label, difference), golden["auc/slip_roc_auc_percent"], rtol=1e-10)
  np.testing.assert_allclose(
    100 * metrics.roc_auc(label, golden["auc/tied_scores"]), golden["auc/tied_roc_auc_percent"], rtol=1e-10
  )
  label, score = golden["auc_with_ties/labels"] > 0, golden["auc_with_ties/scores"]
  np.testing.assert_allclose(metrics.roc_auc(label, score), golden["auc_with_ties/roc_auc"], rtol=1e-12)
  np.testing.assert_allclose(
    metrics.average_precision(label, score), golden["auc_with_ties/average_precision"], rtol=1e-12
  )


def test_scores_of_nan_rank_on_the_wrong_side():
  label, score = np.array([0, 1, 0, 1], bool), np.array([0.0, 1.0, np.nan, np.nan])
  assert metrics.roc_auc(label, score) == 1 / 4
  assert metrics.average_precision(label, score) == (1 / 2 + 2 / 4) / 2
  with pytest.raises(ValueError, match="all 2 examples are positive"):
    metrics.roc_auc(np.ones(2, bool), np.zeros(2))
  with pytest.raises(ValueError, match="none of 2 examples is positive"):
    metrics.average_precision_11(np.zeros(2, bool), np.zeros(2))


def by_class(labels, scores, average):
  return [*metrics.average_precision_by_class(labels.astype(np.int8), scores, average=average).values()]


def test_average_precision_of_several_labels(golden):
  scores, labels = golden["multilabel/scores"], 2 * golden["multilabel/targets"] - 1
  eleven = metrics.average_precision_11
  np.testing.assert_allclose(by_class(labels, scores, eleven), golden["multilabel/voc11_ap_per_class"], rtol=1e-12)
  np.testing.assert_allclose(mean_average_precision(labels, scores), golden["multilabel/voc11_map"], rtol=1e-12)
  found = by_class(labels, scores, metrics.average_precision)
  np.testing.assert_allclose(found, golden["multilabel/sklearn_ap_per_class"], rtol=1e-12)
  np.testing.assert_allclose(found, golden["multilabel/clipbench_ap_per_class"], atol=1e-6)
  found = mean_average_precision(labels, scores, average=metrics.average_precision)
  np.testing.assert_allclose(found, golden["multilabel/clipbench_map"], atol=1e-6)
  after = softmax(scores.astype(np.float64), axis=1)
  np.testing.assert_allclose(
    mean_average_precision(labels, after), golden["multilabel/voc11_map_after_softmax"], rtol=1e-12
  )


def test_three_treatments_of_difficult_objects(golden):
  scores, labels = golden["voc/scores"], golden["voc/present1_difficult0_absent-1"].astype(np.int8)
  present, absent = np.where(labels == 0, 1, labels), np.where(labels == 0, -1, labels)
  eleven, average = metrics.average_precision_11, metrics.average_precision
  for treated, name in ((labels, "left_out"), (present, "as_present"), (absent, "as_absent")):
    np.testing.assert_allclose(by_class(treated, scores, eleven), golden[f"voc/ap11_difficult_{name}"], rtol=1e-12)
  expected = golden["voc/average_precision_difficult_left_out"]
  np.testing.assert_allclose(by_class(labels, scores, average), expected, rtol=1e-12)
  # CLIP_benchmark orders equal scores, of which each class has about twenty, arbitrarily.
  expected = golden["voc/clipbench_ap_difficult_as_present"]
  np.testing.assert_allclose(by_class(present, scores, average), expected, atol=5e-4)


def test_classes_without_a_positive_have_no_average_precision():
  labels, scores = np.array([[1, 0], [-1, -1]]), np.array([[1.0, 1.0], [0.0, 0.0]])
  assert [*metrics.average_precision_by_class(labels, scores)] == [0]
  assert mean_average_precision(labels, scores) == 1
  with pytest.raises(ValueError, match="none of 2 classes has a positive example"):
    mean_average_precision(-np.ones((3, 2), int), np.zeros((3, 2)))


def test_examples_that_count_several_times(golden, ties):
  """Each metric with `times` equals the metric of repeated examples."""
  rng = np.random.default_rng(0)
  times = rng.multinomial(400, np.full(400, 1 / 400), size=3)
  rows = [np.repeat(np.arange(400), row) for row in times]
  group = golden["groups/group"].astype(int)
  cases = [
    (accuracy, ties.correct()),
    (metrics.mean_per_class, ties.label, ties.correct()),
    (metrics.macro_f1, ties.label, ties.predicted),
    (metrics.worst_group, group, ties.correct()),
  ]
  present, score = golden["auc_with_ties/labels"] > 0, golden["auc_with_ties/scores"]
  cases += [(metrics.roc_auc, present, score), (metrics.average_precision, present, score)]
  cases.append((metrics.average_precision_11, present, np.sort(golden["subset/logits_of_all_classes"][:, 0])))
  for metric, *columns in cases:
    expected = [metric(*(column[row] for column in columns)) for row in rows]
    np.testing.assert_allclose(metric(*columns, times), expected, rtol=1e-12, err_msg=metric.__name__)
    assert len({*map(float, expected)}) == 3
  labels, scores = golden["voc/present1_difficult0_absent-1"].astype(np.int8), golden["voc/scores"]
  scores = scores + 1e-3 * np.arange(300)[:, None] / 300  # no ties
  expected = [
    mean_average_precision(labels[row], scores[row]) for row in (np.repeat(np.arange(300), t[:300]) for t in times)
  ]
  np.testing.assert_allclose(mean_average_precision(labels, scores, times=times[:, :300]), expected, rtol=1e-12)


def test_resamples_that_lack_a_class_have_no_value():
  present, score, times = np.array([True, False]), np.array([1.0, 0.0]), np.array([[1, 1], [0, 2], [2, 0]])
  np.testing.assert_array_equal(metrics.roc_auc(present, score, times), [1, np.nan, np.nan])
  np.testing.assert_array_equal(metrics.average_precision(present, score, times), [1, np.nan, 1])
  np.testing.assert_array_equal(metrics.average_precision_11(present, score, times), [1, np.nan, 1])
  labels, scores = np.array([[1, -1], [-1, 1]]), np.stack([score, score], axis=1)
  np.testing.assert_array_equal(mean_average_precision(labels, scores, times=times), [0.75, 1, 1])
  labels[1] = -1
  np.testing.assert_array_equal(mean_average_precision(labels, scores, times=times), [1, np.nan, 1])
  assert np.isnan(metrics.worst_group(np.array([0, -1]), present, times)[1])


def test_metrics_of_predictions(golden, ties):
  group = golden["groups/group"].astype(int)
  stored = {"label": ties.label, "predicted": ties.predicted, "rank": ties.rank, "group": group}
  expected = {
    "top1": "ties/lower_index_first_top1",
    "top5": "ties/lower_index_first_top5",
    "mean_per_class": "absent/mean_per_class_over_present",
    "mean_top1_top5": "kinetics/mean_of_top1_top5_of_the_tied_logits",
    "macro_f1": "wilds/f1_macro",
    "worst_group": "groups/worst_group_of_those_with_examples",
    "worst_group_top5": "groups/worst_group_top5",
  }
  cases = [(metric, stored, golden[name]) for metric, name in expected.items()]
  two = {"label": golden["auc_with_ties/labels"].astype(int), "score": golden["auc_with_ties/scores"]}
  cases.append(("roc_auc", two, golden["auc_with_ties/roc_auc"]))
  voc = {"labels": golden["voc/present1_difficult0_absent-1"].astype(np.int8), "scores": golden["voc/scores"]}
  cases.append(("mean_average_precision_11", voc, golden["voc/ap11_difficult_left_out"].mean()))
  for metric, predictions, value in cases:
    function, columns, _ = metrics.PREDICTION_METRICS[metric]
    np.testing.assert_allclose(function(*columns(predictions)), value, rtol=1e-12, err_msg=metric)
  function, columns, _ = metrics.PREDICTION_METRICS["mean_average_precision"]
  expected = golden["voc/clipbench_ap_difficult_as_present"].mean()
  np.testing.assert_allclose(function(*columns(voc)), expected, atol=5e-4)
