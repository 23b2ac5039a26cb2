"""Tiny models with random weights, shared by tests."""

import functools
from typing import Any

import jax
import numpy as np
from tiny import tiny_config

from declip_jax.clip import Clip
from declip_jax.data.images import EvalView
from declip_jax.sharding import make_mesh
from declip_jax.weights.layout import abstract_variables
from declip_jax.weights.read import Weights


@functools.cache
def make_clip(seed: int, heads: tuple[str, ...] = ("joint",), **fields: Any) -> Clip:
  """A model with random weights; `fields` are those of its config, with dots."""
  return Clip(make_weights(seed, heads, **fields), make_mesh(-1, 1))


def make_weights(seed: int, heads: tuple[str, ...] = ("joint",), **fields: Any) -> Weights:
  """The random weights of `make_clip`."""
  c = tiny_config("clip").model
  c.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
  model, rng = c.to_dict(), np.random.default_rng(seed)
  _, shapes = abstract_variables(model, heads, 16)
  drawn = jax.tree.map(lambda leaf: rng.normal(0.5, 0.3, leaf.shape).astype(leaf.dtype), shapes)
  if heads != ("joint",):  # a fine-tuned model has no text tower
    drawn["params"]["towers"].pop("text", None)
  return Weights(f"weights {seed}", model, heads, **drawn, view=EvalView(16))
