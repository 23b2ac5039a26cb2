"""A whole source of images, or many texts, encoded in batches: the input of every evaluation."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jaxtyping import Bool, Int
import numpy as np

from declip_jax.data.pipeline import EvaluationBatches
from declip_jax.data.sources import Source
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.similarity import Embeddings, Similarity, concatenate, take


class ImageFeatures(NamedTuple):
  """A source's images, in order.

  Attributes:
    embeddings: embeddings of all `n` images; meaningless where `readable` is False.
    label: class of each image, -1 for none and for images that cannot be read.
    readable: whether each image could be decoded.
  """

  embeddings: Embeddings
  label: Int[np.ndarray, "n"]
  readable: Bool[np.ndarray, "n"]


class SourceFeatures:
  """A source with its features, which are encoded when an evaluation first reads them, and only once.

  Attributes:
    source: images, captions and labels.
    encoders: encode functions.
  """

  def __init__(self, source: Source | Sequence[Any], encoders: Encoders):
    self.source, self.encoders = source, encoders

  @property
  def similarity(self) -> Similarity:
    """Scores of embeddings, see `Encoders.similarity`."""
    return self.encoders.similarity

  @cached_property
  def images(self) -> ImageFeatures:
    """Features of all images, in memory until the evaluation ends."""
    return embed_images(self.source, self.encoders)

  def map_images(self, function: Callable[[Embeddings], Embeddings]) -> ImageFeatures:
    """Features of all images with a function applied to the embeddings of each batch.

    Unlike `images`, it keeps only the results of the function: the tokens of a large source would not fit in memory.
    """
    if "images" not in vars(self):
      return embed_images(self.source, self.encoders, function)
    size = self.encoders.batch_size
    starts = range(0, len(self.images.label), size)
    batches = [function(take(self.images.embeddings, slice(start, start + size))) for start in starts]
    return self.images._replace(embeddings=concatenate(batches))

  def texts(self, texts: Sequence[str]) -> Embeddings:
    """Embeddings of any texts."""
    return embed_texts(texts, self.encoders)


def embed_images(
  source: Source | Sequence[Any],
  encoders: Encoders,
  then: Callable[[Embeddings], Embeddings] = lambda embeddings: embeddings,
) -> ImageFeatures:
  """Encodes every image of a source; the result depends on neither batch size nor number of devices or hosts.

  Args:
    source: images to encode.
    encoders: encode functions.
    then: function applied to the embeddings of each batch, so that not all tokens of a large source are kept.
  """
  batches = EvaluationBatches(
    source,
    encoders.batch_size,
    encoders.view,
    encoders.batch_rows,
    encoders.workers,
    encoders.threads,
    max_pixels=encoders.max_pixels,
  )
  encoded = [(then(encoders.image(b["image"])), *encoders.gather((b["label"], b["mask"]))) for b in batches]
  return ImageFeatures(*concatenate(encoded, len(source)))


def embed_texts(texts: Sequence[str], encoders: Encoders) -> Embeddings:
  """Encodes texts in batches of one size; where embeddings are tokens, padding common to all texts is trimmed."""
  tokens = encoders.tokenizer(texts)
  if encoders.tokens:
    tokens = tokens[:, : _longest(tokens)]
  size = encoders.batch_size
  padded = np.concatenate([tokens, np.repeat(tokens[-1:], -len(tokens) % size, axis=0)])
  encoded = [encoders.text(batch[encoders.batch_rows]) for batch in padded.reshape(-1, size, tokens.shape[1])]
  return concatenate(encoded, len(tokens))


def _longest(tokens: Int[np.ndarray, "n t"]) -> int:
  """Length of the longest text, rounded up to a multiple of 16, so that few lengths are compiled."""
  return int(-(-(np.flatnonzero(tokens.any(axis=0))[-1] + 1) // 16) * 16)
