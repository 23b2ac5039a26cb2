"""FLOPs of matrix products and convolutions in a traced function, from its jaxpr, with every iteration of a loop.

XLA's own `cost_analysis` counts the body of a loop once, and therefore a scanned transformer as one layer.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun, jaxprs_in_params, primitives
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np

from declip_jax.build import Built
from declip_jax.models.paths import stop_gradient_below
from declip_jax.objectives.blockwise import PLAIN
from declip_jax.types import Batch


def step_flops(built: Built, batch_size: int, text_length: int = 0) -> float:
  """FLOPs of the model in one train step on a global batch, over all devices.

  They are the numerator of model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B): forward and backward pass
  of towers, heads and objective, once. Recomputation to save memory (rematerialisation, gradient caching, losses in
  blocks) does not count, nor do augmentation, optimiser and diagnostics. Tracing takes seconds; nothing is compiled or
  computed.

  Args:
    built: model, objective, views, and the parameters that are not trained.
    batch_size: global batch size.
    text_length: number of positions of trimmed texts; 0 counts texts of the context length, whatever is trimmed.
  """
  # Plain attention, since the others recompute its weights.
  image, text = map(_with_plain_attention, (built.model.towers.image, built.model.towers.text))
  model = dataclasses.replace(built.model, towers=built.model.towers.clone(image=image, text=text, dtype=jnp.float32))
  batch = built.batch_shape(batch_size)
  objective = dataclasses.replace(built.objective, method=PLAIN)
  params, collections = jax.eval_shape(model.init, jax.random.key(0), batch)

  def loss_of(params: Any, collections: Any, batch: Batch) -> jax.Array:
    params = model.merged(stop_gradient_below(params, built.frozen))
    features, _ = model.encode(params, collections, batch)
    outputs, _ = model.apply_heads(params, collections, features)
    return objective(outputs, batch, jnp.zeros((), jnp.int32))[0]

  gradient = jax.grad(without_remat(loss_of))
  if text_length and "text" in batch:
    shape = batch["text"].shape
    batch = {**batch, "text": jax.ShapeDtypeStruct((*shape[:-1], text_length), batch["text"].dtype)}
  return num_flops(jax.make_jaxpr(gradient)(params, collections, built.training_shape(batch)))


def _with_plain_attention(tower: nn.Module | None) -> nn.Module | None:
  """The tower with plain attention in its blocks, and in float32, so that a GPU has no other in its pooling."""
  plain = {"attention": "xla"} if hasattr(tower, "attention") else {}
  return tower and tower.clone(dtype=jnp.float32, **plain)


def without_remat(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Removes every `jax.checkpoint` from a function that returns one array, so that its gradient recomputes nothing.

  Recomputation in a custom gradient remains.
  """

  def plain(*args: Any) -> jax.Array:
    return jaxpr_as_fun(_without_checkpoint(jax.make_jaxpr(function)(*args)))(*jax.tree.leaves(args))[0]

  return plain


def _without_checkpoint(value: Any) -> Any:
  """A jaxpr, or any other parameter of a primitive, in which each `jax.checkpoint` has become a plain call."""
  if type(value) in (tuple, list):
    return type(value)(map(_without_checkpoint, value))
  if not isinstance(value, ClosedJaxpr | Jaxpr):
    return value
  eqns = []
  for eqn in value.eqns:
    params = {name: _without_checkpoint(param) for name, param in eqn.params.items()}
    if eqn.primitive is primitives.remat_p:
      body = params["jaxpr"]
      call = {"call_jaxpr": ClosedJaxpr(body, getattr(body, "consts", ()))}
      eqns.append(eqn.replace(primitive=primitives.closed_call_p, params=call))
    else:
      eqns.append(eqn.replace(params=params))
  # Since JAX 0.11 the two are one class, whose `jaxpr` is itself.
  if isinstance(value, ClosedJaxpr):
    return ClosedJaxpr(value.jaxpr.replace(eqns=eqns), value.consts)
  return value.replace(eqns=eqns)


