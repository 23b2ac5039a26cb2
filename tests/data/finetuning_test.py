"""Tests for data/finetuning.py, against numbers of timm 1.0.31 on Pillow 13 (fixtures/finetuning.npz).

`changed[i]` is `AugmentOp` of RandAugment, increasing, with `operation`, `level` and `sign`, on the image of
fixtures/augment.npz: every fourth row, every third column from 16 on. `erased_mean_std` is of 8000 boxes of
`RandomErasing` in 48 rows and 64 columns: area, log of height / width, top and left as shares of what is free. `mixup`
(weight 0.3) and `cutmix` (weight 0.55, one for each centre) are `Mixup` in mode "batch" with targets for 5 classes, of
`batch` and `labels`.
"""

from itertools import pairwise
import pathlib

import numpy as np
from PIL import Image
import pytest

from declip_jax.data import finetuning, images
from declip_jax.data.sources.base import BadSample

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
GOLDEN = np.load(FIXTURES / "finetuning.npz")
IMAGE = np.load(FIXTURES / "augment.npz")["image"]
FILL = (124, 116, 104)
BATCH, LABELS = GOLDEN["batch"], GOLDEN["labels"]


class Fixed:
  """A generator that returns given numbers."""

  def __init__(self, *values):
    self.values = iter(values)

  def integers(self, high, size=None):
    return next(self.values)


# RandAugment.


def test_operations_equal_timm():
  assert set(GOLDEN["operation"]) == set(finetuning.OPERATIONS)
  for name, level, sign, golden in zip(
    GOLDEN["operation"], GOLDEN["level"], GOLDEN["sign"], GOLDEN["changed"], strict=True
  ):
    changed = finetuning.OPERATIONS[name](Image.fromarray(IMAGE), level, int(sign), FILL)
    np.testing.assert_array_equal(np.asarray(changed)[::4, 16:112:3], golden, err_msg=f"{name} {level} {sign}")


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


# Mixing.


def test_mixup_equals_timm():
  mixed = finetuning.mixup(BATCH, 0.3)
  assert np.abs(mixed.images - GOLDEN["mixup"]).max() <= 0.5001
  np.testing.assert_allclose(
    finetuning.soft_targets(LABELS, mixed.weight, 5), GOLDEN["mixup_target"], rtol=1e-6, atol=1e-7
  )


def test_cutmix_equals_timm():
  for centre, golden, target in zip(GOLDEN["cutmix_centre"], GOLDEN["cutmix"], GOLDEN["cutmix_target"], strict=True):
    mixed = finetuning.cutmix(BATCH, 0.55, Fixed(*centre))
    np.testing.assert_array_equal(mixed.images, golden)
    np.testing.assert_allclose(finetuning.soft_targets(LABELS, mixed.weight, 5), target, rtol=1e-6, atol=1e-7)


def test_the_weight_of_cutmix_is_the_share_of_remaining_pixels():
  light, dark = np.full((2, 20, 30, 3), 200, np.uint8), np.full((2, 20, 30, 3), 10, np.uint8)
  rng = np.random.default_rng(0)
  for weight in (0.0, 0.2, 0.7, 0.999, 1.0):
    mixed = finetuning.cutmix(np.concatenate([light, dark]), weight, rng)
    assert (mixed.images[:2] == 200).mean() == pytest.approx(mixed.weight)
    assert (mixed.images[2:] == 10).mean() == pytest.approx(mixed.weight)


def test_targets_sum_to_one():
  for weight in (0.0, 0.37, 1.0):
    targets = finetuning.soft_targets(LABELS, weight, 7)
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)


def test_mixing_is_drawn_as_by_timm():
  rng, draws = np.random.default_rng(0), 2000
  ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  batch = np.concatenate([ramp, 255 - ramp])
  weights = {True: [], False: []}
  for _ in range(draws):
    mixed = finetuning.mix(batch, rng)
    whole = (mixed.images[0] == ramp[0]) | (mixed.images[0] == 255 - ramp[0])
    weights[bool(whole.all())].append(mixed.weight)
  cut, blended = np.array(weights[True]), np.array(weights[False])
  assert abs(len(cut) - draws / 2) < 120  # a blend by a weight near 0 or 1 looks like a cut
  assert abs(blended.mean() - 0.5) < 0.04
  assert abs(blended.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.02  # of Beta(0.8, 0.8)
  assert cut.mean() > 0.55  # what exceeds the image was not replaced
  assert finetuning.mix(batch, rng, probability=0.0).weight == 1.0
  only_mixup = [finetuning.mix(batch, rng, mixup_alpha=50.0, cutmix_probability=0.0).weight for _ in range(50)]
  assert all(0.2 < weight < 0.8 for weight in only_mixup)
  assert all(a != b for a, b in pairwise(only_mixup))


# Views.


@pytest.mark.parametrize("engine", images.ENGINES)
def test_views_are_crop_and_flip_then_rand_augment_then_erasing(engine):
  for seed in range(20):
    ours, rng = np.random.default_rng(seed), np.random.default_rng(seed)
    view = finetuning.view(IMAGE, ours, size=40, engine=engine)
    how = {"size": 40, "interpolation": "bicubic", "engine": engine}
    cut = images.random_view(IMAGE, images.Augmentation(scale=(0.08, 1.0), flip_probability=0.5), rng, **how)
    np.testing.assert_array_equal(view, finetuning.random_erasing(finetuning.rand_augment(cut, rng), rng))
    assert view.shape == (40, 40, 3)
    assert view.dtype == np.uint8
  with pytest.raises(BadSample):
    finetuning.view(b"no image", np.random.default_rng(0), size=8, engine=engine)
