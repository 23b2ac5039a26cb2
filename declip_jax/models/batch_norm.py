"""Batch normalisation with PyTorch's running statistics."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class BatchNorm(nn.Module):
  """Normalises over all axes but the last; statistics are float32 and, under jit, those of the global batch.

  Under jit a sharded batch is one array, so this is what PyTorch calls synchronised batch norm. Unlike Flax, and
  like PyTorch, the running variance averages the unbiased batch variance: `new = 0.9 old + 0.1 batch`.

  Attributes:
    groups: number of equal groups of the batch, in order, that are normalised separately, as on GPUs without
      synchronisation; running statistics average the groups, whereas PyTorch keeps those of one GPU.
    affine: whether there is a gain and a bias.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  scale_init: nn.initializers.Initializer = nn.initializers.ones_init()
  groups: int = 1
  affine: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "... c"], train: bool) -> Float[Array, "... c"]:
    channels = x.shape[-1]
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
    running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
    scale, bias = 1.0, 0.0
    if self.affine:
      scale = self.param("scale", self.scale_init, (channels,))
      bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
    shape, x = x.shape, x.astype(jnp.float32)
    mean, var = running_mean.value, running_var.value
    if train:
      if x.shape[0] % self.groups:
        where = "of config.model.heads or config.model.image"
        raise ValueError(f"norm_groups={self.groups} ({where}) does not divide the batch of {x.shape[0]}")
      x = x.reshape(self.groups, -1, *x.shape[1:])
      axes = tuple(range(1, x.ndim - 1))
      mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
      count = x.size // self.groups // channels
      if not self.is_initializing():
        unbiased = var * (count / max(count - 1, 1))
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
          running.value = self.momentum * running.value + (1 - self.momentum) * batch.mean(tuple(range(x.ndim - 1)))
    axes = tuple(range(x.ndim - 1))
    mean, var, scale, bias = (
      jnp.expand_dims(value, axes) if jnp.ndim(value) == 1 else value for value in (mean, var, scale, bias)
    )
    y = (x - mean) * (scale / jnp.sqrt(var + self.epsilon)) + bias
    return y.reshape(shape).astype(self.dtype)
