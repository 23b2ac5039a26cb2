"""The classifier of supervised training."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.models.heads.base import Head, dense, pick
from declip_jax.models.transformer import torch_uniform
from declip_jax.types import Features, Outputs
from declip_jax.unit_norm import unit_norm
from declip_jax.views import Views


class Classifier(Head):
  """A linear layer from image features to the logits of classes.

  Initial weights are N(0, 2e-5), as in BeiT's fine-tuning: a normal with deviation 0.02, truncated at 2, which is 100
  deviations, times 0.001. The bias is 0.

  Attributes:
    image_width: width of the image tower's feature.
    num_classes: number of classes.
    classify_joint: whether it reads unit-norm joint embeddings, as a zero-shot classifier does, instead of the tower's
      feature; it then has the image's projection of `Joint`, under the same name.
    embed_dim, image_bias: dimension of that projection, and whether it has a bias.
  """

  image_width: int
  num_classes: int
  classify_joint: bool
  embed_dim: int
  image_bias: bool
  dtype: Any = jnp.float32

  views: ClassVar = ("classified_image",)
  sides: ClassVar = {"image": ("classifier", "image_projection")}

  def __call__(self, features: Features, outputs: Outputs, views: Views, train: bool) -> dict[str, Array]:
    """`class_logits`: logits of the labelled views."""
    del outputs, train
    classified = views.numbers("classified_image")
    return {"class_logits": self.classify(pick(features.image, classified))} if classified else {}

  @nn.compact
  def classify(self, feature: Float[Array, "*b f"]) -> Float[Array, "*b classes"]:
    """Logits of the classes, float32."""
    dtype = self.dtype
    if self.classify_joint:
      init = {
        "kernel_init": nn.initializers.normal(self.image_width**-0.5),
        "bias_init": torch_uniform(self.image_width),
      }
      projection = dense(self.embed_dim, dtype, use_bias=self.image_bias, **init, name="image_projection")
      feature, dtype = unit_norm(projection(feature)), jnp.float32  # cosines are compared in float32
    return dense(self.num_classes, dtype, kernel_init=nn.initializers.normal(2e-5), name="classifier")(feature)
