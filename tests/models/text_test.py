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


@pytest.mark.slow
def test_trimming_to_the_longest_text_changes_no_value():
  rng = np.random.default_rng(0)
  plain, trimmed = TextTransformer(**TINY), TextTransformer(**TINY, buckets=(3, 5, 20))
  variables = jax.jit(plain.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
  encode, encode_trimmed = (jax.jit(partial(tower.apply, variables)) for tower in (plain, trimmed))
  for longest in (2, 3, 4, 5, 8):  # of which 2 and 3, and 4 and 5 fall into one bucket
    tokens = trimmable(longest, rng)
    features, states = encode(tokens)
    again, states_again = encode_trimmed(tokens)
    np.testing.assert_allclose(again, features, atol=5e-6)
    np.testing.assert_allclose(states_again[:, :longest], states[:, :longest], atol=5e-6)
    bucket = next(length for length in (3, 5, 8) if length >= longest)
    assert not np.any(states_again[:, bucket:])
    assert bucket == 8 or np.all(states[:, bucket:])


def test_trimming_to_the_longest_text_changes_no_gradient():
  rng = np.random.default_rng(0)
  plain, trimmed = TextTransformer(**TINY), TextTransformer(**TINY, buckets=(3,))
  variables = jax.jit(plain.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
  gradient, gradient_trimmed = (
    jax.jit(jax.grad(lambda variables, tokens, tower=tower: jnp.sin(tower.apply(variables, tokens)[0]).sum()))
    for tower in (plain, trimmed)
  )
  for longest in (2, 3, 8):
    tokens = trimmable(longest, rng)
    found, expected = gradient_trimmed(variables, tokens), gradient(variables, tokens)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, expected)


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
