"""The pre-norm transformer that the image and the text tower share (Radford et al. 2021, sections 2.4 and 2.5)."""

from collections.abc import Callable
import math
from typing import Any

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from declip_jax.models.attention import attend
from declip_jax.models.dense import Dense

Initializer = Callable[..., jax.Array]


def quick_gelu(x: Array) -> Array:
  """OpenAI CLIP's sigmoid approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: Array) -> Array:
  """GELU by the error function, as in timm and SLIP's image tower."""
  return jax.nn.gelu(x, approximate=False)


def tanh_gelu(x: Array) -> Array:
  """GELU by a hyperbolic tangent, Flax's and big_vision's default, and so SigLIP's."""
  return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": exact_gelu, "gelu_tanh": tanh_gelu}


def _keeps_products(primitive: Any, *args: Any, **params: Any) -> bool:
  """Keeps the results of linear layers and convolutions; attention, norms and activations are cheap to recompute."""
  dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return primitive is jax.lax.conv_general_dilated_p or dots(primitive, *args, **params)


def _keeps_narrow_products(primitive: Any, *args: Any, **params: Any) -> bool:
  """Keeps those that are not wider than their inputs: in a block all but the first of its MLP."""
  if not _keeps_products(primitive, *args, **params):
    return False
  if primitive is jax.lax.conv_general_dilated_p:
    return True
  kernel = args[1].shape
  width = math.prod(kernel[axis] for axis in params["dimension_numbers"][0][1])
  return math.prod(kernel) <= width**2


# Which values the backward pass recomputes, from the most memory to the least. "none" keeps every activation that
# differentiation needs, which a scan stores for all layers, most of them in float32; "full" keeps only the input of
# each block.
REMAT_POLICIES = {
  "none": None,
  "dots": _keeps_products,
  "narrow_dots": _keeps_narrow_products,
  "full": jax.checkpoint_policies.nothing_saveable,
}


def torch_uniform(fan_in: float) -> Initializer:
  """PyTorch's default for weights and biases of linear layers and convolutions: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
  bound = fan_in**-0.5

  def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def openai_text_init(width: int, depth: int, hidden: int) -> dict[str, Initializer]:
  """OpenAI's initialisation of the text blocks, which DeCLIP uses for its image blocks too."""
  residual = width**-0.5 * (2 * depth) ** -0.5
  return {
    "qkv": nn.initializers.normal(width**-0.5),
    "out": nn.initializers.normal(residual),
    "fc1": nn.initializers.normal((2 * width) ** -0.5),
    "fc2": nn.initializers.normal(residual),
    "fc1_bias": torch_uniform(width),
    "fc2_bias": torch_uniform(hidden),
  }


def torch_init(width: int, depth: int, hidden: int) -> dict[str, Initializer]:
  """PyTorch's own defaults, which OpenAI's image blocks keep: Xavier-uniform for the packed query, key and value."""
  del depth
  return {
    "qkv": nn.initializers.xavier_uniform(),
    "out": torch_uniform(width),
    "fc1": torch_uniform(width),
    "fc2": torch_uniform(hidden),
    "fc1_bias": torch_uniform(width),
    "fc2_bias": torch_uniform(hidden),
  }


def timm_init(width: int, depth: int, hidden: int) -> dict[str, Initializer]:
  """timm's ViT, used by SLIP: N(0, 0.02) weights and zero biases."""
  del width, depth, hidden
  weights = dict.fromkeys(("qkv", "out", "fc1", "fc2"), nn.initializers.normal(0.02))
  return weights | dict.fromkeys(("fc1_bias", "fc2_bias"), nn.initializers.zeros_init())


def big_vision_init(width: int, depth: int, hidden: int) -> dict[str, Initializer]:
  """big_vision's ViT, used by SigLIP: Xavier-uniform, query, key and value each as a square matrix."""
  del depth, hidden
  weights = dict.fromkeys(("out", "fc1", "fc2"), nn.initializers.xavier_uniform())
  bias = dict.fromkeys(("fc1_bias", "fc2_bias"), nn.initializers.normal(1e-6))
  return weights | bias | {"qkv": torch_uniform(width / 3)}


INITS = {"openai_text": openai_text_init, "torch": torch_init, "timm": timm_init, "big_vision": big_vision_init}


class QueryKeyValue(nn.Module):
  """Query, key and value: a dense layer of three times the width, computed as three products.

  Each result then has the memory layout that attention needs. Slices of a single product would be copied: compiled for
  a TPU v5e, a step of CLIP ViT-B/16 would move 17 % more bytes and take 25 % more time by the compiler's estimate.
  """

  heads: int
  dtype: Any
  kernel_init: Initializer
  bias_init: Initializer

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n f"], queries: Float[Array, "b m f"] | None = None
  ) -> list[Float[Array, "b _ h e"]]:
    """Query of `queries` or, by default, of `x`; key and value of `x`."""
    width = x.shape[-1]
    kernel = self.param("kernel", self.kernel_init, (width, 3 * width))
    bias = self.param("bias", self.bias_init, (3 * width,))
    queries, x, kernel, bias = nn.dtypes.promote_dtype(
      x if queries is None else queries, x, kernel, bias, dtype=self.dtype
    )
    kernels = rearrange(kernel, "f (three h e) -> three f h e", three=3, h=self.heads)
    biases = rearrange(bias, "(three h e) -> three 1 1 h e", three=3, h=self.heads)
    return [
      jnp.einsum("bnf,fhe->bnhe", inputs, kernels[part]) + biases[part] for part, inputs in enumerate((queries, x, x))
    ]


