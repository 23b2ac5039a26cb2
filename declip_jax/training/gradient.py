"""The loss and gradient of a global batch, computed at once or by micro-batches to save memory.

| `config.micro_batching` | the loss compares | towers run | for |
|---|---|---|---|
| "cached" | the whole batch | forward twice, backward once | every objective, with the same value and gradient |
| "plain" | a micro-batch | forward once, backward once | losses without negatives, or to save time |

"cached" is GradCache (Gao et al. 2021) for any objective, because a step has two halves. Towers process one example at
a time, so features are computed micro-batch by micro-batch and kept, without the activations that a backward pass would
need. Everything that compares examples comes after the features. It is differentiated once, at the features of the
whole batch, so that temperatures, the bank and batch norms of heads see the whole batch. Then each micro-batch is
encoded again, and the gradients of its features flow back through the towers. Towers draw no random numbers, so both
passes are equal. Only the batch norms of a ResNet compare examples within the towers: they see a micro-batch, as with
any gradient accumulation, and their running statistics are updated once for each. With several devices, each
micro-batch gathers parameters and sums gradients anew, so that no device ever has the whole of either in float32.
"""

from collections.abc import Callable, Sequence
import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from declip_jax.models.model import Model
from declip_jax.models.paths import stop_gradient_below
from declip_jax.objectives import Objective
from declip_jax.types import Batch, Features, Outputs

Metrics = dict[str, Float[Array, ""]]
Tree = Any


class Result(NamedTuple):
  """Results of a batch besides its gradient. With "plain", metrics are means; outputs are the last micro-batch's."""

  loss: Float[Array, ""]
  metrics: Metrics
  outputs: Outputs
  collections: Tree


@dataclasses.dataclass(frozen=True)
class Functions:
  """The pure functions that a loss consists of.

  Attributes:
    model: function from a batch to features, and from features to outputs.
    objective: function from outputs to the loss.
    read: function from parameters to those that the model reads: with merged adapters, gathered from all devices, some
      without a gradient.
    micro_batches: number of micro-batches.
  """

  model: Model
  objective: Objective
  read: Callable[[Tree], Tree]
  micro_batches: int = 1

  def second_half(
    self, params: Tree, collections: Tree, features: Features, batch: Batch, step: Int[Array, ""]
  ) -> Result:
    """The loss, metrics and outputs, given the features."""
    outputs, heads = self.model.apply_heads(params, collections, features)
    loss, metrics = self.objective(outputs, batch, step)
    return Result(loss, metrics, outputs, {**collections, "heads": heads})


# From parameters, collections, batch and 0-based step to the result and the gradient.
Gradient = Callable[[Tree, Tree, Batch, Int[Array, ""]], tuple[Result, Tree]]


def make_gradient(
  method: str,
  micro_batches: int,
  *,
  model: Model,
  objective: Objective,
  frozen: Sequence[str] = (),
  gather: Callable[[Tree], Tree] = lambda params: params,
) -> Gradient:
  """Makes the function that computes the loss and gradient of a batch.

  Args:
    method: one of `METHODS`; ignored with one micro-batch.
    micro_batches: number of micro-batches, each with examples of all devices.
    model, objective: pure functions.
    frozen: paths of parameters without a gradient.
    gather: collects parameters from all devices before the model reads them.

  Raises:
    ValueError: an unknown method, or fewer than one micro-batch.
  """
  if method not in METHODS:
    raise ValueError(f"config.micro_batching={method!r}: choose one of {[*METHODS]}")
  if micro_batches < 1:
    raise ValueError(f"config.micro_batches={micro_batches}: expected 1 or more")
  compute = METHODS[method] if micro_batches > 1 else whole_batch

  def read(params: Tree) -> Tree:
    return gather(model.merged(stop_gradient_below(params, frozen)))

  functions = Functions(model, objective, read, micro_batches)

  def gradient(params: Tree, collections: Tree, batch: Batch, step: Int[Array, ""]) -> tuple[Result, Tree]:
    copies = {name: collections[name] for name in ("momentum",) if name in collections}  # parameters, too
    result, gradients = compute(params, {**collections, **gather(copies)}, batch, step, functions)
    return result._replace(collections={**result.collections, **copies}), gradients

  return gradient


def whole_batch(
  params: Tree,
  collections: Tree,
  batch: Batch,
  step: Int[Array, ""],
  functions: Functions,
) -> tuple[Result, Tree]:
  """The gradient of the whole batch at once."""

  def loss_fn(params: Tree) -> tuple[Float[Array, ""], Result]:
    params = functions.read(params)
    features, towers = functions.model.encode(params, collections, batch)
    result = functions.second_half(params, {**collections, "towers": towers}, features, batch, step)
    return result.loss, result

  (_, result), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
  return result, gradients


