"""Trained towers as functions: `load` a run in a notebook, or bind a model's parameters for the evaluators."""

from collections.abc import Sequence
from functools import partial
import os
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict
import numpy as np

from declip_jax import run
from declip_jax.checkpoint import Checkpoints
from declip_jax.config import from_json
from declip_jax.data import images as image_ops
from declip_jax.data.tokenizer import Tokenizer
from declip_jax.evals.embed import Encoders, embed_texts
from declip_jax.models.model import Model
from declip_jax.sharding import batch_sharding, check_batch, local_rows, replicated, to_global
from declip_jax.state import abstract_state

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
      rows=local_rows(batch_sharding(self._mesh), self._config.evaluate_batch_size),
    )


class Clip:
  """A trained run as two functions, for notebooks; see `load`.

  Attributes:
    config: of the run.
    step: of the checkpoint.
    encoders: what the evaluators take.
  """

  def __init__(self, config: ConfigDict, step: int, encoders: Encoders):
    self.config, self.step, self.encoders = config, step, encoders

  def encode_images(self, images: Sequence[np.ndarray | bytes]) -> Float[np.ndarray, "n d"]:
    """Unit-norm float32 embeddings of images, each uint8 pixels `[h w 3]` of any size or the bytes of a file.

    Raises:
      ValueError: one of them is no image.
    """
    size, how = self.encoders.image_size, self.encoders.interpolation
    views = np.stack([image_ops.eval_view(image_ops.decode(x), size=size, interpolation=how) for x in images])
    batch = self.encoders.batch_size
    padded = np.concatenate([views, np.repeat(views[-1:], -len(views) % batch, axis=0)])
    parts = [self.encoders.image(part) for part in padded.reshape(-1, batch, *views.shape[1:])]
    return np.concatenate(parts)[: len(views)]

  def encode_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
    """Unit-norm float32 embeddings of texts."""
    return embed_texts(texts, self.encoders)


def load(workdir: str | os.PathLike[str], step: int | None = None) -> Clip:
  """The model of a run at its newest checkpoint, or at `step`, on all local devices.

  Raises:
    FileNotFoundError: no such run, or no such checkpoint.
  """
  workdir = run.local_path(workdir)
  config_file = workdir / "config.json"
  if not config_file.exists():
    raise FileNotFoundError(f"{workdir} is no run: it has no config.json")
  config = from_json(config_file.read_text())
  config.mesh.update({"data": -1, "fsdp": 1})  # a run of any mesh is read on whatever there is
  parts = run.build(config)
  checkpoints = Checkpoints(workdir)
  steps = checkpoints.steps()
  chosen = step if step is not None else (steps or [None])[-1]
  if chosen not in steps:
    raise FileNotFoundError(f"{workdir} has no checkpoint of step {step or 'any'}; there are: {steps or 'none'}")
  batch = parts.batch_shape(parts.mesh.size)
  abstract = abstract_state(batch, parts.mesh, model=parts.model, optimizer=parts.optimizer)
  params, collections = checkpoints.restore_model(chosen, abstract)
  checkpoints.close()
  encoders = EncoderFactory(parts.model, config, parts.mesh, parts.tokenizer).bind(params, collections)
  return Clip(config, chosen, encoders)
