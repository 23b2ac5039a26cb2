"""The device mesh, and the one rule that shards everything over it. Model code has no sharding annotations.

The batch is split over both axes of the mesh, so that a plain `image @ text.T` under jit is the logit matrix of the
global batch, and batch statistics are global. Parameters, moments, their copies and the bank are split over `fsdp`
only; a step gathers the parameters that it reads. Only what the compiler cannot split by itself, a kernel, asks for the
mesh that `traced_over` provides.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial, wraps
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from declip_jax.spelling import counted

DATA, FSDP = "data", "fsdp"
MIN_SIZE = 2**18  # elements; splitting smaller arrays costs more communication than it saves memory

Tree = Any


def make_mesh(data: int, fsdp: int, devices: Sequence[Any] | None = None) -> Mesh:
  """A (data, fsdp) mesh over all devices of all processes.

  One of the two sizes may be -1, which means all remaining devices. Within a slice (of a TPU, or GPUs connected by
  NVLink) the order of devices follows its links. Several slices are arranged along `data`: the slow network between
  them carries sums of gradients and compared examples, but never gathered parameters.

  Raises:
    ValueError: the product of the two is not the number of devices, or fsdp does not divide a slice.
  """
  devices = list(devices or jax.devices())
  num_devices = len(devices)
  requested = f"config.mesh (data={data}, fsdp={fsdp})"
  if data == -1 and fsdp > 0:
    data = num_devices // fsdp
  elif fsdp == -1 and data > 0:
    fsdp = num_devices // data
  if data * fsdp != num_devices or data < 1:
    raise ValueError(f"{requested} does not fit {counted(num_devices, 'device')}: the product must be {num_devices}")
  sizes = Counter(getattr(device, "slice_index", 0) for device in devices)
  if len(sizes) == 1:
    grid = mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
  elif len(set(sizes.values())) > 1 or min(sizes.values()) % fsdp:
    raise ValueError(
      f"{requested} does not fit {len(sizes)} slices of {sorted(sizes.values())} devices: slices must have equal sizes "
      f"and fsdp must divide them, so that parameters are gathered within a slice"
    )
  else:
    within, between = (data // len(sizes), fsdp), (len(sizes), 1)
    grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
  return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy of the array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over all devices."""
  return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def traced_over(mesh: Mesh, function: Callable[..., Tree]) -> Callable[..., Tree]:
  """The function, in which `platform` and `on_each_device` know the mesh while jit traces it."""

  @wraps(function)
  def traced(*args: Any) -> Tree:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args)

  return traced


def platform() -> str:
  """The platform of the mesh of `traced_over`, whose devices need not be here; without one, that of JAX's devices."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def is_splittable(rows: int) -> bool:
  """Whether `on_each_device` can split a batch: over the mesh of `traced_over`, or where there is one device only."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.device_count() == 1 if mesh.empty else rows % mesh.size == 0


