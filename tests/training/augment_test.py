"""Tests for augment.py, against numbers that torchvision and Pillow produced (fixtures/augment.npz) and the host."""

from dataclasses import replace
from functools import partial
import itertools
from pathlib import Path

import cpu_devices
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageFilter, ImageOps
import pytest

from declip_jax.data import images
from declip_jax.data.images import Augmentation
from declip_jax.data.images.geometry import Crop
from declip_jax.data.recipes import RECIPES
from declip_jax.sharding import batch_sharding, make_mesh, replicated
from declip_jax.training import augment

GOLDEN = np.load(Path(__file__).parents[1] / "fixtures" / "augment.npz")
IMAGE = GOLDEN["image"]
SIZE = 24
NAMES = ("brightness", "contrast", "saturation", "hue")
ALL = Augmentation(
  "square",
  jitter_probability=0.8,
  grayscale_probability=0.2,
  blur_probability=0.5,
  solarize_probability=0.2,
  flip_probability=0.5,
)
CROPS = np.stack([IMAGE[i : i + SIZE, 2 * i : 2 * i + SIZE] for i in range(48)]).reshape(16, 3, SIZE, SIZE, 3)


# Under the flags of `cpu_devices` XLA contracts products and sums, which moves some levels by one.
UNCONTRACTED = {"xla_cpu_use_fusion_emitters": True} if cpu_devices.HAS_OLDER_EMITTERS else {}


def on_pixels(change):
  """A function of red, green and blue planes as a compiled function of uint8 `[h w 3]`."""

  @partial(jax.jit, compiler_options=UNCONTRACTED)
  def apply(image, *args):
    planes = tuple(jnp.moveaxis(image, -1, 0).astype(jnp.float32))
    return jnp.moveaxis(jnp.stack(change(planes, *args)), 0, -1)

  return apply


def difference(ours, golden):
  """Mean and maximum distance in levels; `golden` may be the top left window of the whole."""
  ours = np.asarray(ours)[: golden.shape[0], : golden.shape[1]]
  assert ((ours == np.rint(ours)) & (ours >= 0) & (ours <= 255)).all()
  deviation = np.abs(ours.astype(int) - golden)
  return deviation.mean(), deviation.max()


@pytest.fixture(scope="module")
def run():
  """Augments `[b v SIZE SIZE 3]`, compiled once for each tuple of augmentations."""
  return jax.jit(augment.augment, static_argnums=3)


# Operations.


@pytest.mark.parametrize(
  ("name", "target"),
  [("brightness", lambda image: 0), ("contrast", augment.mean_luma), ("saturation", augment.luma)],
)
def test_blends_equal_torchvision(name, target):
  blend = on_pixels(lambda image, factor: augment.blend(target(image), image, factor))
  for factor, golden in zip(GOLDEN["factors"], GOLDEN[name], strict=True):
    assert difference(blend(IMAGE, factor), golden) == (0, 0)


def test_grayscale_equals_torchvision():
  assert difference(on_pixels(lambda image: (augment.luma(image),) * 3)(IMAGE), GOLDEN["grayscale"]) == (0, 0)


def test_hue_equals_torchvision():
  turn = on_pixels(augment.adjust_hue)
  for factor, golden in zip(GOLDEN["hue_factors"], GOLDEN["hue"], strict=True):
    mean, largest = difference(turn(IMAGE, factor), golden)
    assert mean < 0.01
    assert largest <= 6


def test_hue_of_all_colours_equals_pillow():
  levels = np.arange(0, 256, 15, dtype=np.uint8)
  colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 54, 3)
  turn = on_pixels(augment.adjust_hue)
  for factor in (-0.1, -1 / 255, 0.0, 0.03, 0.1, 0.5):
    mean, largest = difference(turn(colours, factor), images.exact.jitter(colours, [("hue", factor)]))
    assert mean < 0.2
    assert largest <= 7


@pytest.mark.parametrize("image", [IMAGE, IMAGE[:40, :40]])
def test_blur_is_close_to_pillow_also_at_the_border(image):
  blur = jax.jit(partial(augment.blur_and_flip, max_radius=4.0))
  planes = jnp.moveaxis(image, -1, 0).astype(jnp.float32)
  for radius in (*GOLDEN["blur_radius"], 0.7, 1.4142136, 3.3, 4.0):
    golden = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(float(radius))))
    blurred = jnp.moveaxis(blur(planes, radius, False), 0, -1)
    mean, largest = difference(blurred, golden)
    assert mean < 0.7
    assert largest <= 3
    mirrored = jnp.moveaxis(blur(planes, radius, True), 0, -1)
    np.testing.assert_array_equal(mirrored, blurred[:, ::-1])


def test_blur_with_radius_zero_changes_nothing():
  planes = jnp.moveaxis(IMAGE, -1, 0).astype(jnp.float32)
  np.testing.assert_array_equal(augment.blur_and_flip(planes, 0.0, False, 2.0), planes)
  np.testing.assert_array_equal(augment.blur_and_flip(planes, 0.0, True, 0.0), planes[:, :, ::-1])


