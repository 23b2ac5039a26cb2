"""The vocabulary shared by all packages: `Batch`, `Features`, `Outputs`; `Views` is in `declip_jax.views`.

Letters used in shapes, here and everywhere:

| letter | dimension | letter | dimension |
|---|---|---|---|
| `b` | examples of a batch | `f` | features: the width of a tower |
| `v` | image views of an example | `d` | joint embedding |
| `u` | text views of an example | `p` | projection by a head |
| `h w c` | height, width, channels of an image | `k` | masked positions kept per caption |
| `t` | tokens of a text | `n` | tokens or positions in a sequence |
| `m` | masked patches, or nearest neighbours of a text | `q` | entries of a neighbour bank |
| `g` | width of a tower's tokens, mostly `f` | `e` | width of a token when tokens are compared |
"""

from collections.abc import Iterable
from typing import Any

import jax

from declip_jax.views import Named, Same

# Host to device, flat, static shapes, leading dimension `b`:
#   image         uint8 [b v h w c]     augmented views, not normalised
#   text          int32 [b u t]         token ids of the text views; t may differ between batches, see `trimming`
#   mlm_position  int32 [b k]           positions that masked language modelling predicts ...
#   mlm_target    int32 [b k]           ... the token ids to predict there ...
#   mlm_weight    float32 [b k]         ... and 1 for a real position, 0 for padding
#   mim_position  int32 [b m]           patches, row by row from 0, that masked image modelling hides and predicts
#   mask          bool [b]              False where evaluation padded the last batch
#   label         int32 [b]             class; -1 for none, in evaluation only
# The train step adds, if its config asks for them:
#   partner_label int32 [b]             class of the image that mixup or CutMix mixed in, `image` then being float32 ...
#   label_weight  float32 [b]           ... and the weight of the image's own class; the partner's has the rest
#   branch_scale  float32 [b v depth 2] factors of the residual branches of an image ViT's blocks, see `drop_path`
#   kept_patches  int32 [b v n]         patches, row by row from 0, that enter an image ViT, see `patch_dropout`
Batch = dict[str, jax.Array]
BatchShapes = dict[str, jax.ShapeDtypeStruct]  # the same, without data


def text_length(batch: Batch | BatchShapes) -> int:
  """Number of positions of the texts of a batch, 0 without texts."""
  return batch["text"].shape[-1] if "text" in batch else 0


class _Arrays(Named):
  """Named arrays: a pytree whose entries are attributes."""

  def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    return [(jax.tree_util.GetAttrKey(name), self._entries[name]) for name in self], tuple(self)

  @classmethod
  def tree_unflatten(cls: type[Same], names: tuple[str, ...], values: Iterable[Any]) -> Same:
    new = object.__new__(cls)  # unchecked: JAX also puts None and other placeholders in the place of arrays
    object.__setattr__(new, "_entries", dict(zip(names, values, strict=True)))
    return new


@jax.tree_util.register_pytree_with_keys_class
class Features(_Arrays):
  """The outputs of the towers: one example at a time, before any projection, in the compute dtype. Entries that exist:

  | entry | shape | |
  |---|---|---|
  | `image` | `[b v f]` | pooled features of all image views; meaningless for a view with hidden patches |
  | `text` | `[b u f]` | features of the contrastive texts, at the end-of-text token |
  | `masked_text` | `[b k f]` | states at `mlm_position` of the masked view |
  | `image_tokens` | `[b n g]` | patches (or cells) of the first contrastive image view, before the final norm; |
  | | | with patch dropout, those that are kept |
  | `text_tokens` | `[b t f]` | states of the first contrastive text view, after the final norm |
  | `text_valid` | bool `[b t]` | True up to the end-of-text token |
  | `masked_image` | `[b m f]` | tokens at `mim_position` of the masked view |
  | `masked_pixels` | `[b m e]` | pixels of those patches, normalised for the loss |
  | `momentum_image` | `[b 2 f]` | features of `ssl_image` by the momentum tower, without gradient |
  | any other text role | `[b u f]` | features of its views, at the end-of-text token |
  """


@jax.tree_util.register_pytree_with_keys_class
class Outputs(_Arrays):
  """The inputs of the objectives: the outputs of all heads, float32, over the whole (global) batch.

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
  | `mim_prediction`, `mim_target` | `[b m e]` | predictions for the hidden patches, and their pixels |
  | `class_logits` | `[v b classes]` | logits of the classes of labelled views |
  | `neighbour` | `[m b d]` | unit-norm nearest texts of the bank, without gradient: the nearest of each view of |
  | | | `neighbour_text`, then the second nearest of each, and so on |
  | `neighbour_similarity` | `[m b]` | cosine similarity of each of them to its query text |
  | `neighbour_age` | `[m b]` | steps since each was stored, 0 for an entry of initial noise |
  | `neighbour_ready` | `[]` | 1 once the bank is full, else 0 |

  `pairs`, added by the objective if several terms share it, is an `objectives.contrastive.Contrast` of all views.
  """
