"""Recipes: which views of an example are made, and how. A recipe is a value; `make_views` makes its views."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
import math
from typing import Any

from declip_jax.data import images
from declip_jax.data.text import augment as texts
from declip_jax.spelling import did_you_mean
from declip_jax.views import Views

_COLOURED = ("strong", "color")  # image views with blur and solarize
_PER_VIEW = ("blur_probability", "solarize_probability")
_OF_COLOURS = ("jitter", "jitter_probability", "grayscale_probability", "blur_radius", *_PER_VIEW)
# The fields that each kind of view reads, besides `squash`, which all image views read.
_READ = {
  "weak": ("weak_scale",),
  "square": (),
  "strong": ("strong_scale", "flip_probability", *_OF_COLOURS),
  "color": _OF_COLOURS,
  "randaugment": ("strong_scale", "flip_probability", "rand_magnitude", "erase_probability", "mixup", "cutmix"),
  "raw": (),
  "augmented": ("text_operations",),
  "masked": (),
}


@dataclass(frozen=True)
class Recipe:
  """The views of an example and the strength of their augmentation.

  Attributes:
    image_views: the kind of each image view; `augmentations` has their numbers.
      "weak": a crop with random area and aspect ratio.
      "square": OpenAI's crop, a random square with the full height or width.
      "strong": a crop with random area and aspect ratio, jitter, grayscale, blur, solarize, flip.
      "color": OpenAI's crop, jitter, grayscale, blur, solarize; no flip.
      "randaugment": a crop as in "strong", flip, RandAugment, random erasing; see `data.finetuning`.
    text_views: the kind of each text view: "raw", "augmented" (EDA) or "masked" (masked language modelling).
    views: which view plays which role in the model.
    weak_scale, strong_scale: range of the crop's area, as a share of the image's, in weak and in strong or randaugment
      views.
    jitter: strengths of brightness, contrast, saturation, hue.
    blur_radius: range of the radius, in pixels of the view.
    blur_probability, solarize_probability: one entry per strong or color view, in order; the last entry also applies to
      further views.
    text_operations: operations on augmented texts, names in `texts.OPERATIONS`, one of which is drawn for each text;
      the default is DeCLIP's, and () leaves texts as they are.
    rand_magnitude: mean magnitude of RandAugment's operations, from 0 to 10; 0 omits them all.
    erase_probability: probability of erasing a box of a randaugment view.
    mixup, cutmix: parameter of the Beta distribution of the weight with which the train step mixes labelled images by
      these methods; 0 omits the method. See `training.mixing`.
    squash: whether all crops are of the image resized to a square, whatever its shape, see `images.Augmentation`.
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
  rand_magnitude: float = 9.0
  erase_probability: float = 0.25
  mixup: float = 0.0
  cutmix: float = 0.0
  squash: bool = False

  @property
  def augmentations(self) -> tuple[images.Augmentation, ...]:
    """The distribution of each image view; all probabilities of "weak" and "square" views are 0.

    Those of "randaugment" views are without RandAugment and erasing.
    """
    blur, solarize = (_per_view(getattr(self, field), self.image_views) for field in _PER_VIEW)
    found = []
    for view, kind in enumerate(self.image_views):
      crop = "square" if kind in ("square", "color") else "resized"
      scale = self.strong_scale if kind in ("strong", "randaugment") else self.weak_scale
      if kind not in _COLOURED:
        flip = self.flip_probability if kind == "randaugment" else 0.0
        found.append(images.Augmentation(crop, scale, flip_probability=flip, squash=self.squash))
        continue
      found.append(
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
          squash=self.squash,
        )
      )
    return tuple(found)

  @property
  def read(self) -> frozenset[str]:
    """The fields with numbers of augmentation that a view of this recipe reads."""
    return frozenset(["squash", *(field for view in (*self.image_views, *self.text_views) for field in _READ[view])])

  @property
  def altered(self) -> frozenset[str]:
    """What the image views that are contrasted with texts may show differently: "colours", "sides" (left and right)."""
    views = [self.augmentations[view] for view in self.views.contrastive_image]
    colours = any(view.jitter_probability or view.grayscale_probability or view.solarize_probability for view in views)
    sides = any(view.flip_probability for view in views)
    return frozenset([*["colours"] * colours, *["sides"] * sides])


