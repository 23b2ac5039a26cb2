"""Rows of features, and their place on the devices of a mesh: each host has rows of its own and never sends them."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Float, Int, Shaped
import numpy as np

from declip_jax.runtime.hosts import first_error, gather_rows
from declip_jax.sharding import batch_sharding, to_global

BLOCK = 8192  # rows of a device that a pass over features handles at once
_TILE = 128  # a block of at least this size is a multiple of it

# From scores `[n classes]`, -inf for a class that is never answered, and labels to a number; larger is better.
Score = Callable[[np.ndarray, np.ndarray], float]


class Labelled(NamedTuple):
  """Features and labels of one split, in NumPy; several hosts each have their part.

  Attributes:
    features: one row per example.
    label: class of each row, -1 for none; or, for several labels, 1 where a class is present, -1 where it is absent and
      0 where neither counts, such as a difficult object of VOC.
  """

  features: Float[np.ndarray, "n f"]
  label: Int[np.ndarray, "n"] | Int[np.ndarray, "n k"]


@dataclasses.dataclass(frozen=True)
class ProbeData:
  """What a probe learns from, and what it is judged by; every host has rows of its own of each split.

  Attributes:
    train: rows to train on; rows without a label do not count.
    test: rows to score.
    score: metric of the scores of a split.
    classes: number of classes.
    mesh: devices to compute on.
    val: rows on which hyperparameters are chosen; None for a probe that chooses none.
  """

  train: Labelled
  test: Labelled
  score: Score
  classes: int
  mesh: Mesh
  val: Labelled | None = None

  def check(self) -> None:
    """Rejects splits that no probe can use, see `check_rows`."""
    splits = {"train": self.train, "val": self.val, "test": self.test}
    check_rows({name: rows for name, rows in splits.items() if rows is not None}, self.classes)


def check_rows(splits: dict[str, Labelled], classes: int) -> None:
  """Rejects splits that no probe can use.

  Half precision moves accuracies by tenths of a point, so features that have it are refused: whoever accepts this
  casts them.

  Raises:
    ValueError: on every host; the message names the split, the row and the value.
  """
  if error := first_error(next(filter(None, (_mistake(name, rows, classes) for name, rows in splits.items())), "")):
    raise ValueError(error)
  widths = {name: rows.features.shape[1] for name, rows in splits.items()}
  if len(set(widths.values())) > 1:
    raise ValueError(f"features of different widths: {widths}")


def _mistake(name: str, rows: Labelled, classes: int) -> str:
  features, label = rows
  if features.dtype not in (np.float32, np.float64):
    return f"{name}: features are {features.dtype}; a probe needs float32: half precision moves accuracies by tenths"
  if len(features) != len(label):
    return f"{name}: {len(features)} rows of features, {len(label)} labels"
  bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
  if len(bad):
    return f"{name}: the features of row {bad[0]} are not finite, and those of {len(bad) - 1} other rows"
  if label.ndim == 2:
    if label.shape[1] != classes:
      return f"{name}: labels for {label.shape[1]} classes; expected {classes}"
    bad = np.flatnonzero((np.abs(label) > 1).any(axis=1))
    return f"{name}: labels of row {bad[0]} are {label[bad[0]]}; expected 1, 0 and -1" if len(bad) else ""
  bad = np.flatnonzero((label < -1) | (label >= classes))
  return f"{name}: label of row {bad[0]} is {label[bad[0]]}; expected -1 to {classes - 1}" if len(bad) else ""


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the rows of a split lie on a mesh: those of a host on its own devices, with padding at the end of the host.

  Attributes:
    mesh: devices, split along both axes.
    counts: number of rows of each host.
    rows_per_device: with padding, a multiple of the number of blocks.
  """

  mesh: Mesh
  counts: tuple[int, ...]
  rows_per_device: int

  @classmethod
  def make(cls, rows: int, mesh: Mesh) -> "Layout":
    """The layout of a split of which this host has `rows`; every host has to call this."""
    hosts = gather_rows(np.array([[rows, len(mesh.local_devices)]]))
    needed = max(-(-count // devices) for count, devices in hosts.tolist())
    return cls(mesh, tuple(hosts[:, 0].tolist()), padded_rows(needed))

  def place(self, x: Shaped[np.ndarray, "n ..."], fill: Any = 0) -> Shaped[jax.Array, "rows ..."]:
    """Copies this host's rows to its devices, and `fill` to the rows that pad them."""
    padded = np.full((self.rows_per_device * len(self.mesh.local_devices), *x.shape[1:]), fill, x.dtype)
    padded[: len(x)] = x
    return to_global(padded, batch_sharding(self.mesh))

  def fetch(self, x: Shaped[jax.Array, "rows ..."]) -> Shaped[np.ndarray, "n ..."]:
    """The rows of all hosts, one host after the other, without padding; every host has to call this."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    mine = np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
    return gather_rows(mine[: self.counts[jax.process_index()]])


def padded_rows(rows: int) -> int:
  """The number of rows of a device, with padding: blocks of equal size, or of one block a power of two.

  Data sets of similar size then share compiled programs; compiling one takes longer than many passes over a block.
  """
  blocks = num_blocks(max(rows, 1))
  block = -(-max(rows, 1) // blocks)
  power = 1 << (block - 1).bit_length()
  return power if blocks == 1 else blocks * -(-block // min(_TILE, power)) * min(_TILE, power)


def num_blocks(rows: int) -> int:
  """The number of blocks into which a pass divides the rows of a device."""
  return -(-rows // BLOCK)


def first_row(rows: int) -> int:
  """The number of rows on the hosts before this one, which has `rows`; every host has to call this."""
  return int(gather_rows(np.array([rows]))[: jax.process_index()].sum())
