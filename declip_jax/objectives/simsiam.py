"""Self-supervision on images without negatives: SimSiam (Chen and He 2021), as DeCLIP trains with it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.objectives.contrastive import Metrics
from declip_jax.types import Batch, Outputs


def simsiam(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
  """`-(cos(p1, z2) + cos(p2, z1)) / 2`, no gradient into `z`; in [-1, 1].

  The metric is the standard deviation of unit-norm `z` over the batch times sqrt(p): near 1 is healthy, 0 a collapse
  (SimSiam, section 4.1).
  """
  del batch
  target = jax.lax.stop_gradient(_unit(outputs.simsiam_projection))
  cosine = jnp.sum(_unit(outputs.simsiam_prediction) * target[::-1], axis=-1)
  spread = jnp.std(target, axis=1).mean() * target.shape[-1] ** 0.5
  return -cosine.mean(), {"simsiam_spread": spread}


def _unit(x: Float[Array, "v b p"]) -> Float[Array, "v b p"]:
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)
