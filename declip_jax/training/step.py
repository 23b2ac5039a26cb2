"""The train step: from one state and one global batch to the next state and metrics."""

from collections.abc import Callable
from functools import partial
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import optax

from declip_jax.models.model import Model
from declip_jax.objectives.momentum import moving_average
from declip_jax.training.gradient import Gradient, Metrics
from declip_jax.training.state import State, weights_of
from declip_jax.types import Batch, Outputs

Tree = Any
Scalar = Float[Array, ""]
Flag = Bool[Array, ""]
Step = Int[Array, ""]

_SPIKE_WINDOW = 100  # steps over which the usual gradient norm is averaged


def train_step(
  state: State,
  batch: Batch,
  *,
  model: Model,
  optimizer: optax.GradientTransformation,
  schedule: Callable[[Step], Scalar],
  gradient_fn: Gradient,
  momentum_decay: Callable[[Step], Scalar],
  is_diagnosed: Callable[[Step], Flag],
  augment: Callable[[Batch, Step], Batch] = lambda batch, step: batch,
  diagnose: Callable[[Outputs], Metrics] = lambda outputs: {},
  logit_scale_range: tuple[float, ...] = (),
  spike_factor: float = 0.0,
  ema: float = 0.0,
  first_step: int = 0,
) -> tuple[State, Metrics]:
  """One step on one global batch.

  If the loss, the gradient or the learning rate is not finite, or the gradient spikes, then parameters, optimiser
  state, collections and average do not change; only the step and the counts of skipped steps change.

  Args:
    state, batch: donated, and split over the mesh.
    model, optimizer: pure functions.
    schedule: the learning rate at a 0-based step.
    gradient_fn: computes the loss and gradient of a batch, see `make_gradient`.
    momentum_decay: the decay of the momentum tower at a step; ignored without one.
    is_diagnosed: whether a step also computes `objectives.diagnostics`; otherwise these metrics are NaN.
    augment: function of batch and step that applies the image augmentation that is left to the device.
    diagnose: computes diagnostics from a step's outputs.
    logit_scale_range: bounds of the log inverse temperatures after the step; () for none.
    spike_factor: largest ratio of a gradient's norm to the usual norm, see `is_spike`; 0 for no limit.
    ema: decay of the average of the weights; ignored without one.
    first_step: 0-based step at which the stage begins: the usual norm is that of the gradients since.
  """
  if first_step:  # gradients of other images and batches have other norms
    measured = jnp.where(state.step == first_step, 0, state.skipped["measured"])
    state = state.replace(skipped={**state.skipped, "measured": measured})
  collections = {**state.collections, **update_momentum_tower(model, state, momentum_decay)}
  batch = augment(batch, state.step)
  (loss, metrics, outputs, collections), gradients = gradient_fn(state.params, collections, batch, state.step)

  learning_rate = schedule(state.step)
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = jax.tree.map(lambda param, update: param - learning_rate * update, state.params, updates)
  params = _clip_logit_scales(params, logit_scale_range)

  norms = {name: optax.tree.norm(tree) for name, tree in {**gradients["towers"], "heads": gradients["heads"]}.items()}
  gradient_norm = optax.tree.norm(norms)
  spike, usual_norm = is_spike(gradient_norm, state.skipped, spike_factor)
  good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(learning_rate) & ~spike
  # A finite gradient can still yield single updates that are not finite, as in Adam without epsilon: these entries keep
  # their values. Skipping the whole step would require storing all new parameters until the last one is known.
  select = partial(jax.tree.map, lambda new, old: jnp.where(good & jnp.isfinite(new), new, old))
  new = State(
    step=state.step + 1,
    params=select(params, state.params),
    opt_state=select(opt_state, state.opt_state),
    collections=select(collections, state.collections),
    skipped={
      "total": state.skipped["total"] + ~good,
      "in_a_row": jnp.where(good, 0, state.skipped["in_a_row"] + 1),
      **select(usual_norm, {name: state.skipped[name] for name in usual_norm}),
    },
    average=state.average,
  )
  new = new.replace(average=update_average(new, good, ema))
  metrics |= {"lr": learning_rate, "gradient_norm": gradient_norm}
  metrics |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
  scales = {"temperature": "scale", "dense_temperature": "dense_scale"}
  metrics |= {name: 1 / getattr(outputs, scale) for name, scale in scales.items() if scale in outputs}
  metrics |= {f"skipped_{name}": new.skipped[name] for name in ("total", "in_a_row")}
  return new, metrics | _diagnose_if(is_diagnosed(state.step), diagnose, outputs)


