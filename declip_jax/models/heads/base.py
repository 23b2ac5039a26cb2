"""The interface of a head, and the layers that heads share."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from declip_jax.models.batch_norm import BatchNorm
from declip_jax.models.dense import Dense
from declip_jax.models.transformer import torch_uniform
from declip_jax.types import Features, Outputs
from declip_jax.views import Views


class Head(nn.Module):
  """Maps features of the whole batch to named outputs; a subclass declares what other modules need to know about it.

  All heads share the scope of `Heads`: their parameters are at `heads/<name>`, so their names must differ. Fields are
  set by name, from `config.model.heads` and from what `make_model` knows of the towers.

  Attributes:
    views: roles of `Views` without which a head has no output and no parameters.
    sides: names of the parameters that belong to a tower, under "image" and "text", for optimisers that treat the two
      sides differently.
    diagnostics: the kind of each output, one of `objectives.diagnostics.KINDS`.
    internal: outputs that only later heads use; they are then removed from `Outputs`.
  """

  views: ClassVar[tuple[str, ...]] = ()
  sides: ClassVar[Mapping[str, tuple[str, ...]]] = {}
  diagnostics: ClassVar[Mapping[str, str]] = {}
  internal: ClassVar[tuple[str, ...]] = ()

  def __call__(self, features: Features, outputs: Outputs, views: Views, train: bool) -> dict[str, Array]:
    """The outputs of this head by name, float32; empty if `features` or `views` lack what it needs.

    Args:
      features: what the towers return.
      outputs: outputs of the heads before this one in `HEADS`.
      views: which view plays which role.
      train: whether batch norms use the statistics of the batch.
    """
    raise NotImplementedError


class Mlp(nn.Module):
  """Linear layers with batch norm and ReLU between them.

  The initialisation is PyTorch's default. Statistics are those of one view: call it once per view.

  Attributes:
    input_width: width of the input.
    widths: widths of the layers' outputs.
    final_norm: whether a batch norm follows the last layer, without gain and bias unless `bias`.
    bias: whether the linear layers have biases; MoCo v3's do not.
    groups: groups of the batch norms, see `BatchNorm`.
  """

  input_width: int
  widths: Sequence[int]
  final_norm: bool
  dtype: Any
  bias: bool = True
  groups: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "b f"], train: bool) -> Float[Array, "b p"]:
    last = len(self.widths) - 1
    for index, width in enumerate(self.widths):
      init = torch_uniform(self.widths[index - 1] if index else self.input_width)
      options = {"use_bias": self.bias, "dtype": self.dtype, "kernel_init": init, "bias_init": init}
      x = Dense(width, **options, name=f"linear{index}")(x)
      if index < last or self.final_norm:
        affine = self.bias or index < last
        x = BatchNorm(dtype=self.dtype, groups=self.groups, affine=affine, name=f"norm{index}")(x, train)
      if index < last:
        x = nn.relu(x)
    return x


def linear(width: int, features: int, dtype: Any) -> Dense:
  """A linear layer from `width` to `features` with PyTorch's default initialisation, see `dense`."""
  init = torch_uniform(width)
  return dense(features, dtype, kernel_init=init, bias_init=init)


def dense(features: int, dtype: Any, **options: Any) -> Dense:
  """A linear layer with inputs in the compute dtype; sums and outputs are float32, because the outputs are compared."""
  return Dense(features, dtype, output_dtype=jnp.float32, **options)


def pick(x: Float[Array, "b v f"], views: Sequence[int]) -> Float[Array, "v2 b f"]:
  """The chosen views, with views as the leading axis."""
  return jnp.stack([x[:, view] for view in views])


def per_view(head: Mlp, x: Float[Array, "v b f"], train: bool) -> Float[Array, "v b p"]:
  """Applies a head to each view, in float32. Batch statistics are those of one view, as in SLIP and DeCLIP."""
  return jnp.stack([head(view, train) for view in x]).astype(jnp.float32)
