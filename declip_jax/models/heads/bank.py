"""The neighbour bank of DeCLIP's nearest-neighbour supervision, as a head."""

from einops import rearrange
import jax.numpy as jnp
from jaxtyping import Array

from declip_jax.models import bank
from declip_jax.models.heads.base import Head
from declip_jax.types import Features, Outputs
from declip_jax.views import Views


class NeighbourBank(Head):
  """Finds each text's nearest neighbours among the texts of earlier steps, then stores this batch's texts.

  Attributes:
    embed_dim: dimension `d` of the joint space.
    bank_size: entries `q` of a bank.
    bank_groups: number of banks, each for its share of the batch; see `bank.Bank`.
    bank_overflow: one of `bank.OVERFLOWS`.
    bank_neighbours: nearest texts that are found for each query.
  """

  embed_dim: int
  bank_size: int
  bank_groups: int
  bank_overflow: str
  bank_neighbours: int

  def setup(self) -> None:
    size = (self.bank_groups, self.bank_size, self.embed_dim)
    self.bank = self.variable("bank", "text", lambda: bank.random(self.make_rng("params"), *size))

  def __call__(self, features: Features, outputs: Outputs, views: Views, train: bool) -> dict[str, Array]:
    """`neighbour`, `neighbour_similarity`, `neighbour_age`, `neighbour_ready`."""
    del features, train
    if "text" not in outputs:
      return {}
    current = self.bank.value
    queries = [outputs.text[views.contrastive_text.index(view)] for view in views.neighbour_text]
    written = len(queries) * queries[0].shape[0] // self.bank_groups
    found = [bank.nearest(current, query, self.bank_neighbours, written) for query in queries]
    neighbour, age = (rearrange(jnp.stack(x), "u k b ... -> (k u) b ...") for x in zip(*found, strict=True))
    similarity = jnp.sum(neighbour * jnp.concatenate([jnp.stack(queries)] * self.bank_neighbours), axis=-1)
    ready = (current.filled == self.bank_size).astype(jnp.float32)
    if self.is_mutable_collection("bank") and not self.is_initializing():
      for query in reversed(queries):  # DeCLIP's code writes its augmented view first
        current = bank.push(current, query, self.bank_overflow)
      self.bank.value = current
    return {
      "neighbour": neighbour,
      "neighbour_similarity": similarity,
      "neighbour_age": age,
      "neighbour_ready": ready,
    }
