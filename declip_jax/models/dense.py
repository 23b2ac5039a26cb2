"""Linear layers, with a gradient of their own on CPUs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Initializer = Callable[..., jax.Array]


class Dense(nn.Module):
  """`x @ kernel + bias`, as `flax.linen.Dense`, with gradients that XLA also computes well on a CPU.

  Attributes:
    features: width of the outputs.
    dtype: dtype of the inputs of the product and, unless `output_dtype` is given, of its outputs.
    use_bias: whether there is a bias.
    output_dtype: dtype of the sums and outputs, if another one.
    kernel_init, bias_init: initialisers.
  """

  features: int
  dtype: Any
  use_bias: bool = True
  output_dtype: Any = None
  kernel_init: Initializer = nn.initializers.lecun_normal()
  bias_init: Initializer = nn.initializers.zeros_init()

  @nn.compact
  def __call__(self, x: Float[Array, "*b f"]) -> Float[Array, "*b g"]:
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    return affine(self.output_dtype, x, kernel, bias)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def affine(
  dtype: Any, x: Float[Array, "*b f"], kernel: Float[Array, "f g"], bias: Float[Array, "g"] | None
) -> Float[Array, "*b g"]:
  """`x @ kernel + bias`.

  On a CPU the gradients are products of matrices, even the bias's: XLA copies transposed operands of products over
  several axes element by element, recomputing their inputs for each element, and its sums over the leading axis are
  ten times slower than a product with a vector of ones. Other backends differentiate as JAX does.

  Args:
    dtype: dtype of sums and results; None for that of the inputs.
    x: inputs.
    kernel: weights.
    bias: bias, or None.
  """
  return _affine(dtype, x, kernel, bias)


def _affine(dtype: Any, x: Array, kernel: Array, bias: Array | None) -> Array:
  y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype)
  return y if bias is None else y + jnp.expand_dims(bias, range(y.ndim - 1))


def _forward(dtype: Any, x: Array, kernel: Array, bias: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
  return _affine(dtype, x, kernel, bias), (x, kernel, bias)


def _backward(dtype: Any, saved: tuple[Array | None, ...], gradient: Array) -> tuple[Array | None, ...]:
  platforms = {"cpu": _backward_by_matrices, "default": _backward_by_jax}
  return jax.lax.platform_dependent(gradient, *saved, **{name: partial(f, dtype) for name, f in platforms.items()})


def _backward_by_jax(
  dtype: Any, gradient: Array, x: Array, kernel: Array, bias: Array | None
) -> tuple[Array | None, ...]:
  return jax.vjp(partial(_affine, dtype), x, kernel, bias)[1](gradient)


def _backward_by_matrices(
  dtype: Any, gradient: Array, x: Array, kernel: Array, bias: Array | None
) -> tuple[Array | None, ...]:
  rows = gradient.reshape(-1, gradient.shape[-1])
  to_x, to_kernel = _backward_by_jax(dtype, rows, x.reshape(-1, x.shape[-1]), kernel, None)[:2]
  to_bias = None if bias is None else (jnp.ones(len(rows), rows.dtype) @ rows).astype(bias.dtype)
  return to_x.reshape(x.shape), to_kernel, to_bias


affine.defvjp(_forward, _backward)
