"""Logistic regression with an L2 penalty, fitted on all devices of a mesh: the model of a linear probe.

The objective is scikit-learn's, C * sum of losses + |kernel|^2 / 2 with a free bias, divided by C * rows, so that its
gradient is that of a mean loss. Two classes have one vector of weights, as in scikit-learn: a softmax of two vectors
would be the model of 2 C. It is convex, and L-BFGS (Liu & Nocedal 1989) minimises it for several strengths at once,
which share every pass over the features. The rows are split over the devices, and a pass goes through them in blocks,
so that the logits of all rows never exist at once.

L-BFGS works in coordinates in which the curvature is about 1: along the principal axes of the centred features, each
divided by the root of its curvature for each class. It is that at the point where a fit starts, which by default is the
model without features, and after `_SETTLED` steps that at the point which has been reached. This only changes
variables; penalty, gradient and tolerance are those of the features as given.
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

from declip_jax.evals.rows import num_blocks
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
_SETTLED = 60  # steps after which curvatures are not far from those at the optimum
_LEAST_CURVATURE = 0.1  # of the mean; less would enlarge rounding errors along axes that hardly vary
_LARGE_PASS = 2**25  # products; smaller passes take less time, all together, than compiling more loops
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
  """Mean of the features, and their principal axes (columns)."""

  mean: Float[np.ndarray, "f"]
  axis: Float[np.ndarray, "f f"]


class Inputs(NamedTuple):
  """What the fits share: rows, coordinates, columns that have data, and the tolerance."""

  data: Data
  axes: Axes
  answered: Bool[Array, "k"]
  tolerance: Float[Array, ""]


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
  """The penalty of a fit, and the length of a step of 1 in the coordinates of the search, in units along the axes."""

  penalty: Float[Array, "m"]
  scale: Linear


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
  axes = Axes(mean, np.linalg.eigh(covariance.astype(np.float64)).eigenvectors.astype(np.float32))
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
  """Fits one classifier for each strength; every host has to call this.

  Fits that have ended are left out: the others continue in a program for fewer, which has the same pass at less cost.
  It is the program of two fits, which a sweep needs anyway; where passes are large, one for each halving.

  Args:
    data: rows to fit.
    axes: coordinates of the search, `principal_axes` of about the same rows.
    strengths: scikit-learn's C, one per classifier; CLIP's lambda is 1 / C.
    answered: columns that have data; the others stay zero, and a softmax leaves them out.
    mesh: devices of the rows.
    start: classifiers to start from, such as those of a neighbouring C; by default, the model without features.
    tolerance: largest entry of the gradient at which a fit may end.
  """
  products = data.features.size * len(answered) / mesh.size  # of one pass of one fit, on each device
  inputs, halve = Inputs(data, axes, answered, np.float32(tolerance)), products > _LARGE_PASS
  search = programs(mesh).first(inputs, np.asarray(strengths, np.float32), start)
  if start is None:
    search = programs(mesh).rescale(inputs, _solve(inputs, search, mesh, halve=halve, limit=_SETTLED))
  return programs(mesh).fits(inputs, _solve(inputs, search, mesh, halve=halve, limit=_ITERATIONS))


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


class Programs(NamedTuple):
  """The compiled functions of a fit.

  Attributes:
    first: from inputs, strengths and classifiers, or None, to the search that starts from them, or from the model
      without features, before the first evaluation.
    rescale: from inputs and a search to the search in the coordinates of its points, where they are not optima.
    minimise: from inputs, a search, a number and a limit of iterations to the search when at most so many of its fits
      have not ended, and which these are. It takes the memory of the search that it is given.
    fits: from inputs and a search to its results.
  """

  first: Callable[..., _Search]
  rescale: Callable[..., _Search]
  minimise: Callable[..., tuple[_Search, Array]]
  fits: Callable[..., Fits]


@functools.cache
def programs(mesh: Mesh) -> Programs:
  """The functions that `fit` calls, compiled for each shape."""

  def compiled(function: Callable[..., Tree], **options: Any) -> Callable[..., Tree]:
    def precise(*arguments: Any) -> Tree:
      with jax.default_matmul_precision("highest"):
        return function(*arguments)

    return jax.jit(precise, out_shardings=replicated(mesh), **options)

  return Programs(
    compiled(functools.partial(_first_search, mesh=mesh)),
    compiled(functools.partial(_rescaled, mesh=mesh)),
    compiled(functools.partial(_minimise, mesh=mesh), donate_argnums=1),
    compiled(_fits),
  )


def _shares(inputs: Inputs) -> Float[Array, "k"]:
  """The share of the rows of each class, or of the rows with the answer yes; at least one row has each answer."""
  target, rows = inputs.data.target, _count(inputs.data.target)
  if target.ndim == 1:
    found = (target[:, None] == jnp.arange(len(inputs.answered))[None]).sum(axis=0) / rows
  else:
    found = (target == 1).sum(axis=0) / jnp.maximum((target != 0).sum(axis=0), 1)
  return jnp.clip(found, 1 / rows, 1 - 1 / rows)


def _first_search(inputs: Inputs, strength: Float[Array, "m"], start: Linear | None, *, mesh: Mesh) -> _Search:
  if start is None:
    share = _shares(inputs)
    bias = jnp.log(share) - (jnp.log1p(-share) if inputs.data.target.ndim == 2 else 0)
    bias = jnp.broadcast_to(jnp.where(inputs.answered, bias, 0)[None], (len(strength), len(share)))
    start = Linear(jnp.zeros((len(strength), len(inputs.axes.mean), len(share))), bias)
  penalty = 1 / (strength * _count(inputs.data.target))
  problem = _Problem(penalty, _scale(inputs, penalty, start, mesh))
  point = _in_coordinates(inputs, problem, start)
  zeros, infinite = jax.tree.map(jnp.zeros_like, point), jnp.full_like(strength, jnp.inf)
  counts, step = jnp.zeros(len(strength), jnp.int32), jnp.ones_like(strength)
  return _Search(problem, point, infinite, zeros, infinite, zeros, _no_memory(point), step, counts - 1, counts)


def _rescaled(inputs: Inputs, search: _Search, *, mesh: Mesh) -> _Search:
  linear, penalty = _original(inputs, search.problem, search.point), search.problem.penalty
  problem = _Problem(penalty, _scale(inputs, penalty, linear, mesh))
  point = _in_coordinates(inputs, problem, linear)
  gradient = jax.tree.map(lambda g, old, new: g / old * new, search.gradient, search.problem.scale, problem.scale)
  direction, memory = _lbfgs(gradient, _no_memory(point), point)
  new = search._replace(problem=problem, point=point, gradient=gradient, direction=direction, memory=memory)
  new = new._replace(step=jnp.ones_like(search.step))
  kept = _unfinished(inputs, search, _ITERATIONS)
  return jax.tree.map(lambda a, b: jnp.where(_expand(kept, a), a, b), new, search)


def _scale(inputs: Inputs, penalty: Float[Array, "m"], linear: Linear, mesh: Mesh) -> Linear:
  """The roots of the inverse curvatures of the objective at some classifiers, along each axis and for each class."""

  def of_block(shared: tuple, features: Array, target: Array) -> Linear:
    axes, linear, answered = shared
    along_axes = (features - axes.mean[None]) @ axes.axis
    weight = _second_derivatives(_block_logits(features - axes.mean[None], linear), target, answered)
    return Linear(jnp.einsum("bf,bmk->mfk", along_axes**2, weight), weight.sum(axis=0))

  rows = _count(inputs.data.target)
  shared = (inputs.axes, linear, inputs.answered)
  curvature = jax.tree.map(lambda x: x / rows, sum_over_rows(of_block, shared, inputs.data, mesh))

  def root(x: Float[Array, "m ..."], penalty: Float[Array, "m ..."] | float) -> Float[Array, "m ..."]:
    mean = x.mean(axis=tuple(range(1, x.ndim)), keepdims=True)
    return jax.lax.rsqrt(jnp.maximum(x, _LEAST_CURVATURE * mean) + penalty)

  return Linear(root(curvature.kernel, penalty[:, None, None]), root(curvature.bias, 0.0))


def _no_memory(point: Linear) -> Tree:
  return jax.vmap(optax.scale_by_lbfgs(_MEMORY).init)(point)


def _lbfgs(gradient: Linear, memory: Tree, point: Linear) -> tuple[Linear, Tree]:
  """The direction of the next step of each problem, against which it goes, and its new memory."""
  return jax.vmap(optax.scale_by_lbfgs(_MEMORY).update)(gradient, memory, point)


def _in_coordinates(inputs: Inputs, problem: _Problem, linear: Linear) -> Linear:
  """Points in the coordinates of the search: the inverse of `_original`."""
  along_axes = jnp.einsum("fa,mfk->mak", inputs.axes.axis, linear.kernel)
  return Linear(along_axes / problem.scale.kernel, linear.bias / problem.scale.bias)


def _original(inputs: Inputs, problem: _Problem, point: Linear) -> Linear:
  """Classifiers of the centred features from points in the coordinates of the search.

  A softmax does not change with a vector that all classes have in common. Only a weak penalty would remove it, so it is
  not a part of the search.
  """
  kernel = jnp.einsum("fa,mak->mfk", inputs.axes.axis, problem.scale.kernel * point.kernel)
  linear = Linear(kernel, problem.scale.bias * point.bias)
  if inputs.data.target.ndim == 2:
    return linear
  return jax.tree.map(lambda x: jnp.where(inputs.answered, x - _mean(x, inputs.answered), 0), linear)


def _mean(x: Float[Array, "... k"], answered: Bool[Array, "k"]) -> Float[Array, "... 1"]:
  return jnp.mean(x, axis=-1, where=answered, keepdims=True)


def _fits(inputs: Inputs, end: _Search) -> Fits:
  return Fits(_original(inputs, end.problem, end.point), end.objective, end.largest, end.iterations, end.passes)


def _evaluate(inputs: Inputs, problem: _Problem, point: Linear, mesh: Mesh) -> tuple[Array, Linear, Array]:
  """Objectives, their gradients along the axes, and the largest entries of the gradients of the classifiers."""
  rows, penalty = _count(inputs.data.target), problem.penalty
  linear = _original(inputs, problem, point)
  loss, gradient = loss_and_gradient(inputs.data, inputs.axes.mean, linear, inputs.answered, mesh)
  objective = loss / rows + penalty / 2 * jnp.sum(linear.kernel**2, axis=(1, 2))
  gradient = Linear(gradient.kernel / rows + penalty[:, None, None] * linear.kernel, gradient.bias / rows)
  largest = jnp.maximum(jnp.abs(gradient.kernel).max(axis=(1, 2)), jnp.abs(gradient.bias).max(axis=1))
  along_axes = problem.scale.kernel * jnp.einsum("fa,mfk->mak", inputs.axes.axis, gradient.kernel)
  return objective, Linear(along_axes, problem.scale.bias * gradient.bias), largest


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
      each = _sum_pairwise(_losses(_block_logits(centred, linear), target, answered))
      return each.sum(), each

    (_, each), gradient = jax.value_and_grad(total, has_aux=True)(linear)
    return each, gradient

  return sum_over_rows(of_block, (mean, linear, answered), data, mesh)


def _block_logits(centred: Float[Array, "b f"], linear: Linear) -> Float[Array, "b m k"]:
  return jnp.einsum("bf,mfk->bmk", centred, linear.kernel) + linear.bias[None]


def _second_derivatives(
  logits: Float[Array, "b m k"], target: Int[Array, "b"] | Int[Array, "b k"], answered: Bool[Array, "k"]
) -> Float[Array, "b m k"]:
  """The second derivative of `_losses` by each logit."""
  if target.ndim == 2:
    probability, counts = jax.nn.sigmoid(logits), answered[None, None] & (target[:, None] != 0)
  else:
    probability = jax.nn.softmax(jnp.where(answered[None, None], logits, -jnp.inf), axis=2)
    counts = (target >= 0)[:, None, None]
  return jnp.where(counts, probability * (1 - probability), 0)


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


def _solve(inputs: Inputs, search: _Search, mesh: Mesh, *, halve: bool, limit: int) -> _Search:
  """Continues searches to their ends, or to a limit of iterations, with half of them or two when others have ended."""
  size = len(search.objective)
  fewer = size // 2 if halve else 2 if size > 2 else 0
  search, running = programs(mesh).minimise(inputs, search, np.int32(fewer), np.int32(limit))
  running = np.asarray(running)
  if not running.any():
    return search
  kept = np.argsort(~running, kind="stable")[:fewer]  # those that run come first
  ended = _solve(inputs, _take(search, kept), mesh, halve=halve, limit=limit)
  return _put(search, kept, ended)


@jax.jit
def _take(search: _Search, kept: Int[Array, "n"]) -> _Search:
  return jax.tree.map(lambda x: x[kept], search)


@jax.jit
def _put(search: _Search, kept: Int[Array, "n"], ended: _Search) -> _Search:
  return jax.tree.map(lambda x, y: x.at[kept].set(y), search, ended)


def _unfinished(inputs: Inputs, now: _Search, limit: Int[Array, ""] | int) -> Bool[Array, "m"]:
  promise = _dot(now.gradient, now.direction) / 2  # of a step to the minimum of a quadratic objective
  unfinished = (now.largest > inputs.tolerance) | (promise > _PROMISE * now.objective)
  return unfinished & (now.iterations < limit) & (now.step > _SHORTEST)


def _minimise(
  inputs: Inputs, search: _Search, fewer: Int[Array, ""], limit: Int[Array, ""], *, mesh: Mesh
) -> tuple[_Search, Bool[Array, "m"]]:
  """L-BFGS for `m` convex problems that share the evaluations of their objectives.

  Directions and memory are those of `optax.lbfgs`; its line search is not used, since a vectorised `lax.cond` computes
  both branches, and each is a pass. Here every evaluation moves every problem: to its next point, or to a shorter step.
  A convex problem needs no longer ones: the difference of two of its gradients always has positive curvature.

  Args:
    inputs: rows and coordinates, which the problems share.
    search: where to start.
    fewer: how many problems may be left.
    limit: number of iterations after which a problem ends.
    mesh: devices of the rows.

  Returns:
    the search, and which of its problems have not ended.
  """

  def advance(now: _Search) -> _Search:
    active, slope = _unfinished(inputs, now, limit), -_dot(now.gradient, now.direction)
    first = now.iterations < 0  # the start has not been evaluated, and its direction is zero
    now = now._replace(passes=now.passes + active)
    point = jax.tree.map(lambda p, d: p - _expand(now.step, d) * d, now.point, now.direction)
    objective, gradient, largest = _evaluate(inputs, now.problem, point, mesh)
    direction, memory = _lbfgs(gradient, now.memory, point)
    step = jnp.ones_like(objective)
    new = _Search(
      now.problem, point, objective, gradient, largest, direction, memory, step, now.iterations + 1, now.passes
    )
    change = objective - now.objective
    decreased = change <= _DECREASE * now.step * slope
    flatter = -_dot(gradient, now.direction) <= (2 * _DECREASE - 1) * slope
    within_rounding = change <= _ROUNDING * jnp.abs(now.objective)
    accepted = active & (first | (slope < 0) & (decreased | (within_rounding & flatter)))
    # The minimum of the parabola through both values and the slope; NaN where the objective is not finite.
    parabola = -slope * now.step**2 / (2 * (change - now.step * slope))
    shorter = now.step * jnp.nan_to_num(jnp.clip(parabola / now.step, 0.1, 0.5), nan=0.1)
    rejected = now._replace(step=jnp.where(active, jnp.where(slope < 0, shorter, 0), now.step))
    return jax.tree.map(lambda a, b: jnp.where(_expand(accepted, a), a, b), new, rejected)

  end = jax.lax.while_loop(lambda now: _unfinished(inputs, now, limit).sum() > fewer, advance, search)
  return end, _unfinished(inputs, end, limit)


def _dot(a: Linear, b: Linear) -> Float[Array, "m"]:
  return jnp.sum(a.kernel * b.kernel, axis=(1, 2)) + jnp.sum(a.bias * b.bias, axis=1)


def _expand(x: Shaped[Array, "m"], like: Shaped[Array, "m ..."]) -> Shaped[Array, "m ..."]:
  return x.reshape(x.shape + (1,) * (like.ndim - 1))