def on_each_device(function: Callable[..., Tree], *arrays: jax.Array) -> Tree:
  """The function of arrays whose leading axis is a batch, called on each device with its rows, see `is_splittable`.

  For what the compiler cannot split by itself, such as a kernel. Without `traced_over`, arrays are on one device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function(*arrays)
  rows = PartitionSpec((DATA, FSDP))
  # shard_map's check of replication does not know kernels.
  return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)(*arrays)


def check_batch(batch_size: int, mesh: Mesh, field: str) -> None:
  """Rejects a global batch that does not divide over all devices.

  Raises:
    ValueError: the message names the field, the batch size and the mesh.
  """
  if batch_size <= 0 or batch_size % mesh.size:
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    raise ValueError(
      f"{field}={batch_size}: expected a positive multiple of the number of devices, {mesh.size} ({shape})"
    )


def spec_for(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
  """The rule: large arrays are split over `fsdp` along the largest axis that it divides; all others are replicated.

  Of equally large axes the first is split. The leading axis of stacked layers is split only if it is the largest.
  """
  if fsdp == 1 or math.prod(shape) < MIN_SIZE:
    return PartitionSpec()
  divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
  if not divisible:
    return PartitionSpec()
  best = max(divisible, key=lambda axis: (shape[axis], -axis))
  return PartitionSpec(*(FSDP if axis == best else None for axis in range(best + 1)))


def shard_like(tree: Tree, mesh: Mesh) -> Tree:
  """The sharding of every leaf of `tree` (arrays or their shapes) by `spec_for`.

  The neighbour banks of groups of the batch are split like the batch, so that each group searches its bank on its own
  devices; with any other split, all similarities would have to be sent. One bank for the whole batch is split like a
  parameter.
  """

  def shard(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    in_bank = any(getattr(key, "key", None) == "bank" for key in path)
    if in_bank and len(leaf.shape) == 3 and leaf.shape[0] > 1:
      for axes in ((DATA, FSDP), (DATA,)):
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if shards > 1 and leaf.shape[0] % shards == 0:
          return NamedSharding(mesh, PartitionSpec(axes))
    return NamedSharding(mesh, spec_for(leaf.shape, mesh.shape[FSDP]))

  return jax.tree.map_with_path(shard, tree)


def layout_table(abstract: Tree, max_lines: int = 9) -> list[str]:
  """A table of how a state is sharded, as lines of text: equal layouts within a field of the state share a line.

  Args:
    abstract: the state as shapes with shardings.
    max_lines: number of lines without header and total; the largest layouts come first, and the last line is the sum of
      all others.
  """
  groups: dict[tuple[str, str, str], list[tuple[int, int, str]]] = {}
  for path, leaf in jax.tree.leaves_with_path(abstract):
    field, *names = (str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)
    whole = math.prod(leaf.shape) * leaf.dtype.itemsize
    shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    example = f"{'/'.join(names)} {list(leaf.shape)}".strip()
    groups.setdefault((field, str(leaf.dtype), _layout(leaf.sharding.spec)), []).append((whole, shard, example))
  ordered = sorted(groups.items(), key=lambda group: -sum(leaf[0] for leaf in group[1]))
  if len(ordered) > max_lines:
    others = [leaf for _, leaves in ordered[max_lines - 1 :] for leaf in leaves]
    ordered = [*ordered[: max_lines - 1], (("others", "", ""), others)]
  everything = [leaf for leaves in groups.values() for leaf in leaves]
  lines = [f"{'field':<12}{'dtype':<9}{'split over':<20}{'arrays':>6}{'MiB':>11}{'per device':>12}  largest"]
  for (field, dtype, layout), leaves in [*ordered, (("total", "", ""), everything)]:
    whole, shard = (sum(leaf[place] for leaf in leaves) / 2**20 for place in (0, 1))
    example = max(leaves)[2] if field != "total" else ""
    lines.append(f"{field:<12}{dtype:<9}{layout:<20}{len(leaves):>6}{whole:>11,.2f}{shard:>12,.2f}  {example}".rstrip())
  return lines


def _layout(spec: PartitionSpec) -> str:
  axes = [(names, axis) for axis, names in enumerate(spec) if names]
  texts = [f"{' x '.join(names) if isinstance(names, tuple) else names}, axis {axis}" for names, axis in axes]
  return "; ".join(texts) or "replicated"


def gather(tree: Tree, mesh: Mesh, dtype: Any) -> Tree:
  """Parameters as a model reads them: complete on every device, and cast to `dtype` before they are sent.

  Otherwise the compiler may gather activations instead, and it may gather in float32. A leaf that is not split is
  unchanged. Each device keeps its shard of the summed gradient, in float32 again.

  If all large parameters are read in the compute dtype, as in our models, values are equal to those of the model's own
  cast. So are gradients, except those of a parameter that is used several times: its gradients have `dtype` and are
  also summed in `dtype`.
  """

  def gather_leaf(leaf: jax.Array) -> jax.Array:
    spec = spec_for(leaf.shape, mesh.shape[FSDP])
    return leaf if spec == PartitionSpec() else _gather(leaf, NamedSharding(mesh, spec), dtype)

  return jax.tree.map(gather_leaf, tree)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(leaf: jax.Array, split: NamedSharding, dtype: Any) -> jax.Array:
  shard = jax.lax.with_sharding_constraint(leaf.astype(dtype), split)
  return jax.lax.with_sharding_constraint(shard, replicated(split.mesh))


def _gather_forward(leaf: jax.Array, split: NamedSharding, dtype: Any) -> tuple[jax.Array, None]:
  return _gather(leaf, split, dtype), None


def _gather_backward(split: NamedSharding, dtype: Any, saved: None, gradient: jax.Array) -> tuple[jax.Array]:
  return (jax.lax.with_sharding_constraint(gradient, split).astype(jnp.float32),)


_gather.defvjp(_gather_forward, _gather_backward)


def batch_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """Indices of this host's rows of the global batch, ascending; a TPU mesh may assign rows that are not adjacent."""
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def local_rows(array: Any) -> np.ndarray:
  """This host's rows of an array that is split as a batch, in the order of `batch_rows`; waits for the devices."""
  if not isinstance(array, jax.Array):
    return np.asarray(array)
  shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def to_global(batch: Tree, sharding: NamedSharding) -> Tree:
  """Joins the hosts' local batches, each with the host's `batch_rows`, into global arrays."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
