"""The vocabulary shared by every room of the house: `Batch`, `Views`, `Features`, `Outputs`.

Letters used in shapes, here and everywhere:

| letter | dimension | letter | dimension |
|---|---|---|---|
| `b` | examples of a batch | `d` | joint embedding |
| `v` | image views of an example | `w` | width of a tower |
| `u` | text views of an example | `k` | masked positions kept per caption |
| `h w c` | height, width, channels of an image | `n` | tokens or positions in a sequence |
| `t` | tokens of a text | `q` | entries of the neighbour bank |
"""

from typing import NamedTuple

from flax import struct
import jax

# Host to device, flat, static shapes, leading dimension `b`:
#   image         uint8 [b v h w c]     augmented views, not normalised
#   text          int32 [b u t]         token ids of the text views
#   mlm_position  int32 [b k]           positions that masked language modelling predicts ...
#   mlm_target    int32 [b k]           ... the token ids to predict there ...
#   mlm_weight    float32 [b k]         ... and 1 for a real one, 0 for filling
#   mask          bool [b]              False where evaluation padded the last batch
#   label         int32 [b]             class, -1 for none (evaluation only)
Batch = dict[str, jax.Array]


class Views(NamedTuple):
  """Which view of a `Batch` plays which part; a recipe of `data.recipes` says it, the model obeys.

  `contrastive_image` and `contrastive_text` start with the pair that the plain contrastive term uses.
  """

  contrastive_image: tuple[int, ...] = (0,)
  contrastive_text: tuple[int, ...] = (0,)
  ssl_image: tuple[int, ...] = ()
  masked_text: int | None = None


@struct.dataclass
class Features:
  """What the towers return: one example at a time, before any projection, in the compute dtype.

  Attributes:
    image: `[b v w]` pooled image features.
    text: `[b u w]` text features at the end-of-text token.
    masked_text: `[b k w]` text states at `mlm_position` of the masked view, None if no view is masked.
  """

  image: jax.Array
  text: jax.Array
  masked_text: jax.Array | None = None


@struct.dataclass
class Outputs:
  """What the objectives see: heads applied, float32, over the whole (global) batch. Unused fields are None.

  Attributes:
    image: `[v b d]` unit-norm embeddings of the contrastive image views.
    text: `[u b d]` unit-norm embeddings of the contrastive text views.
    scale: `[]` inverse temperature, exponentiated; the step clips the parameter itself.
    simclr: `[2 b p]` SimCLR projections of the two self-supervised views, not normalised.
    simsiam_projection: `[2 b p]` SimSiam projections `z`.
    simsiam_prediction: `[2 b p]` SimSiam predictions `p`.
    mlm_logits: `[b k vocabulary]` logits at the masked positions.
    neighbour: `[b d]` unit-norm nearest texts of the bank to text view 0, without gradient.
    neighbour_ready: `[]` 1 once the bank is full, else 0.
  """

  image: jax.Array | None = None
  text: jax.Array | None = None
  scale: jax.Array | None = None
  simclr: jax.Array | None = None
  simsiam_projection: jax.Array | None = None
  simsiam_prediction: jax.Array | None = None
  mlm_logits: jax.Array | None = None
  neighbour: jax.Array | None = None
  neighbour_ready: jax.Array | None = None
