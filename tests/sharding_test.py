"""Tests of `declip_jax.sharding`: the rule by cases, and invalid meshes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest
from tiny import tiny_config

from declip_jax import build, sharding
from declip_jax.models.bank import Bank
from declip_jax.planning import hlo
from declip_jax.sharding import (
  MIN_SIZE,
  batch_sharding,
  check_batch,
  gather,
  layout_table,
  make_mesh,
  replicated,
  shard_like,
  spec_for,
  to_global,
)
from declip_jax.training import optim
from declip_jax.training.state import abstract_state


@pytest.fixture(scope="module")
def mesh():
  """Eight devices, four by two."""
  assert jax.device_count() == 8, "conftest.py makes eight"
  return make_mesh(4, 2)


@pytest.mark.parametrize(
  ("shape", "fsdp", "expected"),
  [
    ((), 4, ()),
    ((512,), 4, ()),  # small
    ((511, 512), 4, ()),  # one row below the limit
    ((512, 512), 4, ("fsdp",)),  # at the limit; the first of equal axes
    ((512, 2048), 4, (None, "fsdp")),
    ((2048, 512), 4, ("fsdp",)),
    ((49409, 512), 4, (None, "fsdp")),  # the largest axis does not divide
    ((12, 512, 2048), 4, (None, None, "fsdp")),  # stacked layers
    ((12, 2048, 512), 4, (None, "fsdp")),
    ((1001, 1003), 4, ()),  # nothing divides
    ((4096, 4096), 1, ()),  # nothing to split over
  ],
)
def test_rule(shape, fsdp, expected):
  assert spec_for(shape, fsdp) == PartitionSpec(*expected)


def test_the_limit_equals_the_cases():
  assert MIN_SIZE == 512 * 512


def test_banks_are_sharded_like_their_groups_of_the_batch(mesh):
  shape = jax.ShapeDtypeStruct
  split = {}
  for groups in (1, 2, 4, 8, 16):
    leaves = (shape((groups, 8192, 64), jnp.float32), shape((), jnp.int32), shape((), jnp.int32))
    split[groups] = shard_like({"heads": {"bank": {"text": Bank(*leaves)}}}, mesh)["heads"]["bank"]["text"].entries.spec
  rows = batch_sharding(mesh).spec
  whole, data = PartitionSpec(None, "fsdp"), PartitionSpec(("data",))
  assert split == {1: whole, 2: whole, 4: data, 8: rows, 16: rows}
  only_fsdp = shard_like({"bank": shape((4, 8192, 64), jnp.float32)}, make_mesh(1, 8))["bank"]
  assert only_fsdp.spec == whole


def test_every_leaf_of_a_tree_gets_the_rule(mesh):
  shape = jax.ShapeDtypeStruct
  tree = {"w": shape((512, 1024), jnp.float32), "moments": (shape((1024, 512), jnp.float32), shape((), jnp.int32))}
  specs = jax.tree.map(lambda sharding: sharding.spec, shard_like(tree, mesh))
  expected = {"w": PartitionSpec(None, "fsdp"), "moments": (PartitionSpec("fsdp"), PartitionSpec())}
  assert specs == expected


@pytest.mark.parametrize(
  ("asked", "expected"), [((-1, 1), (8, 1)), ((-1, 4), (2, 4)), ((2, -1), (2, 4)), ((4, 2), (4, 2))]
)
def test_mesh_infers_the_remaining_size(asked, expected):
  mesh = make_mesh(*asked)
  assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp"), expected, strict=True))


@pytest.mark.parametrize("asked", [(-1, -1), (3, -1), (-1, 3), (4, 4), (0, 8), (8, 0), (-2, -4), (0, -1), (-1, 0)])
def test_mesh_names_sizes_that_do_not_fit(asked):
  with pytest.raises(ValueError, match=rf"config.mesh \(data={asked[0]}, fsdp={asked[1]}\) does not fit 8 devices"):
    make_mesh(*asked)


def test_mesh_over_some_of_the_devices():
  assert make_mesh(-1, 1, devices=jax.devices()[:2]).shape == {"data": 2, "fsdp": 1}


@dataclass(frozen=True, order=True)
class Device:
  """A simulated device of a GPU node or a TPU slice."""

  id: int
  slice_index: int
  device_kind: str = "none"
  platform: str = "gpu"
  process_index: int = 0


@pytest.mark.parametrize("asked", [(4, 2), (2, 4), (-1, 1), (-1, 4)])
def test_slices_follow_one_another_along_data(asked):
  devices = [Device(id, id % 2) for id in range(8)]  # slice after slice only in the mesh
  mesh = make_mesh(*asked, devices)
  along = [{device.slice_index for device in row} for row in mesh.devices]
  assert along == [{0}] * (len(along) // 2) + [{1}] * (len(along) // 2)
  assert sorted(mesh.devices.flat) == devices
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(("sizes", "asked"), [((4, 4), (1, 8)), ((2, 2, 2, 2), (2, 4)), ((2, 6), (4, 2))])
def test_gathering_parameters_across_slices_is_rejected(sizes, asked):
  devices = [Device(id, place) for id, place in enumerate(np.repeat(range(len(sizes)), sizes).tolist())]
  with pytest.raises(ValueError, match=rf"config.mesh \(data={asked[0]}, fsdp={asked[1]}\) .* {len(sizes)} slices"):
    make_mesh(*asked, devices)


@pytest.mark.parametrize(
  ("method", "name"), [("declip", "adamw"), *(("slip_mocov3", name) for name in optim.OPTIMIZERS)]
)
def test_moments_and_copies_are_sharded_like_their_parameters(mesh, monkeypatch, method, name):
  monkeypatch.setattr(sharding, "MIN_SIZE", 256)
  config = tiny_config(method)
  config.optimizer.name = name
  built = build.build(config)
  abstract = abstract_state(built.batch_shape(16), mesh, model=built.model, optimizer=built.optimizer)
  others = jax.tree.leaves_with_path((abstract.opt_state, abstract.collections))
  split = 0
  for path, param in jax.tree.leaves_with_path(abstract.params):
    followers = [x.sharding for at, x in others if at[-len(path) :] == path and x.shape == param.shape]
    copied = method == "slip_mocov3" and "'image'" in str(path)
    assert len(followers) >= 1 + copied
    assert set(followers) == {param.sharding}
    split += param.sharding.spec != PartitionSpec()
  assert split > 10


def tower(params, x):
  def layer(x, params):
    return jnp.tanh(x @ params["kernel"].astype(x.dtype) + params["bias"][None]), None

  return (jax.lax.scan(layer, x, params)[0] ** 2).mean()


@pytest.fixture
def layers(monkeypatch):
  monkeypatch.setattr(sharding, "MIN_SIZE", 64 * 64)
  key = jax.random.key(0)
  params = {"kernel": jax.random.normal(key, (3, 64, 64)) / 8, "bias": jnp.ones((3, 64))}
  return params, jax.random.normal(key, (1024, 64))


def test_gathered_parameters_have_the_same_loss_and_gradient(layers):
  params, x = layers
  mesh = make_mesh(2, 4)
  placed = jax.device_put(params, shard_like(params, mesh)), jax.device_put(x, batch_sharding(mesh))
  want = jax.value_and_grad(tower)(params, x)
  got = jax.jit(jax.value_and_grad(lambda params, x: tower(gather(params, mesh, jnp.float32), x)))(*placed)
  for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-6)
  cast = jax.jit(lambda params: gather(params, mesh, jnp.bfloat16))(placed[0])
  assert cast["kernel"].sharding.is_fully_replicated
  np.testing.assert_array_equal(cast["kernel"], params["kernel"].astype(jnp.bfloat16))
  assert cast["bias"].dtype == jnp.float32


def test_each_parameter_is_gathered_once(layers):
  mesh = make_mesh(2, 4)
  layout = shard_like(layers[0], mesh), batch_sharding(mesh)
  shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), layers, layout)

  def sent(function):
    gradient = jax.jit(jax.grad(function), out_shardings=layout[0])
    return hlo.traffic(gradient.lower(*shapes).compile().as_text(), mesh.size).links

  kernels = 3 * 64 * 64 * 4
  gathered = sent(lambda params, x: tower(gather(params, mesh, jnp.float32), x))
  assert gathered["all-gather"] == kernels * 3 / 4
  assert sent(tower)["all-gather"] > gathered["all-gather"]


def test_nothing_is_gathered_without_fsdp(layers):
  before, after = (jax.tree.leaves(tree) for tree in (layers[0], gather(layers[0], make_mesh(8, 1), jnp.bfloat16)))
  assert all(mine is theirs for mine, theirs in zip(before, after, strict=True))


def test_the_table_of_layouts_sums_up(mesh):
  def leaf(*shape, spec=(), dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

  tree = {
    "params": {"a": leaf(1024, 1024, spec=("fsdp",)), "b": leaf(2048, 1024, spec=("fsdp",)), "c": leaf(256, 1024)},
    "bank": leaf(8, 512, 1024, spec=(("data", "fsdp"),)),
    "step": leaf(dtype=jnp.int32),
  }
  header, *rows, total = layout_table(tree)
  assert [row.split() for row in rows] == [
    ["bank", "float32", "data", "x", "fsdp,", "axis", "0", "1", "16.00", "2.00", "[8,", "512,", "1024]"],
    ["params", "float32", "fsdp,", "axis", "0", "2", "12.00", "6.00", "b", "[2048,", "1024]"],
    ["params", "float32", "replicated", "1", "1.00", "1.00", "c", "[256,", "1024]"],
    ["step", "int32", "replicated", "1", "0.00", "0.00", "[]"],
  ]
  assert total.split() == ["total", "5", "29.00", "9.00"]
  many = {f"part{place}": leaf(place + 1, 1024, 1024) for place in range(30)}
  header, *rows, total = layout_table(many)
  assert len([header, *rows, total]) <= 12
  assert rows[-1].split()[:3] == ["others", "22", f"{4 * sum(range(1, 23)):,.2f}"]
  assert total.split() == ["total", "30", "1,860.00", "1,860.00"]


@pytest.mark.parametrize("batch_size", [8, 4096])
def test_batches_that_divide_are_accepted(mesh, batch_size):
  check_batch(batch_size, mesh, "config.batch_size")


@pytest.mark.parametrize("batch_size", [0, -8, 4, 12])
def test_other_batches_are_rejected_by_name(mesh, batch_size):
  with pytest.raises(ValueError, match=rf"^--some_size={batch_size}: .* devices, 8 \(data=4 x fsdp=2\)"):
    check_batch(batch_size, mesh, "--some_size")


def test_a_batch_is_split_over_both_axes(mesh):
  rows = {"image": np.arange(48).reshape(16, 3)}
  placed = to_global(rows, batch_sharding(mesh))["image"]
  np.testing.assert_array_equal(placed, rows["image"])
  assert sorted(shard.index[0].start for shard in placed.addressable_shards) == list(range(0, 16, 2))


def test_replicated_is_whole_everywhere(mesh):
  placed = jax.device_put(np.arange(3), replicated(mesh))
  assert [shard.data.tolist() for shard in placed.addressable_shards] == [[0, 1, 2]] * 8
