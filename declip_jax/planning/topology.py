"""TPU topologies to compile for without the hardware."""

from collections.abc import Iterator
import contextlib
import os
import sys
import tempfile

import jax
from jax.experimental import topologies

from declip_jax.extras import install_command, is_installed

EXAMPLES = "v4:4x4x4, v5e:4x4, v5e:16x16, v5p:4x4x8, v6e:16x16, tpu7x:2x2x2"
# Otherwise libtpu queries a TPU VM's metadata server, locks out other processes, and logs everything.
_LIBTPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
}


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
  """Devices of TPU slices, to compile for; the slices need not exist.

  Args:
    name: TYPE:SHAPE, as libtpu names it.
    slices: number of slices.

  Raises:
    ModuleNotFoundError: libtpu is not installed.
    ValueError: libtpu does not know the topology; the message includes that of libtpu.
  """
  if not is_installed("libtpu"):
    raise ModuleNotFoundError(
      f"--topology={name} needs libtpu, which any x86 Linux can install: {install_command('tpu')}"
    )
  os.environ |= _LIBTPU
  jax.config.update("jax_platforms", "cpu")
  options = {"num_slices": slices} if slices > 1 else {}
  if name.lower().startswith("v4"):
    options["chip_config_name"] = "megacore"  # one device per chip, as on real hosts
  try:
    with _silent_libtpu():
      return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
  except (RuntimeError, ValueError) as error:
    reason = str(error).removeprefix("INVALID_ARGUMENT: ")
    raise ValueError(f"--topology={name}: {reason}\nExamples of topologies: {EXAMPLES}") from error


@contextlib.contextmanager
def _silent_libtpu() -> Iterator[None]:
  """Hides what libtpu prints past its own log, a warning that this machine has no TPU, unless it fails."""
  sys.stderr.flush()
  with tempfile.TemporaryFile() as printed:
    kept = os.dup(2)
    os.dup2(printed.fileno(), 2)
    try:
      yield
    except BaseException:
      printed.seek(0)
      os.write(kept, printed.read())
      raise
    finally:
      os.dup2(kept, 2)
      os.close(kept)
