"""Exact search for the images whose embeddings are nearest to a query."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Float32, Int
import numpy as np

from declip_jax.evals.similarity import unit_rows

_BLOCK = 512  # rows that have a copy in float32 at once
# All values of float16: looking them up is faster than NumPy's conversion (benchmarks/search.py).
_VALUES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


class Hits(NamedTuple):
  """A page of the images of a source, the nearest to a query first; of equally near ones, the first of the source.

  Attributes:
    number: their positions in the source.
    cosine: their similarities to the query.
    total: number of images on all pages.
  """

  number: Int[np.ndarray, "k"]
  cosine: Float32[np.ndarray, "k"]
  total: int


class ImageIndex:
  """Embeddings of images, which may be mapped into memory: a search reads all of them.

  float16 takes half the space of float32 and longer, since it is converted, a block at a time (benchmarks/search.py).

  Args:
    embedding: joint embeddings of any length, float32 or float16.
    readable: whether each image could be decoded; the others are never found.
  """

  def __init__(self, embedding: Float[np.ndarray, "n d"], readable: Bool[np.ndarray, "n"]):
    self._embedding, self._found = embedding, np.flatnonzero(readable)
    self._scale = np.empty(len(embedding), np.float32)  # one over the length of each embedding
    for start in range(0, len(embedding), _BLOCK):
      length = np.linalg.norm(embedding[start : start + _BLOCK].astype(np.float64), axis=1)
      self._scale[start : start + _BLOCK] = 1 / np.where(length == 0, 1, length)

  @property
  def size(self) -> int:
    """Number of images that can be found."""
    return len(self._found)

  def unit(self, number: int) -> Float32[np.ndarray, "d"]:
    """The unit-norm embedding of an image."""
    return unit_rows(self._embedding[number : number + 1].astype(np.float32))[0]

  def cosines(self, query: Float32[np.ndarray, "d"]) -> Float32[np.ndarray, "n"]:
    """Similarities of all images to a unit-norm query."""
    if self._embedding.dtype == np.float32:
      return (self._embedding @ query) * self._scale
    halves, cosine = self._embedding.view(np.uint16), np.empty(len(self._embedding), np.float32)
    buffer = np.empty((_BLOCK, halves.shape[1]), np.float32)
    for start in range(0, len(halves), _BLOCK):
      part = halves[start : start + _BLOCK]
      # With "clip", which changes nothing here, NumPy writes to the buffer directly.
      cosine[start : start + _BLOCK] = np.take(_VALUES, part, out=buffer[: len(part)], mode="clip") @ query
    return cosine * self._scale

  def search(self, query: Float32[np.ndarray, "d"], offset: int, limit: int) -> Hits:
    """The nearest images to a unit-norm query, without the first `offset`, and at most `limit` of them."""
    return self._nearest(self._found, self.cosines(query)[self._found], offset, limit)

  def _nearest(self, number: Int[np.ndarray, "m"], cosine: Float32[np.ndarray, "m"], offset: int, limit: int) -> Hits:
    """A page of the nearest of some images, whose numbers ascend."""
    last = min(offset + limit, len(number))
    if offset >= last:
      return Hits(np.zeros(0, int), np.zeros(0, np.float32), self.size)
    least = np.partition(cosine, len(cosine) - last)[len(cosine) - last]
    candidate = np.flatnonzero(cosine >= least)  # more than `last` if several are equally near
    place = candidate[np.argsort(-cosine[candidate], kind="stable")][offset:last]
    return Hits(number[place], cosine[place], self.size)
