"""The vision transformer of OpenAI's CLIP, with options for those of SLIP, DeCLIP, CLIPA, SigLIP, CoCa and EVA-CLIP."""

from typing import Any, ClassVar

from einops import rearrange, repeat
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from declip_jax.models.attention import attend
from declip_jax.models.dense import Dense
from declip_jax.models.transformer import ACTIVATIONS, INITS, QueryKeyValue, Transformer, torch_uniform

POOLINGS = ("token", "average", "map", "query")  # what `config.model.image.pooling` may name, see `ViT`


class AttentionPool(nn.Module):
  """SigLIP's pooling: a learned query attends to all tokens, and an MLP follows (Zhai et al. 2022, section 3.1).

  It is `MAPHead` of big_vision, the multi-head attention pooling of Set Transformers.
  """

  heads: int
  mlp_ratio: float
  activation: str
  epsilon: float
  initializer: str
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b n f"]) -> Float[Array, "b f"]:
    width = x.shape[-1]
    hidden = round(self.mlp_ratio * width)
    init = INITS[self.initializer](width, 1, hidden)

    def dense(features: int, name: str) -> Dense:
      bias = init.get(f"{name}_bias", nn.initializers.zeros_init())
      return Dense(features, dtype=self.dtype, kernel_init=init[name], bias_init=bias, name=name)

    probe = self.param("probe", nn.initializers.normal(width**-0.5), (width,))
    probe = repeat(probe.astype(x.dtype), "f -> b 1 f", b=x.shape[0])
    zeros = nn.initializers.zeros_init()
    heads = QueryKeyValue(self.heads, self.dtype, kernel_init=init["qkv"], bias_init=zeros, name="qkv")
    attended = dense(width, "out")(rearrange(attend(*heads(x, probe)), "b 1 h e -> b (h e)"))
    norm = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, use_fast_variance=False, name="mlp_norm")
    return attended + dense(width, "fc2")(ACTIVATIONS[self.activation](dense(hidden, "fc1")(norm(attended))))


class QueryPool(nn.Module):
  """CoCa's pooling: a learned query of 8 heads attends to all normalised tokens (Yu et al. 2022, section 3.2).

  Difference: open_clip's has 256 queries, of which its embedding of an image is the first, the only one here; and its
  norm of the queries is part of the learned query.
  """

  width: int
  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b n g"]) -> Float[Array, "b f"]:
    init = nn.initializers.xavier_uniform()
    x = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, use_fast_variance=False, name="norm")(x)
    probe = self.param("probe", nn.initializers.normal(1.0), (self.width,)).astype(x.dtype)
    query = Dense(self.width, dtype=self.dtype, kernel_init=init, name="query")(probe[None, None])
    key, value = (Dense(self.width, dtype=self.dtype, kernel_init=init, name=name)(x) for name in ("key", "value"))
    query = jnp.broadcast_to(query, (x.shape[0], 1, self.width))
    heads = [rearrange(part, "b n (h e) -> b n h e", h=8) for part in (query, key, value)]
    attended = rearrange(attend(*heads), "b 1 h e -> b (h e)")
    return Dense(self.width, dtype=self.dtype, kernel_init=init, name="out")(attended)


