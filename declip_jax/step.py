"""The train step: from one state and one batch to the next, jitted over the mesh."""

from collections.abc import Callable
from functools import partial
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict
import optax

from declip_jax import augment as augmentation
from declip_jax import objectives, optim, run
from declip_jax.gradient import Gradient, Metrics, make_gradient
from declip_jax.models.model import Model
from declip_jax.objectives import diagnostics
from declip_jax.objectives.blockwise import PLAIN, Form
from declip_jax.objectives.momentum import momentum_at, moving_average
from declip_jax.sharding import gather, replicated
from declip_jax.state import State
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


def make_schedule(config: ConfigDict, steps: run.Steps) -> Callable[[Array], Array]:
  """The learning rate of a config as a function of the step."""
  optimizer = config.optimizer
  return optim.make_schedule(
    optimizer.schedule,
    peak=optimizer.learning_rate,
    warmup_steps=steps.warmup,
    total_steps=steps.total,
    start=optimizer.warmup_start,
    end=optimizer.end,
    milestones=optimizer.milestones,
    cooldown_steps=steps.cooldown,
    cooldown_power=optimizer.cooldown_power,
  )


def make_step(
  config: ConfigDict, parts: run.Parts, steps: run.Steps, abstract: State
) -> Callable[[State, Batch], tuple[State, Metrics]]:
  """`train_step` compiled for the mesh; the state that goes in is donated to the one that comes out.

  Raises:
    ValueError: a name that does not exist, or a batch that cannot be divided as the config says.
  """
  _check_parts(config, parts.mesh.size)
  every, last = config.log_every or steps.total, steps.total
  step = partial(
    train_step,
    model=parts.model,
    optimizer=parts.optimizer,
    schedule=make_schedule(config, steps),
    gradient_of=make_gradient(
      config.micro_batching,
      config.micro_batches,
      model=parts.model,
      objective=make_objective(config, parts.mesh),
      frozen=config.optimizer.frozen,
      gather=partial(gather, mesh=parts.mesh, dtype=jnp.dtype(config.model.dtype)),
    ),
    momentum=lambda step: momentum_at(step, last, config.momentum),
    diagnosed=lambda step: ((step + 1) % every == 0) | (step + 1 == last),
    augment=make_augment(config, parts),
    measure=partial(diagnostics.measure, pooled=not objectives.compares_tokens(config.weights)),
    logit_scale_range=config.optimizer.logit_scale_range,
    spike=config.divergence.spike,
  )
  layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return jax.jit(step, donate_argnums=0, out_shardings=(layout, replicated(parts.mesh)))


def _check_parts(config: ConfigDict, devices: int) -> None:
  """Refuses a batch that does not divide into the parts that a config asks for."""
  count = config.micro_batches
  if count > 1 and config.batch_size % (count * devices):
    raise ValueError(
      f"config.micro_batches={count}: config.batch_size={config.batch_size} does not divide into so many parts for "
      f"each of {devices} devices"
    )
  compared = config.batch_size // (max(count, 1) if config.micro_batching == "plain" else 1)  # at once
  for name in ("norm_groups", "bank_groups"):
    groups = config.model.heads[name]
    if config.micro_batching == "plain" and count > 1 and compared % groups:
      raise ValueError(
        f"config.micro_batches={count}: config.model.heads.{name}={groups} does not divide a part of {compared}"
      )
  form, block = config.contrast.form, config.contrast.block
  candidates = compared // devices if form == "ring" else compared  # a ring sees those of one device at a time
  if block > 0 and form != "plain" and candidates % block:
    raise ValueError(
      f"config.contrast.block={block} does not divide the {candidates} candidates that config.contrast.form={form!r} "
      f"compares on {devices} devices at a time"
    )


def make_augment(config: ConfigDict, parts: run.Parts) -> Callable[[Batch, Array], Batch]:
  """What the host leaves to the step with `config.data.augment_on="device"`: colours, blur and flips of image views."""
  if config.data.augment_on == "host":
    return lambda batch, step: batch

  def augment(batch: Batch, step: Array) -> Batch:
    # Folded twice: folded by 0 and 1, the key of the seed would give the keys that parameters are drawn from.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1), step)
    index = jnp.arange(len(batch["image"]))
    return {**batch, "image": augmentation.augment(batch["image"], key, index, parts.recipe.augmentations)}

  return augment


def make_objective(config: ConfigDict, mesh: Mesh | None) -> objectives.Objective:
  """The weighted terms of a config, whose comparisons of all pairs are split over a mesh."""
  form = Form(config.contrast.form, mesh, config.contrast.block) if mesh is not None else PLAIN
  return objectives.make_objective(config.weights, config.weight_schedule, config.terms, form)


def check_objective(config: ConfigDict, model: Model, batch: Batch) -> None:
  """Traces the forward pass without computing it, and refuses terms whose inputs the recipe does not give.

  Raises:
    ValueError: names term, field and recipe.
  """
  objective = make_objective(config, None)

  def forward(batch: Batch) -> Any:
    params, collections = model.init(jax.random.key(0), batch)
    outputs, _ = model.apply_heads(params, collections, model.encode(params, collections, batch)[0])
    objectives.check_inputs(outputs, config.weights, config.data.recipe)
    return objective(outputs, batch, jnp.zeros((), jnp.int32))

  jax.eval_shape(forward, batch)
