"""A GPU or TPU computes what CPUs do: `make test-device`. Elsewhere these tests are skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps

from declip_jax.models.attention import attend

pytestmark = pytest.mark.skipif(
  jax.default_backend() == "cpu", reason="needs a GPU or TPU that JAX uses: make test-device"
)


def test_the_gradient_of_every_term_equals_that_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
  found = steps.take_gradient("everything", 1, 1)
  devices = jax.devices("cpu")
  monkeypatch.setattr(jax, "devices", lambda backend=None: devices)
  with jax.default_device(devices[0]):
    expected = steps.take_gradient("everything", 1, 1)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    if not steps.has_zero_gradient("everything", name) and not name.endswith("accuracy/0"):
      np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-3 * max(np.abs(value).max(), 1e-3), err_msg=name)


@pytest.mark.parametrize(
  ("tokens", "heads", "width", "causal", "lengths"),
  [
    (50, 12, 64, False, None),
    (77, 8, 64, True, None),
    (77, 8, 64, False, (1, 5, 40, 77)),
    (197, 12, 64, False, None),
    (257, 16, 80, False, None),
    (577, 16, 64, False, None),
  ],
)
def test_attention_in_half_precision_equals_that_in_float32(
  tokens: int, heads: int, width: int, causal: bool, lengths: tuple[int, ...] | None
) -> None:
  """On a GPU the first is flash attention, on a TPU our kernel; the second is plain attention."""
  rows = jax.random.normal(jax.random.key(0), (4, 4, tokens, heads, width)).astype(jnp.bfloat16)
  lengths = None if lengths is None else jnp.asarray(lengths)

  def run(rows: jax.Array) -> tuple[jax.Array, ...]:
    *inputs, gradient = rows
    with jax.default_matmul_precision("highest"):
      attended, backward = jax.vjp(lambda *arrays: attend(*arrays, causal=causal, lengths=lengths), *inputs)
    return attended, *backward(gradient)

  for found, expected in zip(jax.jit(run)(rows), jax.jit(run)(rows.astype(jnp.float32)), strict=True):
    atol = 3e-2 * max(1.0, float(jnp.abs(expected).max()))
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0, atol=atol)


def test_steps_in_half_precision_are_finite() -> None:
  result = steps.take_steps("clip", 1, 1, model={"dtype": "bfloat16"})
  losses = [float(result[f"loss/{index}"]) for index in range(steps.STEPS)]
  assert np.isfinite(losses).all()
  assert result[f"skipped_total/{steps.STEPS - 1}"] == 0
