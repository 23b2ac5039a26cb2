"""The first-in-first-out banks of texts that nearest-neighbour supervision searches (DeCLIP, section 3.2.3)."""

from typing import NamedTuple

from einops import rearrange
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The treatment of entries past the end of a bank: "wrap" writes them at its start; "drop", as in DeCLIP's code,
# discards them and restarts at entry 0 (also if the entries fill the bank exactly).
OVERFLOWS = ("wrap", "drop")


class Bank(NamedTuple):
  """`g` banks of `q` unit vectors, the index `pointer` of the entry to write next, and the number `filled` so far.

  The batch is divided among the banks equally, in order. A single bank is global; DeCLIP's code has one per GPU.
  """

  entries: Float[Array, "g q d"]
  pointer: Int[Array, ""]
  filled: Int[Array, ""]


def random(key: jax.Array, groups: int, size: int, dim: int) -> Bank:
  """Banks of random unit vectors, none of which counts as filled."""
  entries = jax.random.normal(key, (groups, size, dim))
  zero = jnp.zeros((), jnp.int32)
  return Bank(entries / jnp.linalg.norm(entries, axis=-1, keepdims=True), zero, zero)


def nearest(
  bank: Bank, queries: Float[Array, "b d"], count: int, written: int
) -> tuple[Float[Array, "k b d"], Float[Array, "k b"]]:
  """The `count` entries with the largest inner products for each query, without gradient, and their ages in steps.

  Each query searches the bank of its share of the batch. `written` is the number of entries that a step writes to
  each bank, which determines the ages: 1 is the previous step, 0 an initial entry that no step has written.
  """
  size = bank.entries.shape[1]
  similarity = jnp.einsum("gbd,gqd->gbq", _split(bank, queries), bank.entries, precision=jax.lax.Precision.HIGHEST)
  chosen = []
  for _ in range(count):  # top_k would gather the similarities of all devices on each device
    chosen.append(jnp.argmax(similarity, axis=-1))
    similarity = jnp.where(jnp.arange(size)[None, None] == chosen[-1][..., None], -jnp.inf, similarity)
  index = jnp.stack(chosen, axis=-1)
  found = jax.vmap(lambda entries, chosen: entries[chosen])(bank.entries, index)
  age = jnp.where(index < bank.filled, (bank.pointer - 1 - index) % size // written + 1, 0)
  found, age = rearrange(found, "g b k d -> k (g b) d"), rearrange(age, "g b k -> k (g b)")
  return jax.lax.stop_gradient(found), age.astype(jnp.float32)


def push(bank: Bank, entries: Float[Array, "b d"], overflow: str = "wrap") -> Bank:
  """Overwrites the oldest entries with `entries`; see `OVERFLOWS` for what happens at the end of a bank.

  Raises:
    ValueError: more entries than a bank can store.
  """
  size, per_bank = bank.entries.shape[1], jax.lax.stop_gradient(_split(bank, entries))
  new = per_bank.shape[1]
  if new > size:
    raise ValueError(f"config.model.heads.bank_size={size}: a step adds {new} texts, so raise bank_size or bank_groups")
  index, end = bank.pointer + jnp.arange(new), bank.pointer + new
  if overflow == "wrap":
    index, pointer = index % size, end % size
  else:
    pointer = jnp.where(end >= size, 0, end)
  return Bank(
    bank.entries.at[:, index].set(per_bank, mode="drop", unique_indices=True),
    pointer,
    jnp.minimum(bank.filled + new, size),
  )


def _split(bank: Bank, entries: Float[Array, "b d"]) -> Float[Array, "g b2 d"]:
  """Divides the entries of a batch among the banks."""
  groups = bank.entries.shape[0]
  if entries.shape[0] % groups:
    raise ValueError(f"config.model.heads.bank_groups={groups} does not divide the batch of {entries.shape[0]} texts")
  return rearrange(entries, "(g b) d -> g b d", g=groups)
