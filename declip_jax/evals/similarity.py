"""Embeddings of images and texts, and the scores between them: cosines, or FILIP's late interaction of tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Bool, Float
import numpy as np

from declip_jax.objectives.filip import late_interaction
from declip_jax.sharding import batch_rows, batch_sharding, replicated, to_global

Tree = Any
# One leading entry per image or text, in NumPy: unit-norm embeddings `[n d]`, unit-norm tokens of images `[n k e]`, or
# `TextTokens`.
Embeddings = Any
_BLOCK = 1024  # images and texts whose tokens are compared in one call; 1 MiB of scores


class TextTokens(NamedTuple):
  """Unit-norm tokens of texts, as FILIP compares them, and a mask that is False at padding."""

  token: Float[np.ndarray, "n t e"]
  valid: Bool[np.ndarray, "n t"]


# From queries and keys (images and texts, or texts and images) to scores `[n m]`.
Similarity = Callable[[Embeddings, Embeddings], Float[np.ndarray, "n m"]]


def cosines(query: Float[np.ndarray, "n d"], key: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
  """The `Similarity` of unit-norm embeddings."""
  return query @ key.T


def unit_rows(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
  """Rows of length one in float32, normalised in float64; a row of zeros stays one, so that it ties with all others."""
  length = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
  return (x / np.where(length == 0, 1, length)).astype(np.float32)


def take(embeddings: Embeddings, index: Any) -> Embeddings:
  """Selects images or texts by an array of indices, a mask or a slice."""
  return jax.tree.map(lambda x: x[index], embeddings)


def num_embeddings(embeddings: Embeddings) -> int:
  """Number of images or texts."""
  return len(jax.tree.leaves(embeddings)[0])


def concatenate(batches: Sequence[Embeddings], size: int | None = None) -> Embeddings:
  """Joins batches along the leading axis and keeps the first `size` entries; by default, all."""
  return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:size], *batches)


def padded_size(size: int, devices: int) -> int:
  """The next power of two times the number of devices, so that few shapes are compiled."""
  padded = devices
  while padded < size:
    padded *= 2
  return padded


def make_late_interaction(mesh: Mesh) -> Similarity:
  """The `Similarity` of tokens (FILIP, Yao et al. 2022, section 3.1), compiled once, on all devices of a mesh.

  Every host has all tokens, provides its share of a block of images and of a block of texts, and receives all scores;
  neither the number of images and texts nor their tokens are limited by the memory of a device. The precision of
  products is set by `jax_default_matmul_precision`, as in training.
  """
  sharding = batch_sharding(mesh)
  compare = partial(late_interaction, devices=mesh.size)
  image_to_text = jax.jit(lambda image, text: compare(image, *text)[0], out_shardings=replicated(mesh))
  text_to_image = jax.jit(lambda text, image: compare(image, *text)[1], out_shardings=replicated(mesh))

  def place(embeddings: Embeddings, start: int, size: int) -> Tree:
    index = np.minimum(start + batch_rows(sharding, size), num_embeddings(embeddings) - 1)  # padded with the last one
    return to_global(take(embeddings, index), sharding)

  def similarity(query: Embeddings, key: Embeddings) -> Float[np.ndarray, "n m"]:
    compiled = text_to_image if isinstance(query, TextTokens) else image_to_text
    scores = np.empty((num_embeddings(query), num_embeddings(key)), np.float32)
    height, width = (padded_size(min(size, _BLOCK), mesh.size) for size in scores.shape)
    for row in range(0, scores.shape[0], height):
      queries = place(query, row, height)
      for column in range(0, scores.shape[1], width):
        block = scores[row : row + height, column : column + width]
        block[:] = np.asarray(compiled(queries, place(key, column, width)))[: block.shape[0], : block.shape[1]]
    return scores

  return similarity