class ViT(nn.Module):
  """Maps images to a pooled feature, before the projection to the joint space, and the patches' tokens.

  `pooling` is "token", the normalised class token (OpenAI); "average", the normalised mean of the patches' tokens,
  beside which the class token stays (CLIPA); "map", `AttentionPool` of the normalised tokens, without a class token
  (SigLIP); or "query", the normalised `QueryPool` of all tokens, `pool_width` wide (CoCa). Where the patches do not
  fill the image, the pixels at its right and bottom are not seen.

  OpenAI's has `pre_norm`, no `patch_bias`, QuickGELU and epsilon 1e-5. timm's (SLIP) has no `pre_norm`, a
  `patch_bias`, exact GELU, epsilon 1e-6 and `initializer="timm"`; SigLIP's differs from it in GELU and initialisation
  of the blocks, and EVA-02-CLIP-E's has `branch_norm`, see `transformer.Block`. SigLIP's patch embedding starts as
  PyTorch's convolution does, where big_vision has Flax's default. The patch embedding is a reshape and a product, which
  equals the convolution of the references with kernel = stride = patch.
  """

  patch: int
  width: int
  depth: int
  heads: int
  pre_norm: bool = True
  patch_bias: bool = False
  activation: str = "quick_gelu"
  epsilon: float = 1e-5
  initializer: str = "torch"
  mlp_ratio: float = 4.0
  pooling: str = "token"
  pool_width: int = 0
  branch_norm: bool = False
  remat: str = "none"
  unroll: int = 1
  attention: str = "auto"
  dtype: Any = jnp.float32

  has_batch_norm: ClassVar[bool] = False

  @property
  def feature_width(self) -> int:
    """Width of the feature and of the tokens."""
    return self.pool_width or self.width

  @property
  def has_class_token(self) -> bool:
    """Whether a class token precedes the patches."""
    return self.pooling != "map"

  @property
  def stride(self) -> int:
    """Distance between neighbouring tokens in pixels."""
    return self.patch

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "b h w c"],
    train: bool = False,
    hidden: Bool[Array, "b n"] | None = None,
    branch_scale: Float[Array, "b depth 2"] | None = None,
    kept: Int[Array, "b n"] | None = None,
  ) -> tuple[Float[Array, "b f"], Float[Array, "b n g"]]:
    """Encodes normalised images.

    Where `hidden`, a learned embedding replaces that of the patch (BEiT, Bao et al. 2022, section 2.3). Tokens are
    those before the final norm, as in DeCLIP's FILIP. `branch_scale` has the factors of the residual branches, see
    `training.drop_path`. With `kept`, only the class token and the patches at these positions enter the transformer,
    and their tokens are returned in this order, see `training.patch_dropout`.
    """
    del train  # no layer depends on other examples
    x = self._embedded(images, hidden)
    if kept is not None:
      places = jnp.pad(kept + 1, ((0, 0), (1, 0))) if self.has_class_token else kept
      x = jnp.take_along_axis(x, places[..., None], axis=1)
    if self.pre_norm:
      x = self._norm("pre_norm")(x)
    x = Transformer(
      width=self.width,
      heads=self.heads,
      depth=self.depth,
      mlp_ratio=self.mlp_ratio,
      activation=self.activation,
      epsilon=self.epsilon,
      initializer=self.initializer,
      branch_norm=self.branch_norm,
      remat=self.remat,
      unroll=self.unroll,
      attention=self.attention,
      dtype=self.dtype,
      name="transformer",
    )(x, branch_scale=branch_scale)
    return self._pooled(x), x[:, int(self.has_class_token) :]

  def _embedded(self, images: Float[Array, "b h w c"], hidden: Bool[Array, "b n"] | None) -> Float[Array, "b m f"]:
    """The embeddings of the patches with those of their positions, after the class token if there is one."""
    fan_in = self.patch**2 * images.shape[-1]
    class_init = nn.initializers.normal(0.02 if self.initializer == "timm" else self.width**-0.5)
    height, width = (size - size % self.patch for size in images.shape[1:3])
    patches = images[:, :height, :width]
    patches = rearrange(patches, "b (y p) (x q) c -> b (y x) (p q c)", p=self.patch, q=self.patch)
    x = Dense(
      self.width,
      use_bias=self.patch_bias,
      dtype=self.dtype,
      kernel_init=torch_uniform(fan_in),
      bias_init=torch_uniform(fan_in),
      name="patch_embedding",
    )(patches)
    if hidden is not None:
      mask = self.param("mask_embedding", nn.initializers.normal(0.02), (self.width,))
      x = jnp.where(hidden[..., None], mask[None, None].astype(x.dtype), x)
    if self.has_class_token:
      token = self.param("class_embedding", class_init, (self.width,))
      x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width)), x], axis=1)
    position_init = nn.initializers.normal(0.01) if self.initializer == "openai_text" else class_init
    return x + self.param("position_embedding", position_init, x.shape[1:])[None].astype(x.dtype)

  def _pooled(self, x: Float[Array, "b m g"]) -> Float[Array, "b f"]:
    norm = self._norm("post_norm")
    if self.pooling == "token":
      return norm(x[:, 0])
    if self.pooling == "average":
      return norm(x[:, 1:].mean(axis=1))
    if self.pooling == "query":
      return norm(QueryPool(self.pool_width, self.epsilon, self.dtype, name="query_pool")(x))
    return AttentionPool(
      heads=self.heads,
      mlp_ratio=self.mlp_ratio,
      activation=self.activation,
      epsilon=self.epsilon,
      initializer=self.initializer,
      dtype=self.dtype,
      name="attention_pool",
    )(norm(x))

  def _norm(self, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, use_fast_variance=False, name=name)
