"""Tiny models with random weights, shared by tests."""

from collections.abc import Mapping
import copy
from dataclasses import replace
import functools
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from tiny import tiny_config

from declip_jax import config
from declip_jax.clip import Clip
from declip_jax.data.images import EvalView
from declip_jax.sharding import make_mesh
from declip_jax.weights.describe import Description
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


def describe_any(path: str, settings: Mapping[str, Any] | None = None) -> Description:
  """Stands in for `weights.describe.describe` where a command names weights that do not exist: CLIP's ViT-B/32."""
  del path, settings
  model = config.default().model.to_dict()
  view = EvalView(224, interpolation="bicubic", mean=model["mean"], std=model["std"])
  return Description("OpenAI", model, ("joint",), view, False)


class Counting:
  """Stands in for the weights of a command: a model that counts the batches that it encodes, and is interrupted.

  Attributes:
    batches: number of batches of images that were encoded.
    left: number of batches after which encoding is interrupted.
  """

  def __init__(self, monkeypatch: pytest.MonkeyPatch, command: ModuleType, clip: Clip, batches: int = 10**6):
    self.batches, self.left, clip = 0, batches, copy.copy(clip)
    encoders = clip.encoders(8)

    def encode(images: Any) -> Any:
      if not self.left:
        raise KeyboardInterrupt
      self.left, self.batches = self.left - 1, self.batches + 1
      return encoders.image(images)

    monkeypatch.setattr(command, "load", lambda *arguments: clip)
    clip.encoders = lambda *arguments, **options: replace(encoders, image=encode)
