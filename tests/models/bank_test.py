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
  entries = jnp.asarray(golden["nn/bank_before"])[None]
  return Bank(entries, jnp.asarray(golden[f"{start}/bank_ptr_before"], jnp.int32), jnp.asarray(entries.shape[1]))


def written(golden, start, overflow):
  """The bank after a step of DeCLIP, which stores its second text first."""
  new = golden_bank(golden, start)
  for text in ("text2", "text1"):
    new = bank.push(new, jnp.asarray(golden[f"nn/{text}"]), overflow)
  return new


def test_finds_the_same_neighbours_as_declip(golden):
  for text in ("text1", "text2"):
    found, _ = bank.nearest(golden_bank(golden, "nn"), jnp.asarray(golden[f"nn/{text}"]), 1, 1)
    np.testing.assert_array_equal(found[0], golden[f"nn/nn_{text}"])
    np.testing.assert_array_equal(found[0], golden["nn/bank_before"][golden[f"nn/nn_index_{text}"]])


@pytest.mark.parametrize("overflow", bank.OVERFLOWS)
def test_writes_the_same_entries_as_declip(golden, overflow):
  new = written(golden, "nn", overflow)
  np.testing.assert_array_equal(new.entries[0], golden["nn/bank_after"])
  assert new.pointer == golden["nn/bank_ptr_after"]


@pytest.mark.parametrize("start", ["nn_wrap", "nn_exact_end"])
def test_drops_the_same_entries_at_the_end_as_declip(golden, start):
  new = written(golden, start, "drop")
  np.testing.assert_array_equal(new.entries[0], golden[f"{start}/bank_after"])
  assert new.pointer == golden[f"{start}/bank_ptr_after"]


@pytest.mark.parametrize("start", ["nn_wrap", "nn_exact_end"])
def test_wraps_around_the_end_and_drops_nothing(golden, start):
  pointer, size = int(golden[f"{start}/bank_ptr_before"]), len(golden["nn/bank_before"])
  rows = [*golden["nn/text2"], *golden["nn/text1"]]
  assert pointer + len(rows) >= size
  expected = golden["nn/bank_before"].copy()
  for index, row in enumerate(rows):
    expected[(pointer + index) % size] = row
  new = written(golden, start, "wrap")
  np.testing.assert_array_equal(new.entries[0], expected)
  assert new.pointer == (pointer + len(rows)) % size


@pytest.mark.parametrize("groups", [1, 2])
def test_keeps_the_newest_rows_of_a_stream_in_each_bank(groups):
  size, rng = 7, np.random.default_rng(0)
  current, seen = bank.random(jax.random.key(0), groups, size, 3), [[] for _ in range(groups)]
  for count in (3, 3, 1, 7, 2, 5):
    rows = rng.normal(size=(groups * count, 3)).astype(np.float32)
    current = bank.push(current, jnp.asarray(rows))
    for part, new in zip(seen, np.split(rows, groups), strict=True):
      part += list(new)
    assert current.filled == min(len(seen[0]), size)
    for entries, part in zip(np.asarray(current.entries), seen, strict=True):
      assert set(map(tuple, part[-size:])) <= set(map(tuple, entries))


def test_each_group_searches_its_own_bank_for_the_k_nearest():
  rng = np.random.default_rng(1)
  groups, size, count = 3, 8, 2
  full = bank.random(jax.random.key(1), groups, size, 4)
  queries = rng.normal(size=(6, 4)).astype(np.float32)
  nearest = jax.jit(bank.nearest, static_argnums=(2, 3))
  full = full._replace(pointer=jnp.asarray(5), filled=jnp.asarray(size))
  found, age = nearest(full, queries, count, 2)
  # Before the bank is full, the entries after the pointer are random.
  _, first_age = nearest(full._replace(filled=full.pointer), queries, count, 2)
  for row, query in enumerate(queries):
    entries = np.asarray(full.entries[row // 2])
    order = np.argsort(-(entries @ query))[:count]
    np.testing.assert_array_equal(found[:, row], entries[order])
    # Two rows a step, the newest at 4: rows 4 and 3 were written one step ago, 2 and 1 two, 0 and 7 three, ...
    np.testing.assert_array_equal(age[:, row], [{4: 1, 3: 1, 2: 2, 1: 2, 0: 3, 7: 3, 6: 4, 5: 4}[i] for i in order])
    np.testing.assert_array_equal(first_age[:, row], [{4: 1, 3: 1, 2: 2, 1: 2, 0: 3}.get(i, 0) for i in order])
  assert 0 < np.mean(first_age > 0) < 1


def test_starts_with_random_unit_vectors_that_do_not_count():
  new = bank.random(jax.random.key(0), 2, 16, 5)
  np.testing.assert_allclose(jnp.linalg.norm(new.entries, axis=-1), 1, rtol=1e-5)
  assert new.filled == 0
  assert len({tuple(row) for row in np.asarray(new.entries).reshape(-1, 5)}) == 32


def test_rejects_a_batch_larger_than_the_bank():
  with pytest.raises(ValueError, match=r"bank_size=4\b.* 5 texts"):
    bank.push(bank.random(jax.random.key(0), 1, 4, 2), jnp.zeros((5, 2)))


def test_has_no_gradient_for_queries_or_entries():
  full = Bank(jnp.eye(3)[None], jnp.zeros((), jnp.int32), jnp.asarray(3))

  def loss(queries):
    return bank.nearest(full, queries, 2, 1)[0].sum() + bank.push(full, queries).entries.sum()

  np.testing.assert_array_equal(jax.grad(loss)(jnp.ones((2, 3))), np.zeros((2, 3)))
