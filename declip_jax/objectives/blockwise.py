"""Sums over all pairs of a global batch, for losses whose matrix of similarities does not fit on a device.

A contrastive loss needs the sums of the matrix `x y^T` over rows and over columns: log-sum-exp for a softmax, a sum of
log-sigmoids for a sigmoid. Three methods compute the same value and gradient:

| method | similarities in memory on each of `p` devices | candidates in memory |
|---|---|---|
| "plain" | `b/p * n` | all |
| "chunked" | `b/p * block` | all |
| "ring" | `b/p * block` | those of one device at a time, passed from neighbour to neighbour |

The last two compute the blocks twice, once for the sums and once, with the same products again, for the gradient:
nothing is stored in between, as it would be if the loop itself were differentiated. In the ring, a candidate is passed
on with its sums and, in the backward pass, with its gradient, so that after one round both are back on their device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

KINDS = ("plain", "chunked", "ring")
# "auto" compares the whole matrix at once if a device's similarities take at most this many bytes; otherwise this is
# the size of a chunk. A gradient stores about four such arrays.
PLAIN_BYTES, CHUNK_BYTES = 2**26, 2**26
# Bytes of candidates above which a device should not hold all of them.
GATHERED_BYTES = 2**30
_NEVER = -1e30  # in place of a similarity that does not count; not infinite, because differences of it are computed


@dataclass(frozen=True)
class Method:
  """How sums over pairs are computed.

  Attributes:
    kind: one of `KINDS`, or "auto", which chooses by the sizes.
    mesh: devices over which the rows are split; only "plain" works without it.
    block: candidates that are compared at once; 0 chooses by the sizes.
  """

  kind: str = "plain"
  mesh: Mesh | None = None
  block: int = 0


PLAIN = Method()


class Sums(NamedTuple):
  """Sums of the similarities along one axis.

  Attributes:
    log_sum: log of the sum of their exponentials.
    top: the largest similarity, without gradient.
    best: its index, the first of equal ones.
  """

  log_sum: Float[Array, "v u b"]
  top: Float[Array, "v u b"]
  best: Int[Array, "v u b"]


def log_sums(
  x: Float[Array, "v b d"],
  y: Float[Array, "u n d"],
  method: Method = PLAIN,
  *,
  full_gradient: bool = True,
  without_self: bool = False,
  columns: bool = True,
) -> tuple[Sums, Sums | None]:
  """Sums over the columns and over the rows of each matrix `x[v] @ y[u].T`: `[v u b]` of rows and `[v u n]` of columns.

  Args:
    x, y: rows and columns, split over the devices along `b` and `n`; float32.
    method: how the sums are computed.
    full_gradient: otherwise columns are constants in the sums of a row, and rows in those of a column.
    without_self: omits similarity (i, i) of each matrix (v, v): that of a row with itself, if `x` is `y`.
    columns: whether to compute the sums of columns; they are None otherwise.
  """
  method = _chosen(method, x, y)
  if method.kind == "plain":
    return _plain_log_sums(x, y, full_gradient, without_self, columns)
  return _softmax(x, y, method, _Softmax(full_gradient, without_self, columns))


def sigmoid_sums(
  x: Float[Array, "b d"], y: Float[Array, "b d"], bias: Float[Array, ""], method: Method = PLAIN
) -> Float[Array, "b"]:
  """For each row of `x @ y.T + bias`, the sum of binary cross-entropies; the target is 1 in its own column, else 0."""
  # The bias is one more dimension, in which all candidates are 1, so it needs no separate gradient.
  x = jnp.concatenate([x, jnp.broadcast_to(bias, (len(x), 1))], axis=1)[None]
  y = jnp.concatenate([y, jnp.ones((len(y), 1), y.dtype)], axis=1)[None]
  method = _chosen(method, x, y)
  if method.kind == "plain":
    return -jax.nn.log_sigmoid(_signed(_products(x, y), 0, 0)[0, 0]).sum(axis=1)
  return _sigmoid(x, y, method)[0, 0]


def check_method(method: Method) -> None:
  """Rejects a method that no batch can use.

  Raises:
    ValueError: the message names the field, its value and the legal ones.
  """
  if method.kind not in (*KINDS, "auto"):
    raise ValueError(f"config.contrast.method={method.kind!r}: choose one of {['auto', *KINDS]}")
  if method.block < 0:
    raise ValueError(f"config.contrast.block={method.block}: expected 1 or more candidates, or 0 to choose by size")


def _chosen(method: Method, x: Float[Array, "v b d"], y: Float[Array, "u n d"]) -> Method:
  """The method with its kind and block decided.

  Raises:
    ValueError: an unknown kind, or a block that does not divide the candidates.
  """
  check_method(method)
  devices = method.mesh.size if method.mesh is not None else 1
  views, columns = len(x) * len(y), y.shape[1]
  matrix = 4 * views * math.ceil(x.shape[1] / devices) * columns
  kind = method.kind
  if kind == "auto":
    kind = "plain" if matrix <= PLAIN_BYTES or method.mesh is None else "chunked"
    if kind == "chunked" and 4 * y.size > GATHERED_BYTES:
      kind = "ring"
  if kind == "plain":
    return Method(kind, method.mesh)
  block, candidates = method.block, columns if kind == "chunked" else columns // devices
  if not block:
    wanted = max(columns * CHUNK_BYTES // matrix, 1)
    block = max(size for size in range(1, min(wanted, candidates) + 1) if candidates % size == 0)
  if candidates % block:
    where = "a batch" if kind == "chunked" else "a device"
    raise ValueError(f"config.contrast.block={block} does not divide the {candidates} candidates of {where}")
  return Method(kind, method.mesh, block)


def _products(x: Float[Array, "v b d"], y: Float[Array, "u n d"]) -> Float[Array, "v u b n"]:
  return jnp.einsum("vbd,und->vubn", x, y, precision=jax.lax.Precision.HIGHEST)


def _plain_log_sums(
  x: Array, y: Array, full_gradient: bool, without_self: bool, columns: bool
) -> tuple[Sums, Sums | None]:
  def sums(x: Array, y: Array, axis: int) -> Sums:
    matrix = _products(x, y)
    matrix = _without_self(matrix, 0, 0) if without_self else matrix
    constant = jax.lax.stop_gradient(matrix)
    return Sums(jax.nn.logsumexp(matrix, axis=axis), constant.max(axis), jnp.argmax(constant, axis))

  # Still a single product: XLA merges equal ones.
  constant = (lambda side: side) if full_gradient else jax.lax.stop_gradient
  return sums(x, constant(y), 3), sums(constant(x), y, 2) if columns else None


def _is_pair(matrix: Float[Array, "v u b n"], row: Any, column: Any) -> Bool[Array, "1 1 b n"]:
  """Whether a row and a column have the same index, in the block that begins at `row` and `column`."""
  own = (row + jnp.arange(matrix.shape[2]))[:, None] == (column + jnp.arange(matrix.shape[3]))[None]
  return own[None, None]


def _without_self(matrix: Float[Array, "v u b n"], row: Any, column: Any) -> Float[Array, "v u b n"]:
  same = jnp.eye(*matrix.shape[:2], dtype=bool)[:, :, None, None]
  return jnp.where(same & _is_pair(matrix, row, column), _NEVER, matrix)


# Two kinds of sums over the blocks so far.


class _Running(NamedTuple):
  """A sum of exponentials so far: relative to the largest, which is at `best`."""

  top: Array
  total: Array
  best: Array

  @classmethod
  def empty(cls, shape: tuple[int, ...]) -> "_Running":
    return cls(jnp.full(shape, _NEVER), jnp.zeros(shape), jnp.full(shape, jnp.iinfo(jnp.int32).max))

  @classmethod
  def of_block(cls, matrix: Array, axis: int, first: Any) -> "_Running":
    top = matrix.max(axis=axis)
    total = jnp.exp(matrix - jnp.expand_dims(top, axis)).sum(axis=axis)
    return cls(top, total, first + jnp.argmax(matrix, axis=axis))

  def merged(self, other: "_Running") -> "_Running":
    top = jnp.maximum(self.top, other.top)
    total = self.total * jnp.exp(self.top - top) + other.total * jnp.exp(other.top - top)
    first = jnp.minimum(
      jnp.where(self.top == top, self.best, jnp.iinfo(jnp.int32).max),
      jnp.where(other.top == top, other.best, jnp.iinfo(jnp.int32).max),
    )
    return _Running(top, total, first)

  def merged_over(self, axes: tuple[str, ...]) -> "_Running":
    """The sums of all devices merged, on each device."""
    top = jax.lax.pmax(self.top, axes)
    total = jax.lax.psum(self.total * jnp.exp(self.top - top), axes)
    best = jax.lax.pmin(jnp.where(self.top == top, self.best, jnp.iinfo(jnp.int32).max), axes)
    return _Running(top, total, best)

  @property
  def sums(self) -> Sums:
    return Sums(self.top + jnp.log(self.total), self.top, self.best)


class _Total(NamedTuple):
  """A plain sum so far."""

  total: Array

  @classmethod
  def empty(cls, shape: tuple[int, ...]) -> "_Total":
    return cls(jnp.zeros(shape))

  def merged(self, other: "_Total") -> "_Total":
    return _Total(self.total + other.total)


class _NoSums(NamedTuple):
  """Replaces the sums of a side that are not computed."""

  @classmethod
  def empty(cls, shape: tuple[int, ...]) -> "_NoSums":
    del shape
    return cls()

  def merged(self, other: "_NoSums") -> "_NoSums":
    del other
    return self

  def merged_over(self, axes: tuple[str, ...]) -> "_NoSums":
    del axes
    return self

  @property
  def sums(self) -> None:
    return None


# Two losses over a block that begins at `row` and `column`. `forward` returns what the block adds to the sums of its
# rows and of its columns. `gradients` returns the gradients of the products, for the rows and for the columns, from
# what was saved for each.


@dataclass(frozen=True)
class _Softmax:
  """Logs of sums of exponentials over rows and over columns."""

  full_gradient: bool
  without_self: bool
  columns: bool

  @property
  def running(self) -> tuple[type, type]:
    """The kinds of sums of rows and of columns."""
    return _Running, _Running if self.columns else _NoSums

  def forward(self, matrix: Array, row: Any, column: Any) -> tuple[_Running, _Running | _NoSums]:
    if self.without_self:
      matrix = _without_self(matrix, row, column)
    return _Running.of_block(matrix, 3, column), _Running.of_block(matrix, 2, row) if self.columns else _NoSums()

  def gradients(self, matrix: Array, row: Any, column: Any, rows: Any, columns: Any) -> tuple[Array, Array]:
    """`rows` and `columns` are log-sums and their gradients; `columns` is unused without sums of columns."""
    if self.without_self:
      matrix = _without_self(matrix, row, column)
    sides = [(rows, 3), (columns, 2)] if self.columns else [(rows, 3)]
    gradients = [
      jnp.expand_dims(gradient, axis) * jnp.exp(matrix - jnp.expand_dims(log_sum, axis))
      for (log_sum, gradient), axis in sides
    ]
    if self.full_gradient:
      return (sum(gradients),) * 2
    return gradients[0], gradients[1] if self.columns else jnp.zeros_like(matrix)


@dataclass(frozen=True)
class _Sigmoid:
  """Sums of binary cross-entropies over rows."""

  running = _Total, _NoSums

  def forward(self, matrix: Array, row: Any, column: Any) -> tuple[_Total, _NoSums]:
    return _Total(-jax.nn.log_sigmoid(_signed(matrix, row, column)).sum(axis=3)), _NoSums()

  def gradients(self, matrix: Array, row: Any, column: Any, rows: Array, columns: tuple[()]) -> tuple[Array, Array]:
    """`rows` are the gradients of their sums; nothing is saved for columns."""
    del columns
    wrong = jax.nn.sigmoid(-_signed(matrix, row, column))
    return (-_signed(wrong, row, column) * rows[..., None],) * 2


def _signed(matrix: Float[Array, "v u b n"], row: Any, column: Any) -> Float[Array, "v u b n"]:
  """The similarity of a pair, and minus that of all others."""
  return jnp.where(_is_pair(matrix, row, column), matrix, -matrix)


Loss = _Softmax | _Sigmoid


def _forward(loss: Loss, x: Array, y: Array, method: Method) -> tuple[Any, Any]:
  """The sums of a device's rows over all columns, and of its columns over all rows."""
  axes, place, count = _places(method)
  shape, (row_kind, column_kind) = (len(x), len(y)), loss.running
  add = partial(_add_block, loss, x, place * x.shape[1], method.block)
  rows = row_kind.empty((*shape, x.shape[1]))
  if method.kind == "ring":

    def ring_step(carry: Any, step: Array) -> tuple[Any, None]:
      rows, y, columns = carry
      arriving = _from_next(y, method)  # while the products are computed
      rows, part = add(rows, y, (place + step) % count * y.shape[1])
      return (rows, arriving, _from_next(columns.merged(part), method)), None

    carry = rows, y, column_kind.empty((*shape, y.shape[1]))
    (rows, _, columns), _ = jax.lax.scan(ring_step, carry, jnp.arange(count))
    return rows, columns
  rows, columns = add(rows, jax.lax.all_gather(y, axes, axis=1, tiled=True), 0)
  own = partial(jax.lax.dynamic_slice_in_dim, start_index=place * y.shape[1], slice_size=y.shape[1], axis=2)
  return rows, jax.tree.map(own, columns.merged_over(axes))


