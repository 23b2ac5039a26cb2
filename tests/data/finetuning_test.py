"""Tests for data/finetuning.py, against numbers of timm 1.0.31 on Pillow 13 (fixtures/finetuning.npz).

`changed[i]` is `AugmentOp` of RandAugment, increasing, with `operation`, `level` and `sign`, on the image of
fixtures/augment.npz: every fourth row, every third column from 16 on. `erased_mean_std` is of 8000 boxes of
`RandomErasing` in 48 rows and 64 columns: area, log of height / width, top and left as shares of what is free.
fixtures/beit_finetuning.npz has further results of timm: each operation at two levels, and statistics of erasing.
"""

import pathlib

import numpy as np
from PIL import Image
import pytest

from declip_jax.data import finetuning, images

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
GOLDEN = np.load(FIXTURES / "finetuning.npz")
IMAGE = np.load(FIXTURES / "augment.npz")["image"]
FILL = (124, 116, 104)
TIMM = np.load(FIXTURES / "beit_finetuning.npz")
# timm's names of the operations that are stronger with a greater magnitude, as far as they are not ours in camel case.
NAMES = {f"{kind.title()}Increasing": kind for kind in ("posterize", "solarize", "color", "contrast", "brightness")}
NAMES |= {"SharpnessIncreasing": "sharpness", "TranslateXRel": "translate_x", "TranslateYRel": "translate_y"}


# RandAugment.


def test_operations_equal_timm():
  assert set(GOLDEN["operation"]) == set(finetuning.OPERATIONS)
  for name, level, sign, golden in zip(
    GOLDEN["operation"], GOLDEN["level"], GOLDEN["sign"], GOLDEN["changed"], strict=True
  ):
    changed = finetuning.OPERATIONS[name](Image.fromarray(IMAGE), level, int(sign), FILL)
    np.testing.assert_array_equal(np.asarray(changed)[::4, 16:112:3], golden, err_msg=f"{name} {level} {sign}")


def test_operations_at_two_levels_equal_timm():
  """Exactly, and with both signs."""
  found = [key.split("/")[1] for key in TIMM.files if key.startswith("randaugment/") and key.endswith("/argument")]
  tested = set()
  for key in found:
    theirs, _, level = key.removesuffix("_negated").partition("_level")
    name = NAMES.get(theirs) or "".join(f"_{c.lower()}" if c.isupper() else c for c in theirs).lstrip("_")
    sign = -1 if key.endswith("_negated") else 1
    image = Image.fromarray(TIMM["randaugment/image"])
    changed = finetuning.OPERATIONS[name](image, float(level) / 10, sign, tuple(map(int, TIMM["randaugment/fill"])))
    np.testing.assert_array_equal(np.asarray(changed), TIMM[f"randaugment/{key}"], err_msg=key)
    tested.add(name)
  assert tested == set(finetuning.OPERATIONS)


def test_posterizing_fully_is_black():
  assert not np.asarray(finetuning.OPERATIONS["posterize"](Image.fromarray(IMAGE), 1.0, 1, FILL)).any()


def record(monkeypatch):
  """Replaces the operations by ones that record their arguments."""
  calls = []
  for name in finetuning.OPERATIONS:

    def note(image, level, sign, fill, name=name):
      calls.append((name, level, sign, fill))
      return image

    monkeypatch.setitem(finetuning.OPERATIONS, name, note)
  return calls


@pytest.mark.slow
def test_operations_and_levels_are_drawn_as_by_timm(monkeypatch):
  calls, rng, draws = record(monkeypatch), np.random.default_rng(0), 6000
  for _ in range(draws):
    np.testing.assert_array_equal(finetuning.rand_augment(IMAGE[:4, :4], rng), IMAGE[:4, :4])
  names, levels, signs, fills = zip(*calls, strict=True)
  assert abs(len(calls) - draws) < 4 * np.sqrt(draws / 2)  # two, each left out half of the time
  counts = np.array([names.count(name) for name in finetuning.OPERATIONS])
  assert np.abs(counts - draws / 15).max() < 4 * np.sqrt(draws / 15)
  assert abs(np.mean(signs)) < 4 / np.sqrt(len(calls))
  assert set(signs) == {-1, 1}
  assert set(fills) == {FILL}  # ImageNet's mean colour
  assert abs(np.mean(levels) - 0.9) < 0.004  # clipping at 10 reduces it by 0.0004
  assert 0.045 < np.std(levels) < 0.052
  assert max(levels) == 1
  assert 0.01 < np.mean(np.array(levels) == 1) < 0.04  # 2.3 % are more than two deviations above


