"""ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s", arXiv 2201.03545), as open_clip trains it by timm."""

from typing import Any, ClassVar

from einops import rearrange
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from declip_jax.models.dense import Dense
from declip_jax.models.stages import hide
from declip_jax.models.transformer import REMAT_POLICIES, exact_gelu

_INIT = nn.initializers.truncated_normal(0.02)  # of convolutions and linear layers, whose biases start at 0


def _norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def _patches(features: int, side: int, dtype: Any, name: str) -> nn.Conv:
  """A convolution of squares that do not overlap."""
  return nn.Conv(features, (side, side), (side, side), "VALID", dtype=dtype, kernel_init=_INIT, name=name)


class Block(nn.Module):
  """Depthwise 7x7, norm, and an MLP of four times the width with GELU; the sum is scaled by channel and added."""

  width: int
  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], _: None) -> tuple[Float[Array, "b h w c"], None]:
    groups = {"feature_group_count": self.width, "dtype": self.dtype, "kernel_init": _INIT}
    y = nn.Conv(self.width, (7, 7), padding=3, **groups, name="depthwise")(x)
    y = _norm(self.epsilon, self.dtype, "norm")(y)
    y = exact_gelu(Dense(4 * self.width, dtype=self.dtype, kernel_init=_INIT, name="fc1")(y))
    y = Dense(self.width, dtype=self.dtype, kernel_init=_INIT, name="fc2")(y)
    scale = self.param("layer_scale", nn.initializers.constant(1e-6), (self.width,))
    return x + y * jnp.expand_dims(scale.astype(x.dtype), (0, 1, 2)), None


class Stage(nn.Module):
  """Norm and a convolution that halves height and width, both absent from the first stage, then scanned blocks."""

  width: int
  blocks: int
  epsilon: float
  is_first: bool
  remat: str
  unroll: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
    if not self.is_first:
      x = _patches(self.width, 2, self.dtype, "downsample")(_norm(self.epsilon, self.dtype, "norm")(x))
    policy = REMAT_POLICIES[self.remat]
    block = Block if policy is None else nn.remat(Block, prevent_cse=False, policy=policy)
    scanned = nn.scan(
      block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.blocks, unroll=self.unroll
    )
    return scanned(self.width, self.epsilon, self.dtype, name="blocks")(x, None)[0]


class ConvNeXt(nn.Module):
  """Maps images to the normalised global average of the last feature map `[b f]`, before the output projection.

  Layer scales start at 1e-6, and there is no drop path, which timm has. The blocks of a stage are one scanned block.

  Attributes:
    widths, layers: channels and number of blocks of each stage.
    hidden: width of a layer with GELU between the normalised average and the projection, as in open_clip's models
      whose projection is an MLP; 0 for none.
    epsilon: that of all norms.
    remat: what the backward pass of a block recomputes, one of `REMAT_POLICIES`.
    unroll: scanned blocks that the compiler sees at once.
    dtype: compute dtype.
  """

  widths: tuple[int, ...]
  layers: tuple[int, ...]
  hidden: int = 0
  epsilon: float = 1e-6
  remat: str = "none"
  unroll: int = 1
  dtype: Any = jnp.float32

  has_batch_norm: ClassVar[bool] = False

  @property
  def feature_width(self) -> int:
    """Width of the feature."""
    return self.hidden or self.widths[-1]

  @property
  def stride(self) -> int:
    """Distance between neighbouring tokens in pixels."""
    return 4 * 2 ** (len(self.widths) - 1)

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], train: bool = False, hidden: Bool[Array, "b n"] | None = None
  ) -> tuple[Float[Array, "b f"], Float[Array, "b n g"]]:
    """Encodes normalised images of any height and width; tokens are the cells of the last feature map.

    Pixels are 0 where `hidden`.
    """
    del train
    images = hide(images, hidden, self.stride).astype(self.dtype)
    x = _patches(self.widths[0], 4, self.dtype, "stem")(images)
    x = _norm(self.epsilon, self.dtype, "stem_norm")(x)
    for index, (width, blocks) in enumerate(zip(self.widths, self.layers, strict=True)):
      fields = {"epsilon": self.epsilon, "remat": self.remat, "unroll": self.unroll, "dtype": self.dtype}
      x = Stage(width, blocks, is_first=index == 0, **fields, name=f"stage{index + 1}")(x)
    feature = _norm(self.epsilon, self.dtype, "post_norm")(x.mean((1, 2)))
    if self.hidden:
      feature = exact_gelu(Dense(self.hidden, dtype=self.dtype, kernel_init=_INIT, name="hidden")(feature))
    return feature, rearrange(x, "b h w c -> b (h w) c")
