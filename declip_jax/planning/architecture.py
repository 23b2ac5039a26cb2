"""The architecture to propose on a machine, by what JAX finds there."""

import importlib.util

ARCHITECTURE, FOR_CPUS = "ViT-B/32", "ViT-Nano/8@32px"


def suggested() -> str:
  """The smallest published architecture, or on a machine with only CPUs one that they train in minutes.

  Where libtpu is installed, JAX is not asked: on a slice of several hosts it would wait for the others.
  """
  if importlib.util.find_spec("libtpu"):
    return ARCHITECTURE
  import jax  # slow to import

  try:
    return FOR_CPUS if jax.default_backend() == "cpu" else ARCHITECTURE
  except RuntimeError:  # another process uses the accelerator
    return ARCHITECTURE
