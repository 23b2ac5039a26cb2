"""Tests of `declip_jax.evals.classify`: labels by name, and errors."""

from typing import Any

import numpy as np
import pytest

from declip_jax.data.images import EvalView
from declip_jax.evals.classify import classify, columns
from declip_jax.evals.encoders import Encoders, ModelClassifier
from declip_jax.evals.features import EvaluationData, Split, Texts, make_data

NAMES = ("cat", "dog", "owl")


class Images(list):
  """Labels of images of which each shows the class with its number; the last one shows an owl, too."""

  name, skipped, left_out, stamp = "greys", {}, {}, "1"

  def __init__(self, labels: list[int], classnames: tuple[str, ...]):
    super().__init__(labels)
    self.classnames = classnames

  def __getitem__(self, index: int) -> dict[str, Any]:
    pixels = np.full((8, 8, 3), min(index, 2), np.uint8)
    return {"image": pixels, "captions": (), "label": super().__getitem__(index), "id": str(index)}


def data(label: list[int], classnames: tuple[str, ...] = NAMES, theirs: tuple[str, ...] = NAMES) -> EvaluationData:
  """Four images and a classifier that recognises what they show."""
  encoders = Encoders(
    image=lambda images: (images[:, 0, 0, :1].astype(np.float32), None),
    text=lambda tokens: tokens,
    tokenizer=lambda texts: np.zeros((1, 1)),
    view=EvalView(8),
    batch_size=4,
    batch_rows=np.arange(4),
    classifier=ModelClassifier(lambda pooled: np.eye(3, dtype=np.float32)[pooled[:, 0].astype(int)], theirs),
  )
  return make_data(encoders, Texts(encoders), Split(Images(label, classnames), encoders))


def test_labels_are_compared_by_name() -> None:
  """The data has its classes in another order than the model, and not all of them."""
  ours = ("Owl", "cat")
  scores = classify(data([ours.index("cat"), -1, ours.index("Owl"), ours.index("cat")], classnames=ours), None)
  assert scores.metrics["top1"] == pytest.approx(2 / 3)  # the last one is an owl
  assert scores.metrics["images"] == 3
  assert classify(data([0, 1, 2, 2]), None).metrics["top1"] == 1
  assert classify(data([1, 0, 2, 2], classnames=()), None).metrics["top1"] == 0.5  # without names by number
  np.testing.assert_array_equal(columns(ours, NAMES, "x"), [2, 0])


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"label": [0, 1, 1, 1], "classnames": ("cat", "cow")}, "greys has classes that the model does not have: cow"),
    ({"label": [0, 0, 0, 0], "classnames": ("dog", "cat"), "theirs": ("cat", "cat", "dog")}, "two classes of one name"),
    ({"label": [0, 3, 0, 0], "classnames": ()}, "greys has more classes than the classifier, which has 3"),
    ({"label": [-1, -1, -1, -1]}, "greys: no readable image has a class label"),
  ],
)
def test_data_that_does_not_fit_is_rejected(given: dict[str, Any], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    classify(data(**given), None)


def test_a_model_without_classifier_is_rejected() -> None:
  given = data([0, 1, 2, 2])
  object.__setattr__(given, "classifier", None)
  with pytest.raises(ValueError, match="no classifier"):
    classify(given, None)
