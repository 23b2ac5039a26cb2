"""Colours, blur and flip of image views on the device, within the train step; the host then only decodes and crops.

Operations, their order and their random parameters are those of `data.images` after the crop, so that a view has the
same distribution wherever it is made; individual draws differ. Pixels are those of its engine "exact", in Pillow's
8-bit arithmetic, with two exceptions: an occasional difference of one level in the hue, where float32 rounds to the
other side of an integer, and of up to three levels in the blur, which is rounded once and not after each box.

The functions for one image take and return integer levels from 0 to 255 as float32, with the channel axis first. Those
that mix colours take the red, green and blue planes as separate arrays: XLA fuses a chain of them into one loop; with a
single array, the hue would prevent that.
"""

from collections.abc import Sequence
from functools import partial
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from declip_jax.data.images import Augmentation

Plane = Float[Array, "h w"]
Planes = tuple[Plane, Plane, Plane]
Scalar = Float[Array, ""]
Flag = Bool[Array, ""]

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)  # indices in `Augmentation.jitter`
_OPERATIONS = ("jitter", "grayscale", "blur", "solarize", "flip")


class Draws(NamedTuple):
  """The random parameters of one view of one example.

  Attributes:
    factors: factors of brightness, contrast and saturation, and the shift of the hue.
    order: order of these four, as indices.
    radius: standard deviation of the blur, in pixels.
    jitter, grayscale, blur, solarize, flip: whether the operation is applied.
  """

  factors: Float[Array, "4"]
  order: Int[Array, "4"]
  radius: Scalar
  jitter: Flag
  grayscale: Flag
  blur: Flag
  solarize: Flag
  flip: Flag


def augment(
  images: UInt8[Array, "b v h w c"],
  key: jax.Array,
  index: Int[Array, "b"],
  augmentations: Sequence[Augmentation],
) -> UInt8[Array, "b v h w c"]:
  """Augments the views of a batch, each with its own draws.

  Args:
    images: crops made by the host.
    key: random key of the step.
    index: positions of the examples in the global batch. Draws depend only on key, position and view, not on how the
      batch is split over devices.
    augmentations: one for each view, `Recipe.augmentations`; their crops are ignored. A view without operations is
      unchanged, and an operation that no view has is not computed.
  """
  changed = [view for view, augmentation in enumerate(augmentations) if _operations(augmentation)]
  if not changed:
    return images
  used = [augmentations[view] for view in changed]
  make = partial(
    _view,
    operations=set().union(*map(_operations, used)),
    turn_hue=any(augmentation.jitter[_HUE] for augmentation in used),
    max_radius=max(a.blur_radius[1] if a.blur_probability else 0.0 for a in used),
  )

  def draw_views(position: Int[Array, ""]) -> Draws:
    example = jax.random.fold_in(key, position)
    draws = [draw(jax.random.fold_in(example, view), augmentations[view]) for view in changed]
    return jax.tree.map(lambda *values: jnp.stack(values), *draws)

  made = jax.vmap(jax.vmap(make))(jnp.stack([images[:, view] for view in changed], axis=1), jax.vmap(draw_views)(index))
  made = dict(zip(changed, jnp.unstack(made, axis=1), strict=True))
  return jnp.stack([made.get(view, images[:, view]) for view in range(images.shape[1])], axis=1)


def _operations(augmentation: Augmentation) -> set[str]:
  return {name for name in _OPERATIONS if getattr(augmentation, f"{name}_probability")}


def draw(key: jax.Array, augmentation: Augmentation) -> Draws:
  """Draws the random parameters of one view."""
  uniform = jax.random.uniform(key, (14,))
  strength, is_hue = jnp.array(augmentation.jitter), jnp.arange(4) == _HUE
  low, high = jnp.where(is_hue, -strength, jnp.maximum(0, 1 - strength)), jnp.where(is_hue, strength, 1 + strength)
  least, greatest = augmentation.blur_radius
  return Draws(
    factors=low + uniform[:4] * (high - low),
    order=jnp.argsort(uniform[4:8]),
    radius=least + uniform[8] * (greatest - least),
    **{name: uniform[9 + i] < getattr(augmentation, f"{name}_probability") for i, name in enumerate(_OPERATIONS)},
  )


def _view(
  image: UInt8[Array, "h w c"], draws: Draws, *, operations: set[str], turn_hue: bool, max_radius: float
) -> UInt8[Array, "h w c"]:
  """Augments one view of one example; the keyword arguments are known at compile time."""
  planes = tuple(image[..., channel].astype(jnp.float32) for channel in range(3))
  if "jitter" in operations:
    planes = _where(draws.jitter, color_jitter(planes, draws.factors, draws.order, turn_hue), planes)
  if "grayscale" in operations:
    planes = _where(draws.grayscale, (luma(planes),) * 3, planes)
  made = jnp.stack(planes)
  if operations & {"blur", "flip"}:  # solarizing before or after the flip gives the same result
    made = blur_and_flip(made, jnp.where(draws.blur, draws.radius, 0), draws.flip, max_radius)
  if "solarize" in operations:
    made = jnp.where(draws.solarize, solarize(made), made)
  return jnp.moveaxis(made.astype(jnp.uint8), 0, -1)


def _where(condition: Flag, new: Planes, old: Planes) -> Planes:
  return jax.tree.map(partial(jnp.where, condition), new, old)


