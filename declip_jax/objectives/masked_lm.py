"""Self-supervision on text: BERT's masked language modelling (Devlin et al. 2019), as DeCLIP trains with it."""

import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from declip_jax.objectives.contrastive import Metrics
from declip_jax.types import Batch, Outputs


def masked_lm(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
  """Cross-entropy over the vocabulary, averaged over the masked positions of the global batch.

  DeCLIP's code averages on each GPU first and then over GPUs. A batch without a masked position costs 0.
  """
  weight = batch["mlm_weight"]
  total = jnp.maximum(weight.sum(), 1)
  loss = optax.softmax_cross_entropy_with_integer_labels(outputs.mlm_logits, batch["mlm_target"])
  hits = jnp.argmax(outputs.mlm_logits, axis=-1) == batch["mlm_target"]
  return (loss * weight).sum() / total, {"mlm_accuracy": (hits * weight).sum() / total}
