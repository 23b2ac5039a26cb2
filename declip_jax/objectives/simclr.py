"""Self-supervision on images by contrast: SimCLR's NT-Xent, as SLIP trains with it."""

import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from declip_jax.objectives.contrastive import Metrics, similarity
from declip_jax.types import Batch, Outputs

TEMPERATURE = 0.1  # SLIP and DeCLIP's SLIP both


def nt_xent(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
  """Each view of an image has to find the other among both views of the whole batch, at temperature 0.1.

  SimCLR (Chen et al. 2020, equation 1): `2b - 2` negatives for each of the `2b` anchors, all with gradient.
  """
  del batch
  views = outputs.simclr / jnp.maximum(jnp.linalg.norm(outputs.simclr, axis=-1, keepdims=True), 1e-12)
  count = views.shape[1]
  rows = views.reshape(2 * count, -1)
  logits = similarity(rows, rows) / TEMPERATURE
  logits = jnp.where(jnp.eye(2 * count, dtype=bool), -jnp.inf, logits)  # an anchor is no candidate of its own
  target = jnp.roll(jnp.arange(2 * count), count)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()
  return loss, {"simclr_accuracy": jnp.mean(jnp.argmax(logits, axis=1) == target)}
