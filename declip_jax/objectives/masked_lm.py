"""Self-supervision on text: BERT's masked language modelling (Devlin et al. 2019), as in DeCLIP."""

import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from declip_jax.objectives.contrastive import Metrics
from declip_jax.types import Batch, Outputs


def masked_lm(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
  """Cross-entropy over the vocabulary, averaged over the masked positions of the global batch.

  DeCLIP's code averages on each GPU first and then over GPUs. Without any masked position the loss is 0. A token
  counts as correct if its logit is the largest, even if others are equal to it: an accuracy of 1 with a loss of
  ln(vocabulary) means that the head does not distinguish words.
  """
  weight, logits = batch["mlm_weight"], outputs.mlm_logits
  total = jnp.maximum(weight.sum(), 1)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["mlm_target"])
  # The softmax has already computed the largest logit; an argmax would be another pass over the widest array.
  target_logit = jnp.take_along_axis(logits, batch["mlm_target"][..., None], axis=-1)[..., 0]
  hits = target_logit >= logits.max(axis=-1)
  return (loss * weight).sum() / total, {"mlm_accuracy": (hits * weight).sum() / total}
