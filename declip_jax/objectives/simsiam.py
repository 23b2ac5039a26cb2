"""Self-supervision on images without negatives: SimSiam (Chen and He 2021), as in DeCLIP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.objectives.contrastive import Metrics
from declip_jax.types import Batch, Outputs
from declip_jax.unit_norm import unit_norm


def simsiam(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
  """`-(cos(p1, z2) + cos(p2, z1)) / 2`, no gradient into `z`; in [-1, 1].

  `diagnostics` has the deviation of `z`, which reveals a collapse. DeCLIP's code divides by the length without an
  epsilon, which is NaN for a row of zeros.
  """
  del batch
  target = jax.lax.stop_gradient(unit_norm(outputs.simsiam_projection))
  cosine = jnp.sum(unit_norm(outputs.simsiam_prediction) * target[::-1], axis=-1)
  return -cosine.mean(), {}
