"""The architecture to propose on a machine, by what JAX finds there."""

from pathlib import Path

ARCHITECTURE, FOR_CPUS = "ViT-B/32", "ViT-Nano/8@32px"
_TPUS = ("/dev/accel0", "/dev/vfio/0")  # device files of the first chip, by generation


def suggested() -> str:
  """The smallest published architecture, or on a machine with only CPUs one that they train in minutes.

  On a machine with TPUs, JAX is not asked: on a slice of several hosts it would wait for the others.
  """
  if any(Path(device).exists() for device in _TPUS):
    return ARCHITECTURE
  import jax  # slow to import

  try:
    return FOR_CPUS if jax.default_backend() == "cpu" else ARCHITECTURE
  except RuntimeError:  # another process uses the accelerator
    return ARCHITECTURE
