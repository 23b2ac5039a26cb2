"""RegNetY (Radosavovic et al. 2020, "Designing Network Design Spaces", arXiv 2003.13678), DeCLIP's widest tower."""

from collections import Counter
from functools import partial
import math
from typing import Any, ClassVar

from einops import rearrange
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from declip_jax.models.batch_norm import BatchNorm
from declip_jax.models.dense import Dense
from declip_jax.models.stages import apply_stage, convolution, hide
from declip_jax.models.transformer import torch_uniform

QUANTUM = 8  # widths are multiples of it, before they are rounded to multiples of the group width


def stages(
  initial_width: int, slope: float, multiplier: float, depth: int, group_width: int
) -> tuple[tuple[int, int], ...]:
  """The width and the number of blocks of each stage, by the paper's quantised linear rule (its equations 2 to 4).

  Block `j` has the width `initial_width * multiplier**s`, where `s` is the integer for which it is closest to
  `initial_width + slope * j`; blocks of equal width are a stage. Then widths are rounded to the nearest multiple of the
  group width, as in pycls; torchvision rounds halves up and never down by more than a tenth, which makes a different
  800MF and a different 8GF.

  Raises:
    ValueError: parameters from which the rule makes no network.
  """
  if not (initial_width > 0 and initial_width % QUANTUM == 0 and slope >= 0 and multiplier > 1):
    raise ValueError(
      f"RegNet: initial_width={initial_width}, slope={slope}, multiplier={multiplier}: the first must be a positive "
      f"multiple of {QUANTUM}, the second at least 0, the third more than 1"
    )
  if depth < 1 or group_width < 1:
    raise ValueError(f"RegNet: depth={depth}, group_width={group_width}: both must be at least 1")
  blocks = Counter()
  for index in range(depth):
    step = round(math.log(1 + slope * index / initial_width, multiplier))
    blocks[QUANTUM * round(initial_width * multiplier**step / QUANTUM)] += 1
  groups = {width: min(group_width, width) for width in blocks}
  return tuple((group * round(width / group), blocks[width]) for width, group in groups.items())


def _convolution(features: int, kernel: int, stride: int, dtype: Any, name: str, groups: int = 1) -> nn.Conv:
  return convolution(features, kernel, stride, _fan_out_normal(features, kernel), dtype, name, groups)


def _fan_out_normal(features: int, kernel: int = 1) -> nn.initializers.Initializer:
  """He's initialisation by fan-out, which pycls counts over all groups."""
  return nn.initializers.normal(math.sqrt(2 / (kernel**2 * features)))


class Block(nn.Module):
  """1x1, grouped 3x3 with the stride, squeeze and excitation, 1x1, and a projected shortcut where the shape changes.

  The squeezed width is a share of the width of the block's input, not of the squeezed layer. `train` is a field,
  because scan and rematerialisation would make an argument a traced value.
  """

  width: int
  group_width: int
  stride: int
  se_ratio: float
  train: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], _: None) -> tuple[Float[Array, "b h2 w2 c2"], None]:
    channels, groups = x.shape[-1], self.width // min(self.group_width, self.width)
    conv = partial(_convolution, self.width, dtype=self.dtype)

    def norm(name: str, y: Array) -> Array:
      return BatchNorm(dtype=self.dtype, name=name)(y, self.train)

    y = nn.relu(norm("norm1", conv(1, 1, name="conv1")(x)))
    y = nn.relu(norm("norm2", conv(3, self.stride, groups=groups, name="conv2")(y)))
    y = y * self._gate(y, round(self.se_ratio * channels))
    y = norm("norm3", conv(1, 1, name="conv3")(y))
    if self.stride > 1 or channels != self.width:
      x = norm("shortcut_norm", conv(1, self.stride, name="shortcut_conv")(x))
    return nn.relu(x + y), None

  def _gate(self, y: Float[Array, "b h w c"], squeezed: int) -> Float[Array, "b 1 1 c"]:
    def dense(features: int, name: str, fan_in: int) -> Dense:
      bias = torch_uniform(fan_in)  # pycls keeps PyTorch's default
      kernel = _fan_out_normal(features)
      return Dense(features, dtype=self.dtype, kernel_init=kernel, bias_init=bias, name=name)

    hidden = nn.relu(dense(squeezed, "squeeze", self.width)(y.mean((1, 2), keepdims=True)))
    return nn.sigmoid(dense(self.width, "excite", squeezed)(hidden))


class RegNetY(nn.Module):
  """Maps images to the globally average-pooled feature `[b f]`, before the output projection.

  Structure and initialisation are those of pycls, the paper's code: convolutions N(0, 2 / (kernel area * outputs)),
  all gains of norms 1 (in timm, the last one of each block starts at 0). The blocks of a stage after its first are one
  scanned block: their parameters and statistics are stacked along a leading axis under `stage<n>_rest`, which a stage
  of one block does not have. As in every ResNet, encoding in micro-batches changes the batch statistics.

  Attributes:
    initial_width, slope, multiplier, depth, group_width: w_0, w_a, w_m, d and g of the paper; see `stages`.
    se_ratio: width between squeeze and excitation, as a share of the block's input width.
    stem_width: channels after the first convolution.
    remat: what the backward pass of a block recomputes, one of `REMAT_POLICIES`.
    unroll: scanned blocks that the compiler sees at once.
    dtype: compute dtype; parameters, statistics and norms are float32.
  """

  initial_width: int
  slope: float
  multiplier: float
  depth: int
  group_width: int
  se_ratio: float = 0.25
  stem_width: int = 32
  remat: str = "none"
  unroll: int = 1
  dtype: Any = jnp.float32

  has_batch_norm: ClassVar[bool] = True

  @property
  def stages(self) -> tuple[tuple[int, int], ...]:
    """Width and number of blocks of each stage."""
    return stages(self.initial_width, self.slope, self.multiplier, self.depth, self.group_width)

  @property
  def feature_width(self) -> int:
    """Width of the feature and of the tokens."""
    return self.stages[-1][0]

  @property
  def stride(self) -> int:
    """Distance between neighbouring tokens in pixels."""
    return 32

  @nn.compact
  def __call__(
    self, images: Float[Array, "b h w c"], train: bool = False, hidden: Bool[Array, "b n"] | None = None
  ) -> tuple[Float[Array, "b f"], Float[Array, "b n f"]]:
    """Encodes normalised images of any height and width; tokens are the cells of the last feature map.

    Pixels are 0 where `hidden`.
    """
    images = hide(images, hidden, self.stride).astype(self.dtype)
    x = _convolution(self.stem_width, 3, 2, self.dtype, "stem_conv")(images)
    x = nn.relu(BatchNorm(dtype=self.dtype, name="stem_norm")(x, train))
    for stage, (width, blocks) in enumerate(self.stages, start=1):
      fields = {"width": width, "group_width": self.group_width, "stride": 1, "se_ratio": self.se_ratio}
      x = apply_stage(
        Block,
        x,
        blocks=blocks,
        first={"stride": 2},
        fields={**fields, "train": train, "dtype": self.dtype},
        name=f"stage{stage}",
        remat=self.remat,
        unroll=self.unroll,
      )
    return x.mean((1, 2)), rearrange(x, "b h w c -> b (h w) c")