def num_flops(jaxpr: ClosedJaxpr | Jaxpr) -> float:
  """FLOPs of one call of a function as written: `jax.make_jaxpr(f)(...)`, or `jaxpr` of `jax.jit(f).trace(...)`.

  A multiplication and an addition are two FLOPs. The body of a scan counts as often as it runs, and the backward pass
  of `jax.checkpoint` includes recomputation. Elementwise operations and dead code do not count. Of a conditional, the
  cheapest branch counts: a train step without its diagnostics. Equal products count even if the compiler would merge
  them.

  Raises:
    ValueError: matrix products in a while loop, whose number of iterations is unknown.
  """
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _sum(needed)


def _sum(jaxpr: Jaxpr) -> float:
  return float(sum(COSTS.get(eqn.primitive.name, _nested)(eqn) for eqn in jaxpr.eqns))


def _nested(eqn: JaxprEqn) -> float:
  return sum(_sum(jaxpr) for jaxpr in jaxprs_in_params(eqn.params))


def _scan(eqn: JaxprEqn) -> float:
  return eqn.params["length"] * _nested(eqn)


def _while(eqn: JaxprEqn) -> float:
  if _nested(eqn):
    raise ValueError("products or convolutions in a while loop: the number of iterations is unknown")
  return 0.0


def _shard_map(eqn: JaxprEqn) -> float:
  """The body is written for one device; every device of the mesh runs it."""
  return eqn.params["mesh"].size * _nested(eqn)


def _cond(eqn: JaxprEqn) -> float:
  return min(_sum(branch.jaxpr) for branch in eqn.params["branches"])


def _dot_general(eqn: JaxprEqn) -> float:
  left, right = (x.aval.shape for x in eqn.invars)
  (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
  free = (size for axis, size in enumerate(right) if axis not in (*contracted, *batch))
  return 2.0 * math.prod(left) * math.prod(free)


def _convolution(eqn: JaxprEqn) -> float:
  """Products with padding, and with the holes in the gradient of a strided convolution, do not count."""
  image, kernel = (x.aval.shape for x in eqn.invars)
  output, params = eqn.outvars[0].aval.shape, eqn.params
  image_axes, kernel_axes, output_axes = params["dimension_numbers"]
  products = output[output_axes[0]] * output[output_axes[1]] * kernel[kernel_axes[1]]
  for axis, (low, _) in enumerate(params["padding"]):
    position = (
      params["window_strides"][axis] * np.arange(output[output_axes[2 + axis]])[:, None]
      + params["rhs_dilation"][axis] * np.arange(kernel[kernel_axes[2 + axis]])
      - low
    )
    hole = params["lhs_dilation"][axis]
    inside = (position >= 0) & (position <= hole * (image[image_axes[2 + axis]] - 1))
    products *= np.count_nonzero(inside & (position % hole == 0))
  return 2.0 * products


def _flash_attention(products: int) -> Callable[[JaxprEqn], float]:
  """cuDNN attention, on a GPU in half precision.

  Args:
    products: number of products of the size of query `[b n h e]` times key `[b m h e]`.
  """
  return lambda eqn: 2.0 * products * eqn.invars[0].aval.size * eqn.invars[1].aval.shape[1]


COSTS: dict[str, Callable[[JaxprEqn], float]] = {
  "scan": _scan,
  "while": _while,
  "cond": _cond,
  "shard_map": _shard_map,
  "dot_general": _dot_general,
  "conv_general_dilated": _convolution,
  "dot_product_attention_fwd_wrapper": _flash_attention(2),
  "dot_product_attention_bwd_wrapper": _flash_attention(5),  # including the weights, which it recomputes
  "pallas_call": lambda eqn: float(eqn.params["cost_estimate"].flops),
}
