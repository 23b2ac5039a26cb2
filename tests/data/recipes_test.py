"""Tests for data/recipes.py: the views of every recipe, which of them remain if some are unused, and overrides."""

from dataclasses import replace
import io
import math
import pickle

import numpy as np
from PIL import Image
import pytest

from declip_jax.data import finetuning, images
from declip_jax.data.images import Crop, ViewParams
from declip_jax.data.make_views import MakeViews, Masking, Rendering
from declip_jax.data.recipes import RECIPES, Recipe, get_recipe, trimmed
from declip_jax.data.sources.base import BadSample
from declip_jax.data.text import augment as texts
from declip_jax.data.text.tokenizer import Tokenizer
from declip_jax.views import Views

TOKENIZER = Tokenizer(16)
CAPTIONS = ("a tall red house stands alone on the hill",)
UNUSED = Views((), (), (), None, None, ())


def photo(seed=0, height=48, width=60):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def flat(level=200, size=12):
  return np.full((size, size, 3), level, np.uint8)


def make(recipe, example, seeds=1, size=12, patch_share=0.4):
  """Samples of seeds 0, 1, ..., stacked."""
  masking = Masking(patch_grid=4, patch_share=patch_share)
  make_views = MakeViews(recipe, TOKENIZER, Rendering(size), masking, num_classes=5)
  example = {"label": 3, **example}
  samples = [make_views(example, np.random.default_rng(seed)) for seed in range(seeds)]
  return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def roughness(views):
  """Mean step from pixel to pixel, per view."""
  return np.abs(np.diff(views.astype(int), axis=-2)).mean(axis=(-3, -2, -1))