def _add_block(loss: Loss, x: Array, row: Any, block: int, rows: Any, y: Array, column: Any) -> tuple[Any, Any]:
  """Adds candidates to the sums of rows, chunk by chunk; also returns the sums of the candidates."""

  def chunk(rows: Any, start: Array) -> tuple[Any, Any]:
    part = jax.lax.dynamic_slice_in_dim(y, start, block, axis=1)
    row_part, column_part = loss.forward(_products(x, part), row, column + start)
    return rows.merged(row_part), column_part

  rows, columns = jax.lax.scan(chunk, rows, jnp.arange(0, y.shape[1], block))
  return rows, jax.tree.map(_joined, columns)


def _backward(loss: Loss, x: Array, y: Array, rows: Any, columns: Any, method: Method) -> tuple[Array, Array]:
  """The gradients of a device's rows and columns; `rows` and `columns` are passed to `gradients`."""
  axes, place, count = _places(method)
  vjp = partial(_vjp_block, loss, x, place * x.shape[1], method.block, rows)
  gradient_x = jnp.zeros_like(x)
  if method.kind == "ring":

    def ring_step(carry: Any, step: Array) -> tuple[Any, None]:
      gradient_x, (y, columns), gradient_y = carry
      arriving = _from_next((y, columns), method)
      gradient_x, more_y = vjp(gradient_x, y, columns, (place + step) % count * y.shape[1])
      return (gradient_x, arriving, _from_next(gradient_y + more_y, method)), None

    carry = gradient_x, (y, columns), jnp.zeros_like(y)
    (gradient_x, _, gradient_y), _ = jax.lax.scan(ring_step, carry, jnp.arange(count))
    return gradient_x, gradient_y
  gathered = jax.lax.all_gather(y, axes, axis=1, tiled=True)
  all_columns = jax.tree.map(partial(jax.lax.all_gather, axis_name=axes, axis=2, tiled=True), columns)
  gradient_x, gradient_y = vjp(gradient_x, gathered, all_columns, 0)
  return gradient_x, jax.lax.psum_scatter(gradient_y, axes, scatter_dimension=1, tiled=True)