def update_momentum_tower(model: Model, state: State, momentum_decay: Callable[[Step], Scalar]) -> dict[str, Tree]:
  """The momentum tower used in this step, as `{"momentum": ...}`; empty without one.

  It is updated towards the parameters before the step, as in MoCo v3. BYOL updates it after the step, which yields the
  same tower.
  """
  online = model.momentum_copy(state.params)
  if not online:
    return {}
  decay = momentum_decay(state.step)
  return {"momentum": moving_average(state.collections["momentum"], online["momentum"], decay)}


def update_average(state: State, good: Flag, decay: float) -> Tree:
  """The average after a step, moved towards the weights of the state after it; the same after a skipped step.

  The decay of step `n`, counted from 1, is `min(decay, (1 + n) / (10 + n))`, as in TensorFlow's
  ExponentialMovingAverage with `num_updates`: the average soon forgets the initial weights. A weight that does not
  change, such as a frozen one, is equal to its average, bit for bit.

  Args:
    state: state after the step, with the average before it; without an average, the result is empty, too.
    good: whether the step was not skipped.
    decay: largest decay, 0 or more and less than 1.
  """
  if not state.average:
    return state.average
  share = jnp.where(good, jnp.maximum(1 - decay, 9 / (10 + state.step)), 0.0)
  weights = weights_of(state.params, state.collections)
  return jax.tree.map(lambda old, new: old + share * (new - old), state.average, weights)


def is_spike(norm: Scalar, state: dict[str, Array], factor: float) -> tuple[Flag, dict[str, Array]]:
  """Whether a gradient's norm is more than `factor` times the geometric mean of previous norms; never if 0.

  The mean is over all steps of the stage that were not skipped. The first hundred weigh the same and are never spikes;
  then weights decay by 0.99 a step, so that the mean follows training. A spike of the loss shows up here, too, and
  gradient norms work for losses of any sign and scale.

  Args:
    norm: norm of the gradient, float32.
    state: "measured", the number of steps in the mean, and "log_norm", its logarithm.
    factor: largest ratio that is not a spike; 0 for no limit.

  Returns:
    Whether it is a spike, and the state including this norm.
  """
  measured, mean, counts = state["measured"], state["log_norm"], norm > 0  # 0: a loss whose weight is still 0
  log_norm = jnp.log(jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
  spike = (measured >= _SPIKE_WINDOW) & (log_norm > mean + math.log(factor)) if factor else jnp.zeros((), bool)
  weight = 1 / (jnp.minimum(measured, _SPIKE_WINDOW - 1) + 1)
  new = {"measured": jnp.minimum(measured + 1, _SPIKE_WINDOW), "log_norm": mean + weight * (log_norm - mean)}
  return spike, {name: jnp.where(counts, value, state[name]) for name, value in new.items()}


def _clip_logit_scales(params: Tree, bounds: tuple[float, ...]) -> Tree:
  if not bounds:
    return params
  heads = params["heads"]
  clipped = {name: jnp.clip(heads[name], *bounds) for name in ("logit_scale", "dense_logit_scale") if name in heads}
  return {**params, "heads": {**heads, **clipped}}


def _diagnose_if(wanted: Flag, diagnose: Callable[[Outputs], Metrics], outputs: Outputs) -> Metrics:
  outputs = jax.lax.stop_gradient(outputs)
  missing = dict.fromkeys(jax.eval_shape(diagnose, outputs), jnp.float32(0))  # NaN would stop jax_debug_nans
  return jax.lax.cond(wanted, diagnose, lambda _: missing, outputs)
