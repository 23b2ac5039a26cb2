"""Where views are cut out: random crops of the papers, and the centre for evaluation. No pixel is looked at."""

import math
from typing import NamedTuple

import numpy as np

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels

CROP_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop, in all the papers
_MAX_ASPECT = 16  # where the shorter side is resized: longer images would make giant intermediate ones


class Crop(NamedTuple):
  """A square cut out of an image: first `box`, which is resized, antialiased, and of that a square.

  Pixels outside the box have no influence (as with crop, then resize; Pillow's `resize(box=)` would look at them).

  Attributes:
    box: of the image.
    height, width: what the box is resized to.
    top, left: where the square begins in that.
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
    """How many times higher the resolution of the image is than that of the view."""
    return min(self.box[2] / self.height, self.box[3] / self.width)


def random_resized_crop(
  height: int, width: int, size: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Crop:
  """Draws the crop of SLIP and DeCLIP, torchvision's `RandomResizedCrop`; see `random_resized_crop_box`."""
  return Crop(random_resized_crop_box(height, width, rng, scale, ratio), size, size, 0, 0, size)


def random_resized_crop_box(
  height: int, width: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float] = CROP_RATIO
) -> Box:
  """Draws the box of torchvision's `RandomResizedCrop`: area uniform, aspect log-uniform, place uniform.

  After 10 boxes that do not fit, the largest central box whose aspect lies within `ratio`.

  Args:
    height: of the image, in pixels.
    width: of the image, in pixels.
    rng: draws area and aspect, again until they fit, then top and left.
    scale: least and greatest area, as fractions of the image's.
    ratio: least and greatest width / height.
  """
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    if 0 < h <= height and 0 < w <= width:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  h, w = min(height, max(1, round(width / ratio[0]))), min(width, max(1, round(height * ratio[1])))
  return (height - h) // 2, (width - w) // 2, h, w


def square_crop(height: int, width: int, size: int, rng: np.random.Generator) -> Crop:
  """Draws the crop that OpenAI trained CLIP with (Radford et al. 2021, section 2.3).

  The shorter side is resized to `size` pixels, and a square of that size cut out at a random place: torchvision's
  `Resize` and `RandomCrop`. Where we differ: of an image longer than 16 times its shorter side only the central part of
  that shape is used.

  Args:
    height: of the image, in pixels.
    width: of the image, in pixels.
    size: of the view.
    rng: draws top and left.
  """
  box, height, width = _shorter_side(height, width, size)
  top, left = (int(rng.integers(side - size + 1)) for side in (height, width))
  return Crop(box, height, width, top, left, size)


def centre_crop(height: int, width: int, size: int, resize: int = 0) -> Crop:
  """The crop of evaluation: the shorter side is resized to `resize` pixels (0 is `size`), the centre cut out.

  Where we differ from torchvision: what an image longer than 16 times its shorter side has beyond that is cut off
  before the resize.

  Raises:
    ValueError: `resize` is smaller than `size`.
  """
  shorter = resize or size
  if shorter < size:
    raise ValueError(f"resize {shorter} is smaller than the {size} pixels to cut out")
  box, height, width = _shorter_side(height, width, shorter)
  return Crop(box, height, width, _centre(height, size), _centre(width, size), size)


def _shorter_side(height: int, width: int, shorter: int) -> tuple[Box, int, int]:
  """The box to use, and its sides if the shorter one has that many pixels; the other is rounded down as there."""
  h, w = (min(side, _MAX_ASPECT * min(height, width)) for side in (height, width))
  return (_centre(height, h), _centre(width, w), h, w), shorter * h // min(h, w), shorter * w // min(h, w)


def _centre(whole: int, part: int) -> int:
  """Where a central part begins, rounded half to even as torchvision rounds it."""
  return round((whole - part) / 2)
