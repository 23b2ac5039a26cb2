"""DeCLIP's projector and predictor for SimSiam."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from declip_jax.models.heads.base import Head, Mlp, per_view, pick
from declip_jax.types import Features, Outputs
from declip_jax.views import Views


class SimSiam(Head):
  """Projects and predicts the un-normalised joint embedding of images, as DeCLIP does.

  Attributes:
    embed_dim: dimension `d` of the joint space.
    simsiam_projector, simsiam_predictor: widths of the layers.
    norm_groups: groups of the batch norms, see `BatchNorm`.
  """

  embed_dim: int
  simsiam_projector: tuple[int, ...]
  simsiam_predictor: tuple[int, ...]
  norm_groups: int
  dtype: Any = jnp.float32

  views: ClassVar = ("ssl_image",)
  sides: ClassVar = {"image": ("projector", "predictor")}
  diagnostics: ClassVar = {"simsiam_projection": "embeddings"}

  def setup(self) -> None:
    options = {"dtype": self.dtype, "groups": self.norm_groups}
    self.projector = Mlp(self.embed_dim, self.simsiam_projector, True, **options)
    self.predictor = Mlp(self.simsiam_projector[-1], self.simsiam_predictor, False, **options)

  def __call__(self, features: Features, outputs: Outputs, views: Views, train: bool) -> dict[str, Array]:
    """`simsiam_projection` and `simsiam_prediction` of the self-supervised views."""
    del features
    if not views.ssl_image:
      return {}
    projected = pick(outputs.projected_image, views.ssl_image)
    projection = per_view(self.projector, projected, train)
    return {
      "simsiam_projection": projection,
      "simsiam_prediction": per_view(self.predictor, projection, train),
    }