class Block(nn.Module):
  """`x += attention(norm(x)); x += mlp(norm(x))`. Softmax and norms are float32.

  With `branch_norm`, the outputs are normalised instead: `x += norm(attention(x)); x += norm(mlp(x))` (EVA-02-CLIP-E).
  Given `lengths`, each position sees the whole text of that length, even if `causal`. Given `visible`, no position
  sees the others. Given `branch_scale`, the outputs of attention and MLP are multiplied by it, see
  `training.drop_path`.
  """

  width: int
  heads: int
  depth: int
  mlp_ratio: float
  activation: str
  epsilon: float
  causal: bool
  initializer: str
  dtype: Any
  branch_norm: bool = False
  attention: str = "auto"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n f"],
    lengths: Int[Array, "b"] | None = None,
    visible: Bool[Array, "b n"] | None = None,
    branch_scale: Float[Array, "b 2"] | None = None,
  ) -> tuple[Float[Array, "b n f"], None]:
    init = INITS[self.initializer](self.width, self.depth, round(self.mlp_ratio * self.width))

    def norm(name: str) -> nn.LayerNorm:
      return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, use_fast_variance=False, name=name)

    def dense(features: int, name: str) -> Dense:
      bias = init.get(f"{name}_bias", nn.initializers.zeros_init())
      return Dense(features, dtype=self.dtype, kernel_init=init[name], bias_init=bias, name=name)

    bias = init.get("qkv_bias", nn.initializers.zeros_init())
    heads = QueryKeyValue(self.heads, self.dtype, kernel_init=init["qkv"], bias_init=bias, name="qkv")
    norms = {name: norm(name) for name in ("attention_norm", "mlp_norm")}
    before, after = ({}, norms) if self.branch_norm else (norms, {})
    query, key, value = heads(before.get("attention_norm", _same)(x))
    causal = self.causal and lengths is None
    masks = {"causal": causal, "lengths": lengths, "visible": visible}
    attended = attend(query, key, value, **masks, implementation=self.attention)
    attended = dense(self.width, "out")(rearrange(attended, "b n h e -> b n (h e)"))
    attended = after.get("attention_norm", _same)(attended)
    x = x + (attended if branch_scale is None else _scaled(attended, branch_scale[:, 0]))
    hidden = dense(round(self.mlp_ratio * self.width), "fc1")(before.get("mlp_norm", _same)(x))
    hidden = dense(self.width, "fc2")(ACTIVATIONS[self.activation](hidden))
    hidden = after.get("mlp_norm", _same)(hidden)
    return x + (hidden if branch_scale is None else _scaled(hidden, branch_scale[:, 1])), None


def _same(x: Array) -> Array:
  return x


def _scaled(x: Float[Array, "b n f"], scale: Float[Array, "b"]) -> Float[Array, "b n f"]:
  return x * scale[:, None, None].astype(x.dtype)


class Transformer(nn.Module):
  """`depth` blocks as one scanned block, so that compile time does not grow with depth.

  Parameters of the blocks are stacked along a leading `depth` axis under `blocks`. `unroll` is the number of blocks
  that the compiler sees at once; it does not change the parameters.
  """

  width: int
  heads: int
  depth: int
  mlp_ratio: float = 4.0
  activation: str = "quick_gelu"
  epsilon: float = 1e-5
  causal: bool = False
  initializer: str = "torch"
  branch_norm: bool = False
  remat: str = "none"
  unroll: int = 1
  attention: str = "auto"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n f"],
    lengths: Int[Array, "b"] | None = None,
    visible: Bool[Array, "b n"] | None = None,
    branch_scale: Float[Array, "b depth 2"] | None = None,
  ) -> Float[Array, "b n f"]:
    policy = REMAT_POLICIES[self.remat]
    block = Block if policy is None else nn.remat(Block, prevent_cse=False, policy=policy)
    blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast if branch_scale is None else (nn.broadcast, nn.broadcast, 1),
      length=self.depth,
      unroll=self.unroll,
    )
    x, _ = blocks(
      width=self.width,
      heads=self.heads,
      depth=self.depth,
      mlp_ratio=self.mlp_ratio,
      activation=self.activation,
      epsilon=self.epsilon,
      causal=self.causal,
      initializer=self.initializer,
      branch_norm=self.branch_norm,
      attention=self.attention,
      dtype=self.dtype,
      name="blocks",
    )(x, lengths, visible, *([] if branch_scale is None else [branch_scale]))
    return x
