"""Batch normalisation with PyTorch's running statistics."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class BatchNorm(nn.Module):
  """Normalises over all axes but the last; statistics are float32 and, under jit, those of the global batch.

  Under jit a sharded batch is one array, so this is what PyTorch calls synchronised batch norm. Unlike Flax's, the
  running variance takes the unbiased batch variance, as PyTorch's does: `new = 0.9 old + 0.1 batch`.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  scale_init: nn.initializers.Initializer = nn.initializers.ones_init()

  @nn.compact
  def __call__(self, x: Float[Array, "... c"], train: bool) -> Float[Array, "... c"]:
    channels = x.shape[-1]
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
    running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
    scale = self.param("scale", self.scale_init, (channels,))
    bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
    x = x.astype(jnp.float32)
    mean, var = running_mean.value, running_var.value
    if train:
      axes = tuple(range(x.ndim - 1))
      mean, var = x.mean(axes), x.var(axes)
      count = x.size // channels
      if not self.is_initializing():
        running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
        unbiased = var * (count / max(count - 1, 1))
        running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
    y = (x - mean) * (scale / jnp.sqrt(var + self.epsilon)) + bias
    return y.astype(self.dtype)
