"""Attention of short sequences on a TPU, whose scores never leave the chip: a Pallas kernel forward and one backward.

Flash attention computes scores in blocks, since those of long sequences do not fit on a chip. Those of a head of our
towers do (50 to 577 image tokens, 77 text tokens), so each head is a few products with a plain softmax between them,
and the backward pass needs nothing but the inputs: it computes the scores again. Arrays keep the layout `[b n h*e]` of
the layers around attention, without padding a head to the 128 lanes of a TPU, or tokens to its tiles: a program has
whole tiles of lanes, and a head takes part in a product with the lanes of all other heads set to 0. Heads of 64 then
have products over 128 lanes, the least that a TPU multiplies at once; those of 80 have some over 256.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
import math
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LANES = 128
MAX_TOKENS = (
  640  # the scores of a head and their gradients fit into the 16 MiB on the chip that a kernel has by default
)
_BLOCK_BYTES = 2**21  # of all arrays of a program, so that the transfers of the next program overlap with its products
_CHIP_BYTES = 12 * 2**20  # that a kernel may take by our estimate; libtpu's limit is 16 MiB
_ARRAYS, _SUMS, _SCORES = 7, 3, 4  # of the backward pass: inputs and results, sums in float32, and arrays of scores
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # the score of a hidden position, as in jax.nn


class Heads(NamedTuple):
  """How attention works, beside its arrays.

  Attributes:
    count: number of heads.
    causal: whether positions see only those before them.
    interpret: whether to run the kernels anywhere, slowly, for tests.
  """

  count: int
  causal: bool = False
  interpret: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
  heads: Heads,
  query: Float[Array, "b n f"],
  key: Float[Array, "b n f"],
  value: Float[Array, "b n f"],
  visible: Bool[Array, "b n"] | None = None,
) -> Float[Array, "b n f"]:
  """Self-attention with float32 scores and scale `e ** -0.5` for heads of width `e = f / heads.count`.

  Args:
    heads: number of heads, and whether attention is causal.
    query, key, value: the heads' parts side by side.
    visible: positions that may be seen, at least one of each sequence; None for all.
  """
  return _forward(heads, query, key, value, visible)[0]


def _forward(heads: Heads, *inputs: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
  (attended,) = _run(_forward_kernel, heads, inputs[:3], inputs[3], results=1, products=2)
  return attended, inputs


def _backward(heads: Heads, inputs: tuple[Array | None, ...], gradient: Array) -> tuple[Array | None, ...]:
  arrays = (*inputs[:3], gradient)
  return *_run(_backward_kernel, heads, arrays, inputs[3], results=3, products=5), None


attention.defvjp(_forward, _backward)


def fits(tokens: int, width: int, heads: int) -> bool:
  """Whether the backward pass in bfloat16 has room on the chip, by an estimate that libtpu's own never exceeded."""
  rows, group = _block(tokens, width, heads, itemsize=2)
  blocks = 2 * rows * _ARRAYS * 2 * _size(tokens, group)  # those of a program, and those of the next one
  return blocks + 4 * (_SUMS * _size(tokens, group) + _SCORES * _size(tokens, tokens)) <= _CHIP_BYTES