def _vjp_block(
  loss: Loss, x: Array, row: Any, block: int, rows: Any, gradient_x: Array, y: Array, columns: Any, column: Any
) -> tuple[Array, Array]:
  """Adds the gradient from candidates to that of rows, chunk by chunk; also returns the gradient of the candidates."""
  exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

  def chunk(gradient_x: Array, start: Array) -> tuple[Array, Array]:
    part = jax.lax.dynamic_slice_in_dim(y, start, block, axis=1)
    saved = jax.tree.map(lambda c: jax.lax.dynamic_slice_in_dim(c, start, block, axis=2), columns)
    for_x, for_y = loss.gradients(_products(x, part), row, column + start, rows, saved)
    return gradient_x + exact("vubn,und->vbd", for_x, part), exact("vubn,vbd->und", for_y, x)

  gradient_x, gradients_y = jax.lax.scan(chunk, gradient_x, jnp.arange(0, y.shape[1], block))
  return gradient_x, _joined(gradients_y, axis=1)


def _places(method: Method) -> tuple[tuple[str, ...], Array, int]:
  """The axes of the mesh, the index of this device along them, and the number of devices."""
  axes = method.mesh.axis_names
  return axes, jax.lax.axis_index(axes), method.mesh.size


def _from_next(tree: Any, method: Method) -> Any:
  """The values of the next device in the ring."""
  axes, _, count = _places(method)
  ring = [(device, (device - 1) % count) for device in range(count)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, ring), tree)


