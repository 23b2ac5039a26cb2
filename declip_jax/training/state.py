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
  """

  step: Leaf
  params: Tree
  opt_state: Tree
  collections: Tree
  skipped: dict[str, Leaf]


def init_state(seed: int, batch: Batch, *, model: Model, optimizer: optax.GradientTransformation) -> State:
  """The state before the first step."""
  params, collections = model.init(jax.random.key(seed), batch)
  zero = jnp.zeros((), jnp.int32)
  skipped = {"total": zero, "in_a_row": zero, "measured": zero, "log_norm": jnp.zeros((), jnp.float32)}
  return State(zero, params, optimizer.init(params), collections, skipped)


def abstract_state(batch: BatchShapes, mesh: Mesh, *, model: Model, optimizer: optax.GradientTransformation) -> State:
  """Shapes, dtypes and shardings of the state, without computing anything."""
  shapes = jax.eval_shape(lambda batch: init_state(0, batch, model=model, optimizer=optimizer), batch)
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
    return init_state(seed, zeros, model=model, optimizer=optimizer)

  return jax.jit(init, out_shardings=shardings)()
