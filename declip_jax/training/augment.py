"""Colours, blur and flip of image views on the device, within the train step; the host then only decodes and crops.

Operations, their order and what is drawn for them are those of `data.images` behind the crop, so a view has the same
distribution wherever it is made; the single draws differ. Pixels are those of its engine "exact", in Pillow's 8-bit
arithmetic, but for two things: here and there a level in the hue, where float32 falls on the other side of an integer,
and up to three in the blur, which is rounded once and not after each of its boxes.

The functions for one image take and return float32 of whole levels from 0 to 255, colours first. Those that mix colours
want the red, the green and the blue plane apart: a chain of them is one loop then, which as one array the hue breaks.
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

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)  # their places in `Augmentation.jitter`
_OPERATIONS = ("jitter", "grayscale", "blur", "solarize", "flip")


class Draws(NamedTuple):
  """What is drawn for one view of one example.

  Attributes:
    factors: of brightness, contrast and saturation, and the shift of the hue.
    order: of these four: which comes first, second, third, last.
    radius: of the blur.
    jitter, grayscale, blur, solarize, flip: whether it is done.
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
  """Augments the views of a batch, each with draws of its own.

  Args:
    images: crops as the host made them.
    key: of the step.
    index: the example's place in the global batch. Draws depend on key, place and view only, not on how the batch is
      split over devices.
    augmentations: of each view, `Recipe.augmentations`; their crops are not looked at. A view without any probability
      stays as it is, and an operation that no view has is not computed.
  """
  changed = [view for view, of in enumerate(augmentations) if _operations(of)]
  if not changed:
    return images
  given = [augmentations[view] for view in changed]
  make = partial(
    _view,
    operations=set().union(*map(_operations, given)),
    turn_hue=any(of.jitter[_HUE] for of in given),
    greatest_radius=max(of.blur_radius[1] if of.blur_probability else 0.0 for of in given),
  )

  def draw_views(place: Int[Array, ""]) -> Draws:
    example = jax.random.fold_in(key, place)
    draws = [draw(jax.random.fold_in(example, view), augmentations[view]) for view in changed]
    return jax.tree.map(lambda *values: jnp.stack(values), *draws)

  made = jax.vmap(jax.vmap(make))(jnp.stack([images[:, view] for view in changed], axis=1), jax.vmap(draw_views)(index))
  made = dict(zip(changed, jnp.unstack(made, axis=1), strict=True))
  return jnp.stack([made.get(view, images[:, view]) for view in range(images.shape[1])], axis=1)


def _operations(augmentation: Augmentation) -> set[str]:
  return {name for name in _OPERATIONS if getattr(augmentation, f"{name}_probability")}


def draw(key: jax.Array, augmentation: Augmentation) -> Draws:
  """Draws what happens to one view."""
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
  image: UInt8[Array, "h w c"], draws: Draws, *, operations: set[str], turn_hue: bool, greatest_radius: float
) -> UInt8[Array, "h w c"]:
  """One view of one example; the keywords are known when compiling."""
  planes = tuple(image[..., channel].astype(jnp.float32) for channel in range(3))
  if "jitter" in operations:
    planes = _where(draws.jitter, color_jitter(planes, draws.factors, draws.order, turn_hue), planes)
  if "grayscale" in operations:
    planes = _where(draws.grayscale, (luma(planes),) * 3, planes)
  made = jnp.stack(planes)
  if operations & {"blur", "flip"}:  # whether solarized before or after the flip is the same
    made = blur_and_flip(made, jnp.where(draws.blur, draws.radius, 0), draws.flip, greatest_radius)
  if "solarize" in operations:
    made = jnp.where(draws.solarize, solarize(made), made)
  return jnp.moveaxis(made.astype(jnp.uint8), 0, -1)


def _where(condition: Flag, new: Planes, old: Planes) -> Planes:
  return jax.tree.map(partial(jnp.where, condition), new, old)


def color_jitter(image: Planes, factors: Float[Array, "4"], order: Int[Array, "4"], turn_hue: bool = True) -> Planes:
  """Adjusts brightness, contrast, saturation and hue, each by its factor, in the given order.

  At each of four places all four are computed and one is taken, for a batch has all 24 orders. The first three share
  their arithmetic. That is four hues where one would do, but only four passes over the image: each mean that contrast
  may need ends one.

  Args:
    image: to adjust.
    factors: see `blend` and `adjust_hue`.
    order: of the four adjustments.
    turn_hue: whether the hue is adjusted at all, known when compiling.
  """
  for operation in order:
    factor, is_hue = factors[operation], operation == _HUE
    grey = jnp.where(operation == _SATURATION, luma(image), 0)
    target = jnp.where(operation == _CONTRAST, mean_luma(image), grey)
    blended = blend(target, image, jnp.where(is_hue, 1, factor))
    # A shift of just 0 is that of a view whose hue is left alone, without the rounding of HSV.
    image = _where(is_hue & (factor != 0), adjust_hue(image, factor), blended) if turn_hue else blended
  return image


