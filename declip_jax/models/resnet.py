"""CLIP's modified ResNet (Radford et al. 2021, section 2.4): a deep stem, anti-aliased strides, attention pool."""

from functools import partial
from typing import Any, ClassVar

from einops import rearrange
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from declip_jax.models.attention import attend
from declip_jax.models.batch_norm import BatchNorm
from declip_jax.models.dense import Dense
from declip_jax.models.stages import apply_stage, convolution, hide
from declip_jax.models.transformer import torch_uniform


def _convolution(features: int, kernel: int, stride: int, fan_in: int, dtype: Any, name: str) -> nn.Conv:
  return convolution(features, kernel, stride, torch_uniform(fan_in), dtype, name)


def _average_pool(x: Float[Array, "b h w c"], stride: int) -> Float[Array, "b h2 w2 c"]:
  return x if stride == 1 else nn.avg_pool(x, (stride, stride), (stride, stride))


class Bottleneck(nn.Module):
  """1x1, 3x3, average pool in place of a stride, 1x1, with a pooled shortcut; the last norm starts at zero."""

  planes: int
  stride: int
  shortcut: bool
  train: bool  # a field: as an argument, scan would trace it
  norm_groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], _: None) -> tuple[Float[Array, "b h2 w2 c2"], None]:
    channels, wide = x.shape[-1], 4 * self.planes
    conv = partial(_convolution, dtype=self.dtype, stride=1)

    def norm(name: str, y: Array, **options: Any) -> Array:
      return BatchNorm(dtype=self.dtype, groups=self.norm_groups, name=name, **options)(y, self.train)

    y = nn.relu(norm("norm1", conv(self.planes, 1, fan_in=channels, name="conv1")(x)))
    y = nn.relu(norm("norm2", conv(self.planes, 3, fan_in=9 * self.planes, name="conv2")(y)))
    y = conv(wide, 1, fan_in=self.planes, name="conv3")(_average_pool(y, self.stride))
    y = norm("norm3", y, scale_init=nn.initializers.zeros_init())
    if self.shortcut:
      x = conv(wide, 1, fan_in=channels, name="shortcut_conv")(_average_pool(x, self.stride))
      x = norm("shortcut_norm", x)
    return nn.relu(x + y), None


class AttentionPool(nn.Module):
  """One attention layer whose only query is the mean cell; its output projection is the model's image projection."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    width = x.shape[-1]
    x = rearrange(x, "b h w c -> b (h w) c")
    x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
    init = nn.initializers.normal(width**-0.5)
    x = x + self.param("position_embedding", init, x.shape[1:])[None].astype(x.dtype)
    bias = torch_uniform(width)
    dense = partial(Dense, width, dtype=self.dtype, kernel_init=init, bias_init=bias)
    split = partial(rearrange, pattern="b n (h e) -> b n h e", h=self.heads)
    query, key, value = split(dense(name="query")(x[:, :1])), split(dense(name="key")(x)), split(dense(name="value")(x))
    return rearrange(attend(query, key, value), "b 1 h e -> b (h e)")


class ModifiedResNet(nn.Module):
  """Maps images to the attention-pooled feature `[b 32*width]`, before its projection, and the last map's cells.

  The reference's attention pool ends in that projection; here it is the model's image projection (with a bias), so
  that self-supervised heads may start from the feature before it, as with a ViT. Batch norm depends on the other
  examples of a batch: it is the only layer whose results differ if a batch is encoded in micro-batches.
  """

  width: int
  layers: tuple[int, int, int, int]
  norm_groups: int = 1
  remat: str = "none"
  unroll: int = 1
  dtype: Any = jnp.float32

  has_batch_norm: ClassVar[bool] = True

  @property
  def feature_width(self) -> int:
    """Width of the feature and of the tokens."""
    return 32 * self.width

  @property
  def stride(self) -> int:
    """Distance between neighbouring tokens in pixels."""
    return 32

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], train: bool = False, hidden: Bool[Array, "b n"] | None = None
  ) -> tuple[Float[Array, "b f"], Float[Array, "b n f"]]:
    """Encodes normalised images, whose height and width must be multiples of 32; tokens are the cells of the last map.

    Pixels are 0 where `hidden`.
    """
    norm = partial(BatchNorm, dtype=self.dtype, groups=self.norm_groups)
    x, half = hide(images, hidden, self.stride).astype(self.dtype), self.width // 2
    for index, (features, stride) in enumerate(((half, 2), (half, 1), (self.width, 1)), start=1):
      conv = _convolution(features, 3, stride, 9 * x.shape[-1], self.dtype, f"stem_conv{index}")
      x = nn.relu(norm(name=f"stem_norm{index}")(conv(x), train))
    x = _average_pool(x, 2)
    for stage, blocks in enumerate(self.layers, start=1):
      fields = {"planes": self.width * 2 ** (stage - 1), "stride": 1, "shortcut": False}
      x = apply_stage(
        Bottleneck,
        x,
        blocks=blocks,
        first={"stride": 1 if stage == 1 else 2, "shortcut": True},
        fields={**fields, "train": train, "norm_groups": self.norm_groups, "dtype": self.dtype},
        name=f"stage{stage}",
        remat=self.remat,
        unroll=self.unroll,
      )
    pooled = AttentionPool(heads=self.width * 32 // 64, dtype=self.dtype, name="attention_pool")(x)
    return pooled, rearrange(x, "b h w c -> b (h w) c")
