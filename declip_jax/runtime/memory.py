"""Running out of memory: one error that says how much was needed and how to need less."""

from collections.abc import Iterator
import contextlib
import re

import jax

_EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED|out of memory|bad_alloc", re.IGNORECASE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# "allocating 4096 bytes", "allocate 12.5GiB", "Used 20.48G of 15.48G hbm"
_NEEDED = re.compile(r"(?:allocat\w+|used|reserve)\s+(?:of\s+)?([\d.]+)\s*([KMGT]?)(?:i?B\b|\b| ?bytes)", re.IGNORECASE)


class OutOfMemory(MemoryError):
  """A device or this machine has less memory than needed; the message says how to need less."""


@contextlib.contextmanager
def explained(remedy: str) -> Iterator[None]:
  """Converts errors due to a lack of memory to `OutOfMemory`.

  Args:
    remedy: what the user can do about it.

  Raises:
    OutOfMemory: memory ran out while the context was open; the message names the amount if it is known.
  """
  try:
    yield
  except OutOfMemory:
    raise
  except MemoryError as error:
    details = f" ({error})" if str(error) else ""
    raise OutOfMemory(f"out of memory on this machine{details}: {remedy}") from error
  except jax.errors.JaxRuntimeError as error:
    if not _EXHAUSTED.search(str(error)):
      raise
    raise OutOfMemory(f"out of memory{_amounts(str(error))}: {remedy}") from error


def _amounts(text: str) -> str:
  needed = _NEEDED.search(text)
  amount = f": {float(needed[1].rstrip('.')) * _UNITS[needed[2].upper()] / 2**30:.1f} GiB were needed" if needed else ""
  limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
  known = [limit for limit in limits if limit]
  return f"{amount}, and a device has {min(known) / 2**30:.1f} GiB" if known else amount
