"""The text transformer of CLIP (Radford et al. 2021, section 2.4), of SLIP and DeCLIP, and those of SigLIP and CoCa."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from declip_jax.models.transformer import Transformer

POOLINGS = ("eot", "last", "class")  # what `config.model.text.pooling` may name, see `TextTransformer`


class TextTransformer(nn.Module):
  """Maps token ids to states at every position, before the final norm; `final_norm` turns states into features.

  CLIP's attention is causal and needs no padding mask: nothing after the end-of-text token affects it. Masked language
  modelling can request a pass in which every token sees the whole text, as in BERT; in DeCLIP's released code a token
  sees only those before it.

  SigLIP's is not `causal`: every token sees the whole row, padding too, and the feature is the state at its last
  position. So a row has to be as long as in training. Difference: its parameters start as OpenAI's do;
  big_vision's start as Flax's, with position embeddings of deviation width^-0.5.

  CoCa's ends with a class token, whose state is the feature. As in open_clip's released weights, no token sees one
  whose id before it is 0, padding or an exclamation mark; so the class token sees itself only after a text that fills
  the row. Its position embedding is part of its embedding.

  Rows may be shorter than the context length: they have the first position embeddings. So a batch can be trimmed to its
  longest text where padding does not matter; see `training.trimming`.

  Attributes:
    eot: id of the end-of-text token.
    pooling: position of the state that is the feature: the first end of text ("eot"), the end of the row ("last"), or a
      class token after it ("class").
  """

  vocab_size: int
  context_length: int
  width: int
  depth: int
  heads: int
  eot: int
  activation: str = "quick_gelu"
  mlp_ratio: float = 4.0
  epsilon: float = 1e-5
  causal: bool = True
  pooling: str = "eot"
  remat: str = "none"
  unroll: int = 1
  attention: str = "auto"
  dtype: Any = jnp.float32

  @property
  def ignores_padding(self) -> bool:
    """Whether nothing after the end of a text matters, so that a row may be cut there."""
    return self.causal and self.pooling == "eot"

  def setup(self) -> None:
    self.token_embedding = nn.Embed(
      self.vocab_size, self.width, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02)
    )
    self.position_embedding = self.param(
      "position_embedding", nn.initializers.normal(0.01), (self.context_length, self.width)
    )
    if self.pooling == "class":
      self.class_embedding = self.param("class_embedding", nn.initializers.normal(0.01), (self.width,))
    self.transformer = Transformer(
      width=self.width,
      heads=self.heads,
      depth=self.depth,
      mlp_ratio=self.mlp_ratio,
      activation=self.activation,
      epsilon=self.epsilon,
      causal=self.causal,
      initializer="openai_text",
      remat=self.remat,
      unroll=self.unroll,
      attention=self.attention,
      dtype=self.dtype,
    )
    self.final_norm = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, use_fast_variance=False)

  def __call__(
    self, tokens: Int[Array, "b n"], bidirectional: bool = False
  ) -> tuple[Float[Array, "b f"], Float[Array, "b n f"]]:
    """Returns the feature `[b f]` at the position of `pooling`, and the states `[b n f]` before the norm.

    OpenAI's code pools at the largest id of a row, which is the same position for its vocabulary; searching for the id
    itself also works after a mask token is appended to the vocabulary.
    """
    states = self.encode(tokens, bidirectional)
    if self.pooling != "eot":
      return self.normalise(states[:, -1]), states[:, : tokens.shape[1]]
    end = self.end(tokens)
    return self.normalise(jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0]), states

  def end(self, tokens: Int[Array, "b n"]) -> Int[Array, "b"]:
    """Position of the first end-of-text token; 0 where there is none."""
    return jnp.argmax(tokens == self.eot, axis=-1)

  def encode(self, tokens: Int[Array, "b n"], bidirectional: bool = False) -> Float[Array, "b m f"]:
    """States of all positions, before the final norm; CoCa's are followed by that of the class token."""
    positions = self.position_embedding[None, : tokens.shape[1]].astype(self.dtype)
    x, visible = self.token_embedding(tokens) + positions, None
    lengths = self.end(tokens) + 1 if bidirectional and self.causal else None
    if self.pooling == "class" and not bidirectional:
      last = jnp.broadcast_to(self.class_embedding.astype(self.dtype), (tokens.shape[0], 1, self.width))
      first = jnp.ones((tokens.shape[0], 1), bool)  # every token sees that at the start
      x, visible = jnp.concatenate([x, last], axis=1), jnp.concatenate([first, tokens != 0], axis=1)
    return self.transformer(x, lengths, visible)

  def normalise(self, states: Float[Array, "... f"]) -> Float[Array, "... f"]:
    """The final norm, which acts on each position separately and is applied only where states are used."""
    return self.final_norm(states)
