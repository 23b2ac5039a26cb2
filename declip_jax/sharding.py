"""The mesh, and the one rule that lays everything out on it. Model code carries no annotations.

The batch is split over both axes of the mesh, so that a plain `image @ text.T` under jit is the logit matrix of the
global batch and batch statistics are global. Parameters, moments, copies and the bank are split over `fsdp` only; what
a step reads of them is gathered.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

DATA, FSDP = "data", "fsdp"
MIN_SIZE = 2**18  # elements below which splitting costs more in messages than it saves in memory

Tree = Any


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A (data, fsdp) mesh over all devices of all processes; one of the two may be -1, "whatever is left".

  Within a slice (a TPU's, or GPUs joined by NVLink) the devices lie as its links do. Several slices follow one another
  along `data`, so that between them, over the slow network, gradients are summed and examples compared, but no
  parameter is gathered.

  Raises:
    ValueError: the two do not multiply to the number of devices, or fsdp does not fit into a slice.
  """
  devices = list(devices or jax.devices())
  count = len(devices)
  asked = (data, fsdp)
  if data == -1 and fsdp > 0:
    data = count // fsdp
  elif fsdp == -1 and data > 0:
    fsdp = count // data
  if data * fsdp != count or data < 1:
    raise ValueError(
      f"config.mesh (data={asked[0]}, fsdp={asked[1]}) does not fit {count} devices: the product must be {count}"
    )
  sizes = Counter(getattr(device, "slice_index", 0) for device in devices)
  if len(sizes) == 1:
    grid = mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
  elif len(set(sizes.values())) > 1 or min(sizes.values()) % fsdp:
    raise ValueError(
      f"config.mesh (data={asked[0]}, fsdp={asked[1]}) does not fit {len(sizes)} slices of {sorted(sizes.values())} "
      f"devices: slices must be equally large and fsdp must divide them, so that parameters are gathered within one"
    )
  else:
    within, between = (data // len(sizes), fsdp), (len(sizes), 1)
    grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
  return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over all devices."""
  return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def check_batch(batch_size: int, mesh: Mesh, name: str) -> None:
  """Refuses a global batch that the devices and hosts cannot share equally.

  Raises:
    ValueError: names the field, the batch size and the mesh.
  """
  if batch_size <= 0 or batch_size % mesh.size:
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    raise ValueError(f"config.{name}={batch_size} does not divide over the {mesh.size} devices of the mesh ({shape})")


def spec_for(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
  """The rule: large arrays are split over `fsdp` along their largest axis that divides, all others are replicated.

  The first of equally large axes is taken. Stacked layers keep their leading axis whole unless it is the largest.
  """
  if fsdp == 1 or math.prod(shape) < MIN_SIZE:
    return PartitionSpec()
  divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
  if not divisible:
    return PartitionSpec()
  best = max(divisible, key=lambda axis: (shape[axis], -axis))
  return PartitionSpec(*(FSDP if axis == best else None for axis in range(best + 1)))


def shard_like(tree: Tree, mesh: Mesh) -> Tree:
  """The sharding of every leaf of `tree` (arrays or their shapes) under `spec_for`.

  The neighbour banks of parts of the batch lie where these parts are: so a search stays within its devices, where banks
  that are split otherwise send all similarities. One bank for the whole batch is split like a parameter.
  """

  def shard(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    in_bank = any(getattr(key, "key", None) == "bank" for key in path)
    if in_bank and len(leaf.shape) == 3 and leaf.shape[0] > 1:
      for axes in ((DATA, FSDP), (DATA,)):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if parts > 1 and leaf.shape[0] % parts == 0:
          return NamedSharding(mesh, PartitionSpec(axes))
    return NamedSharding(mesh, spec_for(leaf.shape, mesh.shape[FSDP]))

  return jax.tree.map_with_path(shard, tree)


def layout_table(abstract: Tree, rows: int = 9) -> list[str]:
  """How a tree of shapes with shardings lies on the devices, as lines of text: equal layouts of a part in one row.

  The parts are the fields of a state. The largest rows come first, those beyond `rows` in one; the last is the total.
  """
  groups: dict[tuple[str, str, str], list[tuple[int, int, str]]] = {}
  for path, leaf in jax.tree.leaves_with_path(abstract):
    part, *names = (str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)
    whole = math.prod(leaf.shape) * leaf.dtype.itemsize
    held = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    example = f"{'/'.join(names)} {list(leaf.shape)}".strip()
    groups.setdefault((part, str(leaf.dtype), _layout(leaf.sharding.spec)), []).append((whole, held, example))
  ordered = sorted(groups.items(), key=lambda group: -sum(leaf[0] for leaf in group[1]))
  if len(ordered) > rows:
    others = [leaf for _, leaves in ordered[rows - 1 :] for leaf in leaves]
    ordered = [*ordered[: rows - 1], (("others", "", ""), others)]
  everything = [leaf for leaves in groups.values() for leaf in leaves]
  lines = [f"{'part':<12}{'dtype':<9}{'split over':<20}{'arrays':>6}{'MiB':>11}{'per device':>12}  the largest"]
  for (part, dtype, layout), leaves in [*ordered, (("total", "", ""), everything)]:
    whole, held = (sum(leaf[place] for leaf in leaves) / 2**20 for place in (0, 1))
    example = max(leaves)[2] if part != "total" else ""
    lines.append(f"{part:<12}{dtype:<9}{layout:<20}{len(leaves):>6}{whole:>11,.2f}{held:>12,.2f}  {example}".rstrip())
  return lines


def _layout(spec: PartitionSpec) -> str:
  axes = [(names, axis) for axis, names in enumerate(spec) if names]
  texts = [f"{' x '.join(names) if isinstance(names, tuple) else names}, axis {axis}" for names, axis in axes]
  return "; ".join(texts) or "nothing: whole"


def gather(tree: Tree, mesh: Mesh, dtype: Any) -> Tree:
  """Parameters as a model reads them: whole on every device, and those that are split cast to `dtype` before they move.

  Without it the compiler may gather activations instead, and it may gather in float32. A leaf that is not split stays
  as it is. Of the gradient's sum each device keeps its part, in float32 again.

  Where nothing large is read in another dtype than the compute dtype, as in our models, values are those of the
  model's own cast. So are gradients, but for a parameter that is used several times: its gradients, of `dtype` each,
  are also summed in `dtype`.
  """

  def whole(leaf: jax.Array) -> jax.Array:
    spec = spec_for(leaf.shape, mesh.shape[FSDP])
    return leaf if spec == PartitionSpec() else _gather(leaf, NamedSharding(mesh, spec), dtype)

  return jax.tree.map(whole, tree)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(leaf: jax.Array, split: NamedSharding, dtype: Any) -> jax.Array:
  part = jax.lax.with_sharding_constraint(leaf.astype(dtype), split)
  return jax.lax.with_sharding_constraint(part, replicated(split.mesh))


def _gather_forward(leaf: jax.Array, split: NamedSharding, dtype: Any) -> tuple[jax.Array, None]:
  return _gather(leaf, split, dtype), None


def _gather_backward(split: NamedSharding, dtype: Any, saved: None, gradient: jax.Array) -> tuple[jax.Array]:
  return (jax.lax.with_sharding_constraint(gradient, split).astype(jnp.float32),)


_gather.defvjp(_gather_forward, _gather_backward)


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """Which rows of a global batch are this host's, ascending; a TPU mesh may give a host rows that are not adjacent."""
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_global(batch: Tree, sharding: NamedSharding) -> Tree:
  """Joins the hosts' local batches into global arrays, each host giving its own rows."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
