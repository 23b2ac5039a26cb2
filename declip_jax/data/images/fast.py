"""Operations on images by OpenCV, several times faster than Pillow's and within a few levels of them.

`tests/data/images_test.py` has the limits, for each operation and for whole views.
"""

from collections.abc import Sequence
from functools import lru_cache
import math
from typing import NamedTuple

import cv2
from jaxtyping import Float32, Float64, UInt8
import numpy as np

from declip_jax.data.images.geometry import Crop
from declip_jax.data.images.photo import Pixels, View

_SAMPLING = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_REACH = {"bilinear": 1, "bicubic": 2}  # radius of the kernels in pixels
_TRUNCATE = -0.499  # added before OpenCV rounds to nearest, since Pillow truncates

# Minimum number of pixels per pixel of the view after blocks are averaged, by the decoder or here. 1 would suffice, but
# fine detail then differs from Pillow's: in photographs by 3 levels on average with 1, by 2 with 1.25, by 1.4 with 1.5.
# Without averaging the difference is 0.3 to 0.9.
LEAST_FACTOR = 1.5


def cut(pixels: Pixels, reduction: int, crop: Crop, interpolation: str) -> View:
  """Cuts out a view, `[size size 3]`.

  To shrink an image, Pillow widens its kernel and OpenCV does not. So the image is first filtered with the few taps
  that make both filters together most like Pillow's kernel; if there are many pixels per pixel of the view, blocks of
  them are averaged before that.

  Args:
    pixels: the decoded image.
    reduction: the factor by which its resolution was reduced.
    crop: the crop, in pixels of the image at full resolution.
    interpolation: "bilinear" or "bicubic".
  """
  factors = crop.box[2] / crop.height / reduction, crop.box[3] / crop.width / reduction
  block = max(1, int(min(factors) / LEAST_FACTOR))
  filters = [_filter(round(64 * factor / block) / 64, reduction * block, interpolation) for factor in factors]
  margins = [(len(taps) // 2 + _REACH[interpolation] + 1) * block for taps in filters]
  rows = _span(crop.box[0], crop.box[2], crop.height, crop.top, crop.size, reduction, margins[0])
  columns = _span(crop.box[1], crop.box[3], crop.width, crop.left, crop.size, reduction, margins[1])
  part = pixels[rows.first : rows.last, columns.first : columns.last]
  if block > 1:
    height, width = (side // block for side in part.shape[:2])
    part = cv2.resize(part[: height * block, : width * block], (width, height), interpolation=cv2.INTER_AREA)
  if max(map(len, filters)) > 1:
    part = cv2.sepFilter2D(part, -1, filters[1], filters[0], borderType=cv2.BORDER_REPLICATE)
  if rows.whole and columns.whole and block == 1:
    return cv2.resize(part, (crop.size, crop.size), interpolation=_SAMPLING[interpolation])
  (y, scale_y), (x, scale_x) = (
    (span.offset / block, factor / block) for span, factor in zip((rows, columns), factors, strict=True)
  )
  centres = np.array([[scale_x, 0, x + scale_x / 2 - 0.5], [0, scale_y, y + scale_y / 2 - 0.5]])  # from view to part
  flags = _SAMPLING[interpolation] | cv2.WARP_INVERSE_MAP
  return cv2.warpAffine(part, centres, (crop.size, crop.size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


class _Span(NamedTuple):
  """The decoded pixels that a view needs along one axis.

  Attributes:
    first, last: the range of pixels, `[first, last)`.
    offset: the start of the view within the range.
    whole: whether the view is exactly this range.
  """

  first: int
  last: int
  offset: float
  whole: bool


def _span(start: int, extent: int, resized: int, corner: int, size: int, reduction: int, margin: int) -> _Span:
  """The span of a view of length `size`, which starts `corner` pixels into the box resized to length `resized`."""
  begin, end = start + corner * extent / resized, start + (corner + size) * extent / resized
  first = max(start // reduction, math.floor(begin / reduction) - margin)
  last = min(-(-(start + extent) // reduction), math.ceil(end / reduction) + margin)
  whole = size == resized and start % reduction == 0 and extent % reduction == 0
  return _Span(first, last, begin / reduction - first, whole)


@lru_cache(maxsize=1024)
def _filter(factor: float, reduced: int, interpolation: str) -> Float32[np.ndarray, "taps"]:
  """The filter after which OpenCV's kernel is most like Pillow's, which is `factor` times wider, in least squares.

  Args:
    factor: resolution divided by that of the view; below 1 the image is enlarged, with Pillow's own kernel.
    reduced: factor by which the resolution was reduced before; averaging already blurred the image by nearly a pixel.
    interpolation: "bilinear" or "bicubic".
  """
  factor, reach, steps = max(factor, 1.0), _REACH[interpolation], 32  # steps per pixel of the numerical integral
  radius = math.ceil(reach * factor) - 1
  end = math.ceil(reach * factor + radius) + reach + 2
  x = np.arange(-end * steps, end * steps + 1) / steps

  wanted = _kernel(x / factor, interpolation, -0.5) / factor
  box = np.ones(max(round(steps * (1 - 1 / reduced)), 1))
  shifted = [
    np.convolve(_kernel(x - tap, interpolation, -0.75), box / len(box), "same") for tap in range(-radius, radius + 1)
  ]
  products = np.array([[a @ b for b in shifted] for a in shifted])
  ones = np.ones((len(shifted), 1))
  system = np.block([[products, ones], [ones.T, np.zeros((1, 1))]])  # a Lagrange multiplier makes the taps sum to 1
  taps = np.linalg.solve(system, np.array([*(a @ wanted for a in shifted), 1.0]))[:-1]
  return ((taps + taps[::-1]) / 2).astype(np.float32)


def _kernel(x: Float64[np.ndarray, "x"], interpolation: str, a: float) -> Float64[np.ndarray, "x"]:
  """Bilinear: the triangle. Bicubic: Keys's kernel, with a = -0.5 in Pillow and -0.75 in OpenCV."""
  x = np.abs(x)
  if interpolation == "bilinear":
    return np.maximum(0, 1 - x)
  outer = np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0)
  return np.where(x < 1, (a + 2) * x**3 - (a + 3) * x**2 + 1, outer)


def jitter(image: Pixels, steps: Sequence[tuple[str, float]]) -> Pixels:
  """Applies brightness, contrast, saturation and hue in the given order, each with its factor.

  Brightness equals Pillow's; contrast and saturation are within 1 level. Hue differs by less than 1 on average, at most
  by 12: Pillow truncates hue and saturation, OpenCV rounds.
  """
  waiting = None  # a table of levels that is still to be applied
  for operation, factor in steps:
    if operation == "brightness":
      table = _blend(0, factor)
      waiting = table if waiting is None else table[waiting]
      continue
    if waiting is not None:
      image, waiting = cv2.LUT(image, waiting), None
    if operation == "contrast":
      red, green, blue, _ = cv2.mean(image)
      waiting = _blend(int(0.299 * red + 0.587 * green + 0.114 * blue + 0.5), factor)
    elif operation == "saturation":
      image = cv2.addWeighted(image, factor, grayscale(image), 1 - factor, _TRUNCATE)
    else:
      hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
      hsv[..., 0] += np.uint8(int(factor * 255) % 256)  # wraps around like the circle
      image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
  return image if waiting is None else cv2.LUT(image, waiting)


def _blend(level: int, factor: float) -> UInt8[np.ndarray, "256"]:
  """The 256 levels blended with `level`, in float32 and truncated as in Pillow."""
  levels = np.arange(256, dtype=np.float32)
  return np.clip(level + np.float32(factor) * (levels - level), 0, 255).astype(np.uint8)


def grayscale(image: Pixels) -> Pixels:
  """Replaces each pixel by its luma (ITU-R 601-2), in three equal channels; within 1 level of Pillow's."""
  return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(image: Pixels, radius: float) -> Pixels:
  """Blurs as Pillow's `GaussianBlur(radius)`: three box blurs, each rounded and with repeated edges; within 3 levels.

  The variances of the boxes sum to `radius`^2 (Gwosdek et al. 2011, extended box filter): each has `2 * whole + 1`
  taps of weight 1 and one of weight `edge` at each end. OpenCV is fast with such small kernels.
  """
  variance = radius**2 / 3
  whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
  edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
  box = np.ones(2 * whole + 3)
  box[[0, -1]] = edge
  box /= box.sum()
  for _ in range(3):
    image = cv2.sepFilter2D(image, -1, box, box, borderType=cv2.BORDER_REPLICATE)
  return image


def solarize(image: Pixels) -> Pixels:
  """Inverts levels of 128 and more; equal to Pillow's."""
  levels = np.arange(256, dtype=np.uint8)
  return cv2.LUT(image, np.where(levels < 128, levels, 255 - levels))


def flip(image: Pixels) -> Pixels:
  """Mirrors left and right."""
  return cv2.flip(image, 1)
