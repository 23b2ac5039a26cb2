"""The causal text transformer of CLIP (Radford et al. 2021, section 2.4), which SLIP and DeCLIP keep."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from declip_jax.models.transformer import Transformer


class TextTransformer(nn.Module):
  """Token ids to states at every position, before the final norm; `final_norm` turns chosen states into features.

  Attention is causal, also where the states feed masked language modelling, as in DeCLIP's released code: a masked
  token sees only what stands before it. No padding mask is needed, since nothing behind the end-of-text token reaches
  it.
  """

  vocab_size: int
  context_length: int
  width: int
  depth: int
  heads: int
  eot: int
  activation: str = "quick_gelu"
  remat: str = "none"
  dtype: Any = jnp.float32

  def setup(self) -> None:
    self.token_embedding = nn.Embed(
      self.vocab_size, self.width, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02)
    )
    self.position_embedding = self.param(
      "position_embedding", nn.initializers.normal(0.01), (self.context_length, self.width)
    )
    self.transformer = Transformer(
      width=self.width,
      heads=self.heads,
      depth=self.depth,
      activation=self.activation,
      causal=True,
      initializer="openai_text",
      remat=self.remat,
      dtype=self.dtype,
    )
    self.final_norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False)

  def __call__(self, tokens: Int[Array, "b n"]) -> tuple[Float[Array, "b width"], Float[Array, "b n width"]]:
    """Returns the feature `[b width]` at the first end-of-text token, and the states `[b n width]` before the norm.

    OpenAI's code pools at the largest id of a row. That is the same position for its vocabulary; a search for the id
    itself also holds when a mask token is appended behind it.
    """
    positions = self.position_embedding[: tokens.shape[1]].astype(self.dtype)
    states = self.transformer(self.token_embedding(tokens) + positions)
    end = jnp.argmax(tokens == self.eot, axis=-1)
    return self.normalise(states[jnp.arange(tokens.shape[0]), end]), states

  def normalise(self, states: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """The final norm, which acts on each position alone and so is applied to the wanted positions only."""
    return self.final_norm(states)
