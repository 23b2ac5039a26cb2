"""Positions of crops: the papers' random crops, and the centre for evaluation. No pixels are read."""

import math
from typing import NamedTuple

import numpy as np

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels

CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop, in all the papers
_MAX_ASPECT = (
  16  # length / width of an image to resize by its shorter side: longer images would become huge before the crop
)


class Crop(NamedTuple):
  """A square crop: `box` of the image is resized, with antialiasing, and a square is cut out of the result.

  Pixels outside the box have no influence, as when cropping before resizing (Pillow's `resize(box=)` would use them).

  Attributes:
    box: the box in the image.
    height, width: size to which the box is resized.
    top, left: position of the square in the result.
    size: side of the square.
  """

  box: Box
  height: int
  width: int
  top: int
  left: int
  size: int

  @property
  def factor(self) -> float:
    """The resolution of the image divided by that of the view."""
    return min(self.box[2] / self.height, self.box[3] / self.width)

  @property
  def visible(self) -> tuple[float, float, float, float]:
    """The part of the image that the square shows: top, left, height and width, in pixels of the image."""
    down, across = self.box[2] / self.height, self.box[3] / self.width
    return self.box[0] + self.top * down, self.box[1] + self.left * across, self.size * down, self.size * across


def random_resized_crop(
  height: int, width: int, size: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Crop:
  """Draws the crop of SLIP and DeCLIP, torchvision's `RandomResizedCrop`; see `random_resized_crop_box`."""
  return Crop(random_resized_crop_box(height, width, rng, scale, ratio), size, size, 0, 0, size)


def random_resized_crop_box(
  height: int, width: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float] = CROP_RATIO
) -> Box:
  """Draws the box of torchvision's `RandomResizedCrop`: uniform area, log-uniform aspect ratio, uniform position.

  After 10 boxes that do not fit, returns the largest central box with an aspect ratio within `ratio`.

  Args:
    height: height of the image in pixels.
    width: width of the image in pixels.
    rng: generator; draws area and aspect ratio until they fit, then top and left.
    scale: range of the area, as a fraction of that of the image.
    ratio: range of width / height.
  """
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    if 0 < h <= height and 0 < w <= width:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  h, w = min(height, max(1, round(width / ratio[0]))), min(width, max(1, round(height * ratio[1])))
  return (height - h) // 2, (width - w) // 2, h, w


def squashed_crop(
  height: int, width: int, size: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Crop:
  """Draws `random_resized_crop` of the image resized to a square: `ratio` is relative to the shape of the image."""
  relative = (ratio[0] * width / height, ratio[1] * width / height)
  return Crop(random_resized_crop_box(height, width, rng, scale, relative), size, size, 0, 0, size)


def square_crop(height: int, width: int, size: int, rng: np.random.Generator) -> Crop:
  """Draws the crop with which OpenAI trained CLIP (Radford et al. 2021, section 2.3).

  The shorter side is resized to `size` pixels, and a square of that size is cut out at a random position: torchvision's
  `Resize` and `RandomCrop`. Difference from these: of an image longer than 16 times its shorter side only the centre of
  that shape is used.

  Args:
    height: height of the image in pixels.
    width: width of the image in pixels.
    size: side of the view in pixels.
    rng: generator; draws top and left.
  """
  box, height, width = _shorter_side(height, width, size)
  top, left = (int(rng.integers(side - size + 1)) for side in (height, width))
  return Crop(box, height, width, top, left, size)


def centre_crop(height: int, width: int, size: int, resize: int = 0) -> Crop:
  """The crop of evaluation: the shorter side is resized to `resize` pixels (0 means `size`), the centre is cut out.

  Difference from torchvision: an image longer than 16 times its shorter side is first clipped to that length.

  Raises:
    ValueError: `resize` is smaller than `size`.
  """
  shorter = resize or size
  if shorter < size:
    raise ValueError(f"resize={shorter} is smaller than size={size}, which is cut out")
  box, height, width = _shorter_side(height, width, shorter)
  return Crop(box, height, width, _centre(height, size), _centre(width, size), size)


def whole_image(height: int, width: int, size: int) -> Crop:
  """The crop of the whole image, resized to a square whatever its shape."""
  return Crop((0, 0, height, width), size, size, 0, 0, size)


def _shorter_side(height: int, width: int, shorter: int) -> tuple[Box, int, int]:
  """The box to use, and its size once the shorter side has `shorter` pixels; the other is rounded down as there."""
  h, w = (min(side, _MAX_ASPECT * min(height, width)) for side in (height, width))
  return (_centre(height, h), _centre(width, w), h, w), shorter * h // min(h, w), shorter * w // min(h, w)


def _centre(whole: int, part: int) -> int:
  """The start of a central part, rounded half to even as in torchvision."""
  return round((whole - part) / 2)
