"""Self-supervision on images with a momentum copy of the tower: MoCo v3 and BYOL, and the copy's moving average."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from declip_jax.objectives.blockwise import PLAIN, Method
from declip_jax.objectives.contrastive import Metrics, info_nce
from declip_jax.types import Batch, Outputs
from declip_jax.unit_norm import unit_norm


def moco(
  outputs: Outputs, batch: Batch, *, method: Method = PLAIN, temperature: float = 0.2
) -> tuple[Float[Array, ""], Metrics]:
  """`2 tau (CE(q1 k2 / tau) + CE(q2 k1 / tau))`: each prediction finds the target of the other view in the batch.

  MoCo v3 (Chen et al. 2021, algorithm 1). The factor `2 tau`, in the paper as in its released code, cancels the `1 /
  tau` of the logits in the gradient; both add the two directions. An anchor has `b - 1` negatives, all of them targets
  of the other view. The targets are constants. MoCo v3 also freezes the patch embedding of its ViTs, which
  `config.optimizer.frozen` does.

  The metric is the mean accuracy of both directions.
  """
  del batch
  target = jax.lax.stop_gradient(unit_norm(outputs.momentum_target))[::-1]
  inverse = jnp.asarray(1 / temperature, target.dtype)
  pairs = [
    info_nce(query[None], key[None], inverse, method=method, symmetric=False)
    for query, key in zip(unit_norm(outputs.momentum_prediction), target, strict=True)
  ]
  loss = 2 * temperature * sum(pair.loss[0, 0] for pair in pairs)
  return loss, {"moco_accuracy": sum(pair.row_accuracy[0, 0] for pair in pairs) / len(pairs)}


def byol(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
  """`(2 - 2 cos(p1, z2)) + (2 - 2 cos(p2, z1))`, averaged over the batch; in [0, 8].

  BYOL (Grill et al. 2020, equation 2): the squared distance of unit rows, the sum of both directions, not their mean.
  The targets are constants. A row shorter than 1e-6 is divided by 1e-6, as in the released code.
  """
  del batch
  target = jax.lax.stop_gradient(unit_norm(outputs.momentum_target, 1e-6))[::-1]
  cosine = jnp.sum(unit_norm(outputs.momentum_prediction, 1e-6) * target, axis=-1)
  return (2 - 2 * cosine).mean(axis=-1).sum(), {}


def momentum_at(step: Int[Array, ""], total_steps: int, start: float) -> Float[Array, ""]:
  """The decay of the momentum tower: from `start` at step 0 to 1 at `total_steps`, along half a cosine.

  BYOL starts at 0.996, MoCo v3 at 0.99.
  """
  return 1 - (1 - start) * (1 + jnp.cos(jnp.pi * step / total_steps)) / 2


def moving_average(old: PyTree, new: PyTree, momentum: Float[Array, ""]) -> PyTree:
  """`momentum * old + (1 - momentum) * new` for every leaf, in the dtype of `old`."""
  return jax.tree.map(lambda o, n: (momentum * o + (1 - momentum) * n).astype(o.dtype), old, new)