# The recipes that `config.data.recipe` may name. Default strengths are those of MoCo v2 (Chen et al. 2020), and so of
# DeCLIP.
RECIPES = {
  # SLIP's code and DeCLIP's configs (clip_experiments/yfcc15m) train CLIP equally: one weak crop, the raw caption.
  "clip": Recipe(("weak",), ("raw",), Views()),
  # CLIP itself (Radford et al. 2021, section 2.3): a random square of the resized image and nothing else.
  "openai": Recipe(("square",), ("raw",), Views()),
  # SLIP's three ablations of CLIP with stronger augmentation (Mu et al. 2021): colours and blur of its self-supervised
  # views on CLIP's own crop; their crop and flip; everything. The paper gives no strengths; these are from SLIP's code.
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
  # with the crop of its ViTs), which SLIP also uses for BYOL.
  "slip_mocov3": Recipe(
    ("weak", "strong", "strong"),
    ("raw",),
    Views(ssl_image=(1, 2)),
    strong_scale=(0.08, 1.0),
    jitter=(0.4, 0.4, 0.2, 0.1),
    blur_probability=(1.0, 0.1),
    solarize_probability=(0.0, 0.2),
  ),
  # SLIP with BEiT (Bao et al. 2022, microsoft/unilm): a view with crop, jitter and flip, in which patches are hidden.
  # Difference: BEiT jitters and flips before it crops, and always resizes with bicubic interpolation.
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
  # DeCLIP: two strong views (MOCOV2 of its loader), the caption, its EDA variant. In the paper the clean caption is
  # contrasted, so the masked one is a separate view; the released code masks the caption that it contrasts.
  "declip": Recipe(
    ("strong", "strong"),
    ("raw", "augmented", "masked"),
    Views(contrastive_image=(0, 1), contrastive_text=(0, 1), ssl_image=(0, 1), masked_text=2, neighbour_text=(0,)),
  ),
  # Ours: DeCLIP's views with CLIP's crop and all colours in place of the strong views.
  "declip_smooth": Recipe(
    ("weak", "weak"),
    ("raw", "augmented", "masked"),
    Views(contrastive_image=(0, 1), contrastive_text=(0, 1), ssl_image=(0, 1), masked_text=2, neighbour_text=(0,)),
  ),
  # DeCLIP and DeFILIP as released (declip.py, declip_solver.py): the masked caption instead of the clean one, and both
  # text views query the bank and are stored in it.
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
  # BeiT's fine-tuning (Bao et al. 2022, microsoft/unilm), which SLIP uses: timm's `rand-m9-mstd0.5-inc1`, erasing with
  # probability 0.25, mixup 0.8, CutMix 1.0. Crops are bicubic there: see `config.data.interpolation`.
  "finetune": Recipe(
    ("randaugment",),
    (),
    Views(contrastive_image=(), contrastive_text=(), neighbour_text=(), classified_image=(0,)),
    strong_scale=(0.08, 1.0),
    mixup=0.8,
    cutmix=1.0,
  ),
}


def get_recipe(name: str, overrides: Mapping[str, Any]) -> Recipe:
  """Returns the recipe with this name, with the fields replaced that are not None in `overrides`.

  Raises:
    ValueError: unknown name or text operation, a number out of range, or a probability per view that is not a tuple.
  """
  if name not in RECIPES:
    hint = did_you_mean(name, RECIPES)
    raise ValueError(f"config.data.recipe={name!r}: choose one of {sorted(RECIPES)}{hint}")
  given = {field: value for field, value in overrides.items() if value is not None}
  for field in _PER_VIEW:
    if field in given and not (isinstance(given[field], tuple) and given[field]):
      raise ValueError(
        f"config.data.{field}={given[field]!r}: expected a tuple such as (0.5,), or (1.0, 0.1) for different views"
      )
  _check_strengths(given)
  operations = given.get("text_operations", ())
  if not set(operations) <= set(texts.OPERATIONS):
    raise ValueError(f"config.data.text_operations={operations!r}: choose some of {sorted(texts.OPERATIONS)}, or ()")
  return replace(RECIPES[name], **given)


