"""Every implementation of attention on this backend against plain loops, and the choice between them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from declip_jax.models import attention
from declip_jax.models.attention import attend


def loops(query: np.ndarray, key: np.ndarray, value: np.ndarray, causal: bool, lengths=None) -> np.ndarray:
  """The definition, in float64."""
  lengths = [key.shape[1]] * len(key) if lengths is None else lengths
  out = np.zeros(query.shape)
  for b, n, h in np.ndindex(*query.shape[:3]):
    seen = range(n + 1) if causal else range(lengths[b])
    scores = np.array([query[b, n, h] @ key[b, m, h] for m in seen]) / query.shape[-1] ** 0.5
    weights = np.exp(scores - scores.max())
    out[b, n, h] = sum(weight * value[b, m, h] for weight, m in zip(weights / weights.sum(), seen, strict=True))
  return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_equals_plain_loops(dtype: jnp.dtype, tolerance: float, causal: bool) -> None:
  rng = np.random.default_rng(0)
  query, key, value = (jnp.asarray(rng.normal(size=(2, 9, 2, 8)), dtype) for _ in range(3))
  expected = loops(*(np.asarray(x, np.float64) for x in (query, key, value)), causal)
  found = jax.jit(attend, static_argnames="causal")(query, key, value, causal=causal)
  assert found.dtype == dtype
  np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance)


def test_keys_past_a_sequences_length_have_no_effect() -> None:
  rng = np.random.default_rng(1)
  query, key, value = (jnp.asarray(rng.normal(size=(3, 7, 2, 8)), jnp.float32) for _ in range(3))
  lengths = np.array([1, 4, 7], np.int32)
  found = jax.jit(attend)(query, key, value, lengths=lengths)
  expected = loops(*(np.asarray(x, np.float64) for x in (query, key, value)), False, lengths)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
  ("backend", "capability", "dtype", "head_width", "expected"),
  [
    ("gpu", "9.0", jnp.bfloat16, 64, "cudnn"),
    ("gpu", "9.0", jnp.float32, 64, "xla"),  # flash attention has no float32
    ("gpu", "9.0", jnp.bfloat16, 20, "xla"),
    ("gpu", "9.0", jnp.bfloat16, 256, "xla"),
    ("gpu", "7.5", jnp.bfloat16, 64, "xla"),
    ("gpu", "gfx90a", jnp.bfloat16, 64, "xla"),
    ("tpu", "", jnp.bfloat16, 64, "xla"),
    ("cpu", "", jnp.bfloat16, 64, "xla"),
  ],
)
def test_choice(
  backend: str, capability: str, dtype: jnp.dtype, head_width: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
  assert attention._implementation(dtype, head_width) == expected


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's flash attention needs a GPU")
@pytest.mark.parametrize(
  ("queries", "keys", "causal", "lengths"),
  [
    (77, 77, True, None),
    (50, 50, False, None),
    (257, 257, False, None),
    (1, 50, False, None),
    (77, 77, False, (2, 40)),
    (77, 77, False, (1, 77)),
  ],
)
def test_flash_attention_equals_plain_attention(
  queries: int, keys: int, causal: bool, lengths: tuple[int, int] | None
) -> None:
  sizes = enumerate((queries, keys, keys))
  query, key, value = (jax.random.normal(jax.random.key(i), (2, n, 8, 64), jnp.bfloat16) for i, n in sizes)
  options = {"is_causal": causal}
  if lengths:
    options["key_value_seq_lengths"] = jnp.asarray(lengths, jnp.int32)

  def step(implementation: str) -> tuple:
    def loss(query, key, value):
      out = jax.nn.dot_product_attention(query, key, value, **options, implementation=implementation)
      return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)

  ((_, flash), flash_gradient), ((_, plain), plain_gradient) = step("cudnn"), step("xla")
  np.testing.assert_allclose(np.asarray(flash, np.float32), np.asarray(plain, np.float32), atol=2e-2)
  for ours, theirs in zip(flash_gradient, plain_gradient, strict=True):
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=5e-2)
