"""Operations on images by OpenCV, several times faster than Pillow's and within a few levels of them.

`tests/data/images_test.py` holds the limits, of each operation and of whole views.
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
_REACH = {"bilinear": 1, "bicubic": 2}  # of the kernels, in pixels
_TRUNCATE = -0.499  # added before OpenCV rounds to nearest, for Pillow truncates

# Averaging blocks of pixels, the decoder or we, leaves at least so many for each of the view. From 1 on there would be
# enough of them, but fine detail then differs from Pillow's: a photograph by 3 levels on average with 1, by 2 with
# 1.25, by 1.4 with 1.5. Without averaging it is 0.3 to 0.9.
LEAST_FACTOR = 1.5


def cut(pixels: Pixels, times: int, crop: Crop, interpolation: str) -> View:
  """Cuts out a view, `[size size 3]`.

  Where it reduces, Pillow widens its kernel and OpenCV does not. So the image is filtered before with the few taps that
  make both together most like Pillow's kernel, and where there are many pixels for each of the view, blocks of them are
  averaged before that.

  Args:
    pixels: of the image.
    times: how many times lower their resolution is than the image's.
    crop: in pixels of the image.
    interpolation: "bilinear" or "bicubic".
  """
  factors = crop.box[2] / crop.height / times, crop.box[3] / crop.width / times
  block = max(1, int(min(factors) / LEAST_FACTOR))
  filters = [_filter(round(64 * factor / block) / 64, times * block, interpolation) for factor in factors]
  margins = [(len(taps) // 2 + _REACH[interpolation] + 1) * block for taps in filters]
  rows = _span(crop.box[0], crop.box[2], crop.height, crop.top, crop.size, times, margins[0])
  columns = _span(crop.box[1], crop.box[3], crop.width, crop.left, crop.size, times, margins[1])
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
  """What a view needs of one axis, in decoded pixels.

  Attributes:
    first, last: the pixels to take, `[first, last)`.
    offset: where the view begins in them.
    whole: whether it is just these pixels.
  """

  first: int
  last: int
  offset: float
  whole: bool


def _span(start: int, extent: int, resized: int, corner: int, size: int, times: int, margin: int) -> _Span:
  """The span of a view that is `size` long, `corner` behind the start of the box, which is resized to `resized`."""
  begin, end = start + corner * extent / resized, start + (corner + size) * extent / resized
  first = max(start // times, math.floor(begin / times) - margin)
  last = min(-(-(start + extent) // times), math.ceil(end / times) + margin)
  whole = size == resized and start % times == 0 and extent % times == 0
  return _Span(first, last, begin / times - first, whole)


@lru_cache(maxsize=1024)
def _filter(factor: float, reduced: int, interpolation: str) -> Float32[np.ndarray, "taps"]:
  """The filter behind which OpenCV's kernel is most like Pillow's, which is `factor` times wider: least squares.

  Args:
    factor: how many times higher the resolution is than the view's; below 1 it is enlarged, with Pillow's own kernel.
    reduced: how many times lower it is than the image's. Averaging has blurred it already, by nearly a pixel.
    interpolation: "bilinear" or "bicubic".
  """
  factor, reach, steps = max(factor, 1.0), _REACH[interpolation], 32  # steps: of the numerical integral, per pixel
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
  system = np.block([[products, ones], [ones.T, np.zeros((1, 1))]])  # with a multiplier: the taps sum to 1
  taps = np.linalg.solve(system, np.array([*(a @ wanted for a in shifted), 1.0]))[:-1]
  return ((taps + taps[::-1]) / 2).astype(np.float32)


def _kernel(x: Float64[np.ndarray, "x"], interpolation: str, a: float) -> Float64[np.ndarray, "x"]:
  """Bilinear: the triangle. Bicubic: Keys's kernel, of which Pillow takes a = -0.5 and OpenCV -0.75."""
  x = np.abs(x)
  if interpolation == "bilinear":
    return np.maximum(0, 1 - x)
  outer = np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0)
  return np.where(x < 1, (a + 2) * x**3 - (a + 3) * x**2 + 1, outer)


def jitter(image: Pixels, steps: Sequence[tuple[str, float]]) -> Pixels:
  """Applies brightness, contrast, saturation and hue, each with its factor, in the given order.

  Brightness is equal to Pillow's, contrast and saturation are within 1 level. Hue is on average within 1, at most 12
  apart: Pillow truncates hue and saturation, OpenCV rounds.
  """
  waiting = None  # a table of levels that the image has yet to go through
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
      hsv[..., 0] += np.uint8(int(factor * 255) % 256)  # wraps around, as the circle does
      image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
  return image if waiting is None else cv2.LUT(image, waiting)


def _blend(level: int, factor: float) -> UInt8[np.ndarray, "256"]:
  """What each of the 256 levels becomes when blended with `level`, in float32 and truncated as in Pillow."""
  levels = np.arange(256, dtype=np.float32)
  return np.clip(level + np.float32(factor) * (levels - level), 0, 255).astype(np.uint8)


def grayscale(image: Pixels) -> Pixels:
  """Replaces each pixel by its luma (ITU-R 601-2), in three equal channels; within 1 level of Pillow's."""
  return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(image: Pixels, radius: float) -> Pixels:
  """Blurs as Pillow's `GaussianBlur(radius)`: three box blurs, each rounded and with repeated edges; within 3 levels.

  The variances of the boxes sum to `radius`^2 (Gwosdek et al. 2011, extended box filter): one has `2 * whole + 1` taps
  of weight 1 and one of weight `edge` at each end. Small kernels also are what OpenCV is fast at.
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
  """Inverts the levels from 128 on; equal to Pillow's."""
  levels = np.arange(256, dtype=np.uint8)
  return cv2.LUT(image, np.where(levels < 128, levels, 255 - levels))


def flip(image: Pixels) -> Pixels:
  """Mirrors left and right."""
  return cv2.flip(image, 1)
