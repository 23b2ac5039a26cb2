"""SLIP's projector for SimCLR."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from declip_jax.models.heads.base import Head, Mlp, per_view, pick
from declip_jax.types import Features, Outputs
from declip_jax.views import Views


class SimClr(Head):
  """Projects image features, before the joint projection, for SimCLR (SLIP, section 3).

  Attributes:
    image_width: width of the image tower's features.
    simclr_projector: widths of the projector's layers.
    norm_groups: groups of the batch norms, see `BatchNorm`.
  """

  image_width: int
  simclr_projector: tuple[int, ...]
  norm_groups: int
  dtype: Any = jnp.float32

  views: ClassVar = ("ssl_image",)
  sides: ClassVar = {"image": ("simclr",)}
  diagnostics: ClassVar = {"simclr": "embeddings"}

  def setup(self) -> None:
    self.simclr = Mlp(self.image_width, self.simclr_projector, False, dtype=self.dtype, groups=self.norm_groups)

  def __call__(self, features: Features, outputs: Outputs, views: Views, train: bool) -> dict[str, Array]:
    """`simclr`: projections of the self-supervised views."""
    del outputs
    if not views.ssl_image:
      return {}
    return {"simclr": per_view(self.simclr, pick(features.image, views.ssl_image), train)}