def _check_strengths(given: Mapping[str, Any]) -> None:
  """Rejects ranges and probabilities that are out of range."""
  legal = {"weak_scale": (0.0, 1.0), "strong_scale": (0.0, 1.0), "blur_radius": (0.0, math.inf)}
  for field, (least, most) in legal.items():
    value = given.get(field, (most, most))
    is_finite = field not in given or all(map(math.isfinite, value))
    if len(value) != 2 or not (is_finite and least <= value[0] <= value[1] <= most) or value[1] == 0:
      raise ValueError(f"config.data.{field}={value!r}: expected two ascending numbers from {least:g} to {most:g}")
  jitter = given.get("jitter", (0.0,) * 4)
  if len(jitter) != 4 or not all(0 <= value < math.inf for value in jitter) or jitter[3] > 0.5:
    raise ValueError(
      f"config.data.jitter={jitter!r}: expected brightness, contrast, saturation and hue, the last at most 0.5"
    )
  for field in (*_PER_VIEW, *(f"{name}_probability" for name in ("jitter", "grayscale", "flip", "erase"))):
    values = given.get(field, ())
    if any(not 0 <= value <= 1 for value in (values if isinstance(values, tuple) else (values,))):
      raise ValueError(f"config.data.{field}={values!r}: expected 0 to 1")
  for field, most in {"rand_magnitude": 10.0, "mixup": math.inf, "cutmix": math.inf}.items():
    if not (0 <= given.get(field, 0) <= most and given.get(field, 0) < math.inf):
      legal_values = "0 to 10" if most == 10 else "a finite number, 0 or more"
      raise ValueError(f"config.data.{field}={given[field]!r}: expected {legal_values}")


def trimmed(recipe: Recipe, used: Views) -> Recipe:
  """Removes the views that `used` does not name; the others keep their order and get new numbers.

  Args:
    recipe: the recipe to trim.
    used: `recipe.views` with () or None for unused roles.

  Returns:
    The recipe whose `views` are `used` with the new numbers. Each view is augmented as strongly as before.

  Raises:
    ValueError: `used` names no image view.
  """
  images_kept, texts_kept = (
    sorted({view for role in used if role.endswith(modality) for view in used.numbers(role)})
    for modality in ("_image", "_text")
  )
  if not images_kept:
    raise ValueError("config.objective: no term with a weight uses an image view")
  new_image, new_text = ({old: new for new, old in enumerate(kept)} for kept in (images_kept, texts_kept))

  def renumber(role: str, view: tuple[int, ...] | int | None) -> tuple[int, ...] | int | None:
    new = new_image if role.endswith("_image") else new_text
    return tuple(new[one] for one in view) if isinstance(view, tuple) else new.get(view)

  probabilities = {}
  for field in _PER_VIEW:
    by_view = _per_view(getattr(recipe, field), recipe.image_views)
    probabilities[field] = tuple(by_view[view] for view in images_kept if view in by_view) or getattr(recipe, field)
  return replace(
    recipe,
    image_views=tuple(recipe.image_views[view] for view in images_kept),
    text_views=tuple(recipe.text_views[view] for view in texts_kept),
    views=Views(**{role: renumber(role, getattr(used, role)) for role in used}),
    **probabilities,
  )


def _per_view(probabilities: tuple[float, ...], kinds: tuple[str, ...]) -> dict[int, float]:
  """The entry of each strong or color view, by the number of the view."""
  coloured = [view for view, kind in enumerate(kinds) if kind in _COLOURED]
  return {view: probabilities[min(place, len(probabilities) - 1)] for place, view in enumerate(coloured)}
