"""Views: their random parameters, and the engines that make them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import math
from typing import Literal, get_args

import numpy as np
from PIL import Image

from declip_jax.data.images import exact, fast
from declip_jax.data.images.geometry import (
  CROP_RATIO,
  Crop,
  centre_crop,
  random_resized_crop,
  square_crop,
  squashed_crop,
  whole_image,
)
from declip_jax.data.images.photo import Photo, Pixels, View, open_photo

EngineName = Literal["exact", "fast"]
Interpolation = Literal["bilinear", "bicubic"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
Steps = tuple[tuple[str, float], ...]

_JITTER = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Engine:
  """An implementation of the operations on views; see `images.exact` for their definitions.

  Attributes:
    cut: function of pixels, the factor by which their resolution was reduced, a crop and an interpolation.
    jitter: function of pixels, and operations with their factors.
    grayscale, solarize, flip: functions of pixels.
    blur: function of pixels and a radius.
    least_factor: minimum number of decoded pixels per pixel of the view, along each axis; infinity means full
      resolution.
  """

  cut: Callable[[Pixels, int, Crop, str], View]
  jitter: Callable[[Pixels, Sequence[tuple[str, float]]], Pixels]
  grayscale: Callable[[Pixels], Pixels]
  blur: Callable[[Pixels, float], Pixels]
  solarize: Callable[[Pixels], Pixels]
  flip: Callable[[Pixels], Pixels]
  least_factor: float


ENGINES = {
  "exact": Engine(exact.cut, exact.jitter, exact.grayscale, exact.blur, exact.solarize, exact.flip, math.inf),
  "fast": Engine(fast.cut, fast.jitter, fast.grayscale, fast.blur, fast.solarize, fast.flip, fast.LEAST_FACTOR),
}


@dataclass(frozen=True)
class Augmentation:
  """The distribution of a view: crop, jitter, grayscale, blur, solarize, flip, in this order.

  The defaults are a crop and nothing else; no flip, since captions may mention left and right.

  Attributes:
    crop: "resized", with random area and aspect ratio; "square", with the full height or width.
    scale: range of the area of "resized", as a share of the image's. The default is SLIP's (Mu et al. 2021).
    ratio: range of width / height of "resized".
    jitter: strengths of brightness, contrast, saturation and hue. For the first three the factor is uniform in
      [1 - strength, 1 + strength], clipped at 0; for hue the shift is uniform in [-strength, strength], in fractions of
      the colour circle. Their order is random, as in torchvision's `ColorJitter`; operations of strength 0 are omitted.
    jitter_probability: probability of all four together; the other probabilities are those of one operation each.
    blur_radius: range of the standard deviation, in pixels of the view. It does not scale with the view's size: the
      papers' values are for 224 pixels, so configs with smaller images may need smaller radii.
    squash: whether views are of the image resized to a square, whatever its shape: `ratio` is then relative to that of
      the image, and "square" is the whole image.
  """

  crop: Literal["resized", "square"] = "resized"
  scale: tuple[float, float] = (0.5, 1.0)
  ratio: tuple[float, float] = CROP_RATIO
  jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
  jitter_probability: float = 0.0
  grayscale_probability: float = 0.0
  blur_probability: float = 0.0
  blur_radius: tuple[float, float] = (0.1, 2.0)
  solarize_probability: float = 0.0
  flip_probability: float = 0.0
  squash: bool = False


@dataclass(frozen=True)
class ViewParams:
  """The random parameters of one view.

  Attributes:
    crop: the crop.
    jitter: operations in order, with their factors.
    grayscale, solarize, flip: whether the operation is applied.
    blur: radius, None for no blur.
  """

  crop: Crop
  jitter: Steps = ()
  grayscale: bool = False
  blur: float | None = None
  solarize: bool = False
  flip: bool = False

  def describe(self) -> list[str]:
    """What is done after the crop, in order, such as "brightness 1.2" for a factor and "hue +12°" for a shift."""
    done = [
      f"hue {360 * factor:+.0f}°" if operation == "hue" else f"{operation} {factor:.2f}"
      for operation, factor in self.jitter
    ]
    if self.grayscale:
      done.append("grey")
    if self.blur is not None:
      done.append(f"blur {self.blur:.1f} px")
    return done + ["solarised"] * self.solarize + ["flipped"] * self.flip


def draw(augmentation: Augmentation, height: int, width: int, size: int, rng: np.random.Generator) -> ViewParams:
  """Draws the parameters of a view of `size` x `size` pixels of an image.

  Reproducibility depends on the order of draws: crop, jitter (whether; order; factors in this order), grayscale, blur
  (whether; radius), solarize, flip. Nothing is drawn for an operation with probability 0.
  """
  a = augmentation
  if a.crop == "square":
    crop = whole_image(height, width, size) if a.squash else square_crop(height, width, size, rng)
  else:
    draw_crop = squashed_crop if a.squash else random_resized_crop
    crop = draw_crop(height, width, size, rng, a.scale, a.ratio)

  def happens(probability: float) -> bool:
    return bool(probability) and rng.random() < probability

  return ViewParams(  # Python evaluates arguments in the order written
    crop,
    jitter=_draw_jitter(a.jitter, rng) if happens(a.jitter_probability) else (),
    grayscale=happens(a.grayscale_probability),
    blur=rng.uniform(*a.blur_radius) if happens(a.blur_probability) else None,
    solarize=happens(a.solarize_probability),
    flip=happens(a.flip_probability),
  )


def _draw_jitter(strengths: tuple[float, float, float, float], rng: np.random.Generator) -> Steps:
  steps = []
  for i in rng.permutation(len(_JITTER)):
    centre = 0 if _JITTER[i] == "hue" else 1
    low, high = centre - strengths[i], centre + strengths[i]
    if strengths[i] > 0:
      steps.append((_JITTER[i], rng.uniform(low if centre == 0 else max(0.0, low), high)))
  return tuple(steps)


def make(
  image: bytes | np.ndarray | Image.Image | Photo,
  views: Sequence[ViewParams],
  *,
  interpolation: Interpolation = "bilinear",
  engine: EngineName = "fast",
) -> list[Pixels]:
  """Makes views of one image, `[size size 3]` each, decoding it once at the resolution that the views need.

  Raises:
    BadSample: the image cannot be read.
    ValueError: unknown interpolation or engine.
  """
  if engine not in ENGINES:
    raise ValueError(f"engine={engine!r}: choose one of {sorted(ENGINES)}")
  if interpolation not in INTERPOLATIONS:
    raise ValueError(f"interpolation={interpolation!r}: choose one of {sorted(INTERPOLATIONS)}")
  operations = ENGINES[engine]
  factor = min(params.crop.factor for params in views) / operations.least_factor
  pixels, reduction = open_photo(image).decode(int(factor))
  return [
    _augment(operations.cut(pixels, reduction, params.crop, interpolation), params, operations) for params in views
  ]


def _augment(view: Pixels, params: ViewParams, engine: Engine) -> Pixels:
  """Applies everything after the crop."""
  if params.jitter:
    view = engine.jitter(view, params.jitter)
  if params.grayscale:
    view = engine.grayscale(view)
  if params.blur is not None:
    view = engine.blur(view, params.blur)
  if params.solarize:
    view = engine.solarize(view)
  return engine.flip(view) if params.flip else view


def random_view(
  image: bytes | np.ndarray | Image.Image | Photo,
  augmentation: Augmentation,
  rng: np.random.Generator,
  *,
  size: int,
  interpolation: Interpolation = "bilinear",
  engine: EngineName = "fast",
) -> Pixels:
  """Draws and makes one view of an image, `[size size 3]`; raises like `make`."""
  photo = open_photo(image)
  params = draw(augmentation, photo.height, photo.width, size, rng)
  return make(photo, [params], interpolation=interpolation, engine=engine)[0]


@dataclass(frozen=True)
class EvalView:
  """The view of an image that a model is evaluated on.

  CLIP evaluates with bicubic interpolation, SLIP with bilinear, DeCLIP with bilinear and `size=224, resize=256`.

  Attributes:
    size: height and width of the view, in pixels.
    resize: length of the image's shorter side, in pixels, before the centre is cut out; 0 means `size`.
    interpolation: method of resizing.
    mean, std: per channel, on a scale of 0 to 1, by which the model normalises pixels; see `normalise`.
    squash: whether the whole image is resized to the view, whatever its shape, and nothing is cut off.
  """

  size: int
  resize: int = 0
  interpolation: Interpolation = "bilinear"
  mean: tuple[float, ...] = (0.0, 0.0, 0.0)
  std: tuple[float, ...] = (1.0, 1.0, 1.0)
  squash: bool = False

  def normalise(self, pixels: np.ndarray) -> np.ndarray:
    """Returns the normalised float32 pixels of a uint8 view."""
    mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
    return (np.asarray(pixels, np.float32) / 255 - mean) / std


def eval_view(
  image: bytes | np.ndarray | Image.Image | Photo, view: EvalView, *, engine: EngineName = "exact"
) -> Pixels:
  """Resizes an image and cuts out its centre, or resizes it whole (`view.squash`): `[size size 3]`, not normalised.

  The default engine equals torchvision bit for bit, so that scores do not depend on the engine that training uses.

  Raises:
    BadSample: the image cannot be read.
    ValueError: see `centre_crop` and `make`.
  """
  photo = open_photo(image)
  sides = photo.height, photo.width, view.size
  params = ViewParams(whole_image(*sides) if view.squash else centre_crop(*sides, view.resize))
  return make(photo, [params], interpolation=view.interpolation, engine=engine)[0]
