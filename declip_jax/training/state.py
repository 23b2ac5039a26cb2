"""The train state: everything that a step changes, and therefore everything that a checkpoint contains."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from declip_jax.models.model import Model
from declip_jax.sharding import shard_like
from declip_jax.types import Batch, BatchShapes

Tree = Any
Leaf = Any  # an array; or its shape, its sharding and so on in trees that describe a state


@struct.dataclass
class State:
  """The input and output of a step. Random keys are not part of it: they are derived from the step.

  Attributes:
    step: number of steps taken or skipped, int32.
    params: float32, under "towers" and "heads".
    opt_state: the optimiser's state.
    collections: batch statistics and the neighbour bank, under "towers" and "heads"; under "momentum" the momentum
      tower's parameters, if a term needs one.
    skipped: the number of steps without an update because the loss, gradient or learning rate was not finite or the
      gradient spiked, in "total" and most recently "in_a_row"; and the statistics that spikes are detected by, see
      `step.is_spike`.
    average: the moving average of what `weights_of` lists, see `step.update_average`; empty for none.
  """

  step: Leaf
  params: Tree
  opt_state: Tree
  collections: Tree
  skipped: dict[str, Leaf]
  average: Tree = struct.field(default_factory=dict)


def init_state(
  seed: int, batch: Batch, *, model: Model, optimizer: optax.GradientTransformation, averaged: bool = False
) -> State:
  """The state before the first step; with `averaged`, it has an average of the weights."""
  params, collections = model.init(jax.random.key(seed), batch)
  zero = jnp.zeros((), jnp.int32)
  skipped = {"total": zero, "in_a_row": zero, "measured": zero, "log_norm": jnp.zeros((), jnp.float32)}
  state = State(zero, params, optimizer.init(params), collections, skipped)
  return start_average(state) if averaged else state


def weights_of(params: Tree, collections: Tree) -> Tree:
  """The arrays that are averaged: `{"params": params, "batch_stats": {"towers": ..., "heads": ...}}`.

  Running means and variances of batch norms belong to the parameters that they were measured with, so they are averaged
  too, as in EfficientNet's code, timm's `ModelEmaV3` and torchvision's `ExponentialMovingAverage`. The neighbour bank
  and the momentum tower are not: evaluations do not read them.
  """
  halves = {half: collections.get(half, {}) for half in ("towers", "heads")}
  statistics = {half: entries["batch_stats"] for half, entries in halves.items() if "batch_stats" in entries}
  return {"params": params, "batch_stats": statistics}


def with_weights(collections: Tree, weights: Tree) -> tuple[Tree, Tree]:
  """Parameters and collections, with the arrays of `weights_of` in place of the collections' own ones."""
  statistics = weights["batch_stats"].items()
  replaced = {half: {**collections.get(half, {}), "batch_stats": arrays} for half, arrays in statistics}
  return weights["params"], {**collections, **replaced}


def evaluated_weights(state: State) -> tuple[Tree, Tree]:
  """The parameters and collections that evaluations read: those of the average, if there is one."""
  return with_weights(state.collections, state.average) if state.average else (state.params, state.collections)


def start_average(state: State) -> State:
  """The state with an average that starts from its weights; they are copied, since a step donates both."""
  return state.replace(average=jax.tree.map(jnp.copy, weights_of(state.params, state.collections)))


def abstract_state(
  batch: BatchShapes, mesh: Mesh, *, model: Model, optimizer: optax.GradientTransformation, averaged: bool = False
) -> State:
  """Shapes, dtypes and shardings of the state, without computing anything; see `init_state`."""
  options = {"model": model, "optimizer": optimizer, "averaged": averaged}
  shapes = jax.eval_shape(lambda batch: init_state(0, batch, **options), batch)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    shard_like(shapes, mesh),
  )


def create_state(
  seed: int, batch: BatchShapes, abstract: State, *, model: Model, optimizer: optax.GradientTransformation
) -> State:
  """Computes the initial state directly into its shards, so that no device ever holds all of it."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

  def init() -> State:
    # Only the shapes of the batch matter, and zeros inside jit cost nothing.
    zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in batch.items()}
    return init_state(seed, zeros, model=model, optimizer=optimizer, averaged=bool(abstract.average))

  return jax.jit(init, out_shardings=shardings)()
