"""MoCo v3's projector and predictor, for BYOL too."""

from typing import Any, ClassVar

from einops import rearrange
import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.models.heads.base import Head, Mlp, per_view, pick
from declip_jax.types import Features, Outputs
from declip_jax.views import Views


class Momentum(Head):
  """Projects and predicts image features before the joint projection (MoCo v3, Chen et al. 2021).

  SLIP's variants use the same heads for BYOL. The model also applies the projector, with the parameters of the momentum
  tower, to that tower's features: see `Model.apply_heads`.

  Attributes:
    image_width: width of the image tower's features.
    momentum_projector, momentum_predictor: widths of the layers.
    norm_groups: groups of the batch norms, see `BatchNorm`.
  """

  image_width: int
  momentum_projector: tuple[int, ...]
  momentum_predictor: tuple[int, ...]
  norm_groups: int
  dtype: Any = jnp.float32

  views: ClassVar = ("ssl_image",)
  sides: ClassVar = {"image": ("momentum_project", "momentum_predict")}
  diagnostics: ClassVar = {"momentum_prediction": "embeddings", "momentum_target": "embeddings"}

  def setup(self) -> None:
    options = {"dtype": self.dtype, "groups": self.norm_groups, "bias": False}
    self.momentum_project = Mlp(self.image_width, self.momentum_projector, True, **options)
    self.momentum_predict = Mlp(self.momentum_projector[-1], self.momentum_predictor, True, **options)

  def __call__(self, features: Features, outputs: Outputs, views: Views, train: bool) -> dict[str, Array]:
    """`momentum_prediction`: predictions of the trained tower for the self-supervised views."""
    del outputs
    if not views.ssl_image:
      return {}
    projection = per_view(self.momentum_project, pick(features.image, views.ssl_image), train)
    return {"momentum_prediction": per_view(self.momentum_predict, projection, train)}

  def targets(self, feature: Float[Array, "b v f"], train: bool) -> Float[Array, "v b p"]:
    """Projections of the momentum tower's features, without prediction."""
    return per_view(self.momentum_project, rearrange(feature, "b v f -> v b f"), train)
