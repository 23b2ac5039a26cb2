"""The gradient of a global batch: of all of it at once, or in parts, one after the other, to fit it in memory.

| `config.micro_batching` | the loss sees | towers run | for |
|---|---|---|---|
| "cached" | the whole batch | forward twice, backward once | every objective, to the same value and gradient |
| "plain" | a part of the batch | forward once, backward once | losses without negatives, or too little time |

"cached" is GradCache (Gao et al. 2021) for any objective, since a step has two halves. Towers look at one example at a
time: their features are computed part by part and kept, without what a backward pass would need. All that looks across
examples comes behind them, is differentiated once at the features of the whole batch, and so temperature, bank and
batch norms of heads count once. Then each part is encoded again, and the features' gradients flow back through it.
Towers draw no random numbers, so both passes are the same. Only a ResNet's batch norms look across examples inside the
tower: they see a part, as in every other accumulation, and their running statistics move once for each. Of several
devices each part gathers parameters and sums gradients again, so that no device ever holds them whole in float32.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from declip_jax.models.model import Model
from declip_jax.models.paths import stop_gradient_below
from declip_jax.objectives import Objective
from declip_jax.types import Batch, Features, Outputs

Metrics = dict[str, Float[Array, ""]]
Tree = Any


class Result(NamedTuple):
  """What a batch gives beside its gradient; of "plain" parts `outputs` are the last one's and metrics their means."""

  loss: Float[Array, ""]
  metrics: Metrics
  outputs: Outputs
  collections: Tree


# Of parameters, collections, batch and 0-based step.
Gradient = Callable[[Tree, Tree, Batch, Int[Array, ""]], tuple[Result, Tree]]


def make_gradient(
  kind: str,
  micro_batches: int,
  *,
  model: Model,
  objective: Objective,
  frozen: Sequence[str] = (),
  gather: Callable[[Tree], Tree] = lambda params: params,
) -> Gradient:
  """The function that gives loss and gradient of a batch.

  Args:
    kind: one of `KINDS`; of no meaning for one part.
    micro_batches: into how many parts the towers take a batch, each with rows of all devices.
    model, objective: pure functions.
    frozen: paths of parameters that have no gradient.
    gather: from all devices, the parameters that a model reads.

  Raises:
    ValueError: an unknown kind, or no part.
  """
  if kind not in KINDS:
    raise ValueError(f"config.micro_batching={kind!r}: choose one of {[*KINDS]}")
  if micro_batches < 1:
    raise ValueError(f"config.micro_batches={micro_batches}: 1 or more")
  halves = {"model": model, "objective": objective, "read": lambda params: gather(stop_gradient_below(params, frozen))}
  of = partial(KINDS[kind], **halves, parts=micro_batches) if micro_batches > 1 else partial(of_batch, **halves)

  def gradient(params: Tree, collections: Tree, batch: Batch, step: Array) -> tuple[Result, Tree]:
    copies = {name: collections[name] for name in ("momentum",) if name in collections}  # parameters, too
    result, slope = of(params, {**collections, **gather(copies)}, batch, step)
    return result._replace(collections={**result.collections, **copies}), slope

  return gradient


def of_batch(
  params: Tree,
  collections: Tree,
  batch: Batch,
  step: Array,
  *,
  model: Model,
  objective: Objective,
  read: Callable[[Tree], Tree],
) -> tuple[Result, Tree]:
  """Of the whole batch at once."""

  def loss_of(params: Tree) -> tuple[Array, Result]:
    params = read(params)
    features, towers = model.encode(params, collections, batch)
    result = _second_half(params, {**collections, "towers": towers}, features, batch, step, model, objective)
    return result.loss, result

  (_, result), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
  return result, gradient


