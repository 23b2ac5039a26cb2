"""Mixup and CutMix on the device, within the train step: each image is mixed with its partner in the reversed batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from declip_jax.types import Batch

Scalar = Float[Array, ""]


def mix(batch: Batch, key: jax.Array, *, mixup: float, cutmix: float) -> Batch:
  """Mixes all images of a labelled batch by mixup (Zhang et al. 2018) or by CutMix (Yun et al. 2019).

  All examples have the same method and weight, as in timm's mode "batch". With both methods, each is drawn with
  probability 1/2. The partner of example `i` is `b - 1 - i` of the global batch; in timm, of the batch of one GPU. The
  middle one of an odd number is its own partner.

  Args:
    batch: `image` and `label`.
    key: random key of the step.
    mixup, cutmix: parameter `a` of the distribution Beta(a, a) of the method's weight; 0 leaves out the method.

  Returns:
    The batch with mixed images, float32 and not rounded, `partner_label`, and `label_weight`, the weight of an
    example's own label; without any method, the batch.
  """
  if not mixup and not cutmix:
    return batch
  images = batch["image"]
  height, width = images.shape[2:4]
  drawn = draw(key, mixup, cutmix, (height, width))
  mask = cutmix_weights(drawn.kept, drawn.centre, height, width)
  return {
    **batch,
    "image": blended(images, jnp.where(drawn.cuts, mask, drawn.blend)),
    "partner_label": batch["label"][::-1],
    "label_weight": jnp.broadcast_to(jnp.where(drawn.cuts, mask.mean(), drawn.blend), batch["label"].shape),
  }


class Draw(NamedTuple):
  """The random parameters of the mixing of a batch.

  Attributes:
    cuts: whether it is by CutMix instead of mixup.
    blend: weight of each image in mixup.
    kept: share of each image that CutMix keeps, before its box is clipped.
    centre: row and column of the centre of that box.
  """

  cuts: Bool[Array, ""]
  blend: Scalar
  kept: Scalar
  centre: Int[Array, "2"]


def draw(key: jax.Array, mixup: float, cutmix: float, size: tuple[int, int]) -> Draw:
  """Draws the parameters for images of a height and a width; see `mix`."""
  which, blend_key, cut_key, centre_key = jax.random.split(key, 4)
  return Draw(
    cuts=jax.random.bernoulli(which) if mixup and cutmix else jnp.asarray(bool(cutmix)),
    blend=jax.random.beta(blend_key, mixup, mixup) if mixup else jnp.float32(1),
    kept=jax.random.beta(cut_key, cutmix, cutmix) if cutmix else jnp.float32(1),
    centre=jax.random.randint(centre_key, (2,), 0, jnp.array(size)),
  )


def cutmix_weights(kept: Scalar, centre: Int[Array, "2"], height: int, width: int) -> Float[Array, "h w"]:
  """The weight of each pixel in CutMix: 0 in the box that is taken from the partner, 1 outside.

  The box has the shape of the image and `1 - kept` of its area, rounded down to whole pixels, and is clipped to the
  image. The mean of the weights is therefore the share of the image that is its own, by which timm corrects the label.
  Older versions of timm shorten odd lengths by a pixel.

  Args:
    kept: share of the image to keep, before the box is clipped.
    centre: row and column of the centre of the box.
    height, width: size of the image in pixels.
  """

  def inside(size: int, middle: Int[Array, ""]) -> Array:
    length = jnp.floor(size * jnp.sqrt(1 - kept)).astype(jnp.int32)
    start = middle - length // 2
    place = jnp.arange(size)
    return (place >= start) & (place < start + length)

  box = inside(height, centre[0])[:, None] & inside(width, centre[1])[None]
  return 1 - box.astype(jnp.float32)


def blended(images: Num[Array, "b v h w c"], weight: Scalar | Float[Array, "h w"]) -> Float[Array, "b v h w c"]:
  """`weight` times each image plus the rest times its partner, float32."""
  weight = weight[None, None, ..., None] if weight.ndim else weight
  return weight * images.astype(jnp.float32) + (1 - weight) * images[::-1].astype(jnp.float32)
