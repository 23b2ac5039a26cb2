"""Tests of `declip_jax.models.resnet`: the attention pool against plain loops, rematerialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from declip_jax.models.resnet import AttentionPool, ModifiedResNet


def test_attention_pool_equals_loops():
  batch, side, width, heads = 2, 3, 12, 3
  rng = np.random.default_rng(0)
  x = rng.normal(size=(batch, side, side, width)).astype(np.float32)
  module = AttentionPool(heads=heads, dtype=jnp.float32)
  params = module.init(jax.random.key(0), jnp.asarray(x))["params"]
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
  each = width // heads
  for image, found in zip(x, module.apply({"params": params}, jnp.asarray(x)), strict=True):
    cells = [image[row, column] for row in range(side) for column in range(side)]
    tokens = np.stack([np.mean(cells, axis=0), *cells]) + params["position_embedding"]
    query, key, value = (tokens @ params[n]["kernel"] + params[n]["bias"] for n in ("query", "key", "value"))
    for head in range(heads):
      part = slice(head * each, (head + 1) * each)
      score = [query[0, part] @ key[n, part] / each**0.5 for n in range(len(tokens))]
      weight = np.exp(score) / np.exp(score).sum()
      np.testing.assert_allclose(found[part], weight @ value[:, part], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_remat_changes_neither_gradient_nor_statistics():
  images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
  fields = {"width": 4, "layers": (1, 0, 0, 0)}  # one block, so that it compiles fast
  variables = jax.jit(ModifiedResNet(**fields).init)(jax.random.key(0), images)

  def run(remat):
    def loss(params):
      module = ModifiedResNet(**fields, remat=remat)
      (y, _), new = module.apply(variables | {"params": params}, images, True, mutable=["batch_stats"])
      return jnp.sum(jnp.sin(y)), new["batch_stats"]

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), run("full"), run("none"))
