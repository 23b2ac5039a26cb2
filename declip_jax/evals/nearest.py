"""Classification by the nearest training rows, and by the nearest mean of a class: what features say without training.

The search is exact. Each device finds the nearest of its own training rows to a chunk of queries; the nearest of all
rows are among these.
"""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Float64, Int
import numpy as np

from declip_jax.evals.rows import Labelled, Layout, check_rows, first_row
from declip_jax.runtime.hosts import gather_rows, sum_over_hosts
from declip_jax.unit_norm import unit_norm

NEIGHBOURS = (10, 20, 100, 200)  # DINO's; papers report 20
TEMPERATURE = 0.07
_CHUNK = 4096  # rows that have a copy in float64 at once
_SIMILARITIES = 2**27  # similarities of a device that exist at once; 512 MiB


class Neighbours(NamedTuple):
  """The nearest rows of each query, the nearest first; of equally near rows, the first one first.

  Attributes:
    cosine: their similarities to the query.
    index: their numbers among the rows of all hosts, one host after the other.
  """

  cosine: Float32[np.ndarray, "n k"]
  index: Int[np.ndarray, "n k"]


# Counts the votes of some nearest neighbours: for the test rows of all hosts, the sum of exp(cosine / temperature) over
# the neighbours of each class (Wu et al. 2018, DINO), divided by that of the nearest row, which changes no order and
# keeps the votes finite at any temperature.
Votes = Callable[[], Float64[np.ndarray, "n k"]]


def nearest(
  queries: Float[np.ndarray, "n f"],
  keys: Float[np.ndarray, "m f"],
  count: int,
  mesh: Mesh,
  used: Int[np.ndarray, "used"] | None = None,
) -> Neighbours:
  """The nearest keys of all hosts to the queries of all hosts; every host has to call this.

  Args:
    queries, keys: rows of this host, of any length.
    count: number of neighbours, at most that of the keys.
    mesh: devices to compute on.
    used: keys that are searched, as numbers of rows of this host; all by default.
  """
  query_layout, key_layout = Layout.make(len(queries), mesh), Layout.make(len(keys), mesh)
  first = first_row(len(keys))
  number = np.full(len(keys), -1, np.int32)
  chosen = slice(None) if used is None else used
  number[chosen] = first + np.arange(len(keys), dtype=np.int32)[chosen]
  found = _search(mesh, count)(
    query_layout.place(queries.astype(np.float32, copy=False)),
    key_layout.place(keys.astype(np.float32, copy=False)),
    key_layout.place(number, fill=-1),
  )
  return Neighbours(*map(query_layout.fetch, found))


