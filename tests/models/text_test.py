"""Tests of `declip_jax.models.text`: causality, pooling, and the scan over blocks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from declip_jax.models.text import TextTransformer
from declip_jax.models.transformer import Block, Transformer

EOT = 9
TINY = {"vocab_size": 12, "context_length": 8, "width": 16, "depth": 2, "heads": 2, "eot": EOT}


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


def test_pools_at_the_first_end_of_text(tiny):
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


def trimmable(longest: int, rng: np.random.Generator) -> np.ndarray:
  """Three texts of which the longest has `longest` tokens."""
  tokens = np.zeros((3, 8), np.int32)
  for row, length in zip(tokens, (longest, 2, max(longest - 1, 2)), strict=True):
    row[: length - 1], row[length - 1] = rng.integers(1, EOT, length - 1), EOT
  return tokens


def test_trimming_to_the_longest_text_changes_neither_value_nor_gradient() -> None:
  tokens, tower = trimmable(5, np.random.default_rng(0)), TextTransformer(**TINY | {"depth": 1})
  variables = jax.jit(tower.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))

  @jax.jit
  @partial(jax.value_and_grad, has_aux=True)
  def encode(variables, tokens):
    found = [tower.apply(variables, tokens, bidirectional) for bidirectional in (False, True)]
    read = [array for feature, states in found for array in (feature, states[:, :5])]
    return sum(jnp.sin(array).sum() for array in read), read

  (_, found), gradient = encode(variables, tokens[:, :5])
  (_, expected), whole_gradient = encode(variables, tokens)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-6), found, expected)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), gradient, whole_gradient)


def test_bidirectional_attention_ends_at_the_end_of_the_text(tiny):
  tower = TextTransformer(**TINY)
  variables = jax.jit(tower.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
  both_ways = jax.jit(lambda ids: tower.apply(variables, ids, bidirectional=True)[1][0])
  tokens = np.array([[8, 1, 2, 3, 4, EOT, 0, 0]])
  for place, seen in ((4, True), (6, False)):
    changed = tokens.copy()
    changed[0, place] = 7
    difference = np.abs(np.asarray(both_ways(tokens)) - both_ways(changed)).max(axis=1)[:place]
    assert (difference > 1e-4).all() == seen
    assert (difference < 1e-6).all() != seen
  # A single token sees only itself either way.
  alone = np.array([[EOT, 0, 0, 0, 0, 0, 0, 0]])
  np.testing.assert_allclose(both_ways(alone)[0], tiny(alone)[1][0, 0], atol=1e-6)


def test_the_final_norm_has_openais_epsilon() -> None:
  # States so small that epsilon decides: a normalised row of 1e-3 has the deviation 1e-3 / sqrt(1e-6 + 1e-5).
  states = jnp.where(jnp.arange(16) % 2, 1e-3, -1e-3)
  ones = {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)}
  found = TextTransformer(**TINY).apply(
    {"params": {"final_norm": ones, "position_embedding": np.zeros((8, 16), np.float32)}},
    states,
    method=TextTransformer.normalise,
  )
  np.testing.assert_allclose(found, np.asarray(states) / np.sqrt(1e-6 + 1e-5), rtol=1e-5)
