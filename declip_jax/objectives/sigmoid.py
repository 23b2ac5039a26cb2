"""Contrastive loss without a softmax: SigLIP's sigmoid loss, in which every pair is a binary classification."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.objectives.blockwise import PLAIN, Method, sigmoid_sums
from declip_jax.objectives.contrastive import Metrics
from declip_jax.types import Batch, Outputs


def sigmoid(outputs: Outputs, batch: Batch, *, method: Method = PLAIN) -> tuple[Float[Array, ""], Metrics]:
  """Binary cross-entropy of all pairs of the first views, with matching pairs as positives: their sum divided by `b`.

  SigLIP (Zhai et al. 2023). The bias is added to the logits, as in its algorithm 1, and so it starts at -10; its
  equation has the opposite sign. The sum grows with the batch, since there are `b - 1` negatives for each positive.

  The metrics are the mean logits of the pairs and of all others.
  """
  del batch
  image, text, count = outputs.scale * outputs.image[0], outputs.text[0], outputs.image.shape[1]
  loss = sigmoid_sums(image, text, outputs.bias, method).mean()
  exact = jax.lax.Precision.HIGHEST
  positive = jnp.einsum("bd,bd->", image, text, precision=exact)
  negative = jnp.dot(image.sum(axis=0), text.sum(axis=0), precision=exact) - positive
  return loss, {
    "sigmoid_positive_logit": positive / count + outputs.bias,
    "sigmoid_negative_logit": negative / max(count * (count - 1), 1) + outputs.bias,
  }
