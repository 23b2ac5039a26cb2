"""Nearest-neighbour supervision: images also learn from similar texts of earlier batches (DeCLIP, section 3.2.3)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.objectives.contrastive import Metrics, info_nce
from declip_jax.types import Batch, Outputs


def nearest_neighbour(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
  """Mean symmetric InfoNCE of each image view and the nearest neighbour of its text; 0 until the bank is full.

  As in the paper the bank holds raw texts, and the loss goes both ways. The released code queries masked and
  augmented texts, computes image-to-text only, and searches a bank of noise until it is filled.
  """
  del batch
  losses = [info_nce(image, outputs.neighbour, outputs.scale)[0] for image in outputs.image]
  likeness = jnp.sum(outputs.text[0] * outputs.neighbour, axis=-1).mean()
  return outputs.neighbour_ready * sum(losses) / len(losses), {"neighbour_similarity": likeness}
