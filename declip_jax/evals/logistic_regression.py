"""Logistic regression with an L2 penalty, fitted on all devices of a mesh: the model of a linear probe.

The objective is scikit-learn's, C * sum of losses + |kernel|^2 / 2 with a free bias, divided by C * rows, so that its
gradient is that of a mean loss. Two classes have one vector of weights, as in scikit-learn: a softmax of two vectors
would be the model of 2 C. It is convex, and L-BFGS (Liu & Nocedal 1989) minimises it for several strengths at once,
which share every pass over the features. The rows are split over the devices, and a pass goes through them in blocks,
so that the logits of all rows never exist at once.

L-BFGS works in coordinates in which the curvature at zero is 1 for every C: along the principal axes of the centred
features, each divided by the root of its curvature. This only changes variables; penalty, gradient and tolerance are
those of the features as given.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped
import numpy as np
import optax

from declip_jax.evals.rows import BLOCK, num_blocks
from declip_jax.sharding import replicated

TOLERANCE = 1e-5  # largest entry of the gradient at which a fit may end
_ITERATIONS = 1000  # limit of CLIP's probes (Radford et al. 2021, A.3)
_MEMORY = 10  # pairs of differences that L-BFGS keeps
# A step is taken if the objective decreases by this share of what the slope promises, or, where it changes by less than
# its rounding errors, if the slope has decreased (Hager & Zhang 2005, section 2).
_DECREASE, _ROUNDING = 1e-4, 1e-6
# A fit continues while a step is expected to decrease the objective by more than this share of it. Otherwise fits of
# separable classes, whose objective and gradient are close to 0, would end far from the optimum or where they started.
_PROMISE = 1e-6
_LEAST_VARIANCE = 1e-3  # of the mean; less would enlarge rounding errors along axes that hardly vary
_SHORTEST = 1e-6  # a fit whose steps become shorter has met the rounding errors of its gradient, and ends

Tree = Any


class Data(NamedTuple):
  """Rows on the devices of a mesh, split over all of them.

  Attributes:
    features: one row per example.
    target: class of each row, -1 for a row that does not count; or, for independent yes-no questions, 1, -1, and 0 for
      a row that does not count.
  """

  features: Float[Array, "rows f"]
  target: Int[Array, "rows"] | Int[Array, "rows k"]


class Linear(NamedTuple):
  """A linear classifier of centred features; with a leading axis `m` several of them."""

  kernel: Float[Array, "*m f k"]
  bias: Float[Array, "*m k"]


class Axes(NamedTuple):
  """Mean of the features, their principal axes (columns), and the variance along each."""

  mean: Float[np.ndarray, "f"]
  axis: Float[np.ndarray, "f f"]
  variance: Float[np.ndarray, "f"]


class Fits(NamedTuple):
  """Results of fits that share their passes.

  Attributes:
    linear: classifiers.
    objective: mean loss and penalty.
    gradient: largest entry of the gradient of the objective.
    iterations: steps of L-BFGS.
    passes: evaluations of the objective.
  """

  linear: Linear
  objective: Float[Array, "m"]
  gradient: Float[Array, "m"]
  iterations: Int[Array, "m"]
  passes: Int[Array, "m"]


class _Problem(NamedTuple):
  """The penalty of a fit, and the length of a step of 1 along each axis in the coordinates of the search."""

  penalty: Float[Array, "m"]
  scale: Float[Array, "m f"]


class _Search(NamedTuple):
  """The state of L-BFGS, with a leading axis of `m` problems: the last accepted point, and the step to try from it."""

  problem: _Problem
  point: Linear
  objective: Float[Array, "m"]
  gradient: Linear
  largest: Float[Array, "m"]
  direction: Linear
  memory: Tree
  step: Float[Array, "m"]
  iterations: Int[Array, "m"]
  passes: Int[Array, "m"]


def principal_axes(data: Data, mesh: Mesh) -> Axes:
  """The axes of all rows that count; every host has to call this."""
  mean, covariance = jax.tree.map(np.asarray, _moments(mesh)(data))
  variance, axis = np.linalg.eigh(covariance.astype(np.float64))
  variance = np.maximum(variance, _LEAST_VARIANCE * variance.mean())
  axes = Axes(mean, axis.astype(np.float32), variance.astype(np.float32))
  if jax.process_count() > 1:  # hosts of different kinds may choose different signs
    axes = Axes(*multihost_utils.broadcast_one_to_all(tuple(axes)))
  return axes


def fit(
  data: Data,
  axes: Axes,
  strengths: Sequence[float],
  answered: Bool[np.ndarray, "k"],
  mesh: Mesh,
  start: Linear | None = None,
  *,
  tolerance: float = TOLERANCE,
) -> Fits:
  """Fits one classifier for each strength; every host has to call this. It compiles once per shape.

  Args:
    data: rows to fit.
    axes: coordinates of the search, `principal_axes` of about the same rows.
    strengths: scikit-learn's C, one per classifier; CLIP's lambda is 1 / C.
    answered: columns that have data; the others stay zero, and a softmax leaves them out.
    mesh: devices of the rows.
    start: classifiers to start from, such as those of a neighbouring C; zeros by default.
    tolerance: largest entry of the gradient at which a fit may end.
  """
  if start is None:
    shape = (len(strengths), data.features.shape[1], len(answered))
    start = Linear(np.zeros(shape, np.float32), np.zeros((shape[0], shape[2]), np.float32))
  return compiled_fit(mesh)(data, axes, np.asarray(strengths, np.float32), answered, start, np.float32(tolerance))


def logits(data: Float[Array, "rows f"], axes: Axes, linear: Linear, mesh: Mesh) -> Float[Array, "rows k"]:
  """Logits of one classifier for rows on the devices, split as the rows are."""
  return _logits(mesh)(data, axes.mean, linear)


@functools.cache
def _logits(mesh: Mesh) -> Callable[..., Float[Array, "rows k"]]:
  @jax.jit
  def compute(features: Array, mean: Array, linear: Linear) -> Array:
    with jax.default_matmul_precision("highest"):
      return (features - mean[None]) @ linear.kernel + linear.bias[None]

  return compute


@functools.cache
def _moments(mesh: Mesh) -> Callable[[Data], tuple[Array, Array]]:
  def counts(target: Array) -> Array:
    return (target >= 0 if target.ndim == 1 else (target != 0).any(axis=1)).astype(jnp.float32)

  def first(_: None, features: Array, target: Array) -> tuple[Array, Array]:
    weight = counts(target)
    return weight.sum(), weight @ features

  def second(mean: Array, features: Array, target: Array) -> Array:
    centred = (features - mean[None]) * counts(target)[:, None]
    return centred.T @ centred

  def moments(data: Data) -> tuple[Array, Array]:
    with jax.default_matmul_precision("highest"):
      rows, total = sum_over_rows(first, None, data, mesh)
      mean = total / rows
      return mean, sum_over_rows(second, mean, data, mesh) / rows

  return jax.jit(moments, out_shardings=replicated(mesh))


@functools.cache
def compiled_fit(mesh: Mesh) -> Callable[..., Fits]:
  """The program that `fit` calls, with the arguments of `fit_program`."""

  def compiled(*arguments: Any) -> Fits:
    with jax.default_matmul_precision("highest"):
      return fit_program(*arguments, mesh=mesh)

  return jax.jit(compiled, out_shardings=replicated(mesh))


def fit_program(
  data: Data,
  axes: Axes,
  strength: Float[Array, "m"],
  answered: Bool[Array, "k"],
  start: Linear,
  tolerance: Float[Array, ""],
  *,
  mesh: Mesh,
) -> Fits:
  """The program that `fit` calls: from rows, axes and first classifiers to the classifiers at the optimum."""
  questions, rows = data.target.ndim == 2, _count(data.target)
  penalty = 1 / (strength * rows)
  curvature = 1 / 4 if questions else 1 / len(answered)  # of the loss at zero, along an axis of variance 1
  problem = _Problem(penalty, 1 / jnp.sqrt(axes.variance[None] * curvature + penalty[:, None]))
  bias_scale = curvature**-0.5

  def original(scale: Array, point: Linear) -> Linear:
    return Linear(jnp.einsum("fa,mak->mfk", axes.axis, scale[..., None] * point.kernel), bias_scale * point.bias)

  def evaluate(problem: _Problem, point: Linear) -> tuple[Array, Linear, Array]:
    penalty, scale = problem
    linear = original(scale, point)
    loss, gradient = loss_and_gradient(data, axes.mean, linear, answered, mesh)
    objective = loss / rows + penalty / 2 * jnp.sum(linear.kernel**2, axis=(1, 2))
    gradient = Linear(gradient.kernel / rows + penalty[:, None, None] * linear.kernel, gradient.bias / rows)
    largest = jnp.maximum(jnp.abs(gradient.kernel).max(axis=(1, 2)), jnp.abs(gradient.bias).max(axis=1))
    along_axes = scale[..., None] * jnp.einsum("fa,mfk->mak", axes.axis, gradient.kernel)
    return objective, Linear(along_axes, bias_scale * gradient.bias), largest

  along_axes = jnp.einsum("fa,mfk->mak", axes.axis, start.kernel) / problem.scale[..., None]
  many = len(data.target) > BLOCK * mesh.size  # of fewer rows, passes take less time than compiling
  end = _minimise(evaluate, problem, Linear(along_axes, start.bias / bias_scale), tolerance, shrink=many)
  return Fits(original(problem.scale, end.point), end.objective, end.largest, end.iterations, end.passes)


def _count(target: Int[Array, "rows"] | Int[Array, "rows k"]) -> Float[Array, ""]:
  counts = target >= 0 if target.ndim == 1 else (target != 0).any(axis=1)
  return counts.sum(dtype=jnp.int32).astype(jnp.float32)


def loss_and_gradient(
  data: Data, mean: Float[Array, "f"], linear: Linear, answered: Bool[Array, "k"], mesh: Mesh
) -> tuple[Float[Array, "m"], Linear]:
  """Sums over all rows of the losses of `m` classifiers and of their gradients: one pass."""

  def of_block(shared: tuple, features: Array, target: Array) -> tuple[Array, Linear]:
    mean, linear, answered = shared
    centred = features - mean[None]

    def total(linear: Linear) -> tuple[Array, Array]:
      each = _sum_pairwise(
        _losses(jnp.einsum("bf,mfk->bmk", centred, linear.kernel) + linear.bias[None], target, answered)
      )
      return each.sum(), each

    (_, each), gradient = jax.value_and_grad(total, has_aux=True)(linear)
    return each, gradient

  return sum_over_rows(of_block, (mean, linear, answered), data, mesh)


def _losses(
  logits: Float[Array, "b m k"], target: Int[Array, "b"] | Int[Array, "b k"], answered: Bool[Array, "k"]
) -> Float[Array, "b m"]:
  """Cross-entropy of the classes that are answered, or the sum of the logistic losses of independent questions."""
  if target.ndim == 2:
    sign = target[:, None].astype(logits.dtype)
    counts = answered[None, None] & (sign != 0)
    return jnp.where(counts, jax.nn.softplus(-sign * logits), 0).sum(axis=2)
  logits = jnp.where(answered[None, None], logits, -jnp.inf)
  # Comparing is faster than indexing, whose gradient would scatter.
  is_target = target[:, None, None] == jnp.arange(logits.shape[2])[None, None]
  right = jnp.where(is_target, logits, 0).sum(axis=2)
  return jnp.where(target[:, None] >= 0, jax.nn.logsumexp(logits, axis=2) - right, 0)


def _sum_pairwise(x: Float[Array, "b m"]) -> Float[Array, "m"]:
  """Sum over rows; compilers add up one row after the other, which would lose digits."""
  group = max(size for size in (1, 8, 64, 128) if x.shape[0] % size == 0)
  return x.reshape(-1, group, x.shape[1]).sum(axis=0).sum(axis=0)


def sum_over_rows(
  function: Callable[..., Tree], shared: Tree, data: tuple[Shaped[Array, "..."], ...], mesh: Mesh
) -> Tree:
  """Sum over all blocks of all devices of what a function computes from a block, on every device.

  Rounding errors do not grow with the number of blocks (Kahan's compensated sum).

  Args:
    function: called as `function(shared, *block)`.
    shared: arrays that every device has.
    data: arrays that are split over the devices.
    mesh: the devices.
  """
  split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

  def of_device(shared: Tree, mine: tuple[Array, ...]) -> Tree:
    count = num_blocks(len(mine[0]))
    blocks = tuple(x.reshape(count, x.shape[0] // count, *x.shape[1:]) for x in mine)
    shapes = jax.eval_shape(function, shared, *(x[0] for x in blocks))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(carry: tuple[Tree, Tree], block: tuple[Array, ...]) -> tuple[tuple[Tree, Tree], None]:
      total, lost = carry
      term = jax.tree.map(jnp.subtract, function(shared, *block), lost)
      new = jax.tree.map(jnp.add, total, term)
      return (new, jax.tree.map(lambda n, t, x: (n - t) - x, new, total, term)), None

    (total, _), _ = jax.lax.scan(add, (zeros, zeros), blocks)
    return jax.lax.psum(total, mesh.axis_names)

  summed = jax.shard_map(of_device, mesh=mesh, in_specs=(whole, split), out_specs=whole, check_vma=False)
  return summed(shared, tuple(data))


def _minimise(
  evaluate: Callable[[_Problem, Linear], tuple[Array, Linear, Array]],
  problem: _Problem,
  start: Linear,
  tolerance: Float[Array, ""],
  *,
  shrink: bool,
) -> _Search:
  """L-BFGS for `m` convex problems that share the evaluations of their objectives.

  Directions and memory are those of `optax.lbfgs`; its line search is not used, since a vectorised `lax.cond` computes
  both branches, and each is a pass. Here every evaluation moves every problem: to its next point, or to a shorter step.
  A convex problem needs no longer ones: the difference of two of its gradients always has positive curvature.

  Args:
    evaluate: function from problems and points to objectives, gradients, and the entries that `tolerance` limits.
    problem: what tells the problems apart.
    start: first points.
    tolerance: see `fit`.
    shrink: whether, once half of the problems have ended, the others continue without them at half the cost of an
      evaluation, and so on. Each halving adds a loop to compile.
  """
  direction_of = jax.vmap(optax.scale_by_lbfgs(_MEMORY).update)
  memory = jax.vmap(optax.scale_by_lbfgs(_MEMORY).init)(start)

  def at(problem: _Problem, point: Linear, memory: Tree, iterations: Array, passes: Array) -> _Search:
    objective, gradient, largest = evaluate(problem, point)
    direction, memory = direction_of(gradient, memory, point)
    step = jnp.ones_like(objective)
    return _Search(problem, point, objective, gradient, largest, direction, memory, step, iterations, passes)

  def running(now: _Search) -> Bool[Array, "m"]:
    promise = _dot(now.gradient, now.direction) / 2  # of a step to the minimum of a quadratic objective
    unfinished = (now.largest > tolerance) | (promise > _PROMISE * now.objective)
    return unfinished & (now.iterations < _ITERATIONS) & (now.step > _SHORTEST)

  def advance(now: _Search) -> _Search:
    active, slope = running(now), -_dot(now.gradient, now.direction)
    now = now._replace(passes=now.passes + active)
    point = jax.tree.map(lambda p, d: p - _expand(now.step, d) * d, now.point, now.direction)
    new = at(now.problem, point, now.memory, now.iterations + 1, now.passes)
    change = new.objective - now.objective
    decreased = change <= _DECREASE * now.step * slope
    flatter = -_dot(new.gradient, now.direction) <= (2 * _DECREASE - 1) * slope
    within_rounding = change <= _ROUNDING * jnp.abs(now.objective)
    accepted = active & (slope < 0) & (decreased | (within_rounding & flatter))
    # The minimum of the parabola through both values and the slope; NaN where the objective is not finite.
    parabola = -slope * now.step**2 / (2 * (change - now.step * slope))
    shorter = now.step * jnp.nan_to_num(jnp.clip(parabola / now.step, 0.1, 0.5), nan=0.1)
    rejected = now._replace(step=jnp.where(active, jnp.where(slope < 0, shorter, 0), now.step))
    return jax.tree.map(lambda a, b: jnp.where(_expand(accepted, a), a, b), new, rejected)

  def solve(now: _Search) -> _Search:
    size = len(now.objective)
    fewer = (size + 1) // 2 if shrink and size > 1 else 0
    now = jax.lax.while_loop(lambda now: running(now).sum() > fewer, advance, now)
    if not fewer:
      return now
    kept = jnp.argsort(~running(now))[:fewer]  # those that run come first
    ended = solve(jax.tree.map(lambda x: x[kept], now))
    return jax.tree.map(lambda x, y: x.at[kept].set(y), now, ended)

  zeros = jnp.zeros(start.bias.shape[0], jnp.int32)
  return solve(at(problem, start, memory, zeros, zeros + 1))


def _dot(a: Linear, b: Linear) -> Float[Array, "m"]:
  return jnp.sum(a.kernel * b.kernel, axis=(1, 2)) + jnp.sum(a.bias * b.bias, axis=1)


def _expand(x: Shaped[Array, "m"], like: Shaped[Array, "m ..."]) -> Shaped[Array, "m ..."]:
  return x.reshape(x.shape + (1,) * (like.ndim - 1))
