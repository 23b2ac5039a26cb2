"""Tests of `declip_jax.models.bank` against a list in plain Python and against DeCLIP's memory bank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as reference

from declip_jax.models import bank
from declip_jax.models.bank import Bank


@pytest.fixture(scope="module")
def golden():
  return reference.load("losses")


def golden_bank(golden, start):
  entries = jnp.asarray(golden["nn/bank_before"])
  return Bank(entries, jnp.asarray(golden[f"{start}/bank_ptr_before"], jnp.int32), jnp.asarray(len(entries)))


def test_finds_what_declip_finds(golden):
  for text in ("text1", "text2"):
    found = bank.nearest(golden_bank(golden, "nn"), golden[f"nn/{text}"])
    np.testing.assert_array_equal(found, golden[f"nn/nn_{text}"])
    np.testing.assert_array_equal(found, golden["nn/bank_before"][golden[f"nn/nn_index_{text}"]])


def test_writes_where_declip_writes(golden):
  """DeCLIP writes the second view, then the first. Our heads keep the first alone."""
  new = golden_bank(golden, "nn")
  for text in ("text2", "text1"):
    new = bank.push(new, golden[f"nn/{text}"])
  np.testing.assert_array_equal(new.entries, golden["nn/bank_after"])
  assert new.pointer == golden["nn/bank_ptr_after"]


def test_drops_nothing_at_the_end_where_declip_drops_the_rest(golden):
  start, size = int(golden["nn_wrap/bank_ptr_before"]), len(golden["nn/bank_before"])
  new = golden_bank(golden, "nn_wrap")
  for text in ("text2", "text1"):
    new = bank.push(new, golden[f"nn/{text}"])
  written = [*golden["nn/text2"], *golden["nn/text1"]]
  assert start + len(written) > size
  expected = golden["nn/bank_before"].copy()
  for index, row in enumerate(written):
    expected[(start + index) % size] = row
  np.testing.assert_array_equal(new.entries, expected)
  assert new.pointer == (start + len(written)) % size
  assert not np.array_equal(new.entries, golden["nn_wrap/bank_after"])


def test_keeps_the_newest_rows_of_a_stream():
  size, rng = 7, np.random.default_rng(0)
  current, seen = bank.empty(size, 3), []
  for count in (3, 3, 1, 7, 2, 5):
    rows = rng.normal(size=(count, 3)).astype(np.float32)
    current = bank.push(current, rows)
    seen += list(rows)
    assert current.filled == min(len(seen), size)
    kept = np.asarray(current.entries)[: len(seen)]
    assert sorted(map(tuple, kept)) == sorted(map(tuple, seen[-size:]))


def test_refuses_a_batch_larger_than_the_bank():
  with pytest.raises(ValueError, match="holds 4 texts, fewer than the global batch of 5"):
    bank.push(bank.empty(4, 2), jnp.zeros((5, 2)))


def test_gives_no_gradient_to_queries_or_entries():
  full = Bank(jnp.eye(3), jnp.zeros((), jnp.int32), jnp.asarray(3))

  def loss(queries):
    return bank.nearest(full, queries).sum() + bank.push(full, queries).entries.sum()

  np.testing.assert_array_equal(jax.grad(loss)(jnp.ones((2, 3))), np.zeros((2, 3)))
