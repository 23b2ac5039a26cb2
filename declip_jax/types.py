"""The vocabulary shared by all packages: `Batch`, `Views`, `Features`, `Outputs`.

Letters used in shapes, here and everywhere:

| letter | dimension | letter | dimension |
|---|---|---|---|
| `b` | examples of a batch | `f` | features: the width of a tower |
| `v` | image views of an example | `d` | joint embedding |
| `u` | text views of an example | `p` | projection by a head |
| `h w c` | height, width, channels of an image | `k` | masked positions kept per caption |
| `t` | tokens of a text | `n` | tokens or positions in a sequence |
| `m` | masked patches, or nearest neighbours of a text | `q` | entries of a neighbour bank |
| | | `e` | width of a token where tokens meet |
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax

# Host to device, flat, static shapes, leading dimension `b`:
#   image         uint8 [b v h w c]     augmented views, not normalised
#   text          int32 [b u t]         token ids of the text views
#   mlm_position  int32 [b k]           positions that masked language modelling predicts ...
#   mlm_target    int32 [b k]           ... the token ids to predict there ...
#   mlm_weight    float32 [b k]         ... and 1 for a real position, 0 for filling
#   mim_position  int32 [b m]           patches, row by row from 0, that masked image modelling hides and predicts
#   mask          bool [b]              False where evaluation padded the last batch
#   label         int32 [b]             class, -1 for none (evaluation only)
Batch = dict[str, jax.Array]
BatchShapes = dict[str, jax.ShapeDtypeStruct]  # the same, without data


Same = TypeVar("Same", bound="_Named")  # not `Self`, which the checker of annotations in tests cannot resolve


class _Named:
  """Immutable entries that are read as attributes; an entry that is None does not exist."""

  _entries: dict[str, Any]

  def __init__(self, **entries: Any) -> None:
    found = {name: entries[name] for name in sorted(entries) if entries[name] is not None}
    object.__setattr__(self, "_entries", found)

  def __getattr__(self, name: str) -> Any:
    entries = self.__dict__.get("_entries", {})  # without entries while it is unpickled
    if name not in entries:
      raise AttributeError(f"{type(self).__name__} has no {name!r}, only {list(entries)}")
    return entries[name]

  def __setattr__(self, name: str, value: Any) -> None:
    raise AttributeError(f"{type(self).__name__}.{name} is read-only: use replace")

  def __contains__(self, name: str) -> bool:
    return name in self._entries

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __repr__(self) -> str:
    return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._entries.items())})"

  def replace(self: Same, **changes: Any) -> Same:
    """A copy with some entries changed or added, or removed by None."""
    return type(self)(**{**self._entries, **changes})


class Views(_Named):
  """Which view of a `Batch` plays which role; a recipe of `data.recipes` decides it. Hashable.

  A role is a name that ends in `_image` or `_text`, and the numbers of its views. A recipe may add roles to those below
  for heads and terms that need others: `Views(mosaic_image=(1,))`; the features of a new text role are
  `Features.<role>`.

  Attributes:
    contrastive_image, contrastive_text: views of the contrastive terms; the first of each is the pair that CLIP
      compares, and whose tokens FILIP compares.
    ssl_image: the two views of self-supervision on images.
    masked_text: the text view in which masked language modelling predicts; None if there is none.
    masked_image: the image view in which masked image modelling hides patches; None if there is none.
    neighbour_text: those of `contrastive_text` that search the neighbour bank and are stored in it.
  """

  contrastive_image: tuple[int, ...]
  contrastive_text: tuple[int, ...]
  ssl_image: tuple[int, ...]
  masked_text: int | None
  masked_image: int | None
  neighbour_text: tuple[int, ...]

  def __init__(
    self,
    contrastive_image: tuple[int, ...] = (0,),
    contrastive_text: tuple[int, ...] = (0,),
    ssl_image: tuple[int, ...] = (),
    masked_text: int | None = None,
    masked_image: int | None = None,
    neighbour_text: tuple[int, ...] = (0,),
    **others: tuple[int, ...],
  ) -> None:
    if wrong := sorted(role for role in others if not role.endswith(("_image", "_text"))):
      raise ValueError(f"roles {wrong} of views: a name has to end in _image or _text")
    roles = {
      "contrastive_image": contrastive_image,
      "contrastive_text": contrastive_text,
      "ssl_image": ssl_image,
      "masked_text": masked_text,
      "masked_image": masked_image,
      "neighbour_text": neighbour_text,
      **others,
    }
    object.__setattr__(self, "_entries", roles)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Views) and self._entries == other._entries

  def __hash__(self) -> int:
    return hash(frozenset(self._entries.items()))

  def numbers(self, role: str) -> tuple[int, ...]:
    """The views of a role as a tuple, empty if no view has it."""
    view = self._entries.get(role)
    return view if isinstance(view, tuple) else () if view is None else (view,)

  def other_texts(self) -> tuple[str, ...]:
    """The text roles that a recipe added."""
    known = ("contrastive_text", "masked_text", "neighbour_text")
    return tuple(role for role in self if role.endswith("_text") and role not in known)


class _Arrays(_Named):
  """Named arrays: a pytree whose entries are attributes."""

  def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    return [(jax.tree_util.GetAttrKey(name), self._entries[name]) for name in self], tuple(self)

  @classmethod
  def tree_unflatten(cls: type[Same], names: tuple[str, ...], values: Iterable[Any]) -> Same:
    new = object.__new__(cls)  # as it is: JAX also puts None and other placeholders in the place of arrays
    object.__setattr__(new, "_entries", dict(zip(names, values, strict=True)))
    return new


@jax.tree_util.register_pytree_with_keys_class
class Features(_Arrays):
  """What the towers return: one example at a time, before any projection, in the compute dtype. Entries that exist:

  | entry | shape | |
  |---|---|---|
  | `image` | `[b v f]` | pooled features of all image views; meaningless for a view with hidden patches |
  | `text` | `[b u f]` | features of the contrastive texts, at the end-of-text token |
  | `masked_text` | `[b k f]` | states at `mlm_position` of the masked view |
  | `image_tokens` | `[b n f]` | patches (or cells) of the first contrastive image view, before the final norm |
  | `text_tokens` | `[b t f]` | states of the first contrastive text view, after the final norm |
  | `text_valid` | bool `[b t]` | True up to the end-of-text token |
  | `masked_image` | `[b m f]` | tokens at `mim_position` of the masked view |
  | `masked_pixels` | `[b m e]` | what those patches hide, normalised for the loss |
  | `momentum_image` | `[b 2 f]` | features of `ssl_image` by the momentum tower, without gradient |
  | any other text role | `[b u f]` | features of its views, at the end-of-text token |
  """


@jax.tree_util.register_pytree_with_keys_class
class Outputs(_Arrays):
  """What the objectives see: the outputs of all heads, float32, over the whole (global) batch.

  The head that returns an entry documents it; these are the ones of `models.heads`:

  | entry | shape | |
  |---|---|---|
  | `image`, `text` | `[v b d]`, `[u b d]` | unit-norm embeddings of the contrastive views |
  | `scale` | `[]` | inverse temperature, exponentiated; the step clips the parameter itself |
  | `bias` | `[]` | what the sigmoid loss adds to every logit |
  | `image_tokens`, `text_tokens` | `[b n e]`, `[b t e]` | unit-norm tokens of the first pair, padding included |
  | `text_valid` | bool `[b t]` | True up to the end-of-text token |
  | `dense_scale` | `[]` | inverse temperature of the tokens' similarities, exponentiated |
  | `simclr` | `[2 b p]` | SimCLR projections of the two self-supervised views, not normalised |
  | `simsiam_projection`, `simsiam_prediction` | `[2 b p]` | SimSiam's `z` and `p` |
  | `momentum_prediction` | `[2 b p]` | predictions of the trained tower for each view, not normalised |
  | `momentum_target` | `[2 b p]` | projections of the momentum tower for each view, without gradient |
  | `mlm_logits` | `[b k vocabulary]` | logits at the masked positions |
  | `mim_prediction`, `mim_target` | `[b m e]` | predictions at the hidden patches, and what they hide |
  | `neighbour` | `[m b d]` | unit-norm nearest texts of the bank, without gradient: the nearest of each view of |
  | | | `neighbour_text`, then the second nearest of each, and so on |
  | `neighbour_similarity` | `[m b]` | cosine of each of them and the text that searched |
  | `neighbour_age` | `[m b]` | steps since each was stored, 0 for a row of initial noise |
  | `neighbour_ready` | `[]` | 1 once the bank is full, else 0 |

  `pairs`, added by the objective where several terms share it, is a `objectives.contrastive.Contrast` of all views.
  """