def test_solarize_equals_pillow():
  solarized = np.moveaxis(np.asarray(ImageOps.solarize(Image.fromarray(IMAGE))), -1, 0)
  planes = jnp.moveaxis(IMAGE, -1, 0).astype(jnp.float32)
  np.testing.assert_array_equal(augment.solarize(planes), solarized)


def test_jitter_in_every_order_equals_torchvision():
  jitter = on_pixels(augment.color_jitter)
  for order, factors, golden in zip(GOLDEN["jitter_order"], GOLDEN["jitter_factors"], GOLDEN["jitter"], strict=True):
    mean, largest = difference(jitter(IMAGE, factors, order), golden)
    assert mean < 0.02
    assert largest <= 8
  factors = np.array([1.3, 0.7, 1.4, 0.08])
  for order in itertools.permutations(range(4)):
    golden = images.exact.jitter(IMAGE, [(NAMES[i], factors[i]) for i in order])
    mean, largest = difference(jitter(IMAGE, factors, jnp.array(order)), golden)
    assert mean < 0.02
    assert largest <= 8


# Draws.


def test_draws_have_the_same_distributions_as_on_the_host():
  wide = replace(ALL, jitter=(0.4, 0.3, 1.5, 0.1), blur_radius=(0.5, 1.5))
  draws = jax.vmap(partial(augment.draw, augmentation=wide))(jax.random.split(jax.random.key(0), 4800))
  flags = np.stack([draws.jitter, draws.grayscale, draws.blur, draws.solarize, draws.flip]).astype(float)
  probability = np.array([0.8, 0.2, 0.5, 0.2, 0.5])
  assert (np.abs(flags.mean(axis=1) - probability) < 4 * np.sqrt(probability * (1 - probability) / 4800)).all()
  orders, counts = np.unique(draws.order, axis=0, return_counts=True)
  assert len(orders) == 24
  assert np.abs(counts - 200).max() < 60
  low, high = np.array([0.6, 0.7, 0, -0.1, 0.5]), np.array([1.4, 1.3, 2.5, 0.1, 1.5])
  shares = (np.column_stack([draws.factors, draws.radius]) - low) / (high - low)
  assert (shares.min(axis=0) > -1e-6).all()
  assert (shares.max(axis=0) < 1 + 1e-6).all()
  numbers = np.column_stack([shares, flags.T, draws.order[:, 0]])
  np.testing.assert_allclose(shares.mean(axis=0), 0.5, atol=0.02)
  np.testing.assert_allclose(shares.std(axis=0), 12**-0.5, atol=0.01)
  assert np.abs(np.corrcoef(numbers.T) - np.eye(11)).max() < 4.5 / np.sqrt(4800)


def test_probability_one_always_applies_and_zero_never():
  given = Augmentation(jitter_probability=1.0, blur_probability=1.0, flip_probability=1.0)
  opposite = Augmentation(grayscale_probability=1.0, solarize_probability=1.0)
  keys = jax.random.split(jax.random.key(1), 500)
  for augmentation, always in ((given, True), (opposite, False)):
    draws = jax.jit(jax.vmap(partial(augment.draw, augmentation=augmentation)))(keys)
    assert all((flags == always).all() for flags in (draws.jitter, draws.blur, draws.flip))
    assert all((flags != always).all() for flags in (draws.grayscale, draws.solarize))


# Views.


def test_views_equal_the_hosts_with_the_same_draws(run):
  """The exact engine is torchvision's, so this is the whole chain with its order, for 48 views of three strengths."""
  without = replace(ALL, jitter=(0.0, 0.3, 1.5, 0.0), blur_probability=0.0)
  key, given = jax.random.key(3), (ALL, without, replace(ALL, jitter_probability=1.0, blur_radius=(1.0, 4.0)))
  made = np.asarray(run(CROPS, key, jnp.arange(16), given))
  whole = Crop((0, 0, SIZE, SIZE), SIZE, SIZE, 0, 0, SIZE)
  means, done = [], np.zeros(5)

  @partial(jax.jit, static_argnums=1)
  def draw(place, view):
    return augment.draw(jax.random.fold_in(jax.random.fold_in(key, place), view), given[view])

  for place, view in itertools.product(range(16), range(3)):
    d = jax.device_get(draw(place, view))
    plan = images.ViewParams(
      whole,
      jitter=tuple((NAMES[i], float(d.factors[i])) for i in d.order if given[view].jitter[i]) if d.jitter else (),
      grayscale=bool(d.grayscale),
      blur=float(d.radius) if d.blur else None,
      solarize=bool(d.solarize),
      flip=bool(d.flip),
    )
    done += [bool(d.jitter), plan.grayscale, plan.blur is not None, plan.solarize, plan.flip]
    (golden,) = images.make(CROPS[place, view], [plan], engine="exact")
    deviation = np.abs(made[place, view].astype(int) - golden)
    if plan.solarize:  # levels near 128 may round to either side
      deviation = np.minimum(deviation, np.abs(255 - made[place, view].astype(int) - golden))
    means.append(deviation.mean())
    assert deviation.max() <= 8, plan
  assert np.max(means) < 0.8
  assert np.mean(means) < 0.25
  assert done.min() > 4


