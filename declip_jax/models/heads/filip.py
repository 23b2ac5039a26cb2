"""FILIP's projections of tokens, and the temperature of their similarities."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.models.heads.base import Head, linear
from declip_jax.types import Features, Outputs
from declip_jax.unit_norm import unit_norm
from declip_jax.views import Views


class Filip(Head):
  """Maps the tokens of both towers to the space in which FILIP compares them (Yao et al. 2022, section 3.1).

  Attributes:
    image_width, text_width: widths of the two towers' tokens.
    dense_dim: width `e` in which tokens are compared.
    logit_scale_init: initial log inverse temperature.
  """

  image_width: int
  text_width: int
  dense_dim: int
  logit_scale_init: float
  dtype: Any = jnp.float32

  sides: ClassVar = {"image": ("image_mapping",), "text": ("text_mapping",)}
  diagnostics: ClassVar = {"image_tokens": "tokens", "text_tokens": "tokens"}

  def setup(self) -> None:
    self.dense_logit_scale = self.param("dense_logit_scale", nn.initializers.constant(self.logit_scale_init), ())
    self.image_mapping = linear(self.image_width, self.dense_dim, self.dtype)
    self.text_mapping = linear(self.text_width, self.dense_dim, self.dtype)

  def __call__(self, features: Features, outputs: Outputs, views: Views, train: bool) -> dict[str, Array]:
    """`image_tokens` and `text_tokens` of the first contrastive pair, `text_valid` and `dense_scale`."""
    del outputs, views, train
    if "text_tokens" not in features:
      return {}
    return {
      "image_tokens": self.map_image(features.image_tokens),
      "text_tokens": self.map_text(features.text_tokens),
      "text_valid": features.text_valid,
      "dense_scale": jnp.exp(self.dense_logit_scale),
    }

  def map_image(self, tokens: Float[Array, "b n f"]) -> Float[Array, "b n e"]:
    """Unit-norm tokens of images, as FILIP compares them."""
    return unit_norm(self.image_mapping(tokens))

  def map_text(self, tokens: Float[Array, "b t f"]) -> Float[Array, "b t e"]:
    """Unit-norm tokens of texts, as FILIP compares them."""
    return unit_norm(self.text_mapping(tokens))
