"""Recipes: which views of an example are made, and how. A recipe is a value; what it makes are plain functions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from declip_jax.data import images, patches
from declip_jax.data.sources import Example
from declip_jax.data.text import augment as texts
from declip_jax.data.text.tokenizer import Tokenizer
from declip_jax.types import Views

_COLOURED = ("strong", "color")  # the image views that blur and solarize
_PER_VIEW = ("blur_probability", "solarize_probability")


@dataclass(frozen=True)
class Recipe:
  """The views of an example and the strength of their augmentation.

  Attributes:
    image_views: one of these for each; `augmentations` has them in numbers.
      "weak": a crop of random area and aspect.
      "square": OpenAI's crop, a random square of the whole height or width.
      "strong": a crop of random area and aspect, jitter, grey, blur, solarize, flip.
      "color": OpenAI's crop, jitter, grey, blur, solarize; no flip.
    text_views: "raw", "augmented" (EDA) or "masked" (masked language modelling) each.
    views: which view plays which part in the model.
    weak_scale, strong_scale: range of the crop's area, as a share of the image's, in weak and in strong views.
    jitter: brightness, contrast, saturation, hue.
    blur_radius: range, in pixels of the view.
    blur_probability, solarize_probability: an entry for each strong or color view, in their order; the last entry is
      also that of the views behind it.
    text_operations: of an augmented text, names of `texts.OPERATIONS`; the default are DeCLIP's.
  """

  image_views: tuple[str, ...]
  text_views: tuple[str, ...]
  views: Views
  weak_scale: tuple[float, float] = (0.5, 1.0)
  strong_scale: tuple[float, float] = (0.2, 1.0)
  jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
  jitter_probability: float = 0.8
  grayscale_probability: float = 0.2
  blur_probability: tuple[float, ...] = (0.5,)
  blur_radius: tuple[float, float] = (0.1, 2.0)
  solarize_probability: tuple[float, ...] = (0.0,)
  flip_probability: float = 0.5
  text_operations: tuple[str, ...] = ("replace", "swap", "delete")

  @property
  def augmentations(self) -> tuple[images.Augmentation, ...]:
    """How each image view is drawn, with all its probabilities; those of a "weak" and a "square" view are 0."""
    blur, solarize = (_per_view(getattr(self, field), self.image_views) for field in _PER_VIEW)
    drawn = []
    for view, kind in enumerate(self.image_views):
      crop = "square" if kind in ("square", "color") else "resized"
      scale = self.strong_scale if kind == "strong" else self.weak_scale
      if kind not in _COLOURED:
        drawn.append(images.Augmentation(crop, scale))
        continue
      drawn.append(
        images.Augmentation(
          crop,
          scale,
          jitter=self.jitter,
          jitter_probability=self.jitter_probability,
          grayscale_probability=self.grayscale_probability,
          blur_probability=blur[view],
          blur_radius=self.blur_radius,
          solarize_probability=solarize[view],
          flip_probability=0.0 if kind == "color" else self.flip_probability,
        )
      )
    return tuple(drawn)


# What `config.data.recipe` may name. A strength that a recipe does not give is that of MoCo v2 (Chen et al. 2020)
# and so of DeCLIP.
RECIPES = {
  # SLIP's code and DeCLIP's configs train CLIP alike: one weak crop, the caption as it is (clip_experiments/yfcc15m).
  "clip": Recipe(("weak",), ("raw",), Views()),
  # CLIP itself (Radford et al. 2021, section 2.3): a random square of the resized image, and nothing else.
  "openai": Recipe(("square",), ("raw",), Views()),
  # SLIP's three studies of CLIP with more augmentation (Mu et al. 2021, ablations): the colours and the blur of its
  # self-supervised views on CLIP's own crop; their crop and flip; all of it. The paper gives no strengths: these are
  # those of SLIP's code.
  "clip_color": Recipe(("color",), ("raw",), Views()),
  "clip_crop": Recipe(
    ("strong",),
    ("raw",),
    Views(),
    strong_scale=(0.08, 1.0),
    jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probability=(0.0,),
  ),
  "clip_full": Recipe(("strong",), ("raw",), Views(), strong_scale=(0.08, 1.0)),
  # SLIP's code, SIMCLR models: its two self-supervised views and no text.
  "simclr": Recipe(
    ("strong", "strong"),
    (),
    Views(contrastive_image=(), contrastive_text=(), ssl_image=(0, 1), neighbour_text=()),
    strong_scale=(0.08, 1.0),
  ),
  # SLIP, datasets.py: CLIP's view, and two of SimCLR.
  "slip": Recipe(("weak", "strong", "strong"), ("raw",), Views(ssl_image=(1, 2)), strong_scale=(0.08, 1.0)),
  # SLIP with MoCo v3 or BYOL in place of SimCLR: MoCo v3's two unlike views (facebookresearch/moco-v3, main_moco.py,
  # with the crop of its ViTs), which SLIP takes for BYOL too.
  "slip_mocov3": Recipe(
    ("weak", "strong", "strong"),
    ("raw",),
    Views(ssl_image=(1, 2)),
    strong_scale=(0.08, 1.0),
    jitter=(0.4, 0.4, 0.2, 0.1),
    blur_probability=(1.0, 0.1),
    solarize_probability=(0.0, 0.2),
  ),
  # SLIP with BEiT (Bao et al. 2022, microsoft/unilm): a view of crop, jitter and flip, in which patches are hidden.
  # Where we differ: BEiT jitters and flips before it crops, and always resizes with bicubic interpolation.
  "slip_mim": Recipe(
    ("weak", "strong"),
    ("raw",),
    Views(masked_image=1),
    strong_scale=(0.08, 1.0),
    jitter=(0.4, 0.4, 0.4, 0.0),
    jitter_probability=1.0,
    grayscale_probability=0.0,
    blur_probability=(0.0,),
  ),
  # DeCLIP: two strong views (MOCOV2 of its loader), the caption, its EDA variant. The paper's contrast sees a clean
  # caption, so the masked one is a view of its own; the released code masks the caption that it contrasts.
  "declip": Recipe(
    ("strong", "strong"),
    ("raw", "augmented", "masked"),
    Views(contrastive_image=(0, 1), contrastive_text=(0, 1), ssl_image=(0, 1), masked_text=2, neighbour_text=(0,)),
  ),
  # DeCLIP and DeFILIP as released (declip.py, declip_solver.py): the masked caption in place of the clean one, and both
  # text views search the bank and enter it.
  "declip_repo": Recipe(
    ("strong", "strong"),
    ("masked", "augmented"),
    Views(contrastive_image=(0, 1), contrastive_text=(0, 1), ssl_image=(0, 1), masked_text=0, neighbour_text=(0, 1)),
  ),
  # FILIP on a strong view, as in the benchmark of DeCLIP's authors (Cui et al. 2022), and a clean caption. FILIP's own
  # paper (Yao et al. 2021) has AutoAugment for images and back-translation for captions instead.
  "filip": Recipe(("strong",), ("raw",), Views()),
  # FILIP as that benchmark released it (filip.py): masking only augments the caption, and nothing predicts the tokens.
  "filip_repo": Recipe(("strong",), ("masked",), Views()),
}


def get_recipe(name: str, overrides: Mapping[str, Any]) -> Recipe:
  """The recipe of that name, with those of its fields replaced that `overrides` gives a value other than None.

  Raises:
    ValueError: an unknown name, a number that cannot be, a probability that is no tuple where it can differ from view
      to view, or an unknown operation on texts.
  """
  if name not in RECIPES:
    raise ValueError(f"config.data.recipe={name!r}: choose one of {sorted(RECIPES)}")
  given = {field: value for field, value in overrides.items() if value is not None}
  for field in _PER_VIEW:
    if field in given and not (isinstance(given[field], tuple) and given[field]):
      raise ValueError(
        f"config.data.{field}={given[field]!r}: give a tuple such as (0.5,), or (1.0, 0.1) for views that differ"
      )
  _check_strengths(given)
  operations = given.get("text_operations", ("swap",))
  if not operations or not set(operations) <= set(texts.OPERATIONS):
    raise ValueError(f"config.data.text_operations={operations!r}: choose one or more of {sorted(texts.OPERATIONS)}")
  return replace(RECIPES[name], **given)


def _check_strengths(given: Mapping[str, Any]) -> None:
  """Refuses ranges and probabilities that cannot be."""
  legal = {"weak_scale": (0.0, 1.0), "strong_scale": (0.0, 1.0), "blur_radius": (0.0, float("inf"))}
  for field, (least, most) in legal.items():
    value = given.get(field, (most, most))
    if len(value) != 2 or not least <= value[0] <= value[1] <= most or value[1] == 0:
      raise ValueError(f"config.data.{field}={value!r}: two numbers, ascending, from {least:g} to {most:g}")
  jitter = given.get("jitter", (0.0,) * 4)
  if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
    raise ValueError(f"config.data.jitter={jitter!r}: brightness, contrast, saturation, hue, the last at most 0.5")
  for field in (*_PER_VIEW, "jitter_probability", "grayscale_probability", "flip_probability"):
    values = given.get(field, ())
    if any(not 0 <= value <= 1 for value in (values if isinstance(values, tuple) else (values,))):
      raise ValueError(f"config.data.{field}={values!r}: from 0 to 1")


def trimmed(recipe: Recipe, used: Views) -> Recipe:
  """The recipe without the views that no part of `used` names; the others keep their order and get new numbers.

  Args:
    recipe: what to trim.
    used: `recipe.views` without the parts that nobody uses, () or None each.

  Returns:
    A recipe whose `views` are `used` in the new numbers. Each view is augmented as strongly as before.

  Raises:
    ValueError: `used` names no image view.
  """
  images_kept = _named(used.contrastive_image, used.ssl_image, used.masked_image)
  texts_kept = _named(used.contrastive_text, used.neighbour_text, used.masked_text)
  if not images_kept:
    raise ValueError("config.objective: no term with a weight uses an image view")
  new_image, new_text = ({old: new for new, old in enumerate(kept)} for kept in (images_kept, texts_kept))
  probabilities = {}
  for field in _PER_VIEW:
    of_view = _per_view(getattr(recipe, field), recipe.image_views)
    probabilities[field] = tuple(of_view[view] for view in images_kept if view in of_view) or getattr(recipe, field)
  return replace(
    recipe,
    image_views=tuple(recipe.image_views[view] for view in images_kept),
    text_views=tuple(recipe.text_views[view] for view in texts_kept),
    views=Views(
      contrastive_image=tuple(new_image[view] for view in used.contrastive_image),
      contrastive_text=tuple(new_text[view] for view in used.contrastive_text),
      ssl_image=tuple(new_image[view] for view in used.ssl_image),
      masked_text=new_text.get(used.masked_text),
      masked_image=new_image.get(used.masked_image),
      neighbour_text=tuple(new_text[view] for view in used.neighbour_text),
    ),
    **probabilities,
  )


def _named(first: tuple[int, ...], second: tuple[int, ...], masked: int | None) -> list[int]:
  """The views that these parts name, ascending."""
  return sorted({*first, *second} | ({masked} - {None}))


def _per_view(probabilities: tuple[float, ...], kinds: tuple[str, ...]) -> dict[int, float]:
  """The entry of each strong or color view, by the number of the view."""
  coloured = [view for view, kind in enumerate(kinds) if kind in _COLOURED]
  return {view: probabilities[min(place, len(probabilities) - 1)] for place, view in enumerate(coloured)}


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
      plans.append(plan if self.augment_on == "host" else images.Plan(plan.crop))
    how = {"interpolation": self.interpolation, "engine": self.engine}
    made = {}  # by source, for each is decoded once
    for source, photo in photos.items():
      made[source] = iter(
        images.make(photo, [plan for plan, of in zip(plans, sources, strict=True) if of == source], **how)
      )
    return [next(made[source]) for source in sources]
