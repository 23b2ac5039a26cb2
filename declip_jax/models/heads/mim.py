"""The pixel layer of masked image modelling."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from declip_jax.models.heads.base import Head, linear
from declip_jax.types import Features, Outputs
from declip_jax.views import Views


class Mim(Head):
  """Predicts the pixels of hidden patches from their tokens.

  Attributes:
    image_width: width of the image tower's tokens.
    patch_size: number `e` of values to predict for each patch.
  """

  image_width: int
  patch_size: int
  dtype: Any = jnp.float32

  views: ClassVar = ("masked_image",)
  sides: ClassVar = {"image": ("mim", "mim_norm")}
  diagnostics: ClassVar = {"mim_prediction": "patches"}

  def setup(self) -> None:
    self.mim_norm = nn.LayerNorm(dtype=self.dtype, use_fast_variance=False)
    self.mim = linear(self.image_width, self.patch_size, self.dtype)

  def __call__(self, features: Features, outputs: Outputs, views: Views, train: bool) -> dict[str, Array]:
    """`mim_prediction`, and `mim_target`: the pixels of the hidden patches."""
    del outputs, views, train
    if "masked_image" not in features:
      return {}
    return {"mim_prediction": self.mim(self.mim_norm(features.masked_image)), "mim_target": features.masked_pixels}
