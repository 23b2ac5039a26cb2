"""Augmentation for fine-tuning on labelled images: RandAugment, random erasing, mixup and CutMix.

SLIP (Mu et al. 2021) fine-tunes with these, using BEiT's script: timm's `rand-m9-mstd0.5-inc1`, erasing with
probability 0.25 in mode "pixel", mixup with 0.8 and CutMix with 1.0, label smoothing of 0.1, bicubic crops of at least
8 %. timm's RandAugment differs from the paper's (Cubuk et al. 2020): its magnitudes vary, each operation is omitted
half of the time, and a greater magnitude is always a stronger change.

RandAugment uses Pillow with both engines: OpenCV's operations give practically the same pixels, and fine-tuning is
limited by the device anyway.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

from jaxtyping import Float, Int, UInt8
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from declip_jax.data import images
from declip_jax.data.images.geometry import Box

Color = tuple[int, int, int]

CROP = images.Augmentation(scale=(0.08, 1.0), flip_probability=0.5)  # before RandAugment
_MEAN_COLOR = tuple(round(255 * level) for level in images.IMAGENET_MEAN_STD[0])


def view(
  image: bytes | np.ndarray | Image.Image | images.Photo,
  rng: np.random.Generator,
  *,
  size: int,
  engine: images.EngineName = "fast",
) -> images.Pixels:
  """Draws a view for fine-tuning, `[size size 3]`: crop and flip, RandAugment, erasing.

  Raises:
    BadSample: the image cannot be read.
  """
  cut = images.random_view(image, CROP, rng, size=size, interpolation="bicubic", engine=engine)
  return random_erasing(rand_augment(cut, rng), rng)


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


class Mixed(NamedTuple):
  """A batch of which each image is mixed with its partner in the reversed batch.

  Attributes:
    images: `[b h w c]`.
    weight: weight of the image's own label; the partner's label, `labels[::-1]`, has the rest.
  """

  images: UInt8[np.ndarray, "b h w c"]
  weight: float


def mix(
  batch: UInt8[np.ndarray, "b h w c"],
  rng: np.random.Generator,
  *,
  mixup_alpha: float = 0.8,
  cutmix_alpha: float = 1.0,
  probability: float = 1.0,
  cutmix_probability: float = 0.5,
) -> Mixed:
  """Mixes the images of a batch by mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), as timm's mode "batch".

  The weight is the same for the whole batch. A host mixes within its share of the global batch, like processes of
  PyTorch.

  Args:
    batch: images; the middle one of an odd number is mixed with itself.
    rng: generator; draws whether to mix, by which method, the weight, and the box of CutMix.
    mixup_alpha: parameter of the distribution of mixup's weight, Beta(alpha, alpha).
    cutmix_alpha: parameter of the distribution of CutMix's weight, Beta(alpha, alpha).
    probability: the probability of mixing at all.
    cutmix_probability: the probability of CutMix instead of mixup.
  """
  if rng.random() >= probability:
    return Mixed(batch, 1.0)
  if rng.random() < cutmix_probability:
    return cutmix(batch, rng.beta(cutmix_alpha, cutmix_alpha), rng)
  return mixup(batch, rng.beta(mixup_alpha, mixup_alpha))


def mixup(batch: UInt8[np.ndarray, "b h w c"], weight: float) -> Mixed:
  """Blends each image with its partner, rounded to whole levels."""
  blended = np.float32(weight) * batch + np.float32(1 - weight) * batch[::-1]
  return Mixed(np.rint(blended).astype(np.uint8), weight)


def cutmix(batch: UInt8[np.ndarray, "b h w c"], weight: float, rng: np.random.Generator) -> Mixed:
  """Replaces a box of each image by that of its partner.

  The box has the shape of the image, `1 - weight` of its area, and its centre anywhere in the image. It is clipped to
  the image, and the weight is adjusted accordingly.
  """
  size, bounds = batch.shape[1:3], []
  for side in size:
    length, centre = int(side * math.sqrt(1 - weight)), int(rng.integers(side))
    start = centre - length // 2
    bounds.append((max(start, 0), min(start + length, side)))
  (top, bottom), (left, right) = bounds
  mixed = batch.copy()
  mixed[:, top:bottom, left:right] = batch[::-1, top:bottom, left:right]
  return Mixed(mixed, 1 - (bottom - top) * (right - left) / (size[0] * size[1]))


def soft_targets(
  labels: Int[np.ndarray, "b"], weight: float, classes: int, smoothing: float = 0.1
) -> Float[np.ndarray, "b classes"]:
  """Returns class probabilities for a mixed batch, float32: smoothed labels, mixed with their partners'.

  Args:
    labels: labels of the images before mixing.
    weight: the weight in `Mixed`.
    classes: number of classes.
    smoothing: the share of probability that is spread evenly over all classes, including the right one.
  """
  own = np.full((len(labels), classes), smoothing / classes, np.float32)
  own[np.arange(len(labels)), labels] += 1 - smoothing
  return np.float32(weight) * own + np.float32(1 - weight) * own[::-1]
