"""Search among more than a million images: usearch finds candidates in a graph (HNSW), which are scored exactly."""

import os
from pathlib import Path

from jaxtyping import Bool, Float, Float32
import numpy as np

from declip_jax.data.storage import outputs
from declip_jax.evals.feature_cache import if_allowed
from declip_jax.extras import usearch_index
from declip_jax.image_search.index import Hits, ImageIndex
from declip_jax.reporting.progress import Bar, message

EXACT = 10**6  # images up to which the search is exact
_CANDIDATES, _DEEPEST = 1000, 500  # images that usearch finds, and the last image of a page that is taken from them
_EXPANSION = 1024  # nearest nodes that are remembered while the graph is searched: more than candidates
_ADDED = 4096  # images added at once


def make_index(
  embedding: Float[np.ndarray, "n d"], readable: Bool[np.ndarray, "n"], folder: Path | None = None
) -> ImageIndex:
  """The index of some images: exact up to `EXACT` images, or if the extra `search` is not installed.

  Args:
    embedding, readable: see `ImageIndex`.
    folder: folder of the features, in which the graph is kept; None to keep it in memory.
  """
  if len(embedding) <= EXACT:
    return ImageIndex(embedding, readable)
  try:
    return ApproximateIndex(embedding, readable, folder)
  except ModuleNotFoundError as error:
    message(f"{len(embedding):,} images: each search reads all, without an index; {error}")
    return ImageIndex(embedding, readable)


class ApproximateIndex(ImageIndex):
  """An index that reads few embeddings: the first pages may miss an image, and further ones are exact.

  Args:
    embedding, readable, folder: see `make_index`.

  Raises:
    ModuleNotFoundError: usearch is not installed.
  """

  def __init__(self, embedding: Float[np.ndarray, "n d"], readable: Bool[np.ndarray, "n"], folder: Path | None):
    super().__init__(embedding, readable)
    self._graph = usearch_index.Index(ndim=embedding.shape[1], metric="cos", dtype="f16", expansion_search=_EXPANSION)
    path = folder / "images.usearch" if folder and folder.is_dir() else None
    if path is None or not self._read(path):
      self._graph.reset()
      self._build()
      if path is not None:
        with if_allowed(), outputs.writing(os.fspath(path)) as temporary:
          self._graph.save(os.fspath(temporary))

  def search(self, query: Float32[np.ndarray, "d"], offset: int, limit: int) -> Hits:
    if offset + limit > _DEEPEST:
      return super().search(query, offset, limit)
    number = np.sort(self._graph.search(query, _CANDIDATES).keys.astype(np.int64))
    cosine = (self._embedding[number].astype(np.float32) @ query) * self._scale[number]
    return self._nearest(number, cosine, offset, limit)

  def _read(self, path: Path) -> bool:
    """Maps the graph in a file into memory; returns whether the file is there, complete and of these images."""
    if not path.exists():
      return False
    try:
      self._graph.view(os.fspath(path))
    except (ValueError, RuntimeError) as error:
      message(f"{path} is damaged, and made anew: {error}")
      return False
    self._graph.expansion_search = _EXPANSION
    return len(self._graph) == self.size

  def _build(self) -> None:
    with Bar("indexing", self.size, "images") as bar:
      for start in range(0, self.size, _ADDED):
        number = self._found[start : start + _ADDED]
        self._graph.add(number.astype(np.uint64), self._embedding[number].astype(np.float32))
        bar.update(len(number))
