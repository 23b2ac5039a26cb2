"""Views: how one is drawn, what was drawn, and the engines that make it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import math
from typing import Literal, get_args

import numpy as np
from PIL import Image

from declip_jax.data.images import exact, fast
from declip_jax.data.images.geometry import CROP_RATIO, Crop, centre_crop, random_resized_crop, square_crop
from declip_jax.data.images.photo import Photo, Pixels, View, open_photo

EngineName = Literal["exact", "fast"]
Interpolation = Literal["bilinear", "bicubic"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
Steps = tuple[tuple[str, float], ...]

_JITTER = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Engine:
  """A way to do the operations of views; see the functions of `images.exact` for what each is.

  Attributes:
    cut: from pixels, how many times lower their resolution is than the image's, a crop and an interpolation.
    jitter: from pixels, and operations with their factors.
    grayscale, solarize, flip: from pixels.
    blur: from pixels and a radius.
    least_factor: decoded pixels that it wants for each of the view, along each axis; infinity wants all there are.
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
  """How a view is drawn: crop, jitter, grey, blur, solarize, flip, in this order.

  The defaults are a crop and nothing else. No flip: captions tell left from right.

  Attributes:
    crop: "resized", of random area and aspect; "square", of the whole height or width.
    scale: of "resized", range of the crop's area as a share of the image's. The default is SLIP's (Mu et al. 2021).
    ratio: of "resized", range of width / height.
    jitter: brightness, contrast and saturation: the factor is uniform in [1 - strength, 1 + strength], cut at 0; hue:
      the shift is uniform in [-strength, strength], in fractions of the colour circle. They come in random order, as in
      torchvision's `ColorJitter`; one of strength 0 is left out.
    jitter_probability: of the four together; the other probabilities are those of one operation each.
    blur_radius: range of the standard deviation, in pixels of the view and not scaled with its size: the papers' values
      belong to 224 pixels, so a config with smaller images may want smaller radii.
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


@dataclass(frozen=True)
class ViewParams:
  """What was drawn for one view.

  Attributes:
    crop: where it lies.
    jitter: operations in their order, with their factors.
    grayscale, solarize, flip: whether it is done.
    blur: radius; None does not blur.
  """

  crop: Crop
  jitter: Steps = ()
  grayscale: bool = False
  blur: float | None = None
  solarize: bool = False
  flip: bool = False


def draw(augmentation: Augmentation, height: int, width: int, size: int, rng: np.random.Generator) -> ViewParams:
  """Draws a view of `size` x `size` pixels of an image.

  The order of the draws, which streams of seeds rely on: the crop, then jitter (whether; order; factors in this order),
  grey, blur (whether; radius), solarize, flip. Nothing is drawn for an operation of probability 0.
  """
  a = augmentation
  if a.crop == "square":
    crop = square_crop(height, width, size, rng)
  else:
    crop = random_resized_crop(height, width, size, rng, a.scale, a.ratio)

  def happens(probability: float) -> bool:
    return bool(probability) and rng.random() < probability

  return ViewParams(  # arguments are evaluated in the order in which they stand
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
  plans: Sequence[ViewParams],
  *,
  interpolation: Interpolation = "bilinear",
  engine: EngineName = "fast",
) -> list[Pixels]:
  """Makes views of one image, `[size size 3]` each; it is decoded once, at the resolution that the largest one needs.

  Raises:
    BadSample: the image cannot be read.
    ValueError: an unknown interpolation or engine.
  """
  if engine not in ENGINES:
    raise ValueError(f"engine {engine!r} is none of {sorted(ENGINES)}")
  if interpolation not in INTERPOLATIONS:
    raise ValueError(f"interpolation {interpolation!r} is none of {sorted(INTERPOLATIONS)}")
  do = ENGINES[engine]
  pixels, times = open_photo(image).decode(int(min(plan.crop.factor for plan in plans) / do.least_factor))
  return [_change(do.cut(pixels, times, plan.crop, interpolation), plan, do) for plan in plans]


def _change(view: Pixels, plan: ViewParams, do: Engine) -> Pixels:
  """What comes behind the crop."""
  if plan.jitter:
    view = do.jitter(view, plan.jitter)
  if plan.grayscale:
    view = do.grayscale(view)
  if plan.blur is not None:
    view = do.blur(view, plan.blur)
  if plan.solarize:
    view = do.solarize(view)
  return do.flip(view) if plan.flip else view


def random_view(
  image: bytes | np.ndarray | Image.Image | Photo,
  augmentation: Augmentation,
  rng: np.random.Generator,
  *,
  size: int,
  interpolation: Interpolation = "bilinear",
  engine: EngineName = "fast",
) -> Pixels:
  """Draws one view of an image and makes it, `[size size 3]`; raises as `make`."""
  photo = open_photo(image)
  plan = draw(augmentation, photo.height, photo.width, size, rng)
  return make(photo, [plan], interpolation=interpolation, engine=engine)[0]


@dataclass(frozen=True)
class EvalView:
  """The view of an image that a model is evaluated on.

  CLIP evaluates with bicubic interpolation, SLIP with bilinear, DeCLIP with bilinear and `size=224, resize=256`.

  Attributes:
    size: height and width of the view, in pixels.
    resize: length of the image's shorter side, in pixels, before the centre is cut out; 0 means `size`.
    interpolation: method of resizing.
    mean, std: per channel, on a scale of 0 to 1, by which the model normalises pixels; see `normalise`.
  """

  size: int
  resize: int = 0
  interpolation: Interpolation = "bilinear"
  mean: tuple[float, ...] = (0.0, 0.0, 0.0)
  std: tuple[float, ...] = (1.0, 1.0, 1.0)

  def normalise(self, pixels: np.ndarray) -> np.ndarray:
    """Normalised float32 pixels of a uint8 view."""
    mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
    return (np.asarray(pixels, np.float32) / 255 - mean) / std


def eval_view(
  image: bytes | np.ndarray | Image.Image | Photo, view: EvalView, *, engine: EngineName = "exact"
) -> Pixels:
  """Resizes an image and cuts out its centre, `[size size 3]`, not normalised.

  The default engine equals torchvision bit for bit, so that a score does not depend on how fast we preprocess.

  Raises:
    BadSample: the image cannot be read.
    ValueError: see `centre_crop` and `make`.
  """
  photo = open_photo(image)
  plan = ViewParams(centre_crop(photo.height, photo.width, view.size, view.resize))
  return make(photo, [plan], interpolation=view.interpolation, engine=engine)[0]
