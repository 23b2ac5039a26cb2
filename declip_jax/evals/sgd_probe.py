"""Linear probe by gradient descent on batches of features: that of SLIP and MoCo v3, and CLIP_benchmark's.

All learning rates are trained at once, as the columns of one wide head that share every batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Float64, Int
import numpy as np
import optax

from declip_jax.evals.rows import Labelled, Layout, ProbeData
from declip_jax.runtime.hosts import gather_rows
from declip_jax.sharding import batch_rows, batch_sharding, replicated
from declip_jax.unit_norm import unit_norm

# Absolute, not to be multiplied by the batch size. SLIP's is 0.01 on ImageNet, with the batch size of 1,024 below; MoCo
# v3's are 12 for a ViT and 0.4 for a ResNet-50.
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a head is trained, with a cosine from its learning rate to 0.

  Attributes:
    optimizer: gradient transformation without learning rate and decay.
    epochs: passes over the training split.
    batch_size: rows of a step; the last batch of an epoch may be smaller.
    cosine_by_epoch: whether the learning rate changes after each epoch, or else after each step.
    unit_norm: whether rows are divided by their norm.
    weight_decay: decoupled decay of kernel and bias.
  """

  optimizer: optax.GradientTransformation
  epochs: int
  batch_size: int
  cosine_by_epoch: bool
  unit_norm: bool
  weight_decay: float


# SLIP (Mu et al. 2021, section 4.1) and MoCo v3 (Chen et al. 2021); torch's momentum.
SGD = Recipe(optax.trace(0.9), epochs=100, batch_size=1024, cosine_by_epoch=True, unit_norm=False, weight_decay=0.0)
# CLIP_benchmark 1.6, whose rate is 0.1; it also tunes the decay.
ADAMW = Recipe(optax.scale_by_adam(), epochs=10, batch_size=64, cosine_by_epoch=False, unit_norm=True, weight_decay=0.0)
RECIPES = {"sgd": SGD, "adamw": ADAMW}


class Heads(NamedTuple):
  """Linear heads trained with `r` learning rates, and the mean training loss of each epoch."""

  kernel: Float[Array, "r f k"]
  bias: Float[Array, "r k"]
  loss: Float32[np.ndarray, "epochs r"]


@dataclasses.dataclass(frozen=True)
class SgdResult:
  """The head with the best learning rate.

  Attributes:
    rate: chosen learning rate.
    val_scores: score of the validation split by learning rate, without those at which the head diverged.
    loss: mean training loss of each epoch at the chosen rate.
    scores: logits of the test rows of all hosts; -inf for a class without training data.
    label: labels of these rows.
  """

  rate: float
  val_scores: dict[float, float]
  loss: Float64[np.ndarray, "epochs"]
  scores: Float32[np.ndarray, "n k"]
  label: Int[np.ndarray, "n"]


def sgd_probe(data: ProbeData, *, recipe: Recipe = SGD, rates: Sequence[float] = RATES, seed: int = 0) -> SgdResult:
  """Trains a head with each learning rate, chooses one on the validation split, and scores the test split.

  The papers report the best of several rates on the test split. Features are computed once, so that there is no
  augmentation, which the papers have. Every host has to call this.

  Args:
    data: splits with one label per row, one for validation among them, and the metric that chooses the learning rate.
    recipe: how heads are trained.
    rates: learning rates.
    seed: seed of initial kernel, normal with deviation 0.01, and of the order of rows.

  Raises:
    ValueError: a split is unusable, see `check_rows`, or has several labels or none; or every head diverged.
  """
  data.check()
  train, val, classes, mesh = data.train, data.val, data.classes, data.mesh
  if val is None:
    raise ValueError("val: no rows; the learning rate is chosen on them")
  if train.label.ndim == 2:
    raise ValueError("train: several labels per row; a probe by gradient descent needs one")
  label = gather_rows(train.label)
  labelled, rng = np.flatnonzero(label >= 0), np.random.default_rng(seed)
  if not len(labelled):
    raise ValueError("train: no labelled rows")
  kernel = rng.normal(0, 0.01, (train.features.shape[1], classes)).astype(np.float32)
  order = (labelled[rng.permutation(len(labelled))] for _ in range(recipe.epochs))
  heads = train_heads(train, order, kernel, mesh, recipe, rates)
  answered = np.bincount(label[labelled], minlength=classes) > 0
  val_label, val_scores = gather_rows(val.label), {}
  for column, logits in enumerate(_logits(val, heads, mesh, recipe)):
    if np.isfinite(logits).all():
      scores = np.where(answered, logits, np.float32(-np.inf))
      value = float(data.score(scores[val_label >= 0], val_label[val_label >= 0]))
      if math.isnan(value):
        raise ValueError(f"the score of the validation split is NaN with the learning rate {rates[column]:g}")
      val_scores[rates[column]] = value
  if not val_scores:
    raise ValueError(f"the head diverged with each of the learning rates {', '.join(f'{rate:g}' for rate in rates)}")
  rate = max(val_scores, key=lambda rate: (val_scores[rate], -rate))
  chosen = rates.index(rate)
  best = Heads(heads.kernel[chosen : chosen + 1], heads.bias[chosen : chosen + 1], heads.loss)
  (logits,) = _logits(data.test, best, mesh, recipe)
  return SgdResult(
    rate=rate,
    val_scores=val_scores,
    loss=heads.loss[:, chosen].astype(np.float64),
    scores=np.where(answered, logits, np.float32(-np.inf)),
    label=gather_rows(data.test.label),
  )


