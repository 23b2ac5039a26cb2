"""What every evaluator needs: a whole source or many texts encoded by pure functions, as rows that can be compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Bool, Float, Int, UInt8
import numpy as np

from declip_jax.data.pipeline import EvaluationBatches
from declip_jax.data.sources import Source
from declip_jax.data.text.tokenizer import Tokenizer

# One row for each image or text, in NumPy: unit-norm embeddings `[n d]`, unit-norm tokens of images `[n k e]`, or
# `TextTokens`.
Rows = Any


class TextTokens(NamedTuple):
  """Unit-norm tokens of texts, as FILIP compares them, and which of them are no padding."""

  token: Float[np.ndarray, "n t e"]
  valid: Bool[np.ndarray, "n t"]


# From rows to search with and rows to search in, images and texts or the other way round, to scores `[n m]`.
Similarity = Callable[[Rows, Rows], Float[np.ndarray, "n m"]]


def cosines(query: Float[np.ndarray, "n d"], key: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
  """The `Similarity` of unit-norm embeddings."""
  return query @ key.T


@dataclass(frozen=True)
class Encoders:
  """Encode functions with parameters and placement bound, how inputs are made for them, and how rows are compared.

  Attributes:
    image: this host's part of a global batch, uint8 `[b h w c]`, to all `Rows` `[B ...]` on every host.
    text: likewise for token ids int32 `[b t]`.
    gather: likewise for any rows, without encoding: `[b ...]` to `[B ...]`.
    tokenizer: of the texts.
    image_size, interpolation, resize: of the evaluation view, `images.eval_view`.
    batch_size: global `B`, a multiple of the number of devices.
    rows: which rows of a global batch are this host's.
    similarity: of rows, on every host; all hosts have to call it alike.
    tokens: whether rows are tokens (FILIP) and not embeddings.
  """

  image: Callable[[UInt8[np.ndarray, "b h w c"]], Rows]
  text: Callable[[Int[np.ndarray, "b t"]], Rows]
  gather: Callable[[Any], Any]
  tokenizer: Tokenizer
  image_size: int
  interpolation: str
  resize: int
  batch_size: int
  rows: Int[np.ndarray, "b"]
  similarity: Similarity = cosines
  tokens: bool = False


class EmbeddedImages(NamedTuple):
  """A source's images in order; `readable` is False where an image could not be decoded and its row means nothing."""

  rows: Rows
  label: Int[np.ndarray, "n"]
  readable: Bool[np.ndarray, "n"]


def embed_images(
  source: Source, encoders: Encoders, then: Callable[[Rows], Rows] = lambda rows: rows
) -> EmbeddedImages:
  """Encodes every image of a source. Neither batch size nor number of devices or hosts changes the result.

  Args:
    source: of the images.
    encoders: to encode with.
    then: what becomes of the rows of each batch, so that not all tokens of a large source are kept.
  """
  batches = EvaluationBatches(
    source,
    encoders.batch_size,
    encoders.image_size,
    encoders.interpolation,
    encoders.resize,
    encoders.rows,
  )
  parts = [(then(encoders.image(b["image"])), *encoders.gather((b["label"], b["mask"]))) for b in batches]
  return EmbeddedImages(*_joined(parts, len(source)))


def embed_texts(texts: Sequence[str], encoders: Encoders) -> Rows:
  """Encodes texts, in batches padded to one size; where rows are tokens, the padding that all texts share is cut."""
  tokens = encoders.tokenizer(texts)
  if encoders.tokens:
    tokens = tokens[:, : _longest(tokens)]
  size = encoders.batch_size
  padded = np.concatenate([tokens, np.repeat(tokens[-1:], -len(tokens) % size, axis=0)])
  parts = [encoders.text(batch[encoders.rows]) for batch in padded.reshape(-1, size, tokens.shape[1])]
  return _joined(parts, len(tokens))


def take(rows: Rows, index: Any) -> Rows:
  """Some of the rows, by an array of indices or a slice."""
  return jax.tree.map(lambda x: x[index], rows)


def count(rows: Rows) -> int:
  """How many images or texts these are."""
  return len(jax.tree.leaves(rows)[0])


def _joined(parts: Sequence[Rows], count: int) -> Rows:
  return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)


def _longest(tokens: Int[np.ndarray, "n t"]) -> int:
  """Where the padding of the longest text begins, as a multiple of 16, so that few lengths are ever compiled."""
  return -(-(np.flatnonzero(tokens.any(axis=0))[-1] + 1) // 16) * 16
