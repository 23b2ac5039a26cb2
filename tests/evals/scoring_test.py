"""Tests of `declip_jax.evals.scoring`: the metric of every data set, and data without a single score."""

from dataclasses import replace

from greys import Greys, grey_encoders
import numpy as np
import pytest

from declip_jax.evals import catalogue
from declip_jax.evals.features import EvaluationData, Features, Split
from declip_jax.evals.scoring import criterion, score
from declip_jax.evals.similarity import cosines

IMAGES = 24
METRICS = {catalogue.suite(name).metric(key) for name in catalogue.suites() for key in catalogue.suite(name).keys}
DATA_SETS = [catalogue.data_set(key) for key in sorted(catalogue.keys())]
METRICS |= {data.metric for data in DATA_SETS}
OF_PAIRS = {"mean_recall@1", "jaccard", "accuracy", "group_score"}  # of retrieval and composition


def make_data(metric: str, classes: int, labels: np.ndarray | None = None) -> EvaluationData:
  """The test split of a data set, half of whose images are of one group."""
  label = np.arange(IMAGES, dtype=np.int32) % classes
  groups = {"region": (np.arange(IMAGES) // 12).astype(np.int32)}
  rows = np.zeros((IMAGES, 1), np.float32)
  texts = (["id"] * IMAGES, np.ones(IMAGES, bool), [()] * IMAGES, [""] * IMAGES)
  features = Features(rows, None, label, labels, groups, *texts)
  source, names = Greys([(0, 0)] * IMAGES), tuple(f"class {index}" for index in range(classes))
  source.classnames = names
  test = Split(source, grey_encoders(8), encode=lambda *_: features)
  return EvaluationData(test, lambda texts: rows, cosines, classnames=names, metric=metric, grouping="region")


@pytest.mark.parametrize("metric", sorted(METRICS - OF_PAIRS - {None}))
def test_every_metric_of_the_catalogue_comes_first_and_is_that_of_right_and_of_wrong_answers(metric: str) -> None:
  several = metric.startswith("mean_average_precision") or metric == "any_label"
  classes = 2 if metric == "roc_auc" else 6
  right = np.eye(classes, dtype=np.float32)[np.arange(IMAGES) % classes]
  data = make_data(metric, classes, np.where(right > 0, 1, -1).astype(np.int8) if several else None)
  found = score(data, right)
  assert (found.headline, found.metrics[metric]) == (metric, 1.0)
  assert metric in found.intervals
  assert score(data, -right).metrics[metric] < 0.5
  label = data.test.label if data.test.labels is None else data.test.labels
  assert criterion(metric)(right, label) == 1.0


def test_a_result_says_that_the_labels_mark_no_object_as_difficult() -> None:
  labels = np.where(np.eye(6)[np.arange(IMAGES) % 6] > 0, 1, -1).astype(np.int8)
  marked = labels.copy()
  marked[0, 3] = 0
  for own, has_difficult, expected in ((labels, True, True), (labels, False, False), (marked, True, False)):
    data = replace(make_data("mean_average_precision_11", 6, own), has_difficult=has_difficult)
    details = score(data, labels.astype(np.float32)).details
    assert ("no object as difficult" in details.get("remark", "")) == expected
  assert [data.key for data in DATA_SETS if data.has_difficult] == ["voc2007"]


def test_data_without_a_single_score_have_those_of_their_groups() -> None:
  assert [data.key for data in DATA_SETS if data.metric is None] == ["fairface", "utkface"]
  data = make_data("", 6)
  right = np.eye(6, dtype=np.float32)[data.test.label]
  right[12:] = 1 - right[12:]
  found = score(data, right)
  assert found.headline == "top1"
  assert found.metrics["top1"] == 0.5
  assert found.details["accuracy_by_region"] == {0: 1.0, 1: 0.0}
  assert found.details["images_by_region"] == {0: 12, 1: 12}


def test_a_metric_that_does_not_exist_and_labels_of_other_classes_are_named() -> None:
  with pytest.raises(ValueError, match="greys: metric 'acc1' is not one of a classifier, top1"):
    score(make_data("acc1", 6), np.eye(6, dtype=np.float32)[np.arange(IMAGES) % 6])
  data = make_data("mean_average_precision", 6, np.ones((IMAGES, 3), np.int8))
  with pytest.raises(ValueError, match="greys: its images have labels for 3 classes; expected 6"):
    score(data, np.zeros((IMAGES, 6), np.float32))