def test_magnitude_is_clipped_to_its_range(monkeypatch):
  calls, rng = record(monkeypatch), np.random.default_rng(0)
  for magnitude in (-50.0, 50.0):
    finetuning.rand_augment(IMAGE, rng, magnitude=magnitude, probability=1.0, count=3)
  assert [level for _, level, _, _ in calls] == [0.0] * 3 + [1.0] * 3


def test_rand_augment_depends_on_the_seed_and_does_not_write():
  before = IMAGE.copy()
  views = [finetuning.rand_augment(IMAGE, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3, 4)]
  np.testing.assert_array_equal(views[0], views[1])
  assert len({view.tobytes() for view in views}) > 2
  np.testing.assert_array_equal(IMAGE, before)


# Erasing.


def test_erased_boxes_have_timms_moments():
  rng, draws = np.random.default_rng(1), int(GOLDEN["erased_draws"])
  top, left, h, w = np.array([finetuning.erased_box(48, 64, rng) for _ in range(draws)], float).T
  assert ((top >= 0) & (left >= 0) & (top + h <= 48) & (left + w <= 64)).all()
  values = (h * w / (48 * 64), np.log(h / w), top / (48 - h), left / (64 - w))
  for value, (mean, std) in zip(values, GOLDEN["erased_mean_std"], strict=True):
    assert abs(value.mean() - mean) < 4 * std * np.sqrt(2 / draws)
    assert abs(value.std() / std - 1) < 0.04
  assert 0.015 < values[0].min() < 0.03 < 0.32 < values[0].max() < 0.34
  assert 0.26 < np.exp(values[1].min()) < 0.31  # 0.3, of whole pixels


def test_erased_boxes_have_timms_quantiles():
  """The share of ours below each quantile of timm's, within four standard errors of both; sizes are whole pixels."""
  rng, draws, other = np.random.default_rng(2), 6000, int(TIMM["erasing/number"])
  size, levels = 56, np.array([0.05, 0.25, 0.5, 0.75, 0.95])
  boxes = np.array([finetuning.erased_box(size, size, rng) for _ in range(draws)], float)
  values = {"area": boxes[:, 2] * boxes[:, 3] / size**2, "log_aspect": np.log(boxes[:, 2] / boxes[:, 3])}
  for name, value in values.items():
    expected = TIMM[f"erasing/{name}_quantiles_5_25_50_75_95"]
    error = np.sqrt(levels * (1 - levels) * (1 / draws + 1 / (other / 4)))
    below, at_most = (np.mean(compared, axis=0) for compared in (value[:, None] < expected, value[:, None] <= expected))
    assert ((below < levels + 4 * error) & (at_most > levels - 4 * error)).all(), name
  assert abs(TIMM["erasing/share"] - 0.25) < 4 * np.sqrt(0.25 * 0.75 / other)


def test_an_image_that_is_too_small_is_not_erased():
  assert finetuning.erased_box(1, 1000, np.random.default_rng(0)) is None
  for shape in ((1, 1000, 3), (1, 1, 3)):
    even = np.full(shape, 7, np.uint8)
    assert (finetuning.random_erasing(even, np.random.default_rng(0), probability=1.0) == 7).all()


def test_erased_pixels_are_noise_around_the_mean_colour():
  even = np.full((300, 300, 3), 255, np.uint8)
  rng, erased = np.random.default_rng(0), []
  for _ in range(40):
    view = finetuning.random_erasing(even, rng, probability=1.0)
    erased.append(view[(view != 255).any(axis=2)])
  assert (even == 255).all()
  pixels = np.concatenate(erased) / 255
  mean, std = images.IMAGENET_MEAN_STD
  np.testing.assert_allclose(pixels.mean(axis=0), mean, atol=0.01)
  np.testing.assert_allclose(pixels.std(axis=0), std, rtol=0.08)  # clipping narrows it
  assert (np.abs(np.corrcoef(pixels.T) - np.eye(3)) < 0.02).all()


def test_a_quarter_of_the_images_is_erased():
  rng = np.random.default_rng(0)
  counts = sum(finetuning.random_erasing(IMAGE, rng) is not IMAGE for _ in range(1000))
  assert 195 < counts < 305  # 4 standard deviations
