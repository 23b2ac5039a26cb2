"""The first-in-first-out bank of texts that nearest-neighbour supervision searches (DeCLIP, section 3.2.3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Bank(NamedTuple):
  """`entries` unit rows, the row `pointer` that is written next, and how many rows were ever `filled`."""

  entries: Float[Array, "q d"]
  pointer: Int[Array, ""]
  filled: Int[Array, ""]


def empty(size: int, dim: int) -> Bank:
  """A bank of `size` zero rows, none of them filled."""
  return Bank(jnp.zeros((size, dim), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def nearest(bank: Bank, queries: Float[Array, "b d"]) -> Float[Array, "b d"]:
  """The entry with the largest inner product for each of `queries`, without gradient."""
  similarity = jnp.einsum("bd,qd->bq", queries, bank.entries, precision=jax.lax.Precision.HIGHEST)
  return jax.lax.stop_gradient(bank.entries[jnp.argmax(similarity, axis=-1)])


def push(bank: Bank, entries: Float[Array, "b d"]) -> Bank:
  """Writes `entries` over the oldest rows, wrapping around.

  DeCLIP's code drops what does not fit before the end and starts again at row 0; here nothing is dropped.

  Raises:
    ValueError: more entries than the bank has rows.
  """
  size, new = bank.entries.shape[0], entries.shape[0]
  if new > size:
    raise ValueError(f"the neighbour bank holds {size} texts, fewer than the global batch of {new}: raise its size")
  rows = (bank.pointer + jnp.arange(new)) % size
  return Bank(
    bank.entries.at[rows].set(jax.lax.stop_gradient(entries), unique_indices=True),
    (bank.pointer + new) % size,
    jnp.minimum(bank.filled + new, size),
  )
