"""Tests of `declip_jax.evals.classify`: labels by name, and errors."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from declip_jax.data.images import EvalView
from declip_jax.evals import mistakes
from declip_jax.evals.catalogue import data_set
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


def test_labels_are_compared_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  """The data has its classes in another order than the model, and not all of them."""
  drawn: list[Any] = []
  monkeypatch.setattr(mistakes, "plot_examples", lambda title, found, path: drawn.append((found, path)))
  ours = ("Owl", "cat")
  scores = classify(data([ours.index("cat"), -1, ours.index("Owl"), ours.index("cat")], classnames=ours), None)
  assert scores.metrics["top1"] == pytest.approx(2 / 3)  # the last one is an owl
  assert scores.metrics["images"] == 3
  assert classify(data([0, 1, 2, 2]), None).metrics["top1"] == 1
  assert not drawn
  classify(data([0, 1, 2, 1]), tmp_path / "x.png")
  (((caption, images),), path) = drawn[0]
  assert (caption, path, images[0][0, 0, 0]) == ("dog, taken for owl: 1", tmp_path / "x.png", 2)


def test_classes_are_matched_by_number_only_if_neither_side_has_names() -> None:
  scores = classify(data([1, 0, 2, 2], classnames=(), theirs=()), None)
  assert scores.metrics["top1"] == 0.5
  assert scores.details["classes"].startswith("by number: neither the model nor the data has names")


def source(classnames: Sequence[str], classes: Sequence[int] | None = None) -> SimpleNamespace:
  return SimpleNamespace(source=Images([], tuple(classnames)), classes=None if classes is None else np.array(classes))


def test_other_names_of_the_catalogue_are_those_of_the_classes() -> None:
  eurosat, imagenet = data_set("eurosat"), data_set("imagenet")
  folders = sorted(["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture"])
  folders += ["PermanentCrop", "Residential", "River", "SeaLake"]
  found = columns(source([]), eurosat.classes, folders, "eurosat", "x")
  assert folders[found[eurosat.classes.index("annual crop land")][0]] == "AnnualCrop"
  assert folders[found[eurosat.classes.index("lake or sea")][0]] == "SeaLake"
  order = np.random.default_rng(0).permutation(1000)
  folders = [imagenet.folders[k] for k in order]
  for key in ("imagenet", "imagenet_sketch", "imagenet_v2"):
    found = columns(source([]), imagenet.classes, folders, key, "x")
    np.testing.assert_array_equal(np.ravel(found), np.argsort(order))


@pytest.mark.parametrize("names", ["classes", "folders"])
@pytest.mark.parametrize("more", [(), ("n99999999", "n99999998")])
def test_a_model_of_imagenet_answers_the_classes_of_a_shift(names: str, more: tuple[str, ...]) -> None:
  """With two classes named missile and two named sunglasses, or with WordNet ids, be there more or not."""
  theirs = (*getattr(data_set("imagenet"), names), *more)
  for key in ("imagenet_r", "imagenet_a", "objectnet", "imagenet_on_r", "imagenet_on_a", "imagenet_on_objectnet"):
    data = data_set(key)
    found = columns(source([]), data.classes, theirs, key, "x")
    assert [set(ids) for ids in found] == [set(ids) for ids in data.parent_ids], key
  with pytest.raises(
    ValueError, match=r"x: the names of the model's 1\d\d\d classes .* onto the 37 of pets; only in the"
  ):
    columns(source([]), data_set("pets").classes, theirs, "pets", "x")


def test_one_of_several_classes_of_imagenet_does_not_stand_for_a_merged_one() -> None:
  """The folders of ObjectNet's entry have the WordNet id of the first class of each."""
  objectnet = data_set("objectnet")
  theirs = (*objectnet.folders, "n99999999")
  with pytest.raises(ValueError, match=r"the model's 114 classes .* onto the 1000 of imagenet; only"):
    columns(source([]), objectnet.classes, theirs, "objectnet", "x")


def test_numbers_of_the_same_source_are_the_same_classes() -> None:
  """Folders with numbers have the order of the catalogue for folders, which a model does not tell."""
  numbers, flowers = [str(number) for number in range(1, 103)], data_set("flowers")
  classes = np.random.default_rng(0).permutation(102)
  found = columns(source(numbers, classes.tolist()), flowers.classes, numbers, "flowers", "x")
  np.testing.assert_array_equal(np.ravel(found), np.argsort(classes))
  with pytest.raises(ValueError, match="x: the names of the model's 102 classes do not map one to one"):
    columns(source([]), flowers.classes, numbers, "flowers", "x")


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"label": [0, 1, 1, 1], "classnames": ("cat", "cow")}, "only in the model: 'dog', 'owl'; only in greys: 'cow'"),
    (
      {"label": [0, 0, 0, 0], "classnames": ("dog", "cat"), "theirs": ("cat", "cat", "dog")},
      "only in the model: 'cat'; only",
    ),
    (
      {"label": [0, 1, 2, 2], "theirs": ()},
      r"of the model have no names, .* cat, dog, owl, .*--settings=\"heads.classnames=\(",
    ),
    (
      {"label": [0, 1, 2, 2], "theirs": (*NAMES, "elk")},
      "heads.classnames has 4 names, but the classifier of the model 3",
    ),
    ({"label": [0, 1, 2, 2], "classnames": ()}, "the classes of the data have no names, .*classnames.txt"),
    (
      {"label": [0, 3, 0, 0], "classnames": (), "theirs": ()},
      "greys has more classes than the classifier, which has 3",
    ),
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
