"""Tests of `declip_jax.evals.probes` and `scoring`: what is trained on which rows, scores, and errors."""

from dataclasses import replace
from typing import Any

from greys import Greys, grey_encoders
import numpy as np
import pytest

from declip_jax.evals import EVALUATORS, metrics, scoring
from declip_jax.evals.features import Split, Texts, make_data
from declip_jax.evals.results import Scores

TRAIN = [(grey, int(grey > 120)) for grey in range(0, 250, 10)]
TEST = [(5, 0), (15, 0), (None, 1), (205, 1), (95, 0), (235, 1), (105, 1), (40, -1)]


def greys(*examples: tuple[int | None, int]) -> Greys:
  return Greys(examples)


def run(kind: str, train: Any = TRAIN, test: Any = TEST, val: Any = None, **options: Any) -> Scores:
  encoders = grey_encoders(8)
  others = {name: Split(greys(*rows), encoders) for name, rows in (("train", train), ("val", val)) if rows is not None}
  data = make_data(encoders, Texts(encoders), Split(greys(*test), encoders), **others)
  return EVALUATORS[kind].function(data, None, **options)


@pytest.mark.parametrize("kind", ["linear_probe", "knn", "nearest_mean"])
def test_a_classifier_of_greys_is_right_but_for_the_dark_odd_one(kind: str) -> None:
  options = {"neighbours": (1, 3, 99), "headline": 3} if kind == "knn" else {}
  # The joint embedding (grey, 3) has a direction, which neighbours compare; the pooled feature is a number.
  scores = run(kind, **options, features="pooled" if kind == "linear_probe" else "joint")
  assert (scores.metrics["images"], scores.metrics["unreadable"]) == (6, 1)
  if kind == "linear_probe":
    assert scores.metrics["top1"] == pytest.approx(5 / 6)
    np.testing.assert_array_equal(scores.predictions["row"], [0, 1, 3, 4, 5, 6])
    np.testing.assert_array_equal(scores.predictions["predicted"], [0, 0, 1, 0, 1, 0])
    assert scores.details["converged"]
    assert len(scores.details["fits"]) >= 13
    low, high = scores.intervals["top1"]
    assert 0.3 < low < 5 / 6 < high < 1
  if kind == "knn":
    assert scores.details["neighbours"] == 3
    assert {"k_1", "k_3"} <= set(scores.metrics)
    assert "k_99" not in scores.metrics


def test_a_probe_sees_the_features_before_the_projection() -> None:
  """Those after it are another answer: greys as numbers all have one direction, (grey, 3) do not."""
  pooled, joint = (run("nearest_mean", features=features).metrics["top1"] for features in ("pooled", "joint"))
  assert run("nearest_mean").metrics["top1"] == pooled != joint


def test_a_validation_split_is_used_or_carved() -> None:
  carved, given = run("linear_probe"), run("linear_probe", val=TRAIN[::3])
  assert carved.details["validation"].startswith("per class, the last 20 %")
  assert given.details["validation"] == "given"


def test_a_head_has_the_rate_that_is_best_on_the_validation_split() -> None:
  scores = run("sgd_probe", rates=(1e-9, 0.1, 1e38), epochs=20, batch_size=8, features="joint")
  assert scores.metrics["images"] == 6
  rates = [rate for rate, _ in scores.details["val_scores"]]
  assert rates == [1e-9, 0.1]  # the last head diverged
  assert scores.details["rate"] in rates
  assert len(scores.details["loss"]) == 20
  assert scores.details["validation"].startswith("per class, the last 20 %")


@pytest.mark.parametrize("method", ["logistic", "ridge"])
def test_few_shots_have_a_mean_and_a_deviation_for_each_number(method: str) -> None:
  scores = run("few_shot", shots=(1, 4, 64), seeds=(0, 1), method=method)
  assert [name for name in scores.metrics if name.startswith("shots")] == ["shots_4", "shots_1"]
  assert scores.details["left_out"] == [64]
  low, high = scores.intervals["shots_4"]
  assert 0 <= low <= scores.metrics["shots_4"] <= high <= 1
  assert scores.metrics["shots_4"] == pytest.approx(np.mean([row[1] for row in scores.details["by_seed"].values()]))
  for column, name in enumerate(("shots_4", "shots_1")):
    assert scores.predictions[f"correct_{name}"].shape == (len(scores.predictions["row"]), 2)
    by_seed = [row[1 - column] for row in scores.details["by_seed"].values()]
    np.testing.assert_allclose(scores.predictions[f"correct_{name}"].mean(axis=0), by_seed)


