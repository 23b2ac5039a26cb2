"""Pretraining of CLIP, SLIP and DeCLIP in JAX. `declip_jax.load(path)` gives a trained model as functions."""

import importlib
from typing import Any

__version__ = "0.2.0"
ADDRESS = "https://github.com/OWNER/declip_jax"  # of the repository; tools/notebooks.py writes it into other files

_MODULES = ("config", "config_files", "evaluate", "train")


def __getattr__(name: str) -> Any:
  """Imports what is used on demand, so that processes that only read data do not import JAX."""
  if name == "load":
    from declip_jax.clip import load

    return load
  if name in _MODULES:
    return importlib.import_module(f"declip_jax.{name}")
  raise AttributeError(f"module 'declip_jax' has no attribute {name!r}")
