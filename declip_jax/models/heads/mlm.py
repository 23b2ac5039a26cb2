"""The vocabulary layer of masked language modelling."""

from typing import Any, ClassVar

from einops import rearrange
import jax.numpy as jnp
from jaxtyping import Array

from declip_jax.models.heads.base import Head, linear
from declip_jax.types import Features, Outputs
from declip_jax.views import Views


class Mlm(Head):
  """Predicts the tokens at the masked positions of a text.

  Attributes:
    text_width: width of the text tower's states.
    vocab_size: size of the vocabulary.
  """

  text_width: int
  vocab_size: int
  dtype: Any = jnp.float32

  views: ClassVar = ("masked_text",)
  sides: ClassVar = {"text": ("mlm",)}

  def setup(self) -> None:
    self.mlm = linear(self.text_width, self.vocab_size, self.dtype)

  def __call__(self, features: Features, outputs: Outputs, views: Views, train: bool) -> dict[str, Array]:
    """`mlm_logits`."""
    del outputs, views, train
    if "masked_text" not in features:
      return {}
    # A single matrix product: on a CPU, the gradient of a batched product takes three times as long.
    logits = self.mlm(rearrange(features.masked_text, "b k f -> (b k) f"))
    return {"mlm_logits": rearrange(logits, "(b k) v -> b k v", b=features.masked_text.shape[0])}
