"""Tests of `declip_jax.training.mixing`, against timm's Mixup: fixtures/beit_finetuning.npz and finetuning.npz."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from declip_jax.objectives.classify import soft_targets
from declip_jax.training.mixing import Draw, blended, cutmix_weights, draw, mix

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOLDEN, OLDER = np.load(FIXTURES / "beit_finetuning.npz"), np.load(FIXTURES / "finetuning.npz")
IMAGES, LABELS = jnp.moveaxis(GOLDEN["mix/images"], 1, -1)[:, None], jnp.asarray(GOLDEN["mix/labels"], jnp.int32)
CLASSES, SMOOTHING = 7, 0.1


@jax.jit
def targets(weight: jax.Array) -> jax.Array:
  return soft_targets(LABELS, LABELS[::-1], jnp.full(len(LABELS), weight), CLASSES, SMOOTHING)


@jax.jit
def cut_and_mix(images: jax.Array, kept: float, centre: jax.Array) -> tuple[jax.Array, jax.Array]:
  weights = cutmix_weights(jnp.float32(kept), centre, *images.shape[2:4])
  return blended(images, weights)[:, 0], weights.mean()


def test_mixup_equals_timm() -> None:
  for weight in (0.3, 0.85):
    expected = np.moveaxis(GOLDEN[f"mix/lam{weight}/mixup_images"], 1, -1)
    np.testing.assert_allclose(blended(IMAGES, jnp.float32(weight))[:, 0], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(targets(weight), GOLDEN[f"mix/lam{weight}/target_smoothing0.1"], rtol=1e-6)


def test_cutmix_equals_timm() -> None:
  for kept in (0.3, 0.85):
    golden = {name: GOLDEN[f"mix/lam{kept}/cutmix_{name}"] for name in ("box_y0_y1_x0_x1", "lam_corrected", "images")}
    y0, y1, x0, x1 = golden["box_y0_y1_x0_x1"]
    mixed, weight = cut_and_mix(IMAGES, kept, np.array([(y0 + y1) // 2, (x0 + x1) // 2]))
    np.testing.assert_array_equal(mixed, np.moveaxis(golden["images"], 1, -1))
    np.testing.assert_allclose(weight, golden["lam_corrected"], rtol=1e-6)
    np.testing.assert_allclose(targets(weight), GOLDEN[f"mix/lam{kept}/cutmix_target_smoothing0.1"], rtol=1e-6)


def test_cutmix_of_odd_lengths_and_at_the_border_equals_timm() -> None:
  batch = jnp.asarray(OLDER["batch"])[:, None]
  for centre, expected in zip(OLDER["cutmix_centre"], OLDER["cutmix"], strict=True):
    np.testing.assert_array_equal(cut_and_mix(batch, 0.55, centre)[0], expected)


def test_a_batch_is_mixed_as_drawn_and_drawn_as_by_timm() -> None:
  """Shares are within four standard errors of both samples, below each quantile of timm's."""
  size, count = 8, 2000
  images = np.zeros((2, 1, size, size, 1), np.uint8)
  images[0] = 200
  batch = {"image": jnp.asarray(images), "label": jnp.array([3, 5])}

  @jax.jit
  @jax.vmap
  def run(key: jax.Array) -> tuple[Draw, dict[str, jax.Array]]:
    return draw(key, 0.8, 1.0, (size, size)), mix(batch, key, mixup=0.8, cutmix=1.0)

  drawn, mixed = jax.device_get(run(jax.random.split(jax.random.key(0), count)))
  own, partner = mixed["image"][:, 0, 0, ..., 0] / 200, mixed["image"][:, 1, 0, ..., 0] / 200
  np.testing.assert_allclose(own + partner, 1, atol=1e-6)  # the second image is mixed with the first, reversed
  np.testing.assert_allclose(mixed["label_weight"], np.repeat(own.mean(axis=(1, 2))[:, None], 2, axis=1), atol=1e-6)
  np.testing.assert_array_equal(mixed["partner_label"], [[5, 3]] * count)
  np.testing.assert_array_equal(mixed["label"], [[3, 5]] * count)
  np.testing.assert_allclose(own[~drawn.cuts], drawn.blend[~drawn.cuts][:, None, None].repeat(size, 1).repeat(size, 2))
  assert np.isin(own[drawn.cuts], [0, 1]).all()

  others = GOLDEN["draws/number"]
  assert abs(drawn.cuts.mean() - GOLDEN["draws/share_of_cutmix"]) < 4 * np.sqrt(0.25 / count + 0.25 / others)
  for name, values in {"mixup": drawn.blend, "cutmix": drawn.kept}.items():
    quantiles = GOLDEN[f"draws/{name}_lam_quantiles_5_25_50_75_95"]
    for level, quantile in zip((0.05, 0.25, 0.5, 0.75, 0.95), quantiles, strict=True):
      error = np.sqrt(level * (1 - level) * (1 / count + 2 / others))
      assert abs((values < quantile).mean() - level) < 4 * error, (name, level)
  centres = np.array([np.bincount(axis, minlength=size) for axis in drawn.centre.T])
  assert (np.abs(centres - count / size) < 5 * np.sqrt(count / size)).all()
  assert mix(batch, jax.random.key(3), mixup=0.0, cutmix=0.0) is batch
