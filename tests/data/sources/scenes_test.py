"""Tests of the scenes: they never change, their drawings are distinguishable, and held-out pairs do not occur."""

import hashlib
import multiprocessing
import pickle
import re

import cv2
import numpy as np
import pytest

from declip_jax.data.sources import scenes
from declip_jax.data.sources.scenes import COLORS, HELD_OUT, SEEN, SHAPES, TEMPLATES, open_scenes

# Duplicated on purpose: names that a person gives these colours, independent of the palette.
_HUES = {
  "red": (220, 20, 30),
  "yellow": (255, 220, 0),
  "green": (0, 150, 50),
  "cyan": (0, 220, 220),
  "blue": (20, 50, 230),
  "purple": (130, 20, 170),
  "pink": (255, 130, 190),
  "brown": (120, 70, 20),
  "white": (255, 255, 255),
  "black": (0, 0, 0),
}


def _digest(source: scenes.Scenes, indices: range) -> str:
  digest = hashlib.sha256()
  for index in indices:
    example = source[index]
    digest.update(example["image"].tobytes() + repr((example["captions"], example["label"], example["id"])).encode())
  return digest.hexdigest()


def _named(caption: str, table: dict) -> set[str]:
  """The entries of a table that a caption names by themselves or by a synonym, as whole words."""
  return {
    name for name, entry in table.items() if re.search(rf"\b({'|'.join((name, *entry.synonyms))})\b", caption.lower())
  }


def _silhouette(image: np.ndarray) -> np.ndarray:
  """Where an image, less its grain, differs from its background, which most of its border shows: bool [h w]."""
  image = cv2.medianBlur(image, 3)
  border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
  return np.linalg.norm(image.astype(float) - np.median(border, axis=0), axis=-1) > 75


def _crop(mask: np.ndarray, side: int = 12) -> np.ndarray:
  """The mask's bounding box, sampled on a grid: float [side * side]."""
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  y, x = (np.linspace(span[0], span[-1], side).round().astype(int) for span in (rows, columns))
  return mask[np.ix_(y, x)].astype(float).ravel()


@pytest.mark.parametrize("split", ["train", "test", "heldout"])
def test_examples_have_the_promised_form(split):
  source = open_scenes(f"{split}/40/48")
  assert len(source) == 40
  for index, example in enumerate(source):
    assert example["image"].shape == (48, 48, 3)
    assert example["image"].dtype == np.uint8
    assert example["image"].flags.c_contiguous
    assert type(example["label"]) is int
    assert 0 <= example["label"] < len(source.classnames)
    assert example["id"] == f"scenes/{split}:{index}"
    assert isinstance(example["captions"], tuple)
    assert len(set(example["captions"])) in (2, 3)
  assert index == 39
  assert source.skipped == {}
  assert source.name == f"scenes:{split}/40/48"


def test_a_scene_is_a_function_of_split_and_index():
  source = open_scenes("train")
  digest = _digest(source, range(30))
  assert digest == _digest(source, range(30))
  assert digest == _digest(open_scenes("train/30"), range(30))
  assert digest != _digest(source, range(1, 31))
  assert not np.array_equal(source[0]["image"], open_scenes("test")[0]["image"])


def test_another_process_draws_the_same_scenes():
  source = open_scenes("heldout")
  assert len(pickle.dumps(source)) < 300
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    assert pool.apply(_digest, (source, range(20))) == _digest(source, range(20))


def test_the_draw_order_has_not_changed():
  # Golden: a change here changes every published number of the demonstration, so it must be intentional.
  assert [open_scenes("train")[i]["label"] for i in range(8)] == [2, 68, 43, 8, 63, 31, 36, 56]
  assert open_scenes("train")[0]["captions"] == (
    "a photo of a red heart",
    "photo 18 of 30: a small red heart at one side on a charcoal background",
    "look at this heart, it is scarlet",
  )


def test_resolution_changes_neither_captions_nor_content():
  small, large = open_scenes("test/20/32"), open_scenes("test/20/64")
  for low, high in zip(small, large, strict=True):
    assert low["captions"] == high["captions"]
    reduced = high["image"].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(reduced - low["image"]).mean() < 16  # the grain differs


def test_every_color_and_shape_is_partly_held_out():
  assert len(SEEN) == 70
  assert len(HELD_OUT) == 30
  assert not set(SEEN) & set(HELD_OUT)
  for position, table in enumerate((COLORS, SHAPES)):
    for name in table:
      assert sum(pair[position] == name for pair in HELD_OUT) == 3
      assert sum(pair[position] == name for pair in SEEN) == 7


def test_classnames_are_the_splits_pairs():
  assert open_scenes("train").classnames == open_scenes("test").classnames == tuple(map(" ".join, SEEN))
  assert open_scenes("heldout").classnames == tuple(map(" ".join, HELD_OUT))


