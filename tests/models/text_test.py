"""Tests of `declip_jax.models.text`: DeCLIP's tower, causality, pooling, and the scan over blocks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_weights as reference

from declip_jax.models.text import TextTransformer
from declip_jax.models.transformer import Block, Transformer

EOT = 9
TINY = {"vocab_size": 12, "context_length": 8, "width": 16, "depth": 2, "heads": 2, "eot": EOT}


def test_equals_declip_with_a_mask_token_among_the_ids():
  golden = reference.load("declip")
  sd = reference.below(golden, "sd/encode_text.")
  tower = TextTransformer(vocab_size=131, context_length=16, width=48, depth=2, heads=3, eot=130)
  variables = {"params": reference.text(sd)}
  tokens = np.concatenate([golden["tokens1_masked"], golden["tokens2"]])
  features, states = jax.jit(tower.apply)(variables, tokens)
  joint = features @ sd["text_projection.weight"].T + sd["text_projection.bias"]
  expected = np.concatenate([golden["declip/text_features1"], golden["declip/text_features2"]])
  np.testing.assert_allclose(joint, expected, rtol=1e-4, atol=2e-5)
  words = tower.apply(variables, states[:8], method="normalise")
  np.testing.assert_allclose(words, golden["declip/text_words1"], rtol=1e-4, atol=3e-5)


@pytest.fixture(scope="module")
def tiny():
  """The apply function of a small tower."""
  tower = TextTransformer(**TINY)
  variables = jax.jit(tower.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
  return jax.jit(partial(tower.apply, variables))


def test_is_causal(tiny):
  tokens = np.array([[8, 1, 2, 3, 4, 5, 6, EOT]])
  changed = tokens.copy()
  changed[0, 4] = 7
  before, after = (np.asarray(tiny(ids)[1][0]) for ids in (tokens, changed))
  np.testing.assert_array_equal(before[:4], after[:4])
  assert (np.abs(before[4:] - after[4:]).max(axis=1) > 1e-4).all()


def test_pools_at_the_first_end_of_text_whatever_ids_follow(tiny):
  plain = np.array([[8, 1, 2, EOT, 0, 0, 0, 0]])
  larger_id_and_second_end = np.array([[8, 1, 2, EOT, 11, EOT, 3, 10]])
  np.testing.assert_array_equal(tiny(plain)[0], tiny(larger_id_and_second_end)[0])


def test_shorter_texts_use_the_first_positions(tiny):
  long = np.array([[8, 1, 2, EOT, 0, 0, 0, 0]])
  np.testing.assert_allclose(tiny(long)[0], tiny(long[:, :4])[0], atol=1e-6)


def test_scan_equals_a_loop_over_blocks():
  fields = {"width": 16, "heads": 2, "depth": 3, "activation": "gelu", "epsilon": 1e-6, "causal": True}
  fields |= {"initializer": "torch", "mlp_ratio": 4.0, "dtype": jnp.float32}
  x = jax.random.normal(jax.random.key(1), (2, 5, 16))
  transformer, block = Transformer(**fields), Block(**fields)
  variables = jax.jit(transformer.init)(jax.random.key(0), x)

  def unrolled(variables, x):
    for index in range(3):
      params = jax.tree.map(lambda leaf, index=index: leaf[index], variables["params"]["blocks"])
      x, _ = block.apply({"params": params}, x)
    return x

  np.testing.assert_allclose(jax.jit(transformer.apply)(variables, x), jax.jit(unrolled)(variables, x), atol=1e-5)