@pytest.mark.parametrize(
  ("kind", "train", "message"),
  [
    ("linear_probe", [(1, 0), (2, 0), (3, 0)], "a probe needs two classes"),
    ("few_shot", [(1, 0), (2, 0), (3, 0)], "greys: 0 images of 'odd'"),
    ("knn", [(1, 0), (2, 1)], "2 labelled rows; expected at least 10 neighbours"),
    ("nearest_mean", [], "greys has no samples"),
  ],
)
def test_splits_that_cannot_be_used_are_named(kind: str, train: Any, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    run(kind, train)


@pytest.mark.parametrize("kind", ["linear_probe", "few_shot", "knn", "nearest_mean"])
def test_features_that_are_not_finite_are_named(kind: str) -> None:
  encoders = grey_encoders(8)
  broken = replace(encoders, image=lambda images: tuple(x / (x[:, :1] - 30) for x in encoders.image(images)))
  with np.errstate(divide="ignore", invalid="ignore"):
    splits = {"train": Split(greys(*TRAIN), broken)}
    data = make_data(broken, Texts(broken), Split(greys(*TEST), broken), **splits)
    with pytest.raises(ValueError, match=r"train: the features of row \d are not finite"):
      EVALUATORS[kind].function(data, None)


def test_a_test_split_without_labels_is_named() -> None:
  with pytest.raises(ValueError, match="greys: no readable image has a class label"):
    run("nearest_mean", test=[(None, 0), (3, -1)])


LOGITS = np.array([[2.0, 1, 0], [0, 2, 1], [0, 0, 0], [np.nan, np.nan, np.nan], [1, 3, 2], [0, 1, 5]])


def score_of(labels: list[int], **fields: Any) -> Scores:
  """Scores of `LOGITS`, for images of which the last one cannot be read."""
  encoders = grey_encoders(8)
  source = greys(*((None if row == 5 else 10, label) for row, label in enumerate(labels)))
  source.classnames = ("even", "odd", "other")
  data = make_data(encoders, Texts(encoders), Split(source, encoders), **fields)
  return scoring.score(data, LOGITS, {"more": 1})


def test_scores_have_names_of_classes_and_count_what_is_left_out() -> None:
  scores = score_of([0, 1, 0, 2, 2, 1], metric="mean_per_class")
  assert scores.headline == "mean_per_class"
  assert scores.metrics["mean_per_class"] == pytest.approx(2 / 3)
  assert (scores.metrics["images"], scores.metrics["unreadable"], scores.metrics["ties"]) == (5, 1, 1)
  assert scores.predictions["predicted"].tolist() == [0, 1, 0, -1, 1]  # the row of NaN is wrong
  assert scores.details["confusions"] == [["other", "odd", 1]]
  assert scores.details["more"] == 1


@pytest.mark.parametrize(
  ("labels", "metric", "message"),
  [
    ([0, 1, 0, 1, 2, 2], "roc_auc", "greys: metric 'roc_auc' is not defined: there is no 'score'"),
    ([0, 1, 0, 1, 2, 2], "worst_group", "greys: metric 'worst_group' is not defined: there is no 'group'"),
    ([-1] * 6, "top1", "greys: no readable image has a class label"),
    ([3, 0, 0, 0, 0, 0], "top1", "greys: sample 0 has label 3, but there are 3 classes"),
  ],
)
def test_a_metric_that_is_not_defined_is_named(labels: list[int], metric: str, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    score_of(labels, metric=metric)


def test_predictions_of_a_probe_do_not_depend_on_the_batch_size() -> None:
  found = []
  for batch_size in (8, 24):
    encoders = grey_encoders(batch_size)
    splits = {"train": Split(greys(*TRAIN), encoders)}
    data = make_data(encoders, Texts(encoders), Split(greys(*TEST), encoders), **splits)
    found.append(EVALUATORS["nearest_mean"].function(data, None, features="joint").predictions["predicted"])
  np.testing.assert_array_equal(*found)


def test_predictions_are_small_integers_unless_there_are_too_many_classes() -> None:
  classes = 40_000
  for own, dtype in ((np.array([3]), np.int16), (np.array([classes - 1]), np.int32)):
    logits = np.zeros((1, own[0] + 1), np.float32)
    found = scoring._columns(metrics.predict(logits, own), logits)
    assert found["label"].tolist() == own.tolist() == found["rank"].tolist()
    assert found["predicted"].tolist() == [0]
    assert {values.dtype for values in found.values()} == {np.dtype(dtype)}


def test_the_optimizer_of_a_probe_can_be_chosen() -> None:
  options = {"rates": (0.1,), "epochs": 2, "batch_size": 8, "features": "joint"}
  losses = [run("sgd_probe", optimizer=name, **options).details["loss"] for name in ("sgd", "adamw")]
  assert losses[0][0] > 10 > losses[1][0]  # greys are large numbers, unless they are divided by their norm
