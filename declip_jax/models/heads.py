"""The second half of the model: projections and heads that see the global batch, from `Features` to `Outputs`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.models import bank
from declip_jax.models.batch_norm import BatchNorm
from declip_jax.models.transformer import torch_uniform
from declip_jax.types import Features, Outputs, Views
from declip_jax.unit_norm import unit_norm

# What `Heads.heads` may name: the joint space with its temperature, and with it the text tower, the bias of the
# sigmoid loss, FILIP's token maps, and what belongs to one term each.
HEADS = ("joint", "sigmoid", "filip", "simclr", "simsiam", "momentum", "mlm", "mim", "bank")


class Mlp(nn.Module):
  """Linear layers with batch norm and ReLU between them.

  PyTorch's default initialisation. Statistics are those of one view: call it once per view.

  Attributes:
    input_width: of the first layer.
    widths: of the layers' outputs.
    final_norm: whether a batch norm stands behind the last layer, without gain and bias unless `bias`.
    bias: whether the linear layers have one; those of MoCo v3 have none.
    groups: of the batch norms.
  """

  input_width: int
  widths: Sequence[int]
  final_norm: bool
  dtype: Any
  bias: bool = True
  groups: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "b w"], train: bool) -> Float[Array, "b p"]:
    last = len(self.widths) - 1
    for index, width in enumerate(self.widths):
      init = torch_uniform(self.widths[index - 1] if index else self.input_width)
      options = {"use_bias": self.bias, "dtype": self.dtype, "kernel_init": init, "bias_init": init}
      x = nn.Dense(width, **options, name=f"linear{index}")(x)
      if index < last or self.final_norm:
        affine = self.bias or index < last
        x = BatchNorm(dtype=self.dtype, groups=self.groups, affine=affine, name=f"norm{index}")(x, train)
      if index < last:
        x = nn.relu(x)
    return x


class Heads(nn.Module):
  """Projects features to the joint space and applies those heads that the method's terms need.

  Attributes:
    image_width, text_width: widths of the two towers' features and tokens.
    patch_size: numbers that masked image modelling predicts for a patch.
    heads: which of `HEADS` exist.
    vocab_size: rows of the masked language modelling head.
    embed_dim: dimension `d` of the joint space.
    image_bias, text_bias: whether the projections have a bias (a ResNet's attention pool does, DeCLIP's text does).
    logit_scale_init, logit_bias_init: first log inverse temperature, of embeddings and of tokens, and first bias of the
      sigmoid loss.
    max_scale: largest inverse temperature, 0 for none; beyond it the gradient is still that of the exponential, as
      DeCLIP's clamp of the data has it.
    dense_dim: width `e` in which FILIP compares tokens.
    simclr_projector: SLIP's head, on the image feature before the projection (SLIP, section 3).
    simsiam_projector, simsiam_predictor: DeCLIP's heads, on the un-normalised joint embedding.
    momentum_projector, momentum_predictor: MoCo v3's heads (Chen et al. 2021), on the image feature before the
      projection; for BYOL too, as in SLIP's variants.
    norm_groups: parts of the batch that heads normalise apart; see `BatchNorm`.
    bank_size: rows `q` of a neighbour bank.
    bank_groups: how many banks there are, each for its part of the batch; see `bank.Bank`.
    bank_overflow: one of `bank.OVERFLOWS`.
    bank_neighbours: nearest texts that are taken for each query.
  """

  image_width: int
  text_width: int
  patch_size: int
  heads: tuple[str, ...]
  vocab_size: int
  embed_dim: int
  image_bias: bool
  text_bias: bool
  logit_scale_init: float
  logit_bias_init: float
  max_scale: float
  dense_dim: int
  simclr_projector: tuple[int, ...]
  simsiam_projector: tuple[int, ...]
  simsiam_predictor: tuple[int, ...]
  momentum_projector: tuple[int, ...]
  momentum_predictor: tuple[int, ...]
  norm_groups: int
  bank_size: int
  bank_groups: int
  bank_overflow: str
  bank_neighbours: int
  dtype: Any = jnp.float32

  def setup(self) -> None:
    mlp = partial(Mlp, dtype=self.dtype, groups=self.norm_groups)
    if "joint" in self.heads:
      self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.logit_scale_init), ())
      self.image_projection = self._projection(self.image_width, self.image_bias)
      self.text_projection = self._projection(self.text_width, self.text_bias)
    if "sigmoid" in self.heads:
      self.logit_bias = self.param("logit_bias", nn.initializers.constant(self.logit_bias_init), ())
    if "filip" in self.heads:
      self.dense_logit_scale = self.param("dense_logit_scale", nn.initializers.constant(self.logit_scale_init), ())
      self.image_mapping = self._linear(self.image_width, self.dense_dim)
      self.text_mapping = self._linear(self.text_width, self.dense_dim)
    if "simclr" in self.heads:
      self.simclr = mlp(self.image_width, self.simclr_projector, False)
    if "simsiam" in self.heads:
      self.projector = mlp(self.embed_dim, self.simsiam_projector, True)
      self.predictor = mlp(self.simsiam_projector[-1], self.simsiam_predictor, False)
    if "momentum" in self.heads:
      self.momentum_project = mlp(self.image_width, self.momentum_projector, True, bias=False)
      self.momentum_predict = mlp(self.momentum_projector[-1], self.momentum_predictor, True, bias=False)
    if "mlm" in self.heads:
      self.mlm = self._linear(self.text_width, self.vocab_size)
    if "mim" in self.heads:
      self.mim_norm = nn.LayerNorm(dtype=self.dtype, use_fast_variance=False)
      self.mim = self._linear(self.image_width, self.patch_size)
    if "bank" in self.heads:
      size = (self.bank_groups, self.bank_size, self.embed_dim)
      self.bank = self.variable("bank", "text", lambda: bank.random(self.make_rng("params"), *size))

  def __call__(self, features: Features, views: Views, train: bool) -> Outputs:
    """Applies the heads to the views that play a part; the bank is searched first and then takes this batch."""
    outputs, joint = Outputs(), None
    if "joint" in self.heads:
      joint = self.image_projection(features.image)
      outputs = outputs.replace(scale=self._scale())
      if views.contrastive_image:
        outputs = outputs.replace(image=unit_norm(_pick(joint, views.contrastive_image)))
      if features.text is not None:
        outputs = outputs.replace(text=unit_norm(self.text_projection(rearrange(features.text, "b u w -> u b w"))))
    if "sigmoid" in self.heads:
      outputs = outputs.replace(bias=self.logit_bias)
    if "filip" in self.heads and features.text_tokens is not None:
      outputs = outputs.replace(
        image_tokens=self.map_image(features.image_tokens),
        text_tokens=self.map_text(features.text_tokens),
        text_valid=features.text_valid,
        dense_scale=jnp.exp(self.dense_logit_scale),
      )
    if views.ssl_image:
      outputs = self._self_supervise(outputs, features.image, joint, views, train)
    if "mlm" in self.heads and features.masked_text is not None:
      # As one product of matrices: XLA's CPU compiler takes three times as long for the gradient of a batch of them.
      logits = self.mlm(rearrange(features.masked_text, "b k w -> (b k) w"))
      outputs = outputs.replace(mlm_logits=rearrange(logits, "(b k) v -> b k v", b=features.masked_text.shape[0]))
    if "mim" in self.heads and features.masked_image is not None:
      outputs = outputs.replace(
        mim_prediction=self.mim(self.mim_norm(features.masked_image)), mim_target=features.masked_pixels
      )
    if "bank" in self.heads and outputs.text is not None:
      outputs = self._search_bank(outputs, views)
    return outputs

  def _self_supervise(
    self,
    outputs: Outputs,
    image: Float[Array, "b v w"],
    joint: Float[Array, "b v d"] | None,
    views: Views,
    train: bool,
  ) -> Outputs:
    feature = _pick(image, views.ssl_image)
    if "simclr" in self.heads:
      outputs = outputs.replace(simclr=_per_view(self.simclr, feature, train))
    if "simsiam" in self.heads:
      projection = _per_view(self.projector, _pick(joint, views.ssl_image), train)
      prediction = _per_view(self.predictor, projection, train)
      outputs = outputs.replace(simsiam_projection=projection, simsiam_prediction=prediction)
    if "momentum" in self.heads:
      projection = _per_view(self.momentum_project, feature, train)
      outputs = outputs.replace(momentum_prediction=_per_view(self.momentum_predict, projection, train))
    return outputs

  def project_momentum(self, feature: Float[Array, "b v w"], train: bool) -> Float[Array, "v b p"]:
    """Projections of the features of several views, without prediction: what the momentum tower gives as targets."""
    return _per_view(self.momentum_project, rearrange(feature, "b v w -> v b w"), train)

  def project_image(self, feature: Float[Array, "b w"]) -> Float[Array, "b d"]:
    """Joint embeddings of image features, not normalised."""
    return self.image_projection(feature)

  def project_text(self, feature: Float[Array, "b w"]) -> Float[Array, "b d"]:
    """Joint embeddings of text features, not normalised."""
    return self.text_projection(feature)

  def map_image(self, tokens: Float[Array, "b n w"]) -> Float[Array, "b n e"]:
    """Unit-norm tokens of images, as FILIP compares them."""
    return unit_norm(self.image_mapping(tokens))

  def map_text(self, tokens: Float[Array, "b t w"]) -> Float[Array, "b t e"]:
    """Unit-norm tokens of texts, as FILIP compares them."""
    return unit_norm(self.text_mapping(tokens))

  def _scale(self) -> Float[Array, ""]:
    scale = jnp.exp(self.logit_scale)
    return scale - jax.lax.stop_gradient(jnp.maximum(scale - self.max_scale, 0)) if self.max_scale else scale

  def _projection(self, width: int, bias: bool) -> nn.Dense:
    init = nn.initializers.normal(width**-0.5)
    return _dense(self.embed_dim, self.dtype, use_bias=bias, kernel_init=init, bias_init=torch_uniform(width))

  def _linear(self, width: int, features: int) -> nn.Dense:
    init = torch_uniform(width)
    return _dense(features, self.dtype, kernel_init=init, bias_init=init)

  def _search_bank(self, outputs: Outputs, views: Views) -> Outputs:
    current = self.bank.value
    queries = [outputs.text[views.contrastive_text.index(view)] for view in views.neighbour_text]
    written = len(queries) * queries[0].shape[0] // self.bank_groups
    found = [bank.nearest(current, query, self.bank_neighbours, written) for query in queries]
    neighbour, age = (rearrange(jnp.stack(x), "u k b ... -> (k u) b ...") for x in zip(*found, strict=True))
    similarity = jnp.sum(neighbour * jnp.concatenate([jnp.stack(queries)] * self.bank_neighbours), axis=-1)
    ready = (current.filled == self.bank_size).astype(jnp.float32)
    if self.is_mutable_collection("bank") and not self.is_initializing():
      for query in reversed(queries):  # DeCLIP's code writes its augmented view first
        current = bank.push(current, query, self.bank_overflow)
      self.bank.value = current
    return outputs.replace(
      neighbour=neighbour, neighbour_similarity=similarity, neighbour_age=age, neighbour_ready=ready
    )


def _dense(features: int, dtype: Any, **options: Any) -> nn.Dense:
  """A linear layer that takes inputs of the compute dtype and sums and returns float32: its outputs are compared."""
  dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
  return nn.Dense(features, dtype=dtype, dot_general=dot, **options)


def _pick(x: Float[Array, "b v w"], views: Sequence[int]) -> Float[Array, "v2 b w"]:
  return jnp.stack([x[:, view] for view in views])


def _per_view(head: Mlp, x: Float[Array, "v b w"], train: bool) -> Float[Array, "v b p"]:
  """Float32; batch statistics are those of one view, as in SLIP and DeCLIP."""
  return jnp.stack([head(view, train) for view in x]).astype(jnp.float32)
