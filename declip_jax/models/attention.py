"""Scaled dot-product attention by the backend's fastest implementation."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


def attend(
  query: Float[Array, "b n h e"],
  key: Float[Array, "b m h e"],
  value: Float[Array, "b m h e"],
  *,
  causal: bool = False,
  lengths: Int[Array, "b"] | None = None,
  visible: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n h e"]:
  """Attention with a float32 softmax and scale `1 / sqrt(e)`, without dropout.

  If given, it is to the first `lengths` keys, or to those that are `visible`.

  On a GPU in half precision it is cuDNN's flash attention, which never stores the `[b h n m]` weights; everywhere else
  it is plain XLA, which fuses well on a TPU at the few hundred positions of these towers.
  """
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=None if visible is None else visible[:, None, None],
    is_causal=causal,
    key_value_seq_lengths=lengths,
    implementation=_implementation(query.dtype, query.shape[-1]),
  )


def _implementation(dtype: DTypeLike, head_width: int) -> str:
  half = dtype in (jnp.bfloat16, jnp.float16)
  fits = head_width % 8 == 0 and head_width <= 128  # cuDNN's conditions on every GPU that has it
  return "cudnn" if half and fits and _cuda_capability() >= 8 else "xla"


def _cuda_capability() -> float:
  """Compute capability of the GPUs, 0 without NVIDIA GPUs; flash attention needs 8 (Ampere)."""
  if jax.default_backend() != "gpu":
    return 0.0
  try:
    return float(jax.devices()[0].compute_capability)
  except ValueError:  # AMD's are called gfx90a and the like
    return 0.0
