"""Data at the edges: each task has a defined result, or an error of one line that says what is wrong; never a NaN."""

from collections.abc import Mapping, Sequence
import functools
import json
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from tiers import slow_except

from declip_jax.data.images import EvalView
from declip_jax.evals import EVALUATORS, linear_probe
from declip_jax.evals.encoders import Encoders, ModelClassifier
from declip_jax.evals.features import Split, Texts, make_data
from declip_jax.evals.results import Result

BROKEN, NAN = None, 77  # an image that cannot be read, and a grey of which all features are NaN
Image = tuple[int | None, int]  # grey and class
DARK, BRIGHT = [(grey, 0) for grey in (10, 20, 30)], [(grey, 1) for grey in (220, 230, 240)]
TRAIN = [(grey, 0) for grey in range(0, 60, 6)] + [(grey, 1) for grey in range(190, 250, 6)]


class Case(NamedTuple):
  """Images of the splits, names of the classes, and, by task, the score or a part of the error; "" for all others."""

  expected: Mapping[str, float | str]
  test: Sequence[Image] = (*DARK, *BRIGHT)
  train: Sequence[Image] = tuple(TRAIN)
  classnames: Sequence[str] = ("dark", "bright")


CASES = {
  "nothing unusual": Case({"": 1}),
  "an image whose features are NaN": Case(
    {"zero_shot": 6 / 7, "classify": 6 / 7, "retrieval": 6 / 7, "composition": 6 / 7, "": "row 6 are not finite"},
    test=[*DARK, *BRIGHT, (NAN, 0)],
  ),
  "only images whose features are NaN": Case(
    {"zero_shot": 0, "classify": 0, "retrieval": 0, "composition": 0, "": "row 0 are not finite, and those of 1 other"},
    test=[(NAN, 0), (NAN, 1)],
  ),
  "an image for training whose features are NaN": Case(
    {"zero_shot": 1, "classify": 1, "retrieval": 1, "composition": 1, "": "train: the features of row"},
    train=[*TRAIN, (NAN, 0)],
  ),
  "images that cannot be read": Case({"": 1}, test=[(BROKEN, 0), *DARK, (BROKEN, 1), *BRIGHT]),
  "only images that cannot be read": Case(
    {
      "retrieval": "edge has no readable image with a caption",
      "composition": "edge: no image can be read",
      "": "edge: no readable image has a class label",
    },
    test=[(BROKEN, 0), (BROKEN, 1)],
  ),
  "only images for training that cannot be read": Case(
    {
      "zero_shot": 1,
      "classify": 1,
      "retrieval": 1,
      "composition": 1,
      "linear_probe": "a probe needs two classes",
      "few_shot": "edge: 0 images of 'dark'",
      "": "labelled rows",
    },
    train=[(BROKEN, 0), (BROKEN, 1)],
  ),
  "a class without images": Case({"few_shot": "0 images of 'green'", "": 1}, classnames=("dark", "bright", "green")),
  "a class without images for training": Case(
    {"few_shot": "0 images of 'green'", "retrieval": 1, "composition": 1, "": 6 / 7},
    test=[*DARK, *BRIGHT, (100, 2)],
    classnames=("dark", "bright", "green"),
  ),
  "one class": Case(
    {"linear_probe": "a probe needs two classes", "": 1}, test=DARK, train=TRAIN[:10], classnames=("dark",)
  ),
  "more classes than images": Case(
    {"few_shot": "0 images of 'green'", "linear_probe": 1, "": 1},
    test=[DARK[0], BRIGHT[0]],
    classnames=("dark", "bright", "green", *map(str, range(7))),
  ),
  "no images": Case({"": "edge has no samples"}, test=[]),
  "no images for training": Case(
    {"zero_shot": 1, "classify": 1, "retrieval": 1, "composition": 1, "": "edge has no samples"}, train=[]
  ),
  "images without a class": Case(
    {"retrieval": 1, "composition": 1, "": "edge: no readable image has a class label"},
    test=[(10, -1), (220, -1)],
  ),
}
OPTIONS = {
  "knn": {"neighbours": (1, 3)},
  "few_shot": {"shots": (2,), "seeds": (0,), "method": "ridge"},
  "sgd_probe": {"rates": (0.1,), "epochs": 2, "batch_size": 32},
}


