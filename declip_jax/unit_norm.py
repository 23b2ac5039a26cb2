"""Normalisation of rows to length one, as cosine similarities require."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def unit_norm(x: Float[Array, "*rows d"], epsilon: float = 1e-12) -> Float[Array, "*rows d"]:
  """Rows of length one, in float32 or wider.

  A row shorter than `epsilon` is divided by `epsilon`, as PyTorch's `normalize` does: zeros stay zeros, and their
  gradient is finite.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), epsilon**2))
