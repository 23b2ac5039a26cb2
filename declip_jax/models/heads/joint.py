"""The joint space of images and texts, with the temperature of their similarities."""

from typing import Any, ClassVar

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.models.dense import Dense
from declip_jax.models.heads.base import Head, dense, pick
from declip_jax.models.transformer import torch_uniform
from declip_jax.types import Features, Outputs
from declip_jax.unit_norm import unit_norm
from declip_jax.views import Views


class Joint(Head):
  """CLIP's projections to the joint space, and the inverse temperature (Radford et al. 2021, section 2.5).

  Attributes:
    image_width, text_width: widths of the two towers' features.
    embed_dim: dimension `d` of the joint space.
    image_linear, text_linear: whether a linear layer maps features to the joint space; SigLIP's image tower ends in it.
    image_bias, text_bias: whether the projections have a bias (a ResNet's attention pool has one, DeCLIP's text too).
    logit_scale_init: initial log inverse temperature.
    max_scale: largest inverse temperature, 0 for none; beyond it the gradient is still that of the exponential, as
      with DeCLIP's clamp of `.data`.
  """

  image_width: int
  text_width: int
  embed_dim: int
  image_linear: bool
  text_linear: bool
  image_bias: bool
  text_bias: bool
  logit_scale_init: float
  max_scale: float
  dtype: Any = jnp.float32

  sides: ClassVar = {"image": ("image_projection",), "text": ("text_projection",)}
  diagnostics: ClassVar = {"image": "pooled", "text": "pooled"}
  internal: ClassVar = ("projected_image",)

  def setup(self) -> None:
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.logit_scale_init), ())
    if self.image_linear:
      self.image_projection = self._projection(self.image_width, self.image_bias)
    if self.text_linear:
      self.text_projection = self._projection(self.text_width, self.text_bias)

  def __call__(self, features: Features, outputs: Outputs, views: Views, train: bool) -> dict[str, Array]:
    """`scale`; `image` and `text`, unit embeddings of the contrastive views; `projected_image` `[b v d]` of all."""
    del outputs, train
    projected = self.project_image(features.image)
    found = {"projected_image": projected, "scale": self._scale()}
    if views.contrastive_image:
      found["image"] = unit_norm(pick(projected, views.contrastive_image))
    if "text" in features:
      found["text"] = unit_norm(self.project_text(rearrange(features.text, "b u f -> u b f")))
    return found

  def project_image(self, feature: Float[Array, "... f"]) -> Float[Array, "... d"]:
    """Joint embeddings of image features, not normalised."""
    return self.image_projection(feature) if self.image_linear else feature.astype(jnp.float32)

  def project_text(self, feature: Float[Array, "... f"]) -> Float[Array, "... d"]:
    """Joint embeddings of text features, not normalised."""
    return self.text_projection(feature) if self.text_linear else feature.astype(jnp.float32)

  def _scale(self) -> Float[Array, ""]:
    scale = jnp.exp(self.logit_scale)
    return scale - jax.lax.stop_gradient(jnp.maximum(scale - self.max_scale, 0)) if self.max_scale else scale

  def _projection(self, width: int, bias: bool) -> Dense:
    init = nn.initializers.normal(width**-0.5)
    return dense(self.embed_dim, self.dtype, use_bias=bias, kernel_init=init, bias_init=torch_uniform(width))