class Edge(list):
  """Squares of one grey, with a class and captions."""

  name, skipped, left_out, stamp = "edge", {}, {}, "1"

  def __init__(self, images: Sequence[Image], classnames: Sequence[str], captions: int):
    super().__init__(images)
    self.classnames, self.captions = tuple(classnames), captions

  def __getitem__(self, index: int) -> dict[str, Any]:
    grey, label = super().__getitem__(index)
    pixels = b"broken" if grey is None else np.full((8, 8, 3), grey, np.uint8)
    captions = (f"grey {grey or 0}", f"grey {255 - (grey or 0)}")[: self.captions]  # the right one first
    return {"image": pixels, "captions": captions, "label": label, "id": f"edge:{index}"}


def direction(grey: np.ndarray) -> np.ndarray:
  """Unit vectors that turn with the grey; NaN for one of them."""
  angle = np.where(grey == NAN, np.nan, grey / 255 * math.pi / 2)
  return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def encoders() -> Encoders:
  def image(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (direction(images[:, 0, 0, 0].astype(float)),) * 2

  def tokens(texts: Sequence[str]) -> np.ndarray:
    greys = {"dark": "20", "bright": "230"}
    words = [text.removeprefix("grey ") if text.startswith("grey") else greys.get(text, "400") for text in texts]
    return np.array([[int(word) + (int(word) == NAN)] for word in words])  # texts are never NaN

  classifier = ModelClassifier(lambda pooled: pooled, ())
  return Encoders(
    image,
    lambda rows: direction(rows[:, 0].astype(float)),
    tokens,
    EvalView(8),
    16,
    np.arange(16),
    classifier=classifier,
  )


def result(task: str, case: Case) -> Result:
  encode = encoders()
  names = case.classnames

  def split(images: Sequence[Image]) -> Split:
    return Split(Edge(images, names, 2 if task == "composition" else 1), encode)

  splits = {"train": split(case.train)} if EVALUATORS[task].needs_train else {}
  prompts = [[name] for name in names]
  if task == "classify":
    logits = functools.partial(np.pad, pad_width=((0, 0), (0, max(len(names) - 2, 0))), constant_values=-9)
    encode = Encoders(
      **{**vars(encode), "classifier": ModelClassifier(lambda pooled: logits(pooled)[:, : len(names)], tuple(names))}
    )
  data = make_data(encode, Texts(encode), split(case.test), prompts=prompts, **splits)
  scores = EVALUATORS[task].function(data, None, **OPTIONS.get(task, {}))
  assert not any(np.isnan(values).any() for values in scores.predictions.values() if values.dtype.kind == "f")
  ours = {
    "metrics": scores.metrics,
    "intervals": scores.intervals,
    "details": scores.details,
    "headline": scores.headline,
  }
  return Result("edge", "m", "p", task, {}, ours)


FAST = ("retrieval", "zero_shot")


@pytest.mark.parametrize("task", slow_except(FAST, EVALUATORS))
def test_each_task_has_a_result_or_an_error_for_data_at_the_edges(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(linear_probe, "_COARSE", range(0, 32, 16))  # two strengths that take few passes
  monkeypatch.setattr(linear_probe, "_HALVINGS", ())
  wrong = {}
  for name, case in CASES.items():
    expected = case.expected.get(task, case.expected[""])
    try:
      found = result(task, case)
      text = found.to_json()  # which rejects a NaN
      value = json.loads(text)["declip_jax"]["metrics"][found.ours["headline"]]
      if isinstance(expected, str) or value != pytest.approx(expected):
        wrong[name] = value
    except ValueError as error:
      if not isinstance(expected, str) or expected not in str(error) or "\n" in str(error):
        wrong[name] = error
  assert not wrong