def cached(
  params: Tree,
  collections: Tree,
  batch: Batch,
  step: Array,
  *,
  model: Model,
  objective: Objective,
  read: Callable[[Tree], Tree],
  parts: int,
) -> tuple[Result, Tree]:
  """Of the whole batch, whose towers take it in parts."""
  micro_batches, seen = jax.tree.map(partial(_dealt, parts=parts), batch), read(params)

  def encode(towers: Tree, micro_batch: Batch) -> tuple[Tree, Features]:
    features, towers = model.encode(seen, {**collections, "towers": towers}, micro_batch)
    return towers, features

  towers, features = jax.lax.scan(encode, collections["towers"], micro_batches)
  features = jax.tree.map(_gathered, features)

  def loss_of(heads: Tree, slots: list[Array]) -> tuple[Array, Result]:
    whole = read({"towers": params["towers"], "heads": heads})
    at = _with_floats(features, slots)
    result = _second_half(whole, {**collections, "towers": towers}, at, batch, step, model, objective)
    return result.loss, result

  both = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
  (_, result), (heads, slopes) = both(params["heads"], _floats(features))

  def learn(gradient: Tree, given: tuple[Batch, list[Array]]) -> tuple[Tree, None]:
    micro_batch, slopes = given

    def features_of(towers: Tree) -> list[Array]:
      whole = read({"towers": towers, "heads": params["heads"]})
      return _floats(model.encode(whole, collections, micro_batch)[0])

    (more,) = jax.vjp(features_of, params["towers"])[1](slopes)
    return jax.tree.map(jnp.add, gradient, more), None

  nothing = jax.tree.map(jnp.zeros_like, params["towers"])
  given = micro_batches, [_dealt(slope, parts) for slope in slopes]
  return result, {"towers": jax.lax.scan(learn, nothing, given)[0], "heads": heads}


def plain(
  params: Tree,
  collections: Tree,
  batch: Batch,
  step: Array,
  *,
  model: Model,
  objective: Objective,
  read: Callable[[Tree], Tree],
  parts: int,
) -> tuple[Result, Tree]:
  """The mean over parts, each with a loss of its own; bank and batch norms go from one to the next."""
  micro_batches = jax.tree.map(partial(_dealt, parts=parts), batch)
  of = partial(of_batch, params, model=model, objective=objective, read=read)

  def learn(carry: tuple[Tree, Tree, Outputs], micro_batch: Batch) -> tuple[Any, tuple[Array, Metrics]]:
    collections, gradient, _ = carry
    result, more = of(collections, micro_batch, step)
    gradient = jax.tree.map(lambda sum_, new: sum_ + new / parts, gradient, more)
    return (result.collections, gradient, result.outputs), (result.loss, result.metrics)

  first = jax.tree.map(lambda x: x[0], micro_batches)
  outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, collections, first, step)[0].outputs)
  nothing = jax.tree.map(jnp.zeros_like, params)
  (collections, gradient, outputs), found = jax.lax.scan(learn, (collections, nothing, outputs), micro_batches)
  loss, metrics = jax.tree.map(partial(jnp.mean, axis=0), found)
  return Result(loss, metrics, outputs, collections), gradient


# What `config.micro_batching` may name.
KINDS: dict[str, Callable[..., tuple[Result, Tree]]] = {"cached": cached, "plain": plain}


def _second_half(
  params: Tree, collections: Tree, features: Features, batch: Batch, step: Array, model: Model, objective: Objective
) -> Result:
  outputs, heads = model.apply_heads(params, collections, features)
  loss, metrics = objective(outputs, batch, step)
  return Result(loss, metrics, outputs, {**collections, "heads": heads})


def _dealt(x: Array, parts: int) -> Array:
  """`[b ...]` to `[parts b/parts ...]`: every part has rows of all devices, in their order, and none moves."""
  return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)


def _gathered(x: Array) -> Array:
  """`_dealt`, undone."""
  return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def _floats(features: Features) -> list[Array]:
  """Those that have a gradient."""
  return [x for x in jax.tree.leaves(features) if jnp.issubdtype(x.dtype, jnp.inexact)]


def _with_floats(features: Features, given: list[Array]) -> Features:
  new = iter(given)
  return jax.tree.map(lambda x: next(new) if jnp.issubdtype(x.dtype, jnp.inexact) else x, features)