def test_views_without_probabilities_are_unchanged(run):
  plain, key = Augmentation(), jax.random.key(0)
  crops = jnp.array(CROPS)
  assert augment.augment(crops, key, jnp.arange(16), (plain,) * 3) is crops
  never = replace(ALL, **dict.fromkeys([f"{name}_probability" for name in augment._OPERATIONS], 1e-9))
  made = run(CROPS, key, jnp.arange(16), (never, ALL, plain))
  np.testing.assert_array_equal(made[:, ::2], CROPS[:, ::2])
  assert (made[:, 1] != CROPS[:, 1]).any(axis=(1, 2, 3)).mean() > 0.8


def test_an_operation_without_probability_is_not_computed():
  def primitives(**probabilities):
    given = (replace(Augmentation(), **probabilities),) * 3
    return str(jax.make_jaxpr(partial(augment.augment, augmentations=given))(CROPS, jax.random.key(0), np.arange(16)))

  assert "dot_general" not in primitives(jitter_probability=0.8)
  assert "div" in primitives(jitter_probability=0.8)
  assert primitives(jitter_probability=0.8).count("floor") > primitives(
    jitter_probability=0.8, jitter=(0.4, 0.4, 0.4, 0.0)
  ).count("floor")
  assert "dot_general" in primitives(flip_probability=0.5)
  assert "reduce_sum" not in primitives(blur_probability=0.5)


def test_examples_views_and_steps_draw_differently_and_again_the_same(run):
  same = np.broadcast_to(CROPS[:1, :1], CROPS.shape)
  given = (replace(ALL, jitter_probability=1.0, grayscale_probability=0.0),) * 3
  first, again, other = (run(same, jax.random.key(seed), jnp.arange(16), given) for seed in (5, 5, 6))
  np.testing.assert_array_equal(first, again)
  every = np.concatenate([first, other]).reshape(96, -1)
  assert len(np.unique(every, axis=0)) == 96


def test_draws_depend_on_the_position_in_the_global_batch(run):
  key, given = jax.random.key(2), (ALL,) * 3
  whole = run(CROPS, key, jnp.arange(16), given)
  mixed = np.random.default_rng(0).permutation(16)
  np.testing.assert_array_equal(run(CROPS[mixed], key, jnp.array(mixed), given), whole[mixed])


def test_one_device_equals_eight(run):
  mesh = make_mesh(data=4, fsdp=2)
  spread, everywhere, given = batch_sharding(mesh), replicated(mesh), (ALL,) * 3
  eight = jax.jit(partial(augment.augment, augmentations=given), in_shardings=(spread, everywhere, spread))
  compiled = eight.lower(CROPS, jax.random.key(4), jnp.arange(16)).compile()
  made = compiled(CROPS, jax.random.key(4), jnp.arange(16))
  assert made.sharding.is_equivalent_to(spread, made.ndim)
  np.testing.assert_array_equal(made, run(CROPS, jax.random.key(4), jnp.arange(16), given))
  assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "collective"))


def statistics(views):
  """For each view: mean and deviation of each channel, roughness along both axes, and left minus right."""
  views = np.asarray(views, float)
  rough = [np.square(np.diff(views, axis=axis)).mean(axis=(1, 2, 3)) for axis in (1, 2)]
  halves = np.split(views.mean(axis=(1, 3)), 2, axis=1)
  sides = halves[0].mean(axis=1) - halves[1].mean(axis=1)
  mixed = (views[..., 0] * views[..., 1]).mean(axis=(1, 2))
  return np.column_stack([views.mean(axis=(1, 2)), views.std(axis=(1, 2)), *rough, sides, np.square(sides), mixed])


@pytest.mark.slow
def test_views_have_the_same_distribution_as_on_the_host():
  count, crop = 2000, IMAGE[40 : 40 + SIZE, 30 : 30 + SIZE]
  rng = np.random.default_rng(0)
  host = statistics([images.random_view(crop, ALL, rng, size=SIZE, engine="exact") for _ in range(count)])
  copies = np.broadcast_to(crop, (count, 1, *crop.shape))
  device = statistics(
    jax.jit(augment.augment, static_argnums=3)(copies, jax.random.key(7), np.arange(count), (ALL,))[:, 0]
  )
  for moment in (lambda x: x, lambda x: np.square(x - np.concatenate([host, device]).mean(axis=0))):
    ours, golden = moment(device), moment(host)
    error = np.sqrt((ours.var(axis=0) + golden.var(axis=0)) / count)
    assert (np.abs(ours.mean(axis=0) - golden.mean(axis=0)) < 4 * error).all()


def test_a_recipe_determines_the_augmentation_of_each_view(run):
  given = RECIPES["slip_mocov3"].augmentations
  made = run(CROPS, jax.random.key(0), jnp.arange(16), given)
  assert made.shape == CROPS.shape
  assert made.dtype == jnp.uint8
  changed = (made != CROPS).any(axis=(2, 3, 4)).mean(axis=0)
  assert changed[0] == 0
  assert (changed[1:] > 0.8).all()
