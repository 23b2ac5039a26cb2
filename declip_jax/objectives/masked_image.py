"""Self-supervision on images by filling in hidden patches: masked image modelling."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.objectives.contrastive import Metrics
from declip_jax.types import Batch, Outputs


def masked_image(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
  """Mean squared error of the predictions at the hidden patches, over patches and their elements.

  In the spirit of BEiT (Bao et al. 2022), which hides patches of the tower's input and predicts them from its tokens.
  BEiT's targets are the codes of a separately trained tokenizer; ours are the patch's own pixels, normalised per patch,
  and the loss is that of MAE (He et al. 2022, section 3, "reconstruction target"). Predicting 0, the mean of every
  normalised patch, gives a loss of about 1.
  """
  del batch
  target = jax.lax.stop_gradient(outputs.mim_target)
  error = outputs.mim_prediction - target
  return jnp.mean(error.astype(jnp.promote_types(error.dtype, jnp.float32)) ** 2), {}
