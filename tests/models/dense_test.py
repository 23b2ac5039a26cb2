"""Linear layers: values and gradients beside Flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from declip_jax.models.dense import Dense


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_equal_those_of_flax(dtype: jnp.dtype, use_bias: bool) -> None:
  x, weights = (jax.random.normal(jax.random.key(seed), (3, 5, width)) for seed, width in ((0, 7), (1, 11)))
  ours, flax = Dense(11, dtype, use_bias), nn.Dense(11, use_bias, dtype)
  params = flax.init(jax.random.key(2), x)
  assert jax.tree.all(jax.tree.map(jnp.array_equal, params, ours.init(jax.random.key(2), x)))

  def value_and_gradient(layer: nn.Module):
    return jax.jit(jax.value_and_grad(lambda params, x: (weights * layer.apply(params, x)).sum(), (0, 1)))(params, x)

  tolerance = {jnp.float32: 1e-6, jnp.bfloat16: 1e-2}[dtype]
  for a, b in zip(*map(jax.tree.leaves, map(value_and_gradient, (ours, flax))), strict=True):
    assert a.dtype == b.dtype
    assert jnp.linalg.norm(a - b) <= tolerance * jnp.linalg.norm(b)


def test_sums_are_float32_on_request() -> None:
  x = jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16)
  layer = Dense(8, jnp.bfloat16, output_dtype=jnp.float32)
  params = layer.init(jax.random.key(1), x)
  kernel = params["params"]["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
  assert jnp.allclose(layer.apply(params, x), x.astype(jnp.float32) @ kernel, rtol=1e-5, atol=1e-5)


def test_only_programs_for_cpus_flatten_the_gradients() -> None:
  layer = Dense(11, jnp.bfloat16)
  x = jax.ShapeDtypeStruct((3, 5, 7), jnp.float32)
  params = jax.eval_shape(layer.init, jax.random.key(0), x)
  traced = jax.jit(jax.grad(lambda params, x: layer.apply(params, x).sum(), (0, 1))).trace(params, x)
  cpu, tpu = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu"))
  assert ("tensor<15x11xbf16>" in cpu, "tensor<15x11xbf16>" in tpu) == (True, False)
  assert tpu.count("stablehlo.dot_general") == 2  # the sum has no cotangent of its own, so the forward pass is gone
