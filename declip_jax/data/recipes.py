"""Recipes: which views of an example are made, and how. A recipe is a value; what it makes are plain functions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from declip_jax.data import images, texts
from declip_jax.data.sources import Example
from declip_jax.data.tokenizer import Tokenizer
from declip_jax.types import Views


@dataclass(frozen=True)
class Recipe:
  """The views of an example and the strength of their augmentation.

  Attributes:
    image_views: "weak" (a crop) or "strong" (crop, colour, grey, blur, flip) each; see `images.weak_view`.
    text_views: "raw", "augmented" (EDA) or "masked" (masked language modelling) each.
    views: which view plays which part in the model.
    weak_scale, strong_scale: range of the crop's area, as a share of the image's.
    jitter: brightness, contrast, saturation, hue.
    blur_radius: range, in pixels of the view.
  """

  image_views: tuple[str, ...]
  text_views: tuple[str, ...]
  views: Views
  weak_scale: tuple[float, float] = (0.5, 1.0)
  strong_scale: tuple[float, float] = (0.2, 1.0)
  jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
  jitter_probability: float = 0.8
  grayscale_probability: float = 0.2
  blur_probability: float = 0.5
  blur_radius: tuple[float, float] = (0.1, 2.0)
  flip_probability: float = 0.5


# What `config.data.recipe` may name.
RECIPES = {
  # SLIP's code and DeCLIP's configs train CLIP alike: one weak crop, the caption as it is (clip_experiments/yfcc15m).
  "clip": Recipe(("weak",), ("raw",), Views()),
  # SLIP, datasets.py: CLIP's view, and two of SimCLR.
  "slip": Recipe(("weak", "strong", "strong"), ("raw",), Views(ssl_image=(1, 2)), strong_scale=(0.08, 1.0)),
  # DeCLIP: two strong views (MOCOV2 of its loader), the caption, its EDA variant. The paper's contrast sees a clean
  # caption, so the masked one is a view of its own; the released code masks the caption that it contrasts.
  "declip": Recipe(
    ("strong", "strong"),
    ("raw", "augmented", "masked"),
    Views(contrastive_image=(0, 1), contrastive_text=(0, 1), ssl_image=(0, 1), masked_text=2),
  ),
}


def get_recipe(name: str, overrides: Mapping[str, Any]) -> Recipe:
  """The recipe of that name, with those of its fields replaced that `overrides` gives a value other than None.

  Raises:
    ValueError: an unknown name.
  """
  if name not in RECIPES:
    raise ValueError(f"config.data.recipe={name!r}: choose one of {sorted(RECIPES)}")
  return replace(RECIPES[name], **{field: value for field, value in overrides.items() if value is not None})


@dataclass(frozen=True)
class MakeViews:
  """Turns an example with decoded pixels into one row of a training `Batch`.

  Attributes:
    recipe: what to make.
    tokenizer: of the captions.
    size: `h` and `w` of the views.
    interpolation: "bilinear" or "bicubic".
    mask_probability: of masked language modelling.
    mask_slots: `k`; 0 takes `texts.mlm_slots`.
  """

  recipe: Recipe
  tokenizer: Tokenizer
  size: int
  interpolation: str = "bilinear"
  mask_probability: float = 0.15
  mask_slots: int = 0

  def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`image` uint8 `[v h w 3]`, `text` int32 `[u t]`, and `mlm_*` `[k]` where the recipe has a masked view."""
    row = {"image": np.stack([self._image_view(kind, example["image"], rng) for kind in self.recipe.image_views])}
    caption = texts.choose_caption(example["captions"], rng)
    raw = self.tokenizer([caption])[0]
    masked = texts.MaskedText(raw, *[np.zeros(0)] * 3)
    if "masked" in self.recipe.text_views:
      masked = texts.mask_tokens(raw, rng, self.tokenizer, slots=self._slots(), probability=self.mask_probability)
      row |= {"mlm_position": masked.position, "mlm_target": masked.target, "mlm_weight": masked.weight}
    make = {
      "raw": lambda: raw,
      "augmented": lambda: self.tokenizer([texts.augment(caption, rng)])[0],
      "masked": lambda: masked.tokens,
    }
    return row | {"text": np.stack([make[kind]() for kind in self.recipe.text_views])}

  def batch_shapes(self, batch_size: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shapes and dtypes of a batch of such rows, without reading any."""
    image_views, text_views = len(self.recipe.image_views), len(self.recipe.text_views)
    shapes = {
      "image": ((image_views, self.size, self.size, 3), np.uint8),
      "text": ((text_views, self.tokenizer.context_length), np.int32),
    }
    if self.recipe.views.masked_text is not None:
      slots = (self._slots(),)
      shapes |= {"mlm_position": (slots, np.int32), "mlm_target": (slots, np.int32), "mlm_weight": (slots, np.float32)}
    return {name: ((batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}

  def _slots(self) -> int:
    return self.mask_slots or texts.mlm_slots(self.tokenizer.context_length, self.mask_probability)

  def _image_view(self, kind: str, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r = self.recipe
    if kind == "weak":
      return images.weak_view(image, rng, size=self.size, scale=r.weak_scale, interpolation=self.interpolation)
    brightness, contrast, saturation, hue = r.jitter
    return images.strong_view(
      image,
      rng,
      size=self.size,
      scale=r.strong_scale,
      brightness=brightness,
      contrast=contrast,
      saturation=saturation,
      hue=hue,
      jitter_probability=r.jitter_probability,
      grayscale_probability=r.grayscale_probability,
      blur_probability=r.blur_probability,
      blur_radius=r.blur_radius,
      flip_probability=r.flip_probability,
      interpolation=self.interpolation,
    )
