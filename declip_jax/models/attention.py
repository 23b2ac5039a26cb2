"""Scaled dot-product attention by the backend's fastest implementation."""

from einops import rearrange
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from declip_jax.models import attention_kernel
from declip_jax.sharding import is_splittable, on_each_device, platform

# What `config.model.attention` may name: the fastest that the backend has; plain XLA; cuDNN's flash attention, on a
# GPU in half precision; the kernel in `attention_kernel`, on a TPU.
IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas")


def attend(
  query: Float[Array, "b n h e"],
  key: Float[Array, "b m h e"],
  value: Float[Array, "b m h e"],
  *,
  causal: bool = False,
  lengths: Int[Array, "b"] | None = None,
  visible: Bool[Array, "b m"] | None = None,
  implementation: str = "auto",
) -> Float[Array, "b n h e"]:
  """Attention with a float32 softmax and scale `1 / sqrt(e)`, without dropout.

  If given, it is to the first `lengths` keys, or to those that are `visible`.

  "auto" is cuDNN's flash attention on a GPU and our kernel on a TPU, both in half precision and without storing the
  `[b h n m]` weights. Everywhere else, and for shapes that our kernel does not support, it is plain XLA. Only plain XLA
  supports all shapes and dtypes; docs/scaling.md compares the three, and JAX's kernels, as compiled for TPUs.

  Raises:
    ValueError: "pallas" with keys that are not those of the queries.
  """
  if implementation == "auto":
    implementation = _fastest(query, key)
  if implementation == "pallas":
    return _by_kernel(query, key, value, causal, _visible(key, lengths, visible))
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=None if visible is None else visible[:, None, None],
    is_causal=causal,
    key_value_seq_lengths=lengths,
    implementation=implementation,
  )


def _by_kernel(query: Array, key: Array, value: Array, causal: bool, visible: Array | None) -> Float[Array, "b n h e"]:
  if query.shape != key.shape:
    raise ValueError(f"attention='pallas': queries {query.shape} and keys {key.shape} are not of the same tokens")
  heads = attention_kernel.Heads(query.shape[2], causal, interpret=platform() != "tpu")
  rows = [rearrange(x, "b n h e -> b n (h e)") for x in (query, key, value)]
  masks = [] if visible is None else [visible]
  attended = on_each_device(lambda *inputs: attention_kernel.attention(heads, *inputs), *rows, *masks)
  return rearrange(attended, "b n (h e) -> b n h e", h=heads.count)


def _visible(key: Array, lengths: Array | None, visible: Array | None) -> Bool[Array, "b m"] | None:
  """The positions that `lengths` and `visible` leave, None for all."""
  if lengths is None:
    return visible
  first = jnp.arange(key.shape[1])[None] < lengths[:, None]
  return first if visible is None else first & visible


def _fastest(query: Array, key: Array) -> str:
  dtype, head_width, backend = query.dtype, query.shape[-1], platform()
  if backend == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and head_width % 8 == 0 and head_width <= 128:
    return "cudnn" if _cuda_capability() >= 8 else "xla"  # cuDNN's conditions on every GPU that has it
  if backend == "tpu" and dtype == jnp.bfloat16 and query.shape == key.shape and is_splittable(len(query)):
    _, tokens, heads, _ = query.shape
    return "pallas" if attention_kernel.fits(tokens, heads * head_width, heads) else "xla"
  return "xla"


def _cuda_capability() -> float:
  """Compute capability of the GPUs, 0 of AMD's; flash attention needs 8 (Ampere)."""
  try:
    return float(jax.devices()[0].compute_capability)
  except ValueError:  # AMD's are called gfx90a and the like
    return 0.0
