"""The bias of SigLIP's logits."""

import flax.linen as nn
from jaxtyping import Array

from declip_jax.models.heads.base import Head
from declip_jax.types import Features, Outputs
from declip_jax.views import Views


class Sigmoid(Head):
  """The bias that the sigmoid loss adds to every logit.

  Attributes:
    logit_bias_init: initial bias.
  """

  logit_bias_init: float

  def setup(self) -> None:
    self.logit_bias = self.param("logit_bias", nn.initializers.constant(self.logit_bias_init), ())

  def __call__(self, features: Features, outputs: Outputs, views: Views, train: bool) -> dict[str, Array]:
    """`bias`."""
    del features, outputs, views, train
    return {"bias": self.logit_bias}
