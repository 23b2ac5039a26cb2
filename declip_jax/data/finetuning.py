"""Augmentation for fine-tuning on labelled images: RandAugment and random erasing; the train step mixes the images.

SLIP (Mu et al. 2021) fine-tunes with these, using BEiT's script: timm's `rand-m9-mstd0.5-inc1`, and erasing with
probability 0.25 in mode "pixel". timm's RandAugment differs from the paper's (Cubuk et al. 2020): its magnitudes vary,
each operation is omitted half of the time, and a greater magnitude is always a stronger change.

RandAugment uses Pillow with both engines: OpenCV's operations give practically the same pixels, and fine-tuning is
limited by the device anyway.
"""

from collections.abc import Callable
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from declip_jax.data import images
from declip_jax.data.images.geometry import Box

Color = tuple[int, int, int]

_MEAN_COLOR = tuple(round(255 * level) for level in images.IMAGENET_MEAN_STD[0])


def rand_augment(
  image: images.Pixels,
  rng: np.random.Generator,
  *,
  magnitude: float = 9.0,
  deviation: float = 0.5,
  count: int = 2,
  probability: float = 0.5,
  fill: Color = _MEAN_COLOR,
) -> images.Pixels:
  """Applies random operations of `OPERATIONS` in sequence, as timm's `rand-m9-mstd0.5-inc1`.

  Args:
    image: the image.
    rng: generator; draws the operations, then for each whether it is applied, its magnitude and its sign.
    magnitude: mean of the magnitudes, which are clipped to [0, 10].
    deviation: standard deviation of the magnitudes.
    count: number of operations, with replacement.
    probability: the probability with which each is applied.
    fill: colour of pixels from outside the image.
  """
  made = Image.fromarray(image)
  for number in rng.integers(len(OPERATIONS), size=count):
    if rng.random() < probability:
      level = min(max(rng.normal(magnitude, deviation), 0.0), 10.0) / 10
      made = list(OPERATIONS.values())[number](made, level, 1 if rng.random() < 0.5 else -1, fill)
  return np.array(made)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> "Operation":
  return lambda image, level, sign, fill: kind(image).enhance(max(0.1, 1 + sign * 0.9 * level))


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Color) -> Image.Image:
  kwargs = {"resample": Image.Resampling.BICUBIC, "fillcolor": fill}
  return image.transform(image.size, Image.Transform.AFFINE, matrix, **kwargs)


def _posterize(image: Image.Image, level: float, sign: int, fill: Color) -> Image.Image:
  """Keeps the highest 4 to 0 bits; 0 gives black, which `ImageOps.posterize` of current Pillow rejects."""
  kept = 256 - 2 ** (4 + int(4 * level))
  return image.point([value & kept for value in range(256)] * 3)


def _solarize_add(image: Image.Image, level: float, sign: int, fill: Color) -> Image.Image:
  levels = np.arange(256)
  table = np.where(levels < 128, np.minimum(levels + int(110 * level), 255), levels)
  return image.point([*table] * 3)


# Functions of image, level in [0, 1], sign and fill colour; they ignore what they do not need.
Operation = Callable[[Image.Image, float, int, Color], Image.Image]
OPERATIONS: dict[str, Operation] = {
  "auto_contrast": lambda image, level, sign, fill: ImageOps.autocontrast(image),
  "equalize": lambda image, level, sign, fill: ImageOps.equalize(image),
  "invert": lambda image, level, sign, fill: ImageOps.invert(image),
  "rotate": lambda image, level, sign, fill: image.rotate(
    sign * 30 * level, resample=Image.Resampling.BICUBIC, fillcolor=fill
  ),
  "posterize": _posterize,
  "solarize": lambda image, level, sign, fill: ImageOps.solarize(image, 256 - int(256 * level)),
  "solarize_add": _solarize_add,
  "color": _enhance(ImageEnhance.Color),
  "contrast": _enhance(ImageEnhance.Contrast),
  "brightness": _enhance(ImageEnhance.Brightness),
  "sharpness": _enhance(ImageEnhance.Sharpness),
  "shear_x": lambda image, level, sign, fill: _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0), fill),
  "shear_y": lambda image, level, sign, fill: _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0), fill),
  "translate_x": lambda image, level, sign, fill: _affine(
    image, (1, 0, sign * 0.45 * level * image.width, 0, 1, 0), fill
  ),
  "translate_y": lambda image, level, sign, fill: _affine(
    image, (1, 0, 0, 0, 1, sign * 0.45 * level * image.height), fill
  ),
}


def random_erasing(
  image: images.Pixels,
  rng: np.random.Generator,
  *,
  probability: float = 0.25,
  mean_std: tuple[tuple[float, ...], tuple[float, ...]] = images.IMAGENET_MEAN_STD,
) -> images.Pixels:
  """Fills a random box with noise (Zhong et al. 2020), as timm's mode "pixel"; does not modify `image`.

  Difference from timm: its noise is normal in normalised values. Here levels are limited to 0 to 255, which clips noise
  that is more than about two standard deviations from the mean.

  Args:
    image: the image.
    rng: generator; draws whether to erase, the box and the noise.
    probability: the probability of erasing.
    mean_std: mean and standard deviation by which images are normalised, per channel, for pixels scaled to [0, 1].
  """
  if rng.random() >= probability:
    return image
  box = erased_box(*image.shape[:2], rng)
  if box is None:
    return image
  top, left, height, width = box
  mean, std = np.array(mean_std)
  noise = 255 * (mean + std * rng.standard_normal((height, width, 3)))
  erased = image.copy()
  erased[top : top + height, left : left + width] = np.clip(np.rint(noise), 0, 255).astype(np.uint8)
  return erased


def erased_box(height: int, width: int, rng: np.random.Generator) -> Box | None:
  """Draws the box to erase: 2 % to a third of the area, log-uniform height / width in 0.3 to 1 / 0.3, uniform position.

  Returns None if none of ten boxes fits into the image.
  """
  for _ in range(10):
    area = height * width * rng.uniform(0.02, 1 / 3)
    aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
    h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if h < height and w < width:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  return None
