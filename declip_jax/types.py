"""The vocabulary shared by every room of the house: `Batch`, `Views`, `Features`, `Outputs`.

Letters used in shapes, here and everywhere:

| letter | dimension | letter | dimension |
|---|---|---|---|
| `b` | examples of a batch | `d` | joint embedding |
| `v` | image views of an example | `w` | width of a tower |
| `u` | text views of an example | `k` | masked positions kept per caption |
| `h w c` | height, width, channels of an image | `n` | tokens or positions in a sequence |
| `t` | tokens of a text | `q` | entries of a neighbour bank |
| `m` | masked patches, or nearest neighbours of a text | `e` | width of a token where tokens meet |
"""

from typing import Any, NamedTuple

from flax import struct
import jax

# Host to device, flat, static shapes, leading dimension `b`:
#   image         uint8 [b v h w c]     augmented views, not normalised
#   text          int32 [b u t]         token ids of the text views
#   mlm_position  int32 [b k]           positions that masked language modelling predicts ...
#   mlm_target    int32 [b k]           ... the token ids to predict there ...
#   mlm_weight    float32 [b k]         ... and 1 for a real one, 0 for filling
#   mim_position  int32 [b m]           patches, row by row from 0, that masked image modelling hides and predicts
#   mask          bool [b]              False where evaluation padded the last batch
#   label         int32 [b]             class, -1 for none (evaluation only)
Batch = dict[str, jax.Array]
BatchShapes = dict[str, jax.ShapeDtypeStruct]  # the same, without data


class Views(NamedTuple):
  """Which view of a `Batch` plays which part; a recipe of `data.recipes` says it, the model obeys.

  Attributes:
    contrastive_image, contrastive_text: seen by the contrastive terms; the first of each is the pair of the plain one,
      and the one whose tokens FILIP compares.
    ssl_image: the two views of self-supervision on images.
    masked_text: the text view in which masked language modelling predicts.
    masked_image: the image view in which masked image modelling hides patches.
    neighbour_text: those of `contrastive_text` that search the neighbour bank and enter it.
  """

  contrastive_image: tuple[int, ...] = (0,)
  contrastive_text: tuple[int, ...] = (0,)
  ssl_image: tuple[int, ...] = ()
  masked_text: int | None = None
  masked_image: int | None = None
  neighbour_text: tuple[int, ...] = (0,)


@struct.dataclass
class Features:
  """What the towers return: one example at a time, before any projection, in the compute dtype; None where unused.

  Attributes:
    image: `[b v w]` pooled image features; that of a view with hidden patches means nothing.
    text: `[b u w]` text features at the end-of-text token.
    masked_text: `[b k w]` text states at `mlm_position` of the masked view.
    image_tokens: `[b n w]` patches (or cells) of the first contrastive image view, before the final norm.
    text_tokens: `[b t w]` states of the first contrastive text view, after the final norm.
    text_valid: bool `[b t]` True up to the end-of-text token.
    masked_image: `[b m w]` tokens at `mim_position` of the masked view.
    masked_pixels: `[b m e]` what those patches hide, as the loss wants it.
    momentum_image: `[b 2 w]` features of `ssl_image` by the momentum tower, without gradient.
  """

  image: jax.Array
  text: jax.Array | None = None
  masked_text: jax.Array | None = None
  image_tokens: jax.Array | None = None
  text_tokens: jax.Array | None = None
  text_valid: jax.Array | None = None
  masked_image: jax.Array | None = None
  masked_pixels: jax.Array | None = None
  momentum_image: jax.Array | None = None


@struct.dataclass
class Outputs:
  """What the objectives see: heads applied, float32, over the whole (global) batch. Unused fields are None.

  Attributes:
    image: `[v b d]` unit-norm embeddings of the contrastive image views.
    text: `[u b d]` unit-norm embeddings of the contrastive text views.
    pairs: InfoNCE of all pairs of image and text views, `objectives.contrastive.Contrast`, where more than one term
      looks at it.
    scale: `[]` inverse temperature, exponentiated; the step clips the parameter itself.
    bias: `[]` what the sigmoid loss adds to every logit.
    image_tokens: `[b n e]` unit-norm tokens of the first contrastive image view.
    text_tokens: `[b t e]` unit-norm tokens of the first contrastive text view, padding included.
    text_valid: bool `[b t]` True up to the end-of-text token.
    dense_scale: `[]` inverse temperature of the tokens' similarities, exponentiated.
    simclr: `[2 b p]` SimCLR projections of the two self-supervised views, not normalised.
    simsiam_projection: `[2 b p]` SimSiam projections `z`.
    simsiam_prediction: `[2 b p]` SimSiam predictions `p`.
    momentum_prediction: `[2 b p]` predictions of the online tower for each view, not normalised.
    momentum_target: `[2 b p]` projections of the momentum tower for each view, without gradient.
    mlm_logits: `[b k vocabulary]` logits at the masked positions.
    mim_prediction: `[b m e]` predictions at the hidden patches.
    mim_target: `[b m e]` what they hide.
    neighbour: `[m b d]` unit-norm nearest texts of the bank, without gradient: for each view of `neighbour_text` its
      nearest, and so on for each further neighbour.
    neighbour_similarity: `[m b]` cosine of each of them and the text that searched.
    neighbour_age: `[m b]` steps since each of them was written, 0 for a row of noise that none has written.
    neighbour_ready: `[]` 1 once the bank is full, else 0.
  """

  image: jax.Array | None = None
  text: jax.Array | None = None
  pairs: Any = None
  scale: jax.Array | None = None
  bias: jax.Array | None = None
  image_tokens: jax.Array | None = None
  text_tokens: jax.Array | None = None
  text_valid: jax.Array | None = None
  dense_scale: jax.Array | None = None
  simclr: jax.Array | None = None
  simsiam_projection: jax.Array | None = None
  simsiam_prediction: jax.Array | None = None
  momentum_prediction: jax.Array | None = None
  momentum_target: jax.Array | None = None
  mlm_logits: jax.Array | None = None
  mim_prediction: jax.Array | None = None
  mim_target: jax.Array | None = None
  neighbour: jax.Array | None = None
  neighbour_similarity: jax.Array | None = None
  neighbour_age: jax.Array | None = None
  neighbour_ready: jax.Array | None = None
