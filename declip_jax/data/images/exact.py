"""Operations on images by Pillow, bit for bit equal to torchvision's transforms of Pillow images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from declip_jax.data.images.geometry import Crop
from declip_jax.data.images.photo import Pixels, View

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_ENHANCE = {
  "brightness": ImageEnhance.Brightness,
  "contrast": ImageEnhance.Contrast,
  "saturation": ImageEnhance.Color,
}


def cut(pixels: Pixels, reduction: int, crop: Crop, interpolation: str) -> View:
  """Cuts out a view, `[size size 3]`; `reduction` must be 1, since this engine decodes at full resolution."""
  assert reduction == 1
  top, left, height, width = crop.box
  box = Image.fromarray(pixels[top : top + height, left : left + width])
  resized = box.resize((crop.width, crop.height), _RESAMPLING[interpolation])
  return np.array(resized.crop((crop.left, crop.top, crop.left + crop.size, crop.top + crop.size)))


def jitter(image: Pixels, steps: Sequence[tuple[str, float]]) -> Pixels:
  """Applies brightness, contrast, saturation and hue in the given order, each with its factor."""
  made = Image.fromarray(image)
  for operation, factor in steps:
    made = _rotate_hue(made, factor) if operation == "hue" else _ENHANCE[operation](made).enhance(factor)
  return np.array(made)


def _rotate_hue(image: Image.Image, factor: float) -> Image.Image:
  """Rotates the hue by `factor` of the colour circle, in 8-bit HSV."""
  hue, saturation, value = image.convert("HSV").split()
  turned = Image.fromarray(np.asarray(hue) + np.uint8(int(factor * 255) % 256))  # wraps around like the circle
  return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def grayscale(image: Pixels) -> Pixels:
  """Replaces each pixel by its luma (ITU-R 601-2), in three equal channels."""
  return np.array(Image.fromarray(image).convert("L").convert("RGB"))


def blur(image: Pixels, radius: float) -> Pixels:
  """Blurs by three box blurs whose total standard deviation is `radius` pixels."""
  return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def solarize(image: Pixels) -> Pixels:
  """Inverts levels of 128 and more."""
  return np.array(ImageOps.solarize(Image.fromarray(image)))


def flip(image: Pixels) -> Pixels:
  """Mirrors left and right."""
  return np.array(ImageOps.mirror(Image.fromarray(image)))
