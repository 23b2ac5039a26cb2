"""Trained towers as functions: `load` a run in a notebook, or bind a model's parameters for the evaluators."""

from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from declip_jax.data.tokenizer import Tokenizer
from declip_jax.evals.embed import Encoders
from declip_jax.models.model import Model
from declip_jax.sharding import batch_sharding, check_batch, replicated, to_global

Tree = Any


class EncoderFactory:
  """Compiles the encode functions of a model once; `bind` makes `Encoders` of any parameters.

  Args:
    model: to encode with.
    config: gives image size, interpolation and batch size.
    mesh: to encode on.
    tokenizer: of the model.
  """

  def __init__(self, model: Model, config: ConfigDict, mesh: Mesh, tokenizer: Tokenizer):
    check_batch(config.evaluate_batch_size, mesh, "evaluate_batch_size")
    self._config, self._mesh, self._tokenizer = config, mesh, tokenizer
    everywhere = replicated(mesh)
    self._image = jax.jit(model.encode_image, out_shardings=everywhere)
    self._text = jax.jit(model.encode_text, out_shardings=everywhere)
    self._gather = jax.jit(lambda x: x, out_shardings=everywhere)

  def bind(self, params: Tree, collections: Tree) -> Encoders:
    """Encode functions of these parameters, from host arrays to host arrays."""
    place = partial(to_global, sharding=batch_sharding(self._mesh))
    fetch = partial(jax.tree.map, np.asarray)
    return Encoders(
      image=lambda images: np.asarray(self._image(params, collections, place(images))),
      text=lambda tokens: np.asarray(self._text(params, collections, place(tokens))),
      gather=lambda rows: fetch(self._gather(place(rows))),
      tokenizer=self._tokenizer,
      image_size=self._config.data.image_size,
      interpolation=self._config.data.interpolation,
      batch_size=self._config.evaluate_batch_size,
      host=jax.process_index(),
      hosts=jax.process_count(),
    )
