"""The train step: from one state and one batch to the next, jitted over the mesh."""

from collections.abc import Callable
from functools import partial
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import optax

from declip_jax.models.model import Model
from declip_jax.objectives import diagnostics
from declip_jax.objectives.momentum import moving_average
from declip_jax.training.gradient import Gradient, Metrics
from declip_jax.training.state import State
from declip_jax.types import Batch, Outputs

_MEASURED = 100  # steps over which a gradient's usual norm is measured


def train_step(
  state: State,
  batch: Batch,
  *,
  model: Model,
  optimizer: optax.GradientTransformation,
  schedule: Callable[[Array], Array],
  gradient_of: Gradient,
  momentum: Callable[[Array], Array],
  diagnosed: Callable[[Array], Array],
  augment: Callable[[Batch, Array], Batch] = lambda batch, step: batch,
  measure: Callable[[Outputs], Metrics] = diagnostics.measure,
  logit_scale_range: tuple[float, ...] = (),
  spike: float = 0.0,
) -> tuple[State, Metrics]:
  """One step on one global batch. If loss, gradient or rate is not finite or spikes, only step and `skipped` change.

  Args:
    state, batch: donated, and split over the mesh.
    model, optimizer: pure functions.
    schedule: learning rate of a 0-based step.
    gradient_of: loss and gradient of a batch, see `make_gradient`.
    momentum: of the momentum tower at a step; unused if there is none.
    diagnosed: whether a step also measures `objectives.diagnostics`; otherwise these metrics are NaN.
    augment: what is left to do to the images of a batch, at a step.
    measure: the diagnostics of a step's outputs.
    logit_scale_range: of the log inverse temperatures after the step; () is any.
    spike: how many times its usual norm makes a gradient too large, see `spikes`; 0 takes any.
  """
  before = {**state.collections, **follow(model, state, momentum)}
  batch = augment(batch, state.step)

  (loss, metrics, outputs, collections), gradient = gradient_of(state.params, before, batch, state.step)
  norms = {part: optax.tree.norm(tree) for part, tree in {**gradient["towers"], "heads": gradient["heads"]}.items()}
  gradient_norm = optax.tree.norm(norms)
  update, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  lr = schedule(state.step)
  params = jax.tree.map(lambda param, change: param - lr * change, state.params, update)
  if logit_scale_range:
    scales = {"logit_scale", "dense_logit_scale"} & params["heads"].keys()
    params["heads"] |= {name: jnp.clip(params["heads"][name], *logit_scale_range) for name in scales}
  too_large, usual = spikes(gradient_norm, state.skipped, spike)
  good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(lr) & ~too_large
  # A finite gradient may still give an entry an update that is not, as Adam without an epsilon does: the entry stays as
  # it was. To skip the step for it, all new parameters would have to wait in memory until the last one is known.
  keep = partial(jax.tree.map, lambda new, old: jnp.where(good & jnp.isfinite(new), new, old))
  new = State(
    step=state.step + 1,
    params=keep(params, state.params),
    opt_state=keep(opt_state, state.opt_state),
    collections=keep(collections, state.collections),
    skipped={
      "total": state.skipped["total"] + ~good,
      "in_a_row": jnp.where(good, 0, state.skipped["in_a_row"] + 1),
      **keep(usual, {name: state.skipped[name] for name in usual}),
    },
  )
  metrics |= {"lr": lr, "gradient_norm": gradient_norm}
  metrics |= {f"gradient_norm/{part}": norm for part, norm in norms.items()}
  scales = {"temperature": outputs.scale, "dense_temperature": outputs.dense_scale}
  metrics |= {name: 1 / scale for name, scale in scales.items() if scale is not None}
  metrics |= {f"skipped_{name}": new.skipped[name] for name in ("total", "in_a_row")}
  return new, metrics | _diagnose(measure, outputs, diagnosed(state.step))


def follow(model: Model, state: State, momentum: Callable[[Array], Array]) -> Any:
  """The momentum tower that encodes in this step; empty if there is none.

  It moves towards the parameters first, as in MoCo v3. BYOL moves it behind the update, which is the same tower.
  """
  online = model.momentum_copy(state.params)
  if not online:
    return {}
  return {"momentum": moving_average(state.collections["momentum"], online["momentum"], momentum(state.step))}


def spikes(norm: Array, state: dict[str, Array], factor: float) -> tuple[Array, dict[str, Array]]:
  """Whether a gradient's norm is more than `factor` times the geometric mean of those before it; 0 is never.

  The mean is that of all steps that were not skipped, for the first hundred, which are never too large; then older ones
  fade with the factor 0.99 a step, so that it follows the training. A spiking loss shows here, too, and losses of any
  sign and size can be judged by it.

  Args:
    norm: of the gradient, float32 scalar.
    state: "measured", how many steps are in the mean, and "log_norm", its logarithm.
    factor: see above.

  Returns:
    Whether it is too large, and the state with this norm in it.
  """
  measured, mean, counts = state["measured"], state["log_norm"], norm > 0  # 0: a loss that has not begun
  log_norm = jnp.log(jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
  too_large = (measured >= _MEASURED) & (log_norm > mean + math.log(factor)) if factor else jnp.zeros((), bool)
  share = 1 / (jnp.minimum(measured, _MEASURED - 1) + 1)
  new = {"measured": jnp.minimum(measured + 1, _MEASURED), "log_norm": mean + share * (log_norm - mean)}
  return too_large, {name: jnp.where(counts, value, state[name]) for name, value in new.items()}


def _diagnose(measure: Callable[[Outputs], Metrics], outputs: Outputs, wanted: Array) -> Metrics:
  outputs = jax.lax.stop_gradient(outputs)
  names = jax.eval_shape(measure, outputs)
  nothing = dict.fromkeys(names, jnp.float32(jnp.nan))
  return jax.lax.cond(wanted, measure, lambda _: nothing, outputs)
