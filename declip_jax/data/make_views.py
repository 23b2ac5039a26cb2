"""From an example of a source to the views of a training sample."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from declip_jax.data import images, patches
from declip_jax.data.recipes import Recipe
from declip_jax.data.sources import Example
from declip_jax.data.text import augment as texts
from declip_jax.data.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class MakeViews:
  """Turns an example, its image encoded or not, into one row of a training `Batch`.

  What is drawn, in this order: the plan of each image view (see `images.draw`), then the texts, then hidden patches.

  Attributes:
    recipe: what to make.
    tokenizer: of the captions.
    size: `h` and `w` of the views.
    interpolation: "bilinear" or "bicubic".
    mask_probability: of masked language modelling.
    mask_slots: `k`; 0 takes `texts.mlm_slots`.
    mask_whole_words: see `texts.mask_tokens`.
    caption_weights: see `texts.choose_caption`.
    patch_grid: patches along each side of a view, where masked image modelling hides some.
    patch_share: of the patches that it hides; the paper's 0.4.
    engine: of `images.ENGINES`.
    augment_on: "host" makes views completely; "device" leaves all behind the crop to the train step, which finds what
      to do in `Recipe.augmentations`. Crops and texts are the same with both.
  """

  recipe: Recipe
  tokenizer: Tokenizer
  size: int
  interpolation: str = "bilinear"
  mask_probability: float = 0.15
  mask_slots: int = 0
  mask_whole_words: bool = False
  caption_weights: tuple[float, ...] = ()
  patch_grid: int = 0
  patch_share: float = 0.4
  engine: images.EngineName = "fast"
  augment_on: Literal["host", "device"] = "host"

  def __post_init__(self) -> None:
    if self.augment_on not in ("host", "device"):
      raise ValueError(f"config.data.augment_on={self.augment_on!r}: choose 'host' or 'device'")
    if self.engine not in images.ENGINES:
      raise ValueError(f"config.data.engine={self.engine!r}: choose one of {sorted(images.ENGINES)}")

  def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One row: `image` uint8 `[v h w 3]` and, where the recipe has such a view, `text`, `mlm_*` and `mim_position`.

    `text` is int32 `[u t]`, `mlm_*` are `[k]`, `mim_position` is int32 `[m]`. If the example has `ssl_image`, another
    image, the views of `recipe.views.ssl_image` are made of it.

    Raises:
      BadSample: an image cannot be read.
      ValueError: an example with `ssl_image`, and a view of self-supervision that the caption has to fit too.
    """
    views = self.recipe.views
    row = {"image": np.stack(self._image_views(example, rng))}
    if self.recipe.text_views:
      row |= self._text_views(example, rng)
    if views.masked_image is not None:
      row["mim_position"] = patches.block_mask(self.patch_grid, self._hidden_patches(), rng)
    return row

  def batch_shapes(self, batch_size: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shapes and dtypes of a batch of such rows, without reading any.

    Raises:
      ValueError: the recipe hides patches, and `patch_grid` and `patch_share` give none to hide.
    """
    image_views, text_views = len(self.recipe.image_views), len(self.recipe.text_views)
    shapes = {"image": ((image_views, self.size, self.size, 3), np.uint8)}
    if text_views:
      shapes["text"] = ((text_views, self.tokenizer.context_length), np.int32)
    if self.recipe.views.masked_text is not None:
      slots = (self._slots(),)
      shapes |= {"mlm_position": (slots, np.int32), "mlm_target": (slots, np.int32), "mlm_weight": (slots, np.float32)}
    if self.recipe.views.masked_image is not None:
      shapes["mim_position"] = ((self._hidden_patches(),), np.int32)
    return {name: ((batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}

  def _slots(self) -> int:
    return self.mask_slots or texts.mlm_slots(self.tokenizer.context_length, self.mask_probability)

  def _hidden_patches(self) -> int:
    return patches.count_hidden(self.patch_grid, self.patch_share)

  def _text_views(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
    row = {}
    caption = texts.choose_caption(example["captions"], rng, self.caption_weights)
    raw = self.tokenizer([caption])[0]
    masked = texts.MaskedText(raw, *[np.zeros(0)] * 3)
    if "masked" in self.recipe.text_views:
      how = {"probability": self.mask_probability, "whole_words": self.mask_whole_words}
      masked = texts.mask_tokens(raw, rng, self.tokenizer, slots=self._slots(), **how)
    if self.recipe.views.masked_text is not None:
      row |= {"mlm_position": masked.position, "mlm_target": masked.target, "mlm_weight": masked.weight}
    make = {
      "raw": lambda: raw,
      "augmented": lambda: self.tokenizer([texts.augment(caption, rng, self.recipe.text_operations)])[0],
      "masked": lambda: masked.tokens,
    }
    return row | {"text": np.stack([make[kind]() for kind in self.recipe.text_views])}

  def _image_views(self, example: Example, rng: np.random.Generator) -> list[images.Pixels]:
    views = self.recipe.views
    elsewhere = views.ssl_image if "ssl_image" in example else ()
    if set(elsewhere) & set(views.contrastive_image):
      raise ValueError(
        f"config.data.recipe: image views {views.ssl_image} are self-supervised, {views.contrastive_image} are "
        "compared with captions; self-supervision on other images needs views of its own, as recipe 'slip' has"
      )
    sources = ["ssl_image" if view in elsewhere else "image" for view in range(len(self.recipe.image_views))]
    photos = {source: images.open_photo(example[source]) for source in dict.fromkeys(sources)}
    plans = []
    for source, augmentation in zip(sources, self.recipe.augmentations, strict=True):
      plan = images.draw(augmentation, photos[source].height, photos[source].width, self.size, rng)
      plans.append(plan if self.augment_on == "host" else images.ViewParams(plan.crop))
    how = {"interpolation": self.interpolation, "engine": self.engine}
    made = {}  # by source, for each is decoded once
    for source, photo in photos.items():
      made[source] = iter(
        images.make(photo, [plan for plan, of in zip(plans, sources, strict=True) if of == source], **how)
      )
    return [next(made[source]) for source in sources]