def color_jitter(image: Planes, factors: Float[Array, "4"], order: Int[Array, "4"], turn_hue: bool = True) -> Planes:
  """Adjusts brightness, contrast, saturation and hue, each by its factor, in the given order.

  Each of the four steps computes all four adjustments and selects one, because a batch contains all 24 orders. The
  first three share their arithmetic. The hue is computed four times instead of once, but with only four passes over
  the image: each mean that contrast may need requires a pass of its own.

  Args:
    image: planes of the image.
    factors: see `blend` and `adjust_hue`.
    order: order of the four adjustments.
    turn_hue: whether the hue is adjusted at all, known at compile time.
  """
  for operation in order:
    factor, is_hue = factors[operation], operation == _HUE
    grey = jnp.where(operation == _SATURATION, luma(image), 0)
    target = jnp.where(operation == _CONTRAST, mean_luma(image), grey)
    blended = blend(target, image, jnp.where(is_hue, 1, factor))
    # A shift of exactly 0 means that the view's hue is unchanged, without the rounding of HSV.
    image = _where(is_hue & (factor != 0), adjust_hue(image, factor), blended) if turn_hue else blended
  return image


def blend(target: Plane | Scalar | float, image: Planes, factor: Scalar | float) -> Planes:
  """Interpolates from `target` (factor 0) to an image (factor 1) and beyond, truncated to integer levels as in Pillow.

  Target 0 adjusts brightness, `mean_luma` contrast, and `luma` saturation.
  """
  return tuple(jnp.floor(jnp.clip(target + factor * (plane - target), 0, 255)) for plane in image)


def luma(image: Planes) -> Plane:
  """Grey levels (ITU-R 601-2), in the fixed-point numbers of Pillow, which are exact in float32."""
  red, green, blue = image
  return jnp.floor((19595 * red + 38470 * green + 7471 * blue + 2**15) / 2**16)


def mean_luma(image: Planes) -> Scalar:
  """The mean grey level, rounded."""
  return jnp.floor(luma(image).mean() + 0.5)


def adjust_hue(image: Planes, factor: Scalar | float) -> Planes:
  """Rotates the hue by `factor` of the colour circle, in Pillow's 8-bit HSV."""
  red, green, blue = image
  value = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
  # The hue in sixths of the circle: the position of the strongest channel, and the shift by the other two.
  is_red, is_green = red == value, green == value
  shift = jnp.where(is_red, green - blue, jnp.where(is_green, blue - red, red - green))
  sixths = jnp.where(is_red, 0, jnp.where(is_green, 2, 4)) + shift / jnp.maximum(chroma, 1)
  hue = jnp.floor(jnp.where(sixths < 0, sixths + 6, sixths) * (255 / 6)) + jnp.trunc(factor * 255) % 256
  sixths = jnp.where(hue >= 256, hue - 256, hue) * (6 / 255)
  drop = value * jnp.floor(255 * chroma / jnp.maximum(value, 1)) / 255

  def channel(offset: int) -> Plane:
    position = jnp.where(sixths + offset >= 6, sixths + offset - 6, sixths + offset)
    return jnp.floor(value - drop * jnp.clip(jnp.minimum(position, 4 - position), 0, 1) + 0.5)

  return channel(5), channel(3), channel(1)


def blur_and_flip(
  image: Float[Array, "c h w"], radius: Scalar | float, flip: Flag | bool, max_radius: float
) -> Float[Array, "c h w"]:
  """Blurs like Pillow's `GaussianBlur(radius)`, and mirrors left and right if `flip`.

  Pillow applies three box blurs of total variance `radius`^2, each of which repeats the edge. Here they are products
  with a banded matrix for each axis, which are fast on every device for any radius.

  Args:
    image: the image, with the channel axis first.
    radius: standard deviation, in pixels; 0 for no blur.
    flip: whether to mirror.
    max_radius: upper bound of the radius, known at compile time.
  """
  rows, columns = (_three_boxes(radius, max_radius, size) for size in image.shape[1:])
  columns = jnp.where(flip, columns[::-1], columns)
  blurred = jnp.einsum("ij,cjk->cik", rows, image, precision=jax.lax.Precision.HIGH)
  blurred = jnp.einsum("cik,lk->cil", blurred, columns, precision=jax.lax.Precision.HIGH)
  return jnp.clip(jnp.floor(blurred + 0.5), 0, 255)


def _three_boxes(radius: Scalar | float, max_radius: float, size: int) -> Float[Array, "size size"]:
  """The matrix of three box blurs, each of variance `radius`^2 / 3 (Gwosdek et al. 2011, extended box filter).

  A box has `2 * whole + 1` taps of weight 1, and a tap of weight `edge` at each end.
  """
  variance = radius**2 / 3
  whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
  edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
  reach = int((math.sqrt(4 * max_radius**2 + 1) - 1) / 2) + 1
  place = jnp.arange(size)
  box = jnp.zeros((size, size))
  for offset in range(-reach, reach + 1):
    weight = jnp.where(abs(offset) <= whole, 1, jnp.where(abs(offset) == whole + 1, edge, 0))
    box += weight * (jnp.clip(place + offset, 0, size - 1)[:, None] == place[None])
  return jnp.linalg.matrix_power(box / (2 * whole + 1 + 2 * edge), 3)


def solarize(image: Float[Array, "c h w"]) -> Float[Array, "c h w"]:
  """Inverts levels of 128 and above."""
  return jnp.where(image < 128, image, 255 - image)