# The contents of a sample: image views, text views, and a mask or the label.
CONTENTS = {
  "clip": (1, 1, ""),
  "openai": (1, 1, ""),
  "clip_color": (1, 1, ""),
  "clip_crop": (1, 1, ""),
  "clip_full": (1, 1, ""),
  "simclr": (2, 0, ""),
  "slip": (3, 1, ""),
  "slip_mocov3": (3, 1, ""),
  "slip_mim": (2, 1, "mim"),
  "declip": (2, 3, "mlm"),
  "declip_repo": (2, 2, "mlm"),
  "filip": (1, 1, ""),
  "filip_repo": (1, 1, ""),
  "finetune": (1, 0, "label"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_samples_and_batch_shapes_follow_the_recipe(name):
  image_views, text_views, masks = CONTENTS[name]
  shapes = {"image": ((image_views, 12, 12, 3), np.uint8)}
  if text_views:
    shapes["text"] = ((text_views, 16), np.int32)
  if masks == "mlm":
    shapes |= {"mlm_position": ((5,), np.int32), "mlm_target": ((5,), np.int32), "mlm_weight": ((5,), np.float32)}
  if masks == "mim":
    shapes["mim_position"] = ((6,), np.int32)  # 0.4 of 4 x 4
  if masks == "label":
    shapes["label"] = ((), np.int32)
  make_views = MakeViews(RECIPES[name], TOKENIZER, Rendering(12), Masking(slots=5, patch_grid=4), num_classes=5)
  row = make_views({"image": photo(), "captions": CAPTIONS, "label": 3}, np.random.default_rng(0))
  assert {key: (value.shape, value.dtype.type) for key, value in row.items()} == shapes
  assert make_views.batch_shapes(7) == {key: ((7, *shape), dtype) for key, (shape, dtype) in shapes.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_samples_depend_only_on_example_and_generator(name):
  example = {"image": photo(), "captions": CAPTIONS}
  first, again = (make(RECIPES[name], example, 3) for _ in range(2))
  assert all(np.array_equal(first[key], again[key]) for key in first)
  assert all(len({row.tobytes() for row in first[key]}) > 1 for key in first if key in ("image", "mim_position"))


@pytest.mark.parametrize("name", ["openai", "slip", "declip", "declip_repo"])
def test_the_origin_of_a_sample_has_what_made_it(name):
  """The sample is the same with it, and its views and texts can be made again from it."""
  recipe = RECIPES[name]
  make_views = MakeViews(recipe, TOKENIZER, Rendering(12))
  example = {"image": photo(), "captions": CAPTIONS, "label": 3, "id": "0"}
  if name == "slip":
    example["ssl_image"] = photo(1)
  for seed in range(5):
    plain = make_views(example, np.random.default_rng(seed))
    sample = make_views.with_origin(example, np.random.default_rng(seed))
    origin = sample.pop("origin")
    assert plain.keys() == sample.keys()
    assert all(np.array_equal(plain[field], sample[field]) for field in plain)
    again = [images.make(origin.photos[field], [params])[0] for field, params in origin.views]
    np.testing.assert_array_equal(again, sample["image"])
    assert [field for field, _ in origin.views] == [
      "ssl_image" if view and name == "slip" else "image" for view in range(len(again))
    ]
    assert (origin.operation in texts.OPERATIONS) == ("augmented" in recipe.text_views)
    assert origin.masked == sample.get("mlm_weight", np.zeros(0)).sum()


def test_the_operations_of_a_view_are_described_in_order():
  crop = Crop((10, 20, 30, 60), 40, 80, 5, 20, 20)
  params = ViewParams(crop, (("hue", -0.05), ("contrast", 0.5)), True, 1.25, True, True)
  assert params.describe() == ["hue -18°", "contrast 0.50", "grey", "blur 1.2 px", "solarised", "flipped"]
  assert crop.visible == (13.75, 35, 15, 15)


@pytest.mark.parametrize("name", RECIPES)
def test_roles_name_existing_views(name):
  recipe = RECIPES[name]
  views = recipe.views
  of_image = {view for role in views if role.endswith("_image") for view in views.numbers(role)}
  of_text = {view for role in views if role.endswith("_text") for view in views.numbers(role)}
  assert of_image == set(range(len(recipe.image_views)))
  assert of_text == set(range(len(recipe.text_views)))
  assert set(views.neighbour_text) <= set(views.contrastive_text)
  assert views.masked_text is None or recipe.text_views[views.masked_text] == "masked"
  assert len(views.ssl_image) in (0, 2)


# Image views.


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reads_the_fields_that_change_its_views(name):
  recipe = RECIPES[name]
  others = {"weak_scale": (0.3, 0.4), "strong_scale": (0.3, 0.4), "jitter": (0.9,) * 4, "blur_radius": (3.0, 4.0)}
  others |= {"blur_probability": (0.7,), "solarize_probability": (0.7,)}
  others |= dict.fromkeys(("jitter_probability", "grayscale_probability", "flip_probability"), 0.7)

  def views(changed):  # a square crop has no scale
    return [replace(view, scale=(1.0, 1.0)) if view.crop == "square" else view for view in changed.augmentations]

  changed = {field for field in others if views(replace(recipe, **{field: others[field]})) != views(recipe)}
  assert changed == recipe.read & set(others)
  assert ("text_operations" in recipe.read) == ("augmented" in recipe.text_views)


def test_openai_crops_a_full_height_square_without_further_changes():
  image = photo(height=12, width=20)
  views = make(RECIPES["openai"], {"image": image, "captions": CAPTIONS}, 20)["image"][:, 0]
  windows = [image[:, left : left + 12].tobytes() for left in range(9)]
  assert {view.tobytes() for view in views} <= set(windows)
  assert len({view.tobytes() for view in views}) > 4


def test_color_changes_the_colours_of_the_square_and_does_not_mirror_it():
  image = flat()
  image[:, :6] //= 4  # dark on the left
  rows = make(RECIPES["clip_color"], {"image": image, "captions": CAPTIONS}, 100)["image"][:, 0].astype(int)
  assert (rows[:, :, :4].mean(axis=(1, 2, 3)) < rows[:, :, 8:].mean(axis=(1, 2, 3))).all()
  changed = (rows != image).any(axis=(1, 2, 3))
  assert 70 < changed.sum() <= 100  # jitter in 80 %, and blur
  sharp = replace(RECIPES["clip_color"], blur_probability=(0.0,), jitter_probability=0.0, grayscale_probability=0.0)
  assert (make(sharp, {"image": image, "captions": CAPTIONS}, 30)["image"] == image).all()


def test_crop_mirrors_half_of_its_views_and_keeps_their_colours():
  image = flat(size=48)
  image[:, :24] //= 4
  rows = make(RECIPES["clip_crop"], {"image": image, "captions": CAPTIONS}, 200)["image"][:, 0].astype(int)
  left, right = rows[:, :, 0].mean(axis=(1, 2)), rows[:, :, -1].mean(axis=(1, 2))
  both = left != right  # the others contain one side only
  assert both.sum() > 100
  assert 0.35 < (left < right)[both].mean() < 0.65
  assert rows.min() >= 50
  assert rows.max() <= 200
  assert (rows[..., 0] == rows[..., 2]).all()


def test_full_augmentation_equals_the_self_supervised_views():
  full, slip = RECIPES["clip_full"], RECIPES["slip"]
  assert full == replace(slip, image_views=("strong",), views=Views())
  simclr = RECIPES["simclr"]
  assert simclr == replace(slip, image_views=("strong", "strong"), text_views=(), views=simclr.views)


@pytest.mark.slow
def test_the_two_views_of_moco_v3_differ_in_blur_and_solarization():
  recipe = replace(RECIPES["slip_mocov3"], jitter=(0.0, 0.0, 0.0, 0.0), blur_radius=(2.0, 2.0))
  assert RECIPES["slip_mocov3"].jitter == (0.4, 0.4, 0.2, 0.1)
  bright = make(recipe, {"image": flat(), "captions": CAPTIONS}, 400)["image"]
  inverted = (bright == 55).all(axis=(2, 3, 4))
  assert (inverted | (bright == 200).all(axis=(2, 3, 4))).all()
  assert inverted[:, :2].sum() == 0
  assert 48 < inverted[:, 2].sum() < 112  # 0.2 of 400, within 4 standard deviations
  levels = photo(height=24, width=24) // 2  # too dark to solarize
  rough = roughness(make(recipe, {"image": levels, "captions": CAPTIONS}, 400, size=24)["image"])
  blurred = rough < 6
  assert not blurred[:, 0].any()
  assert blurred[:, 1].all()
  assert 16 < blurred[:, 2].sum() < 64  # 0.1 of 400, within 4 standard deviations


def test_the_last_probability_applies_to_all_further_views():
  four = replace(RECIPES["simclr"], image_views=("strong",) * 4, blur_probability=(0.0,))
  four = replace(four, jitter_probability=0.0, grayscale_probability=0.0, solarize_probability=(1.0, 0.0, 1.0))
  views = make(four, {"image": flat(), "captions": ()})["image"][0]
  assert views[:, 0, 0, 0].tolist() == [55, 200, 55, 55]
  mixed = replace(four, image_views=("weak", "strong", "square", "color"), solarize_probability=(0.0, 1.0))
  assert make(mixed, {"image": flat(), "captions": ()})["image"][0, :, 0, 0, 0].tolist() == [200, 200, 200, 55]


def test_self_supervised_views_come_from_the_other_image():
  example = {"image": flat(200, size=40), "ssl_image": flat(60, size=8), "captions": CAPTIONS}
  plain = {"jitter_probability": 0.0, "solarize_probability": (0.0,)}
  for name in ("slip", "slip_mocov3"):
    views = make(replace(RECIPES[name], **plain), example)["image"][0]
    assert views[:, 0, 0, 0].tolist() == [200, 60, 60]
  with pytest.raises(ValueError, match=r"image views \(0, 1\) are self-supervised.* recipe 'slip'"):
    make(RECIPES["declip"], example)


def test_augmentations_describe_each_view():
  weak, strong = images.Augmentation(scale=(0.5, 1.0)), RECIPES["slip"].augmentations[1]
  assert RECIPES["clip"].augmentations == (weak,)
  assert RECIPES["openai"].augmentations == (images.Augmentation("square"),)
  assert RECIPES["slip"].augmentations == (weak, strong, strong)
  assert strong == images.Augmentation(
    scale=(0.08, 1.0),
    jitter=(0.4, 0.4, 0.4, 0.1),
    jitter_probability=0.8,
    grayscale_probability=0.2,
    blur_probability=0.5,
    blur_radius=(0.1, 2.0),
    flip_probability=0.5,
  )
  assert RECIPES["declip"].augmentations == (replace(strong, scale=(0.2, 1.0)),) * 2
  first, second = RECIPES["slip_mocov3"].augmentations[1:]
  assert first == replace(strong, jitter=(0.4, 0.4, 0.2, 0.1), blur_probability=1.0)
  assert second == replace(first, blur_probability=0.1, solarize_probability=0.2)
  color = RECIPES["clip_color"].augmentations[0]
  assert color == replace(strong, crop="square", scale=weak.scale, flip_probability=0.0)


@pytest.mark.parametrize("engine", images.ENGINES)
def test_views_for_fine_tuning_are_crop_and_flip_then_rand_augment_then_erasing(engine):
  recipe, image = RECIPES["finetune"], photo()
  for seed in range(20):
    make_views = MakeViews(recipe, TOKENIZER, Rendering(40, "bicubic", engine), num_classes=5)
    sample = make_views({"image": image, "captions": (), "label": 4}, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    crop = images.Augmentation(scale=(0.08, 1.0), flip_probability=0.5)
    cut = images.random_view(image, crop, rng, size=40, interpolation="bicubic", engine=engine)
    expected = finetuning.random_erasing(finetuning.rand_augment(cut, rng), rng)
    np.testing.assert_array_equal(sample["image"][0], expected)
    assert sample["label"] == 4
  plain = make(replace(recipe, rand_magnitude=0.0, erase_probability=0.0), {"image": flat(), "captions": ()}, 20)
  assert (plain["image"] == 200).all()


@pytest.mark.parametrize("label", [-1, 5])
def test_an_example_without_one_of_the_classes_is_bad(label):
  with pytest.raises(BadSample, match=r"x\.jpg: .*class") as raised:
    make(RECIPES["finetune"], {"image": photo(), "captions": (), "label": label, "id": "x.jpg"})
  assert raised.value.kind == "no label"


@pytest.mark.parametrize("engine", images.ENGINES)
@pytest.mark.parametrize("name", ["slip_mocov3", "clip_color", "openai"])
def test_views_are_drawn_one_by_one_from_one_image(name, engine):
  file = io.BytesIO()
  Image.fromarray(photo(height=200, width=260)).save(file, "JPEG")
  example = {"image": file.getvalue(), "captions": CAPTIONS}
  for seed in range(5):
    rng = np.random.default_rng(seed)
    plans = [images.draw(augmentation, 200, 260, 24, rng) for augmentation in RECIPES[name].augmentations]
    row = MakeViews(RECIPES[name], TOKENIZER, Rendering(24, engine=engine))(example, np.random.default_rng(seed))
    np.testing.assert_array_equal(row["image"], images.make(example["image"], plans, engine=engine))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "finetune"])  # RandAugment runs on the host
def test_for_the_device_the_same_crops_are_made_and_nothing_else(name):
  example = {"image": photo(), "captions": CAPTIONS}
  for seed in range(4):
    host, device = (
      MakeViews(RECIPES[name], TOKENIZER, Rendering(12, augment_on=where), Masking(patch_grid=4))(
        example, np.random.default_rng(seed)
      )
      for where in ("host", "device")
    )
    assert all(np.array_equal(host[key], device[key]) for key in host if key != "image")  # texts and patches
    rng = np.random.default_rng(seed)
    plans = [images.draw(augmentation, 48, 60, 12, rng) for augmentation in RECIPES[name].augmentations]
    np.testing.assert_array_equal(
      device["image"], images.make(photo(), [images.ViewParams(plan.crop) for plan in plans])
    )
    np.testing.assert_array_equal(host["image"], images.make(photo(), plans))


def test_bad_images_are_bad_samples():
  for engine in images.ENGINES:
    make_views = MakeViews(RECIPES["slip"], TOKENIZER, Rendering(12, engine=engine))
    with pytest.raises(BadSample, match="not a known image format") as caught:
      make_views({"image": b"<html>", "captions": CAPTIONS}, np.random.default_rng(0))
    assert caught.value.kind == "unknown format"
    with pytest.raises(BadSample) as caught:
      make_views({"image": photo(), "ssl_image": b"", "captions": CAPTIONS}, np.random.default_rng(0))
    assert caught.value.kind == "empty image"


@pytest.mark.parametrize(("field", "legal"), [("engine", "'exact', 'fast'"), ("augment_on", "'host' or 'device'")])
def test_an_unknown_option_is_rejected_by_name(field, legal):
  with pytest.raises(ValueError, match=rf"config.data.{field}='gpu': choose .*{legal}"):
    Rendering(12, **{field: "gpu"})


# Patches.


def test_patches_are_hidden_by_share_and_differ_between_samples():
  example = {"image": photo(), "captions": CAPTIONS}
  positions = make(RECIPES["slip_mim"], example, 50, patch_share=0.25)["mim_position"]
  assert positions.shape == (50, 4)
  assert (np.diff(positions, axis=1) > 0).all()
  assert 0 <= positions.min() < positions.max() < 16
  assert len({row.tobytes() for row in positions}) > 20


@pytest.mark.parametrize(("grid", "share", "named"), [(0, 0.4, "patch_grid=0"), (4, 1.0, "patch_share=1.0")])
def test_hiding_no_patches_is_rejected_before_anything_is_read(grid, share, named):
  make_views = MakeViews(RECIPES["slip_mim"], TOKENIZER, Rendering(12), Masking(patch_grid=grid, patch_share=share))
  with pytest.raises(ValueError, match=named):
    make_views.batch_shapes(4)


# Texts.


def test_without_a_text_view_captions_are_not_read():
  assert set(make(RECIPES["simclr"], {"image": photo(), "captions": ()})) == {"image"}


def test_a_masked_caption_may_be_contrasted():
  example = {"image": photo(), "captions": CAPTIONS}
  (raw,) = TOKENIZER(CAPTIONS)
  filip = make(RECIPES["filip_repo"], example, 60)
  assert set(filip) == {"image", "text"}  # nothing predicts the masked tokens
  masked = (filip["text"][:, 0] == TOKENIZER.mask).sum()
  assert 0.08 < masked / (60 * (np.flatnonzero(raw == TOKENIZER.eot)[0] - 1)) < 0.16  # 0.15 * 0.8
  declip = make(RECIPES["declip_repo"], example, 60)
  assert (declip["text"][:, 1] != TOKENIZER.mask).all()
  for text, position, target, weight in zip(
    declip["text"][:, 0], declip["mlm_position"], declip["mlm_target"], declip["mlm_weight"], strict=True
  ):
    restored = text.copy()
    restored[position[weight > 0]] = target[weight > 0]
    np.testing.assert_array_equal(restored, raw)


# Trimming.


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_used_in_full_makes_the_same_samples(name):
  example = {"image": photo(), "captions": CAPTIONS}
  same = trimmed(RECIPES[name], RECIPES[name].views)
  assert same.views == RECIPES[name].views
  whole, kept = (make(recipe, example, 5) for recipe in (RECIPES[name], same))
  assert set(whole) == set(kept)
  assert all(np.array_equal(whole[key], kept[key]) for key in whole)


@pytest.mark.parametrize(
  ("name", "used", "image_views", "text_views", "views"),
  [
    (
      "declip",
      UNUSED.replace(contrastive_image=(0,), contrastive_text=(0,)),
      ("strong",),
      ("raw",),
      UNUSED.replace(contrastive_image=(0,), contrastive_text=(0,)),
    ),
    (  # all but masked language modelling
      "declip",
      RECIPES["declip"].views.replace(masked_text=None),
      ("strong", "strong"),
      ("raw", "augmented"),
      RECIPES["declip"].views.replace(masked_text=None),
    ),
    (  # no contrast at all
      "declip",
      UNUSED.replace(ssl_image=(0, 1), masked_text=2),
      ("strong", "strong"),
      ("masked",),
      UNUSED.replace(ssl_image=(0, 1), masked_text=0),
    ),
    (  # the second of two views
      "declip_repo",
      UNUSED.replace(contrastive_image=(1,), contrastive_text=(1,), neighbour_text=(1,)),
      ("strong",),
      ("augmented",),
      UNUSED.replace(contrastive_image=(0,), contrastive_text=(0,), neighbour_text=(0,)),
    ),
    (
      "slip",
      UNUSED.replace(ssl_image=(1, 2)),
      ("strong", "strong"),
      (),
      UNUSED.replace(ssl_image=(0, 1)),
    ),
    (
      "slip_mim",
      UNUSED.replace(masked_image=1),
      ("strong",),
      (),
      UNUSED.replace(masked_image=0),
    ),
    (
      "slip_mocov3",
      UNUSED.replace(contrastive_image=(0,), contrastive_text=(0,)),
      ("weak",),
      ("raw",),
      UNUSED.replace(contrastive_image=(0,), contrastive_text=(0,)),
    ),
  ],
)
def test_unused_views_are_not_made(name, used, image_views, text_views, views):
  recipe = trimmed(RECIPES[name], used)
  assert (recipe.image_views, recipe.text_views, recipe.views) == (image_views, text_views, views)
  row = make(recipe, {"image": photo(), "captions": CAPTIONS})
  assert row["image"].shape[1] == len(image_views)
  assert ("mlm_position" in row, "mim_position" in row) == (
    views.masked_text is not None,
    views.masked_image is not None,
  )


def test_remaining_views_keep_their_strength():
  three = Recipe(("strong", "weak", "color", "strong"), (), UNUSED)
  three = replace(three, blur_probability=(0.1, 0.2, 0.3), solarize_probability=(0.0, 0.4))
  kept = trimmed(three, UNUSED.replace(contrastive_image=(1,), ssl_image=(2, 3)))
  assert kept.image_views == ("weak", "color", "strong")
  assert kept.blur_probability == (0.2, 0.3)
  assert kept.solarize_probability == (0.4, 0.4)
  assert trimmed(three, UNUSED.replace(contrastive_image=(1,))).blur_probability == (0.1, 0.2, 0.3)  # none is blurred


def test_a_use_without_image_is_rejected():
  with pytest.raises(ValueError, match="config.objective: no term"):
    trimmed(RECIPES["declip"], UNUSED.replace(masked_text=2))


# Overrides.


def test_overrides_replace_fields_and_none_keeps_them():
  recipe = get_recipe(
    "slip_mocov3", {"solarize_probability": (0.5,), "blur_probability": None, "flip_probability": 0.0}
  )
  assert recipe == replace(RECIPES["slip_mocov3"], solarize_probability=(0.5,), flip_probability=0.0)
  assert recipe.blur_probability == (1.0, 0.1)


@pytest.mark.parametrize("field", ["blur_probability", "solarize_probability"])
@pytest.mark.parametrize("value", [0.2, (), 0.0])
def test_a_probability_per_view_is_a_tuple(field, value):
  with pytest.raises(ValueError, match=rf"config.data.{field}=.*: .*tuple such as \(0.5,\)"):
    get_recipe("slip", {field: value})


@pytest.mark.parametrize(
  "given",
  [{"mixup": math.inf}, {"cutmix": math.nan}, {"jitter": (math.nan, 0, 0, 0)}, {"blur_radius": (0.1, math.inf)}],
)
def test_strengths_that_are_not_finite_are_rejected(given):
  with pytest.raises(ValueError, match=rf"config.data.{next(iter(given))}=.*: expected"):
    get_recipe("slip", given)


def test_an_unknown_recipe_is_rejected_by_name():
  with pytest.raises(ValueError, match=r"config.data.recipe='moco': choose one of \['clip', 'clip_color'"):
    get_recipe("moco", {})


def test_make_views_can_be_sent_to_worker_processes():
  make_views = MakeViews(RECIPES["slip_mocov3"], TOKENIZER, Rendering(12))
  row = pickle.loads(pickle.dumps(make_views))({"image": photo(), "captions": CAPTIONS}, np.random.default_rng(0))
  assert row["image"].shape == (3, 12, 12, 3)
