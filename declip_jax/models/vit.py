"""The vision transformer of OpenAI's CLIP, with options for timm's, which SLIP uses, and DeCLIP's."""

from typing import Any, ClassVar

from einops import rearrange
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from declip_jax.models.transformer import Transformer, torch_uniform


class ViT(nn.Module):
  """Maps images to the normalised class token, before the projection to the joint space, and the patches' tokens.

  OpenAI's has `pre_norm`, no `patch_bias`, QuickGELU and epsilon 1e-5. timm's (SLIP) has no `pre_norm`, a
  `patch_bias`, exact GELU, epsilon 1e-6 and `initializer="timm"`. The patch embedding is a reshape and a product,
  which equals the convolution of the references with kernel = stride = patch.
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
  remat: str = "none"
  unroll: int = 1
  dtype: Any = jnp.float32

  has_batch_norm: ClassVar[bool] = False

  @property
  def feature_width(self) -> int:
    """Width of the feature and of the tokens."""
    return self.width

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
  ) -> tuple[Float[Array, "b f"], Float[Array, "b n f"]]:
    """Encodes normalised images, whose height and width must be multiples of `patch`.

    Where `hidden`, a learned embedding replaces that of the patch (BEiT, Bao et al. 2022, section 2.3). Tokens are
    those before the final norm, as in DeCLIP's FILIP. `branch_scale` has the factors of the residual branches, see
    `training.drop_path`. With `kept`, only the class token and the patches at these positions enter the transformer,
    and their tokens are returned in this order, see `training.patch_dropout`.
    """
    del train  # no layer depends on other examples
    fan_in = self.patch**2 * images.shape[-1]
    class_init = nn.initializers.normal(0.02 if self.initializer == "timm" else self.width**-0.5)
    patches = rearrange(images, "b (y p) (x q) c -> b (y x) (p q c)", p=self.patch, q=self.patch)
    x = nn.Dense(
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
    token = self.param("class_embedding", class_init, (self.width,))
    x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width)), x], axis=1)
    position_init = nn.initializers.normal(0.01) if self.initializer == "openai_text" else class_init
    x = x + self.param("position_embedding", position_init, x.shape[1:])[None].astype(x.dtype)
    if kept is not None:
      with_class = jnp.pad(kept + 1, ((0, 0), (1, 0)))
      x = jnp.take_along_axis(x, with_class[..., None], axis=1)
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
      remat=self.remat,
      unroll=self.unroll,
      dtype=self.dtype,
      name="transformer",
    )(x, branch_scale=branch_scale)
    return self._norm("post_norm")(x[:, 0]), x[:, 1:]

  def _norm(self, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, use_fast_variance=False, name=name)