def _joined(chunks: Array, axis: int = 2) -> Array:
  """`[chunks ... block ...]` to `[... n ...]`, where the block is axis `axis` of a chunk."""
  moved = jnp.moveaxis(chunks, 0, axis)
  return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])


def _on_devices(function: Callable[..., Any], method: Method, axes_in: tuple[int, ...], axis_out: int) -> Any:
  """`function` on each device's rows; arguments and results are split along `axes_in` and `axis_out`."""

  def spec(axis: int) -> PartitionSpec:
    return PartitionSpec(*(None,) * axis, method.mesh.axis_names)

  # shard_map's check of replication does not know our derivatives.
  return jax.shard_map(
    function,
    mesh=method.mesh,
    in_specs=tuple(map(spec, axes_in)),
    out_specs=spec(axis_out),
    check_vma=False,
  )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _softmax(x: Array, y: Array, method: Method, loss: _Softmax) -> tuple[Sums, Sums | None]:
  return _softmax_forward(x, y, method, loss)[0]


def _softmax_forward(x: Array, y: Array, method: Method, loss: _Softmax) -> tuple[Any, Any]:
  def local(x: Array, y: Array) -> tuple[Sums, Sums | None]:
    rows, columns = _forward(loss, x, y, method)
    return rows.sums, columns.sums

  rows, columns = found = _on_devices(local, method, (1, 1), 2)(x, y)
  return found, (x, y, rows.log_sum, columns.log_sum if columns else None)