def train_heads(
  train: Labelled,
  order: Iterable[Int[np.ndarray, "n"]],
  kernel: Float32[np.ndarray, "f k"],
  mesh: Mesh,
  recipe: Recipe,
  rates: Sequence[float],
) -> Heads:
  """Trains one head with each learning rate; every host has to call this.

  Args:
    train: rows of this host.
    order: the rows of each epoch in turn, as numbers of the rows of all hosts, one host after the other; as many of
      them for each epoch.
    kernel: initial kernel of every head; the bias starts at 0.
    mesh: devices to compute on.
    recipe: how heads are trained.
    rates: learning rates.
  """
  layout = Layout.make(len(train.features), mesh)
  features, label = (
    layout.place(train.features.astype(np.float32, copy=False)),
    layout.place(train.label.astype(np.int32), fill=-1),
  )
  place = gather_rows(batch_rows(batch_sharding(mesh), features.shape[0])[: len(train.features)].astype(np.int32))
  each, losses = np.asarray(rates, np.float32), []
  start, train_epoch = _train(mesh, recipe)
  carry = start(np.broadcast_to(kernel, (len(each), *kernel.shape)))
  for epoch, rows in enumerate(order):
    padding = np.full(-len(rows) % recipe.batch_size, -1, np.int32)
    batches = np.concatenate([place[rows], padding]).reshape(-1, recipe.batch_size)
    steps = epoch * len(batches) + np.arange(len(batches))
    counted = np.full_like(steps, steps[0]) if recipe.cosine_by_epoch else steps
    factors = ((1 + np.cos(np.pi * counted / (recipe.epochs * len(batches)))) / 2).astype(np.float32)
    carry, loss = train_epoch(features, label, batches, factors, each, carry)
    losses.append(np.asarray(loss))  # waits, so that the order of one epoch at a time is on the devices
  return Heads(*carry[0], np.stack(losses))


@functools.cache
def _train(mesh: Mesh, recipe: Recipe) -> tuple[Callable[..., tuple], Callable[..., tuple[tuple, Array]]]:
  """Compiled functions from a kernel for each rate to the carry of training, and of one epoch to the next carry."""

  def loss(head: tuple[Array, Array], rows: Array, label: Array) -> tuple[Array, Array]:
    kernel, bias = head
    losses = optax.softmax_cross_entropy_with_integer_labels(
      jnp.einsum("bf,rfk->brk", rows, kernel) + bias[None], jnp.broadcast_to(label[:, None], (len(label), len(bias)))
    )
    each = jnp.where(label[:, None] >= 0, losses, 0).sum(axis=0)
    return each.sum() / jnp.sum(label >= 0), each

  def start(kernel: Array) -> tuple:
    head = kernel, jnp.zeros((kernel.shape[0], kernel.shape[2]))
    return head, recipe.optimizer.init(head)

  def epoch(features: Array, label: Array, batches: Array, factors: Array, rates: Array, carry: tuple) -> Any:
    def step(carry: tuple, batch: tuple[Array, Array]) -> tuple[tuple, Array]:
      head, state = carry
      index, factor = batch
      rows = jax.lax.with_sharding_constraint(features[index], batch_sharding(mesh))
      rows = unit_norm(rows) if recipe.unit_norm else rows
      gradient, each = jax.grad(loss, has_aux=True)(head, rows, jnp.where(index >= 0, label[index], -1))
      updates, state = recipe.optimizer.update(gradient, state)

      def move(x: Array, update: Array) -> Array:
        rate = (rates * factor).reshape(-1, *(1,) * (x.ndim - 1))
        return x - rate * (update + recipe.weight_decay * x)

      return (jax.tree.map(move, head, updates), state), each

    with jax.default_matmul_precision("highest"):
      carry, losses = jax.lax.scan(step, carry, (batches, factors))
    return carry, losses.sum(axis=0) / jnp.sum(batches >= 0)

  return jax.jit(start, out_shardings=replicated(mesh)), jax.jit(epoch, out_shardings=replicated(mesh))


def _logits(rows: Labelled, heads: Heads, mesh: Mesh, recipe: Recipe) -> Iterator[Float32[np.ndarray, "n k"]]:
  """Logits of the rows of all hosts by each head."""
  layout = Layout.make(len(rows.features), mesh)
  features = layout.place(rows.features.astype(np.float32, copy=False))
  for kernel, bias in zip(heads.kernel, heads.bias, strict=True):
    yield layout.fetch(_apply(features, kernel, bias, recipe.unit_norm))


@functools.partial(jax.jit, static_argnums=3)
def _apply(rows: Float[Array, "n f"], kernel: Float[Array, "f k"], bias: Float[Array, "k"], unit: bool) -> Array:
  with jax.default_matmul_precision("highest"):
    return (unit_norm(rows) if unit else rows) @ kernel + bias[None]
