"""FLOPs of a traced function, from its jaxpr: those of matrix products and convolutions, with all turns of a loop.

XLA's own `cost_analysis` counts the body of a loop once, and so a scanned transformer as one layer.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun, jaxprs_in_params, primitives
from jax.interpreters import partial_eval
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from declip_jax import build
from declip_jax.models.paths import stop_gradient_below
from declip_jax.objectives.blockwise import PLAIN
from declip_jax.types import Batch


def step_flops(config: ConfigDict, built: build.Built) -> float:
  """The model's FLOPs in one train step on a global batch, over all devices: `step_flops(config, build.build(config))`.

  They are the numerator of model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B): forward and backward pass
  of towers, heads and objective, once. What a step computes again to save memory (rematerialisation, gradient caching,
  losses in blocks) does not count, and neither do augmentation, optimiser and diagnostics. Texts count with the
  shortest of `config.model.text.buckets`, so that utilisation is at least what it says. Tracing takes seconds;
  nothing is compiled or computed.
  """
  # In float32, for in half precision a GPU's attention computes its weights again.
  image, text = (
    module and module.clone(dtype=jnp.float32) for module in (built.model.towers.image, built.model.towers.text)
  )
  model = dataclasses.replace(built.model, towers=built.model.towers.clone(image=image, text=text, dtype=jnp.float32))
  batch = built.batch_shape(config.batch_size)
  objective = dataclasses.replace(built.objective, method=PLAIN)
  params, collections = jax.eval_shape(model.init, jax.random.key(0), batch)

  def loss_of(params: Any, collections: Any, batch: Batch) -> jax.Array:
    params = stop_gradient_below(params, config.optimizer.frozen)
    features, _ = model.encode(params, collections, batch)
    outputs, _ = model.apply_heads(params, collections, features)
    return objective(outputs, batch, jnp.zeros((), jnp.int32))[0]

  return count(jax.make_jaxpr(jax.grad(without_remat(loss_of)))(params, collections, batch))


def without_remat(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """The same function of arrays to one array without any `jax.checkpoint`, so that its gradient computes nothing again.

  What a custom gradient computes again stays.
  """

  def plain(*args: Any) -> jax.Array:
    return jaxpr_as_fun(_unwrapped(jax.make_jaxpr(function)(*args)))(*jax.tree.leaves(args))[0]

  return plain


def _unwrapped(part: Any) -> Any:
  """A jaxpr, or whatever else a primitive has as a parameter, with `jax.checkpoint`s turned into calls."""
  if type(part) in (tuple, list):
    return type(part)(map(_unwrapped, part))
  if isinstance(part, ClosedJaxpr):
    return ClosedJaxpr(_unwrapped(part.jaxpr), part.consts)
  if not isinstance(part, Jaxpr):
    return part
  eqns = []
  for eqn in part.eqns:
    params = {name: _unwrapped(param) for name, param in eqn.params.items()}
    if eqn.primitive is primitives.remat_p:
      call = {"call_jaxpr": ClosedJaxpr(params["jaxpr"], ())}
      eqns.append(eqn.replace(primitive=primitives.closed_call_p, params=call))
    else:
      eqns.append(eqn.replace(params=params))
  return part.replace(eqns=eqns)


def count(jaxpr: ClosedJaxpr | Jaxpr) -> float:
  """FLOPs of one call, as it is written: of `jax.make_jaxpr(f)(...)`, or the `jaxpr` of `jax.jit(f).trace(...)`.

  A multiplication and an addition are two. A scan counts its body times its length, the backward pass of
  `jax.checkpoint` also what it computes again. Left out are what no result needs, everything elementwise, and, of each
  conditional, all branches but the cheapest: a train step that does not run its diagnostics. Products that the compiler
  finds to be equal count each.

  Raises:
    ValueError: a loop of unknown length around products.
  """
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(needed)


def _count(jaxpr: Jaxpr) -> float:
  return float(sum(COSTS.get(eqn.primitive.name, _of_parts)(eqn) for eqn in jaxpr.eqns))


def _of_parts(eqn: JaxprEqn) -> float:
  return sum(_count(part) for part in jaxprs_in_params(eqn.params))


def _scan(eqn: JaxprEqn) -> float:
  return eqn.params["length"] * _of_parts(eqn)


def _while(eqn: JaxprEqn) -> float:
  if _of_parts(eqn):
    raise ValueError("a while loop around products or convolutions: nobody knows how often it turns")
  return 0.0


def _shard_map(eqn: JaxprEqn) -> float:
  """Written for one device of a mesh; all do it."""
  return eqn.params["mesh"].size * _of_parts(eqn)


def _cond(eqn: JaxprEqn) -> float:
  return min(_count(branch.jaxpr) for branch in eqn.params["branches"])


def _dot_general(eqn: JaxprEqn) -> float:
  left, right = (x.aval.shape for x in eqn.invars)
  (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
  free = (size for axis, size in enumerate(right) if axis not in (*contracted, *batch))
  return 2.0 * math.prod(left) * math.prod(free)


def _convolution(eqn: JaxprEqn) -> float:
  """Without the products with padding, or with the holes that the gradient of a stride makes."""
  image, kernel = (x.aval.shape for x in eqn.invars)
  output, params = eqn.outvars[0].aval.shape, eqn.params
  image_axes, kernel_axes, output_axes = params["dimension_numbers"]
  products = output[output_axes[0]] * output[output_axes[1]] * kernel[kernel_axes[1]]
  for axis, (low, _) in enumerate(params["padding"]):
    reached = (
      params["window_strides"][axis] * np.arange(output[output_axes[2 + axis]])[:, None]
      + params["rhs_dilation"][axis] * np.arange(kernel[kernel_axes[2 + axis]])
      - low
    )
    hole = params["lhs_dilation"][axis]
    inside = (reached >= 0) & (reached <= hole * (image[image_axes[2 + axis]] - 1))
    products *= np.count_nonzero(inside & (reached % hole == 0))
  return 2.0 * products


def _flash_attention(products: int) -> Callable[[JaxprEqn], float]:
  """cuDNN's, on a GPU in half precision: so many products of the size of query `[b n h e]` with key `[b m h e]`."""
  return lambda eqn: 2.0 * products * eqn.invars[0].aval.size * eqn.invars[1].aval.shape[1]


COSTS: dict[str, Callable[[JaxprEqn], float]] = {
  "scan": _scan,
  "while": _while,
  "cond": _cond,
  "shard_map": _shard_map,
  "dot_general": _dot_general,
  "conv_general_dilated": _convolution,
  "dot_product_attention_fwd_wrapper": _flash_attention(2),
  "dot_product_attention_bwd_wrapper": _flash_attention(5),  # it computes the weights again
}
