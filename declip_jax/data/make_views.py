"""From an example of a source to a training sample: its views, tokens and masks."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from declip_jax.data import finetuning, images, patches
from declip_jax.data.recipes import Recipe
from declip_jax.data.sources import BadSample, Example
from declip_jax.data.text import augment as texts
from declip_jax.data.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rendering:
  """How image views are made, for any recipe.

  Attributes:
    size: `h` and `w` of the views, in pixels.
    interpolation: "bilinear" or "bicubic".
    engine: one of `images.ENGINES`.
    augment_on: "host" makes views completely; "device" leaves everything after the crop to the train step, which reads
      `Recipe.augmentations`. Crops and texts are the same with both.
    max_pixels: largest number of pixels of an image, see `images.open_photo`.

  Raises:
    ValueError: `engine` or `augment_on` has another value.
  """

  size: int
  interpolation: images.Interpolation = "bilinear"
  engine: images.EngineName = "fast"
  augment_on: Literal["host", "device"] = "host"
  max_pixels: int = images.MAX_PIXELS

  def __post_init__(self) -> None:
    if self.augment_on not in ("host", "device"):
      raise ValueError(f"config.data.augment_on={self.augment_on!r}: choose 'host' or 'device'")
    if self.engine not in images.ENGINES:
      raise ValueError(f"config.data.engine={self.engine!r}: choose one of {sorted(images.ENGINES)}")


@dataclass(frozen=True)
class Masking:
  """How tokens and patches are masked, if the recipe masks any.

  Attributes:
    probability: the probability with which a token is selected.
    slots: `k`, the number of slots for selected tokens; 0 means `texts.mlm_slots`.
    whole_words: see `texts.mask_tokens`.
    patch_grid: patches along each side of a view.
    patch_share: share of the patches that are hidden; 0.4 in BEiT (Bao et al. 2022).
  """

  probability: float = 0.15
  slots: int = 0
  whole_words: bool = False
  patch_grid: int = 0
  patch_share: float = 0.4


@dataclass
class Origin:
  """What a sample was made from and the random draws that made it, filled in by `MakeViews`.

  Attributes:
    photos: encoded images, by the field of the example.
    views: for each image view the field of its image, and the parameters that the host has applied to it.
    operation: the operation of EDA on an augmented text, "" for none.
    masked: number of tokens that masked language modelling predicts.
  """

  photos: dict[str, images.Photo] = dataclasses.field(default_factory=dict)
  views: list[tuple[str, images.ViewParams]] = dataclasses.field(default_factory=list)
  operation: str = ""
  masked: int = 0


@dataclass(frozen=True)
class MakeViews:
  """Turns an example, with its image encoded or not, into one sample of a training `Batch`.

  The order of random draws: the parameters of each image view (see `images.draw`), then RandAugment and erasing, then
  the texts, then the patches.

  Attributes:
    recipe: the views to make.
    tokenizer: the tokenizer of the captions.
    rendering: how image views are made.
    masking: how tokens and patches are masked.
    caption_weights: see `texts.choose_caption`.
    num_classes: number of classes, if the recipe has `classified_image` views.
  """

  recipe: Recipe
  tokenizer: Tokenizer
  rendering: Rendering
  masking: Masking = Masking()
  caption_weights: tuple[float, ...] = ()
  num_classes: int = 0

  def __call__(self, example: Example, rng: np.random.Generator, origin: Origin | None = None) -> dict[str, np.ndarray]:
    """Returns one sample: `image` uint8 `[v h w 3]` and, if the recipe needs them, the other fields of a batch.

    `text` is int32 `[u t]`, `mlm_*` are `[k]`, `mim_position` is int32 `[m]`, `label` is int32. If the example has
    `ssl_image`, another image, the views of `recipe.views.ssl_image` are made from it. `origin` is filled in.

    Raises:
      BadSample: an image cannot be read, or the example has no class where the recipe needs one.
      ValueError: the example has `ssl_image`, but a self-supervised view is also contrasted with the caption.
    """
    origin = origin or Origin()
    sample = {"image": np.stack(self._image_views(example, rng, origin))}
    if self.recipe.views.numbers("classified_image"):
      sample["label"] = self._label(example)
    if self.recipe.text_views:
      sample |= self._text_views(example, rng, origin)
    if self.recipe.views.masked_image is not None:
      sample["mim_position"] = patches.block_mask(self.masking.patch_grid, self._num_hidden(), rng)
    return sample

  def with_origin(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
    """The same sample, with its `Origin` as a further field."""
    origin = Origin()
    return {**self(example, rng, origin), "origin": origin}

  def batch_shapes(self, batch_size: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shapes and dtypes of a batch of such samples, without reading any.

    Raises:
      ValueError: the recipe hides patches, but `patch_grid` and `patch_share` leave none to hide.
    """
    image_views, text_views, size = len(self.recipe.image_views), len(self.recipe.text_views), self.rendering.size
    shapes = {"image": ((image_views, size, size, 3), np.uint8)}
    if text_views:
      shapes["text"] = ((text_views, self.tokenizer.context_length), np.int32)
    if self.recipe.views.masked_text is not None:
      slots = (self._slots(),)
      shapes |= {"mlm_position": (slots, np.int32), "mlm_target": (slots, np.int32), "mlm_weight": (slots, np.float32)}
    if self.recipe.views.masked_image is not None:
      shapes["mim_position"] = ((self._num_hidden(),), np.int32)
    if self.recipe.views.numbers("classified_image"):
      shapes["label"] = ((), np.int32)
    return {name: ((batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}

  def _slots(self) -> int:
    return self.masking.slots or texts.mlm_slots(self.tokenizer.context_length, self.masking.probability)

  def _label(self, example: Example) -> np.int32:
    label = example["label"]
    if label < 0:
      raise BadSample("no label", f"{example['id']}: no class")
    if label >= self.num_classes:
      raise BadSample("no label", f"{example['id']}: class {label}: expected 0 to {self.num_classes - 1}")
    return np.int32(label)

  def _num_hidden(self) -> int:
    return patches.num_hidden(self.masking.patch_grid, self.masking.patch_share)

  def _text_views(self, example: Example, rng: np.random.Generator, origin: Origin) -> dict[str, np.ndarray]:
    fields = {}
    caption = texts.choose_caption(example["captions"], rng, self.caption_weights)
    raw = self.tokenizer([caption])[0]
    masked = texts.MaskedText(raw, *[np.zeros(0)] * 3)
    if "masked" in self.recipe.text_views:
      kwargs = {"probability": self.masking.probability, "whole_words": self.masking.whole_words}
      masked = texts.mask_tokens(raw, rng, self.tokenizer, slots=self._slots(), **kwargs)
    if self.recipe.views.masked_text is not None:
      fields |= {"mlm_position": masked.position, "mlm_target": masked.target, "mlm_weight": masked.weight}
      origin.masked = int(masked.weight.sum())

    def augmented() -> np.ndarray:
      text, origin.operation = texts.augment(caption, rng, self.recipe.text_operations)
      return self.tokenizer([text])[0]

    make = {"raw": lambda: raw, "augmented": augmented, "masked": lambda: masked.tokens}
    return fields | {"text": np.stack([make[kind]() for kind in self.recipe.text_views])}

  def _image_views(self, example: Example, rng: np.random.Generator, origin: Origin) -> list[images.Pixels]:
    views = self.recipe.views
    elsewhere = views.ssl_image if "ssl_image" in example else ()
    if set(elsewhere) & set(views.contrastive_image):
      raise ValueError(
        f"config.data.recipe: image views {views.ssl_image} are self-supervised, {views.contrastive_image} are "
        "contrasted with captions; self-supervision on other images needs views of its own, as in recipe 'slip'"
      )
    fields = ["ssl_image" if view in elsewhere else "image" for view in range(len(self.recipe.image_views))]
    limit = self.rendering.max_pixels
    photos = {field: images.open_photo(example[field], limit) for field in dict.fromkeys(fields)}
    drawn = []
    for field, augmentation in zip(fields, self.recipe.augmentations, strict=True):
      params = images.draw(augmentation, photos[field].height, photos[field].width, self.rendering.size, rng)
      drawn.append(params if self.rendering.augment_on == "host" else images.ViewParams(params.crop))
    origin.photos, origin.views = photos, [*zip(fields, drawn, strict=True)]
    kwargs = {"interpolation": self.rendering.interpolation, "engine": self.rendering.engine}
    made = {}  # by field, since each image is decoded once
    for field, photo in photos.items():
      of_photo = [params for params, name in zip(drawn, fields, strict=True) if name == field]
      made[field] = iter(images.make(photo, of_photo, **kwargs))
    views = [next(made[field]) for field in fields]
    return [self._augmented(*pair, rng) for pair in zip(views, self.recipe.image_views, strict=True)]

  def _augmented(self, view: images.Pixels, kind: str, rng: np.random.Generator) -> images.Pixels:
    """Applies what follows the crop and the flip in a "randaugment" view."""
    if kind != "randaugment":
      return view
    if self.recipe.rand_magnitude:
      view = finetuning.rand_augment(view, rng, magnitude=self.recipe.rand_magnitude)
    return finetuning.random_erasing(view, rng, probability=self.recipe.erase_probability)