def cached(
  params: Tree,
  collections: Tree,
  batch: Batch,
  step: Int[Array, ""],
  functions: Functions,
) -> tuple[Result, Tree]:
  """The gradient of the whole batch, which the towers process by micro-batches."""
  model, read, micro_batches = functions.model, functions.read, functions.micro_batches
  batches, read_params = jax.tree.map(partial(_split, micro_batches=micro_batches), batch), read(params)

  def encode(towers: Tree, micro_batch: Batch) -> tuple[Tree, Features]:
    features, towers = model.encode(read_params, {**collections, "towers": towers}, micro_batch)
    return towers, features

  towers, features = jax.lax.scan(encode, collections["towers"], batches)
  features = jax.tree.map(_merge, features)

  def loss_fn(heads: Tree, floats: list[Array]) -> tuple[Float[Array, ""], Result]:
    all_params = read({"towers": params["towers"], "heads": heads})
    at = _replace_floats(features, floats)
    result = functions.second_half(all_params, {**collections, "towers": towers}, at, batch, step)
    return result.loss, result

  value_and_gradients = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
  (_, result), (heads, feature_gradients) = value_and_gradients(params["heads"], _floats(features))

  def accumulate(gradients: Tree, inputs: tuple[Batch, list[Array]]) -> tuple[Tree, None]:
    micro_batch, feature_gradients = inputs

    def features_fn(towers: Tree) -> list[Array]:
      all_params = read({"towers": towers, "heads": params["heads"]})
      return _floats(model.encode(all_params, collections, micro_batch)[0])

    _, vjp = jax.vjp(features_fn, params["towers"])
    return jax.tree.map(jnp.add, gradients, *vjp(feature_gradients)), None

  zeros = jax.tree.map(jnp.zeros_like, params["towers"])
  inputs = batches, [_split(gradient, micro_batches) for gradient in feature_gradients]
  return result, {"towers": jax.lax.scan(accumulate, zeros, inputs)[0], "heads": heads}


def plain(
  params: Tree,
  collections: Tree,
  batch: Batch,
  step: Int[Array, ""],
  functions: Functions,
) -> tuple[Result, Tree]:
  """The mean gradient of the micro-batches, each with its own loss; bank and batch norms pass from one to the next."""
  micro_batches = functions.micro_batches
  batches = jax.tree.map(partial(_split, micro_batches=micro_batches), batch)
  compute = partial(whole_batch, params, functions=functions)

  def accumulate(carry: tuple[Tree, Tree, Outputs], micro_batch: Batch) -> tuple[Any, tuple[Array, Metrics]]:
    collections, mean, _ = carry
    result, gradients = compute(collections, micro_batch, step)
    mean = jax.tree.map(lambda sum_, new: sum_ + new / micro_batches, mean, gradients)
    return (result.collections, mean, result.outputs), (result.loss, result.metrics)

  first = jax.tree.map(lambda x: x[0], batches)
  shapes = jax.eval_shape(compute, collections, first, step)[0].outputs
  outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  zeros = jax.tree.map(jnp.zeros_like, params)
  (collections, mean, outputs), values = jax.lax.scan(accumulate, (collections, zeros, outputs), batches)
  loss, metrics = jax.tree.map(partial(jnp.mean, axis=0), values)
  return Result(loss, metrics, outputs, collections), mean


# What `config.micro_batching` may name.
METHODS: dict[str, Callable[..., tuple[Result, Tree]]] = {"cached": cached, "plain": plain}


def _split(x: Shaped[Array, "b ..."], micro_batches: int) -> Shaped[Array, "micro_batches _ ..."]:
  """`[b ...]` to `[micro_batches b/micro_batches ...]`: each has examples of all devices, in order; no data moves."""
  return jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1)


def _merge(x: Shaped[Array, "micro_batches _ ..."]) -> Shaped[Array, "b ..."]:
  """The inverse of `_split`."""
  return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def _floats(features: Features) -> list[Array]:
  """The features that have a gradient."""
  return [x for x in jax.tree.leaves(features) if jnp.issubdtype(x.dtype, jnp.inexact)]


def _replace_floats(features: Features, floats: list[Array]) -> Features:
  new = iter(floats)
  return jax.tree.map(lambda x: next(new) if jnp.issubdtype(x.dtype, jnp.inexact) else x, features)
