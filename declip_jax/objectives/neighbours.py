"""Nearest-neighbour supervision: images also learn from similar texts of earlier batches (DeCLIP, section 3.2.3)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.objectives.blockwise import PLAIN, Method
from declip_jax.objectives.contrastive import Metrics, info_nce
from declip_jax.types import Batch, Outputs


def nearest_neighbour(
  outputs: Outputs,
  batch: Batch,
  *,
  method: Method = PLAIN,
  symmetric: bool = True,
  warmup: bool = True,
  label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
  """Mean InfoNCE of every image view with every neighbour of its texts; neighbours are constants.

  By default the loss has both directions, as we read the paper, and is 0 until the bank is full, which the paper does
  not mention. The released code has only the direction from image to text (`symmetric=False`) and searches a bank of
  noise until it is full (`warmup=False`); both text views are queries there, which `Views.neighbour_text` chooses.

  The metrics are the mean cosine similarity of neighbours to their queries and the mean age of neighbours in steps,
  both 0 if there are none yet, and the share of neighbours that are initial noise.
  """
  del batch
  pairs = info_nce(outputs.image, outputs.neighbour, outputs.scale, method=method, symmetric=symmetric)
  loss = pairs.smoothed(label_smoothing).mean()
  texts = outputs.neighbour_age > 0
  count = jnp.maximum(texts.sum(), 1)
  metrics = {
    "neighbour_similarity": outputs.neighbour_similarity.sum(where=texts) / count,
    "neighbour_age": outputs.neighbour_age.sum(where=texts) / count,
    "neighbour_noise": 1 - texts.mean(),
  }
  return outputs.neighbour_ready * loss if warmup else loss, metrics