@pytest.mark.slow
@pytest.mark.parametrize(("split", "count"), [("train", 5000), ("heldout", 600)])
def test_captions_name_the_label_and_nothing_held_out(split, count, monkeypatch):
  monkeypatch.setattr(scenes, "_draw", lambda *_: np.zeros((64, 64, 3), np.uint8))  # only words matter here
  source = open_scenes(f"{split}/{count}")
  seen = set()
  for example in source:
    color, shape = source.classnames[example["label"]].split()
    assert ((color, shape) in HELD_OUT) == (split == "heldout")
    for caption in example["captions"]:
      assert _named(caption, COLORS) == {color}, caption
      assert _named(caption, SHAPES) == {shape}, caption
      assert 3 <= len(caption.split()) <= 20
      assert not re.search(r"\b(left|right)\b|  |\ba [aeiou]|\{", caption), caption
    seen.add(example["label"])
  assert seen == set(range(len(source.classnames)))


def test_captions_mostly_use_the_class_name(monkeypatch):
  monkeypatch.setattr(scenes, "_draw", lambda *_: np.zeros((64, 64, 3), np.uint8))
  source = open_scenes("train/1000")
  for position in (0, 1):
    hits = [source.classnames[e["label"]].split()[position] in c for e in source for c in e["captions"]]
    assert 0.7 < np.mean(hits) < 0.82


def test_labels_name_the_color_that_is_drawn():
  source = open_scenes("test/400")
  names = list(_HUES)
  correct = []
  for example in source:
    image, mask = example["image"].astype(float), _silhouette(example["image"])
    distance = np.linalg.norm(image[mask][:, None] - [_HUES[name] for name in names], axis=-1)
    votes = np.bincount(
      distance.argmin(1)[distance.min(1) < 60], minlength=len(names)
    )  # darker second tones are left out
    correct.append(names[votes.argmax()] == source.classnames[example["label"]].split()[0])
  assert np.mean(correct) > 0.95


def test_the_stamp_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
  source = open_scenes("train/300")
  stamp = source.stamp
  monkeypatch.setattr(scenes.Scenes, "__getitem__", lambda *_: pytest.fail("the key of every sample has the stamp"))
  assert source.stamp == stamp


@pytest.mark.slow
def test_a_classifier_of_shapes_transfers_to_held_out_pairs():
  # The nearest mean silhouette: if this crude classifier transfers, labels, drawings and splits agree.
  def load(location):
    source = open_scenes(location)
    crops = np.stack([_crop(_silhouette(example["image"])) for example in source])
    return crops, np.array([source.classnames[example["label"]].split()[1] for example in source])

  crops, shapes = load("train/1500")
  means = np.stack([crops[shapes == name].mean(0) for name in SHAPES])
  crops, shapes = load("heldout/300")
  predicted = np.array(list(SHAPES))[np.linalg.norm(crops[:, None] - means, axis=-1).argmin(1)]
  assert np.mean(predicted == shapes) > 0.9


def test_objects_fit_into_the_image_and_fill_six_to_nine_tenths_of_it():
  for seed in range(500):
    scene = scenes._compose(SEEN, np.random.default_rng(seed))
    points = np.concatenate(scenes._place(scene))
    assert points.min() > -1e-9
    assert points.max() < 1 + 1e-9
    assert np.ptp(points, axis=0).max() == pytest.approx(scene.extent)
    assert 0.6 <= scene.extent <= 0.94


def test_captions_name_the_true_positions():
  rows = {"top": [], "middle": [], "bottom": []}
  for example in open_scenes("train/400"):
    height = np.flatnonzero(_silhouette(example["image"]).any(1)).mean() / 63
    for row in rows:
      if row in " ".join(example["captions"]):
        rows[row].append(height)
  # Objects fill much of the picture, so the centre of one "at the top" is at 0.42 on average; by chance at 0.5.
  assert np.mean(rows["top"]) < 0.45 < np.mean(rows["middle"]) < 0.55 < np.mean(rows["bottom"])


def test_indices_are_checked():
  source = open_scenes("test/10")
  assert source[-1]["id"] == "scenes/test:9"
  assert source[np.int64(3)]["id"] == "scenes/test:3"
  for index in (10, -11):
    with pytest.raises(IndexError, match=f"0 to 9, not {index}"):
      source[index]


@pytest.mark.parametrize(
  ("location", "message"),
  [
    ("validation", "no split 'validation'.*train, test, heldout"),
    ("", "no split ''"),
    ("train/many", "split/count/pixels"),
    ("train/-5", "split/count/pixels"),
    ("train/10/64/3", "split/count/pixels"),
    ("train/0", "at least 1"),
    ("train/10/8", "at least 16 pixels"),
  ],
)
def test_bad_locations_are_explained(location, message):
  with pytest.raises(ValueError, match=message):
    open_scenes(location)


def test_templates_take_a_class_name():
  assert all(template.count("{}") == 1 for template in TEMPLATES)
  assert TEMPLATES[0].format("red circle") == "a red circle"


def test_the_stamp_depends_on_drawings_and_captions(monkeypatch):
  before = open_scenes("train/100/32").stamp
  assert pickle.loads(pickle.dumps(open_scenes("train/100/32"))).stamp == before
  monkeypatch.setattr(scenes, "_DETAILED", 0.9)
  assert open_scenes("train/100/32").stamp != before
  monkeypatch.undo()
  monkeypatch.setitem(COLORS, "red", COLORS["red"]._replace(rgb=(221, 32, 36)))
  changed = open_scenes("train/100/32")
  assert (changed.stamp != before) == any("red" in changed.classnames[changed[index]["label"]] for index in (0, 50, 99))
