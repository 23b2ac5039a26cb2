"""The methods of sums over all pairs have equal values and gradients, and bounded memory."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from declip_jax.objectives import blockwise
from declip_jax.objectives.blockwise import PLAIN, Method
from declip_jax.sharding import make_mesh

B, D = 32, 5


def arrays(*shapes: tuple[int, ...], seed: int = 0) -> list[jax.Array]:
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def methods() -> list[Method]:
  meshes = make_mesh(8, 1), make_mesh(2, 4), make_mesh(1, 1, jax.devices()[:1])
  return [
    Method("chunked", meshes[0], 8),
    Method("chunked", meshes[1], 32),
    Method("chunked", meshes[2], 4),
    Method("ring", meshes[0]),
    Method("ring", meshes[1], 2),
    Method("ring", meshes[2], 8),
  ]


def on(method: Method, x: jax.Array) -> jax.Array:
  """Split like a batch, along the axis before the last."""
  if method.mesh is None:
    return x
  return jax.device_put(x, NamedSharding(method.mesh, PartitionSpec(*(None,) * (x.ndim - 2), method.mesh.axis_names)))


@partial(jax.jit, static_argnums=(3, 4))  # here, so that PLAIN is compiled once
def weighted_log_sums(x: jax.Array, y: jax.Array, slopes: list, method: Method, full_gradient: bool) -> tuple:
  """The sums, and the gradient of their weighted sum."""

  def weighted(x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple]:
    sums = blockwise.log_sums(x, y, method, full_gradient=full_gradient)
    return sum((of.log_sum * slope).sum() for of, slope in zip(sums, slopes, strict=True)), sums

  (_, sums), gradient = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(x, y)
  return sums, gradient


@pytest.mark.parametrize("method", methods(), ids=lambda method: f"{method.kind} {dict(method.mesh.shape)}")
@pytest.mark.parametrize("full_gradient", [True, False])
def test_log_sums_equal_the_whole_matrix(method: Method, full_gradient: bool) -> None:
  x, y = arrays((2, B, D), (3, B, D))
  y = y.at[0, 3].set(y[0, 9])  # two candidates that are equal: the first is the best
  slopes = arrays((2, 3, B), (2, 3, B), seed=1)
  (sums, gradient), (wanted, wanted_gradient) = (
    weighted_log_sums(on(f, x), on(f, y), slopes, f, full_gradient) for f in (method, PLAIN)
  )
  for of, want in zip(sums, wanted, strict=True):
    np.testing.assert_allclose(of.log_sum, want.log_sum, atol=3e-6)
    np.testing.assert_array_equal(of.best, want.best)
  for of, want in zip(gradient, wanted_gradient, strict=True):
    np.testing.assert_allclose(of, want, atol=1e-5, rtol=1e-6)


def test_whole_matrix_equals_a_loop() -> None:
  x, y = (np.asarray(array, np.float64) for array in arrays((1, 7, D), (2, 9, D)))
  rows, columns = blockwise.log_sums(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
  for u in range(2):
    for i in range(7):
      row = [sum(x[0, i, k] * y[u, j, k] for k in range(D)) for j in range(9)]
      assert float(rows.log_sum[0, u, i]) == pytest.approx(np.log(sum(np.exp(row))), abs=1e-5)
      assert int(rows.best[0, u, i]) == int(np.argmax(row))
    for j in range(9):
      column = [sum(x[0, i, k] * y[u, j, k] for k in range(D)) for i in range(7)]
      assert float(columns.log_sum[0, u, j]) == pytest.approx(np.log(sum(np.exp(column))), abs=1e-5)


@pytest.mark.parametrize("method", [*methods()[::2], PLAIN], ids=lambda method: method.kind)
def test_a_row_can_be_excluded_from_its_own_candidates(method: Method) -> None:
  (x,) = arrays((2, B, D))
  slope = arrays((2, 2, B), seed=1)[0]
  logits = np.einsum("vbd,und->vubn", x, x)
  logits[[0, 1], [0, 1], np.arange(B)[:, None], np.arange(B)[:, None]] = -np.inf

  def weighted(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, _ = blockwise.log_sums(x, x, method, without_self=True)
    return (rows.log_sum * slope).sum(), rows

  (_, rows), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(on(method, x))
  np.testing.assert_allclose(rows.log_sum, np.log(np.exp(logits).sum(axis=3)), atol=5e-6)
  np.testing.assert_array_equal(rows.best, logits.argmax(axis=3))
  soft = np.exp(logits - np.log(np.exp(logits).sum(axis=3, keepdims=True))) * np.asarray(slope)[..., None]
  wanted = np.einsum("vubn,und->vbd", soft, x) + np.einsum("vubn,vbd->und", soft, x)
  np.testing.assert_allclose(gradient, wanted, atol=1e-5)


@partial(jax.jit, static_argnums=4)
def weighted_sigmoid_sums(x: jax.Array, y: jax.Array, bias: jax.Array, slope: jax.Array, method: Method) -> tuple:
  """The weighted sum of the sums, and its gradient."""

  def weighted(x: jax.Array, y: jax.Array, bias: jax.Array) -> jax.Array:
    return (blockwise.sigmoid_sums(x, y, bias, method) * slope).sum()

  return jax.value_and_grad(weighted, argnums=(0, 1, 2))(x, y, bias)


@pytest.mark.parametrize("method", methods(), ids=lambda method: f"{method.kind} {dict(method.mesh.shape)}")
def test_sigmoid_sums_equal_the_whole_matrix(method: Method) -> None:
  x, y, slope = *arrays((B, D), (B, D)), arrays((B,), seed=1)[0]
  found, wanted = (weighted_sigmoid_sums(on(f, x), on(f, y), jnp.float32(-3), slope, f) for f in (method, PLAIN))
  for of, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(of, want, atol=1e-5, rtol=1e-6)


@pytest.mark.slow
def test_ring_memory_is_constant_in_devices_and_chunks_need_less_than_the_matrix() -> None:
  """Temporary bytes on each device, by the compiler, for 64 rows on each of 2 and of 8 devices."""

  def temporary(kind: str, count: int, block: int = 0) -> int:
    method = Method(kind, make_mesh(count, 1, jax.devices()[:count]), block)
    place = NamedSharding(method.mesh, PartitionSpec(None, method.mesh.axis_names))
    x = jax.ShapeDtypeStruct((1, 64 * count, 16), jnp.float32, sharding=place)

    def loss(x: jax.Array, y: jax.Array) -> jax.Array:
      rows, columns = blockwise.log_sums(x, y, method)
      return rows.log_sum.sum() + columns.log_sum.sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=(place, place))
    return grad.lower(x, x).compile().memory_analysis().temp_size_in_bytes

  assert temporary("ring", 8) < 1.3 * temporary("ring", 2)
  assert temporary("ring", 8, 4) < temporary("ring", 8) / 2
  assert temporary("plain", 8) > 3 * temporary("plain", 2)
  assert temporary("chunked", 8, 64) < temporary("plain", 8) / 2


def test_the_method_is_chosen_by_the_sizes_and_a_bad_one_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
  x = jnp.zeros((1, 64, 4))
  mesh = make_mesh(8, 1)

  def chosen(kind: str = "auto", block: int = 0) -> tuple[str, int]:
    method = blockwise._chosen(Method(kind, mesh, block), x, x)
    return method.kind, method.block

  assert chosen() == ("plain", 0)
  monkeypatch.setattr(blockwise, "PLAIN_BYTES", 1024)  # the matrix has 64 / 8 * 64 * 4 = 2048 on each device
  monkeypatch.setattr(blockwise, "CHUNK_BYTES", 700)
  assert chosen() == ("chunked", 16)  # 21 would be small enough, and does not divide 64
  monkeypatch.setattr(blockwise, "GATHERED_BYTES", 1000)
  assert chosen() == ("ring", 8)  # all candidates of a device
  monkeypatch.setattr(blockwise, "CHUNK_BYTES", 200)
  assert chosen() == ("ring", 4)  # 6 would be small enough, and does not divide 8
  with pytest.raises(ValueError, match=r"config.contrast.method='rings': choose one of \['auto', 'plain', 'chunked'"):
    chosen("rings")
  with pytest.raises(ValueError, match=r"config.contrast.block=10 does not divide the 64 candidates"):
    chosen("chunked", 10)
  with pytest.raises(ValueError, match=r"config.contrast.block=5 does not divide the 8 candidates of a device"):
    chosen("ring", 5)
