"""Contrastive self-supervision on images: SimCLR's NT-Xent, as in SLIP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.objectives.blockwise import PLAIN, Method, log_sums
from declip_jax.objectives.contrastive import Metrics
from declip_jax.types import Batch, Outputs
from declip_jax.unit_norm import unit_norm


def nt_xent(
  outputs: Outputs, batch: Batch, *, method: Method = PLAIN, temperature: float = 0.1
) -> tuple[Float[Array, ""], Metrics]:
  """Each view of an image has to find the other among both views of the whole batch.

  SimCLR (Chen et al. 2020, equation 1): `2b - 2` negatives for each of the `2b` anchors, all with gradient. SLIP and
  DeCLIP's SLIP both use the temperature 0.1.

  The metric is the fraction of the first views that find theirs, as SLIP counts it.
  """
  del batch
  views = unit_norm(outputs.simclr)
  # An anchor is not its own candidate.
  found, _ = log_sums(views / temperature, views, method, without_self=True, columns=False)
  positive = jnp.einsum("bd,bd->b", *views, precision=jax.lax.Precision.HIGHEST) / temperature
  loss = (jax.nn.logsumexp(found.log_sum, axis=1) - positive[None]).mean()
  # On a tie with a candidate of its own view the other view wins, which is first in SLIP's argmax.
  in_other_view, own = found.top[0, 1] >= found.top[0, 0], found.best[0, 1] == jnp.arange(views.shape[1])
  return loss, {"simclr_accuracy": jnp.mean(in_other_view & own)}
