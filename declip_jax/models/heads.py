"""The second half of the model: projections and heads that see the global batch, from `Features` to `Outputs`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.models import bank
from declip_jax.models.batch_norm import BatchNorm
from declip_jax.models.transformer import torch_uniform
from declip_jax.types import Features, Outputs, Views

LOG_SCALE_INIT = 2.659260036932778  # ln(1 / 0.07), Radford et al. 2021, section 2.5


def unit_norm(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
  """Rows of length one in float32. A zero row stays zero, with a zero gradient."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


class Mlp(nn.Module):
  """Linear layers with batch norm and ReLU between them; `final_norm` adds a norm behind the last.

  PyTorch's default initialisation. Statistics are those of one view over the global batch: call it once per view.
  """

  input_width: int
  widths: Sequence[int]
  final_norm: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b w"], train: bool) -> Float[Array, "b p"]:
    last = len(self.widths) - 1
    for index, width in enumerate(self.widths):
      init = torch_uniform(self.widths[index - 1] if index else self.input_width)
      x = nn.Dense(width, dtype=self.dtype, kernel_init=init, bias_init=init, name=f"linear{index}")(x)
      if index < last or self.final_norm:
        x = BatchNorm(dtype=self.dtype, name=f"norm{index}")(x, train)
      if index < last:
        x = nn.relu(x)
    return x


class Heads(nn.Module):
  """Projects features to the joint space and applies those heads that the method's terms need.

  Attributes:
    image_width, text_width: widths of the two towers' features.
    embed_dim: dimension `d` of the joint space.
    heads: which of "simclr", "simsiam", "mlm", "bank" exist.
    vocab_size: rows of the masked language modelling head.
    image_bias, text_bias: whether the projections have a bias (a ResNet's attention pool does, DeCLIP's text does).
    simclr_projector: SLIP's head, on the image feature before the projection (SLIP, section 3).
    simsiam_projector, simsiam_predictor: DeCLIP's heads, on the un-normalised joint embedding.
    bank_size: rows `q` of the neighbour bank.
  """

  image_width: int
  text_width: int
  embed_dim: int
  heads: tuple[str, ...]
  vocab_size: int
  image_bias: bool
  text_bias: bool
  simclr_projector: tuple[int, ...]
  simsiam_projector: tuple[int, ...]
  simsiam_predictor: tuple[int, ...]
  bank_size: int
  dtype: Any = jnp.float32

  def setup(self) -> None:
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(LOG_SCALE_INIT), ())
    self.image_projection = self._projection(self.image_width, self.image_bias)
    self.text_projection = self._projection(self.text_width, self.text_bias)
    if "simclr" in self.heads:
      self.simclr = Mlp(self.image_width, self.simclr_projector, False, self.dtype)
    if "simsiam" in self.heads:
      self.projector = Mlp(self.embed_dim, self.simsiam_projector, True, self.dtype)
      self.predictor = Mlp(self.simsiam_projector[-1], self.simsiam_predictor, False, self.dtype)
    if "mlm" in self.heads:
      init = torch_uniform(self.text_width)
      self.mlm = _dense(self.vocab_size, self.dtype, kernel_init=init, bias_init=init)
    if "bank" in self.heads:
      self.bank = self.variable("bank", "text", bank.empty, self.bank_size, self.embed_dim)

  def __call__(self, features: Features, views: Views, train: bool) -> Outputs:
    """Applies the heads to the views that play a part; the bank is searched first and then takes this batch."""
    joint = self.image_projection(features.image)
    outputs = Outputs(
      image=unit_norm(_pick(joint, views.contrastive_image)),
      text=unit_norm(self.text_projection(_pick(features.text, views.contrastive_text))),
      scale=jnp.exp(self.logit_scale),
    )
    if "simclr" in self.heads and views.ssl_image:
      ssl = _pick(features.image, views.ssl_image)
      outputs = outputs.replace(simclr=_per_view(self.simclr, ssl, train))
    if "simsiam" in self.heads and views.ssl_image:
      projection = _per_view(self.projector, _pick(joint, views.ssl_image), train)
      prediction = _per_view(self.predictor, projection, train)
      outputs = outputs.replace(simsiam_projection=projection, simsiam_prediction=prediction)
    if "mlm" in self.heads and features.masked_text is not None:
      outputs = outputs.replace(mlm_logits=self.mlm(features.masked_text))
    if "bank" in self.heads:
      outputs = self._search_bank(outputs)
    return outputs

  def project_image(self, feature: Float[Array, "b w"]) -> Float[Array, "b d"]:
    """Joint embeddings of image features, not normalised."""
    return self.image_projection(feature)

  def project_text(self, feature: Float[Array, "b w"]) -> Float[Array, "b d"]:
    """Joint embeddings of text features, not normalised."""
    return self.text_projection(feature)

  def _projection(self, width: int, bias: bool) -> nn.Dense:
    init = nn.initializers.normal(width**-0.5)
    return _dense(self.embed_dim, self.dtype, use_bias=bias, kernel_init=init, bias_init=torch_uniform(width))

  def _search_bank(self, outputs: Outputs) -> Outputs:
    current, query = self.bank.value, outputs.text[0]
    neighbour = bank.nearest(current, query)
    ready = (current.filled == self.bank_size).astype(jnp.float32)
    if self.is_mutable_collection("bank") and not self.is_initializing():
      self.bank.value = bank.push(current, query)
    return outputs.replace(neighbour=neighbour, neighbour_ready=ready)


def _dense(features: int, dtype: Any, **options: Any) -> nn.Dense:
  """A linear layer that takes inputs of the compute dtype and sums and returns float32: its outputs are compared."""
  dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
  return nn.Dense(features, dtype=dtype, dot_general=dot, **options)


def _pick(x: Float[Array, "b v w"], views: Sequence[int]) -> Float[Array, "v2 b w"]:
  return jnp.stack([x[:, view] for view in views])


def _per_view(head: Mlp, x: Float[Array, "v b w"], train: bool) -> Float[Array, "v b p"]:
  """Float32; batch statistics are those of one view, as in SLIP and DeCLIP."""
  return jnp.stack([head(view, train) for view in x]).astype(jnp.float32)
