"""PyTorch and torchvision for the benchmarks that measure beside them."""

import re


def import_torchvision() -> None:
  """Imports it, also its CUDA build beside PyTorch's CPU build.

  That misses a few operators at import, which nothing here uses: they are declared.

  Raises:
    ImportError: PyTorch or torchvision is not installed.
  """
  import torch

  for _ in range(10):
    try:
      import torchvision  # noqa: F401

      return
    except RuntimeError as error:
      missing = re.match(r"operator (torchvision::\w+) does not exist", str(error))
      if not missing:
        raise
      torch.library.define(missing[1], "(Tensor x) -> Tensor")
