"""Tests of `declip_jax.training.patch_dropout`, and of what a config with patch dropout trains.

tests/models has the tests of the towers, tests/planning/flops_test.py that of the FLOPs.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
from tiny import tiny_config

from declip_jax import architectures, build, sharding
from declip_jax.training.patch_dropout import draw_kept_patches, num_kept


def config_with(dropout: float, method: str = "clip", **data: object) -> Any:
  c = tiny_config(method, **data)
  c.model.patch_dropout = dropout
  return c


def test_the_number_of_kept_patches_is_that_of_open_clip() -> None:
  cases = {(196, 0.5): 98, (49, 0.5): 24, (196, 0.75): 49, (50, 0.9): 4, (256, 0.3): 179, (4, 0.9): 1, (1, 0.5): 1}
  assert {case: num_kept(*case) for case in cases} == cases


def test_kept_patches_are_a_uniformly_random_subset() -> None:
  count, patches, kept = 3000, 5, 2
  found = np.asarray(draw_kept_patches(jax.random.key(0), (count, 2), patches=patches, kept=kept))
  assert found.shape == (count, 2, kept)
  assert found.dtype == np.int32
  subsets = [tuple(row) for row in np.sort(found.reshape(-1, kept))]
  pairs = [*itertools.combinations(range(patches), kept)]  # without repetition
  assert set(subsets) == set(pairs)
  share = 1 / len(pairs)
  deviation = np.sqrt(share * (1 - share) / len(subsets))
  for pair in pairs:
    assert abs(subsets.count(pair) / len(subsets) - share) < 4 * deviation, pair
  # Views are independent.
  same = np.mean((np.sort(found[:, 0]) == np.sort(found[:, 1])).all(axis=-1))
  assert abs(same - share) < 4 * np.sqrt(share * (1 - share) / count)


def test_each_step_view_and_image_keeps_other_patches_on_any_number_of_devices() -> None:
  c = config_with(0.5, "slip", image_size=32)
  built = build.build(c)
  shapes = built.batch_shape(16)
  batch, augment = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}, build.make_augment(c, built)

  def draw(step: int) -> jax.Array:
    return augment(batch, step)["kept_patches"]

  found, following = (np.asarray(jax.jit(draw)(step)) for step in (0, 1))
  expected = built.training_shape(shapes)["kept_patches"]
  assert (found.shape, found.dtype) == (expected.shape, expected.dtype) == ((16, 3, 8), np.int32)
  assert 0 <= found.min() < found.max() < 16
  assert len({tuple(row) for row in np.sort(found).reshape(-1, 8)}) > 45
  assert (np.sort(found) != np.sort(following)).any(axis=-1).mean() > 0.9
  split = jax.jit(draw, out_shardings=sharding.batch_sharding(built.mesh))(0)
  assert len(split.sharding.device_set) == 8
  np.testing.assert_array_equal(split, found)


def test_without_patch_dropout_towers_get_the_same_batch() -> None:
  c = config_with(0.0)
  built = build.build(c)
  batch = {name: np.zeros(x.shape, x.dtype) for name, x in built.batch_shape(2).items()}
  assert build.make_augment(c, built)(batch, 0) is batch
  assert "kept_patches" not in built.training_shape(built.batch_shape(2))


def test_evaluation_has_the_same_model() -> None:
  """Only an entry of the training batch drops patches, so that the model has no setting for it."""
  assert build.build(config_with(0.5)).model == build.build(config_with(0.0)).model


def test_filip_compares_the_kept_patches() -> None:
  built = build.build(config_with(0.5, "filip"))
  shapes = built.batch_shape(16)

  def encode(batch: Any, training: Any) -> Any:
    return built.model.encode(*built.model.init(jax.random.key(0), batch), training)[0]

  features = jax.eval_shape(encode, shapes, built.training_shape(shapes))
  assert features.image_tokens.shape == (16, 2, 32)
  c = config_with(0.5, "filip_repo")
  assert c.objective.filip.top_k == 3
  built = build.build(c)
  with pytest.raises(ValueError, match=r"config.objective.filip.top_k=3: images have 2 tokens"):
    build.check_objective(c, built, built.batch_shape(16))


@pytest.mark.parametrize(
  ("method", "image", "dropout", "message"),
  [
    ("clip", architectures.resnet(4, (1, 1, 1, 1)), 0.5, r"patch_dropout=0.5 needs config\.model\.image\.kind='vit'"),
    ("clip", architectures.build("RegNetY-400MF").image, 0.5, "kind='vit', not 'regnet'"),
    ("slip_mim", None, 0.5, r"patch_dropout=0.5: recipe 'slip_mim' hides patches for masked image modelling"),
    ("clip", None, 1.0, r"config\.model\.patch_dropout=1.0: expected .* less than 1"),
    ("clip", None, -0.1, r"config\.model\.patch_dropout=-0.1: expected"),
  ],
)
def test_where_patches_cannot_be_dropped_the_config_is_rejected(
  method: str, image: Any, dropout: float, message: str
) -> None:
  c = config_with(dropout, method)
  c.model.image = image or c.model.image
  with pytest.raises(ValueError, match=message):
    build.build(c)


@pytest.mark.slow
def test_devices_and_cached_micro_batches_keep_the_same_patches(monkeypatch: pytest.MonkeyPatch) -> None:
  """Three steps in one pass on one device, and with features that are encoded twice on eight devices."""
  expected = steps.take_steps("slip_mocov3", 1, 1, model={"patch_dropout": 0.5})
  whole = steps.one_device("slip_mocov3")
  assert abs(expected["loss/0"] - whole["loss/0"]) > 1e-3
  monkeypatch.setattr(sharding, "MIN_SIZE", 256)
  found = steps.take_steps("slip_mocov3", 2, 4, micro_batches=2, model={"patch_dropout": 0.5})
  steps.compare("slip_mocov3", found, expected)
