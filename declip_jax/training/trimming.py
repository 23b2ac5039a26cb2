"""Trims the texts of a batch to a length that holds its longest one: the same results at a lower cost.

Nothing after the end of a text affects a causal tower, or a bidirectional pass that stops there, and the losses read no
state after it. So the host drops columns that are padding in every row, and a step of static shapes costs what its
texts need. Each length is another program, which is compiled when a batch first has it. There are a few lengths to
choose from, so that few programs are compiled; the longest of them is the context length, which holds every text. Masks
and augmentation are drawn before texts are trimmed, and do not depend on it. Lengths depend only on the batches, so a
run that resumes repeats them, on any number of hosts.

All hosts have to run the same program, but each knows only its own rows of a batch. The others' captions cannot be
derived from seed and position: a host would have to read the samples of all hosts. One length for the whole run would
have to hold the longest text of a large data set, which is the context length. A switch on the device between branches
of all lengths needs no agreement, but compiles all of them, and its memory is more than that of the longest one. So the
hosts agree: before a step is dispatched, the devices are asked for the maximum over the hosts for the batch after it,
one number per device. They know it when the step starts, so that the host can trim that batch while the step runs. The
price is that a batch has to be read one step earlier. It is dispatched from the thread that dispatches the steps:
collectives of two threads could start in another order on each host, and wait for each other forever.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Int
import numpy as np

from declip_jax.sharding import replicated, to_global
from declip_jax.types import Batch


class Measured(NamedTuple):
  """A batch whose texts are still on the host.

  Attributes:
    arrays: the other arrays, on the devices.
    text: this host's rows of token ids.
    needed: number of positions that these rows need.
  """

  arrays: Batch
  text: Int[np.ndarray, "b u t"]
  needed: int


@runtime_checkable
class Batches(Protocol):
  """Batches that are read ahead, each with the input position after it and the numbers of bad samples."""

  def __next__(self) -> tuple[Measured, dict[str, int], np.ndarray]: ...

  def close(self) -> None: ...


def needed_length(batch: Mapping[str, np.ndarray], eot: int) -> int:
  """The number of positions up to the last one that a train step reads.

  It reads texts up to their first end-of-text token, and the positions that masked language modelling predicts. A row
  without an end needs all positions.

  Args:
    batch: `text` and, for masked language modelling, `mlm_position`, see `types.Batch`.
    eot: id of the end-of-text token.
  """
  text = batch["text"]
  is_end = text == eot
  ends = np.where(is_end.any(axis=-1), is_end.argmax(axis=-1), text.shape[-1] - 1)
  return 1 + int(max(ends.max(), batch["mlm_position"].max(initial=0) if "mlm_position" in batch else 0))


def trimmed_length(lengths: Sequence[int], needed: int) -> int:
  """The shortest of some ascending lengths that is at least `needed`, which the last one always is."""
  return next(length for length in lengths if length >= needed)


def measure(batch: Mapping[str, np.ndarray], eot: int, sharding: NamedSharding) -> Measured:
  """Places all arrays of this host's rows of a batch except texts, and measures these."""
  others = {name: array for name, array in batch.items() if name != "text"}
  return Measured(to_global(others, sharding), batch["text"], needed_length(batch, eot))


class TrimmedBatches:
  """Iterates over global batches with trimmed texts; every host has to iterate from the thread that runs the steps.

  Yields what `batches` yields, with a `Batch` in place of each `Measured`.

  Args:
    batches: batches, at least one more than are used; closed together with this.
    lengths: legal lengths of texts, ascending; the last one holds every text.
    sharding: how a batch is split.
  """

  def __init__(self, batches: Batches, lengths: Sequence[int], sharding: NamedSharding):
    self._batches, self._lengths, self._sharding = batches, tuple(lengths), sharding
    self._largest = jax.jit(jnp.max, out_shardings=replicated(sharding.mesh))
    self._ahead: tuple | None = None

  def __iter__(self) -> "TrimmedBatches":
    return self

  def __next__(self) -> tuple[Batch, dict[str, int], np.ndarray]:
    (arrays, text, _), needed, *others = self._ahead or self._read()
    self._ahead = self._read() if jax.process_count() > 1 else None
    text = text[..., : trimmed_length(self._lengths, needed())]
    return ({**arrays, "text": to_global(np.ascontiguousarray(text), self._sharding)}, *others)

  def close(self) -> None:
    """Ends the reading."""
    self._batches.close()

  def _read(self) -> tuple[Any, ...]:
    """The next batch, and a function that returns how many positions the rows of all hosts need."""
    batch, *others = next(self._batches)
    return batch, self._agree(batch.needed), *others

  def _agree(self, needed: int) -> Callable[[], int]:
    """Starts to compute the maximum over all hosts; returns a function that waits for it."""
    if jax.process_count() == 1:
      return lambda: needed
    mine = np.full(len(self._sharding.mesh.local_devices), needed, np.int32)
    largest = self._largest(to_global(mine, self._sharding))
    return lambda: int(jax.device_get(largest))
