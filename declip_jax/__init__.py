"""Pretraining of CLIP, SLIP and DeCLIP in JAX. `declip_jax.load(path)` gives a trained model as functions."""

from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
  if name == "load":  # on demand, so that processes that only read data do not import JAX
    from declip_jax.clip import load

    return load
  raise AttributeError(f"module 'declip_jax' has no attribute {name!r}")