def _softmax_backward(method: Method, loss: _Softmax, saved: Any, gradient: tuple[Sums, Sums | None]) -> Any:
  def local(
    x: Array, y: Array, rows: Array, columns: Array | None, row_gradient: Array, column_gradient: Array | None
  ) -> Any:
    return _backward(loss, x, y, (rows, row_gradient), (columns, column_gradient), method)

  rows, columns = gradient
  gradients = rows.log_sum, columns.log_sum if columns else None
  return _on_devices(local, method, (1, 1, 2, 2, 2, 2), 1)(*saved, *gradients)


_softmax.defvjp(_softmax_forward, _softmax_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sigmoid(x: Array, y: Array, method: Method) -> Array:
  return _sigmoid_forward(x, y, method)[0]


def _sigmoid_forward(x: Array, y: Array, method: Method) -> tuple[Any, Any]:
  def local(x: Array, y: Array) -> Array:
    return _forward(_Sigmoid(), x, y, method)[0].total

  return _on_devices(local, method, (1, 1), 2)(x, y), (x, y)


def _sigmoid_backward(method: Method, saved: Any, gradient: Array) -> Any:
  def local(x: Array, y: Array, gradient: Array) -> tuple[Array, Array]:
    return _backward(_Sigmoid(), x, y, gradient, (), method)

  return _on_devices(local, method, (1, 1, 2), 1)(*saved, gradient)


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)