def _block(tokens: int, width: int, heads: int, itemsize: int) -> tuple[int, int]:
  """The sequences and the lanes of a program."""
  group = math.lcm(width // heads, LANES)
  group = group if width % group == 0 else width
  return max(1, _BLOCK_BYTES // (_ARRAYS * itemsize * _size(tokens, group))), group


def _size(rows: int, lanes: int) -> int:
  """The elements of a matrix on the chip, with those that fill its tiles."""
  return pl.cdiv(rows, 16) * 16 * pl.cdiv(lanes, LANES) * LANES


def _run(
  kernel: Callable[..., None],
  heads: Heads,
  arrays: Sequence[Array],
  visible: Array | None,
  *,
  results: int,
  products: int,
) -> tuple[Array, ...]:
  """Runs a kernel for every sequence and group of heads; `products` is the number of its products with scores."""
  batch, tokens, width = arrays[0].shape
  rows, group = _block(tokens, width, heads.count, arrays[0].dtype.itemsize)
  rows = pl.cdiv(batch, pl.cdiv(batch, rows))  # as many in each program
  block = pl.BlockSpec((rows, tokens, group), lambda row, column: (row, 0, column))
  mask_block = pl.BlockSpec((rows, 1, tokens), lambda row, column: (row, 0, 0))
  masks = [] if visible is None else [visible[:, None].astype(jnp.float32)]
  shape = jax.ShapeDtypeStruct((batch, tokens, width), arrays[0].dtype)
  return pl.pallas_call(
    partial(kernel, heads=heads, width=width // heads.count, masked=visible is not None),
    grid=(pl.cdiv(batch, rows), width // group),
    in_specs=[block] * len(arrays) + [mask_block] * len(masks),
    out_specs=[block] * results,
    out_shape=[shape] * results,
    # Without the bytes: given them, XLA keeps fewer other arrays on the chip (docs/scaling.md).
    cost_estimate=pl.CostEstimate(
      flops=2 * products * batch * tokens**2 * width,
      transcendentals=batch * tokens**2 * heads.count,
      bytes_accessed=0,
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    interpret=heads.interpret,
    name=kernel.__name__.strip("_"),
  )(*arrays, *masks)


class _Place(NamedTuple):
  """Where a head is in a group of lanes: lanes `start` to `stop` of a window of whole tiles."""

  window: slice
  start: int
  stop: int

  def only(self, x: Float[Array, "n w"]) -> Float[Array, "n w"]:
    """An array of the window in which the other heads' lanes are 0."""
    if (self.start, self.stop) == (0, x.shape[1]):
      return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >= self.start) & (lane < self.stop), x, jnp.zeros_like(x))


def _places(group: int, width: int) -> Iterator[_Place]:
  for first in range(0, group, width):
    start, last = first // LANES * LANES, first + width
    window = slice(start, min(-(-last // LANES) * LANES, group))
    yield _Place(window, first - start, last - start)


class _Sums:
  """Results of the heads of a group, added up by tiles of lanes."""

  def __init__(self) -> None:
    self.tiles: dict[int, Array] = {}

  def add(self, place: _Place, x: Float[Array, "n w"]) -> None:
    for offset in range(0, x.shape[1], LANES):
      lane, part = place.window.start + offset, x[:, offset : offset + LANES]
      self.tiles[lane] = self.tiles[lane] + part if lane in self.tiles else part

  def write(self, ref: Any, row: Array) -> None:
    for lane, x in self.tiles.items():
      ref[row, :, lane : lane + x.shape[1]] = x.astype(ref.dtype)


def _forward_kernel(*refs: Any, heads: Heads, width: int, masked: bool) -> None:
  query_ref, key_ref, value_ref, *mask_ref, attended_ref = refs

  @pl.loop(0, query_ref.shape[0])
  def sequence(row: Array) -> None:
    attended = _Sums()
    visible = mask_ref[0][row] if masked else None
    for place in _places(query_ref.shape[2], width):
      query, key, value = (ref[row, :, place.window] for ref in (query_ref, key_ref, value_ref))
      weights = _weights(place.only(query), key, visible, heads.causal, width)
      attended.add(place, _product(weights.astype(value.dtype), place.only(value), 1, 0))
    attended.write(attended_ref, row)


def _backward_kernel(*refs: Any, heads: Heads, width: int, masked: bool) -> None:
  inputs, mask_ref, gradient_refs = refs[:4], refs[4:-3], refs[-3:]

  @pl.loop(0, inputs[0].shape[0])
  def sequence(row: Array) -> None:
    to_query, to_key, to_value = sums = [_Sums() for _ in gradient_refs]
    visible = mask_ref[0][row] if masked else None
    for place in _places(inputs[0].shape[2], width):
      query, key, value, gradient = (ref[row, :, place.window] for ref in inputs)
      query, key, gradient = map(place.only, (query, key, gradient))
      weights = _weights(query, key, visible, heads.causal, width)
      to_value.add(place, _product(weights.astype(gradient.dtype), gradient, 0, 0))
      to_weights = _product(gradient, value, 1, 1)
      mean = jnp.sum(weights * to_weights, axis=1, keepdims=True)
      to_scores = (weights * (to_weights - mean) * width**-0.5).astype(query.dtype)
      to_query.add(place, _product(to_scores, key, 1, 0))
      to_key.add(place, _product(to_scores, query, 0, 0))
    for gradients, ref in zip(sums, gradient_refs, strict=True):
      gradients.write(ref, row)


def _weights(query: Array, key: Array, visible: Array | None, causal: bool, width: int) -> Float[Array, "n n"]:
  """The softmax of the scores of a head, float32."""
  scores = _product(query, key, 1, 1) * width**-0.5
  if causal:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
    scores = jnp.where(row >= column, scores, _HIDDEN)
  if visible is not None:
    scores = jnp.where(visible > 0, scores, _HIDDEN)
  weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
  return weights / jnp.sum(weights, axis=1, keepdims=True)


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Float[Array, "_ _"]:
  """The float32 product that sums over an axis of each; float32 inputs are not rounded, whatever JAX's default is."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(
    x, y, (((x_axis,), (y_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
  )
