"""Imports of the libraries that benchmarks compare with; `make bench-input` and `make bench-open-clip` install them."""

import importlib
import re
from types import ModuleType


def optional_import(name: str) -> ModuleType | None:
  """Imports a module; returns None if it is not installed."""
  try:
    if name in ("open_clip", "torchvision.transforms"):
      _import_torchvision()
    return importlib.import_module(name)
  except ImportError:
    return None


def _import_torchvision() -> None:
  """Imports torchvision, even its CUDA build together with PyTorch's CPU build.

  That combination lacks a few operators at import, which no benchmark uses; this declares them.

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
