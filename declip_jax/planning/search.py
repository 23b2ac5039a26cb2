"""Searches for the largest batch that fits into the devices' memory, with few compilations."""

from collections.abc import Callable, Sequence
import dataclasses
import math
import sys

import jax
from ml_collections import ConfigDict

from declip_jax.planning.compile import OutOfMemory, compile_with_progress, memory


@dataclasses.dataclass(frozen=True)
class Largest:
  """The largest batch that fits.

  Attributes:
    pairs: number of pairs per device; None if no compiled size fits.
    batch_size: global batch size.
    tried: for each compiled size, the pairs per device and the bytes needed on each device, None if unknown.
  """

  pairs: int | None
  batch_size: int | None
  tried: list[tuple[int, float | None]]


def largest_batch(
  config: ConfigDict, devices: Sequence[jax.Device], needed: float, available: float, run: ConfigDict | None = None
) -> Largest:
  """The largest batch that fits, rounded down to a multiple of what the config requires of a batch.

  Args:
    config: the config, whose own batch was compiled already.
    devices: devices to compile for.
    needed: bytes that the config's own batch needs on each device.
    available: bytes that each device has.
    run: see `compile_step`.
  """
  num_devices = len(devices)
  groups = config.model.heads.norm_groups, config.model.heads.bank_groups, config.model.image.get("norm_groups", 1)
  divisor = math.lcm(num_devices * config.micro_batches, *groups)  # of the global batch
  unit = math.lcm(divisor // num_devices, config.contrast.block or 1)

  def needed_with(pairs: int) -> float:
    resized = config.copy_and_resolve_references()
    resized.batch_size = pairs * num_devices
    try:
      return memory(compile_with_progress(resized, devices, run)).peak
    except OutOfMemory as error:
      return error.needed
    except ValueError as error:  # such as a bank that is smaller than the batch
      print(f"  {pairs} pairs: {error}", file=sys.stderr, flush=True)
      return math.inf

  tried = search_largest(needed_with, available, {config.batch_size // num_devices: needed}, unit)
  pairs = max((pairs for pairs, size in tried.items() if size <= available), default=None)
  return Largest(
    pairs=pairs,
    batch_size=pairs and pairs * num_devices,
    tried=[(pairs, size if math.isfinite(size) else None) for pairs, size in sorted(tried.items())],
  )


def search_largest(
  needed_with: Callable[[int], float], available: float, known: dict[int, float], unit: int, tries: int = 3
) -> dict[int, float]:
  """Searches for the largest batch per device that fits, given that memory grows almost linearly with the batch.

  Args:
    needed_with: returns the bytes that a batch needs; expensive. Infinity is an unknown number above `available`.
    available: bytes that each device has.
    known: the bytes of the one size that is known already.
    unit: number of which every size is a multiple.
    tries: largest number of calls of `needed_with`.

  Returns:
    The bytes of each size that was tried, `known` included.
  """
  tried, (first,) = dict(known), known
  guess = first // 2 // unit * unit or 2 * first
  for _ in range(tries):
    tried[guess] = needed_with(guess)
    fitting = [size for size, need in tried.items() if need <= available]
    too_large = [size for size in tried if size not in fitting]
    # On the line through the two sizes closest to the limit; by bisection if that line does not rise.
    finite = sorted((abs(need - available), size) for size, need in tried.items() if math.isfinite(need))
    low, high = sorted(size for _, size in finite[:2]) if len(finite) > 1 else (first, first)
    if tried[high] > tried[low]:
      guess = low + (available - tried[low]) * (high - low) / (tried[high] - tried[low])
    else:
      guess = (max(fitting, default=0) + min(too_large, default=32 * first)) / 2
    guess = min(guess, 16 * first, *(size - unit for size in too_large))
    guess = max(int(guess // unit * unit), *fitting, 0)
    if guess in tried or not guess:
      break
  return tried