def blend(target: Plane | Scalar | float, image: Planes, factor: Scalar | float) -> Planes:
  """Moves an image away from `target`, which factor 0 leaves and 1 does not; truncated to whole levels as in Pillow.

  With target 0 this is brightness, with `mean_luma` contrast, with `luma` saturation.
  """
  return tuple(jnp.floor(jnp.clip(target + factor * (plane - target), 0, 255)) for plane in image)


def luma(image: Planes) -> Plane:
  """Grey levels (ITU-R 601-2), in the fixed-point numbers of Pillow, which float32 holds exactly."""
  red, green, blue = image
  return jnp.floor((19595 * red + 38470 * green + 7471 * blue + 2**15) / 2**16)


def mean_luma(image: Planes) -> Scalar:
  """The mean grey level, rounded."""
  return jnp.floor(luma(image).mean() + 0.5)


def adjust_hue(image: Planes, factor: Scalar | float) -> Planes:
  """Turns the hue by `factor` of the colour circle, in Pillow's HSV of 8 bits each."""
  red, green, blue = image
  value = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
  # The hue in sixths of the circle: where the strongest channel stands, and how far the other two pull from there.
  is_red, is_green = red == value, green == value
  pull = jnp.where(is_red, green - blue, jnp.where(is_green, blue - red, red - green))
  sixths = jnp.where(is_red, 0, jnp.where(is_green, 2, 4)) + pull / jnp.maximum(chroma, 1)
  hue = jnp.floor(jnp.where(sixths < 0, sixths + 6, sixths) * (255 / 6)) + jnp.trunc(factor * 255) % 256
  sixths = jnp.where(hue >= 256, hue - 256, hue) * (6 / 255)
  drop = value * jnp.floor(255 * chroma / jnp.maximum(value, 1)) / 255

  def channel(offset: int) -> Plane:
    place = jnp.where(sixths + offset >= 6, sixths + offset - 6, sixths + offset)
    return jnp.floor(value - drop * jnp.clip(jnp.minimum(place, 4 - place), 0, 1) + 0.5)

  return channel(5), channel(3), channel(1)


def blur_and_flip(
  image: Float[Array, "c h w"], radius: Scalar | float, flip: Flag | bool, greatest_radius: float
) -> Float[Array, "c h w"]:
  """Blurs as Pillow's `GaussianBlur(radius)`, and mirrors left and right if `flip`.

  Pillow blurs by three boxes of total variance `radius`^2, each of which repeats the edge. Here they are products with
  a banded matrix for each axis. Every device does these fast, whatever the radius.

  Args:
    image: to blur.
    radius: standard deviation, in pixels; 0 does not blur.
    flip: whether to mirror.
    greatest_radius: the largest there is, known when compiling.
  """
  rows, columns = (_three_boxes(radius, greatest_radius, size) for size in image.shape[1:])
  columns = jnp.where(flip, columns[::-1], columns)
  blurred = jnp.einsum("ij,cjk->cik", rows, image, precision=jax.lax.Precision.HIGH)
  blurred = jnp.einsum("cik,lk->cil", blurred, columns, precision=jax.lax.Precision.HIGH)
  return jnp.clip(jnp.floor(blurred + 0.5), 0, 255)


def _three_boxes(radius: Scalar | float, greatest_radius: float, size: int) -> Float[Array, "size size"]:
  """The matrix of three box blurs, each of variance `radius`^2 / 3 (Gwosdek et al. 2011, extended box filter).

  A box has `2 * whole + 1` taps of weight 1 and one of weight `edge` at each end.
  """
  variance = radius**2 / 3
  whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
  edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
  reach = int((math.sqrt(4 * greatest_radius**2 + 1) - 1) / 2) + 1
  place = jnp.arange(size)
  box = jnp.zeros((size, size))
  for offset in range(-reach, reach + 1):
    weight = jnp.where(abs(offset) <= whole, 1, jnp.where(abs(offset) == whole + 1, edge, 0))
    box += weight * (jnp.clip(place + offset, 0, size - 1)[:, None] == place[None])
  return jnp.linalg.matrix_power(box / (2 * whole + 1 + 2 * edge), 3)


def solarize(image: Float[Array, "c h w"]) -> Float[Array, "c h w"]:
  """Inverts the levels from 128 on."""
  return jnp.where(image < 128, image, 255 - image)