@functools.cache
def _search(mesh: Mesh, count: int) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
  names, split = mesh.axis_names, PartitionSpec(mesh.axis_names)

  def of_device(queries: Array, keys: Array, number: Array) -> tuple[Array, Array]:
    keys, devices = unit_norm(keys), mesh.size
    chunk = min(len(queries), max(1, _SIMILARITIES // (len(keys) * devices)))
    padded = jnp.pad(unit_norm(queries), ((0, -len(queries) % chunk), (0, 0)))

    def of_chunk(mine: Array) -> tuple[Array, Array]:
      everyone = jax.lax.all_gather(mine, names, tiled=True)
      cosine = jnp.where(number[None] >= 0, everyone @ keys.T, -jnp.inf)
      cosine, place = jax.lax.top_k(cosine, min(count, len(keys)))
      # From [devices chunk k], the nearest on this device to the queries of each, to those on each to its own queries.
      sent = [x.reshape(devices, chunk, -1) for x in (cosine, number[place])]
      cosine, candidate = (jax.lax.all_to_all(x, names, 0, 0, tiled=True) for x in sent)
      cosine, candidate = (x.swapaxes(0, 1).reshape(chunk, -1) for x in (cosine, candidate))
      cosine, place = jax.lax.top_k(cosine, count)
      return cosine, jnp.take_along_axis(candidate, place, axis=1)

    found = jax.lax.map(of_chunk, padded.reshape(-1, chunk, padded.shape[1]))
    return tuple(x.reshape(-1, count)[: len(queries)] for x in found)

  def search(*arrays: Array) -> tuple[Array, Array]:
    with jax.default_matmul_precision("highest"):
      return jax.shard_map(of_device, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)(*arrays)

  return jax.jit(search)


def knn(
  train: Labelled,
  test: Labelled,
  *,
  classes: int,
  mesh: Mesh,
  neighbours: Sequence[int] = NEIGHBOURS,
  temperature: float = TEMPERATURE,
) -> tuple[dict[int, Votes], Int[np.ndarray, "n"]]:
  """Votes of the nearest training rows, by their number (DINO, Caron et al. 2021), and the labels of the test rows.

  Votes are counted on demand, since those of many classes take much memory. Numbers larger than that of the labelled
  training rows are left out. Every host has to call this.

  Args:
    train, test: the splits, with one label per row.
    classes: number of classes.
    mesh: devices to compute on.
    neighbours: numbers of neighbours.
    temperature: of the weights, more than 0.

  Raises:
    ValueError: a split is unusable, see `check_rows`, or has several labels.
  """
  _check(train, test, classes)
  label = gather_rows(train.label)
  sizes = [count for count in neighbours if count <= np.sum(label >= 0)]
  if not sizes:
    raise ValueError(f"train: {np.sum(label >= 0)} labelled rows; expected at least {min(neighbours)} neighbours")
  found = nearest(test.features, train.features, max(sizes), mesh, np.flatnonzero(train.label >= 0))
  votes = {
    size: functools.partial(_vote, found.cosine[:, :size], label[found.index[:, :size]], classes, temperature)
    for size in sizes
  }
  return votes, gather_rows(test.label)


def _vote(
  cosine: Float32[np.ndarray, "n neighbours"],
  label: Int[np.ndarray, "n neighbours"],
  classes: int,
  temperature: float,
) -> Float64[np.ndarray, "n k"]:
  weight = np.exp((cosine.astype(np.float64) - cosine[:, :1]) / temperature)
  votes = np.zeros((len(label), classes))
  for place in reversed(range(label.shape[1])):
    votes[np.arange(len(label)), label[:, place]] += weight[:, place]
  return votes


def nearest_mean(train: Labelled, test: Labelled, *, classes: int) -> tuple[Float32[np.ndarray, "n k"], np.ndarray]:
  """Cosines of the test rows of all hosts to the mean of each class's unit-norm rows, and the labels of these rows.

  A class without training data has -inf. Every host has to call this.

  Raises:
    ValueError: a split is unusable, see `check_rows`, has several labels, or the training split has none.
  """
  _check(train, test, classes)
  totals = np.zeros((classes, train.features.shape[1]))
  for start in range(0, len(train.label), _CHUNK):
    rows = start + np.flatnonzero(train.label[start : start + _CHUNK] >= 0)
    np.add.at(totals, train.label[rows], _unit(train.features[rows]))
  counts = sum_over_hosts(np.bincount(train.label[train.label >= 0], minlength=classes))
  if not counts.any():
    raise ValueError("train: no labelled rows")
  cosine = _unit(test.features) @ _unit(sum_over_hosts(totals)).T
  scores = np.where(counts > 0, cosine, -np.inf).astype(np.float32)
  return gather_rows(scores), gather_rows(test.label)


def _unit(x: Float[np.ndarray, "n f"]) -> Float64[np.ndarray, "n f"]:
  return x / np.maximum(np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True), 1e-12)


def _check(train: Labelled, test: Labelled, classes: int) -> None:
  check_rows({"train": train, "test": test}, classes)
  if train.label.ndim == 2:
    raise ValueError("neighbours vote for one class: expected one label per row, not several")
