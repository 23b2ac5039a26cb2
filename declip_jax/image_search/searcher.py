"""A model, a source and the embeddings of its images: answers queries, and describes the samples that it finds."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
import functools
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float32
import numpy as np

from declip_jax.clip import Clip
from declip_jax.data.sources import Source
from declip_jax.evals.features import Features
from declip_jax.evals.similarity import unit_rows
from declip_jax.image_search.approximate import make_index
from declip_jax.image_search.index import Hits
from declip_jax.image_search.pictures import Pictures

_TEXTS = 4096  # embeddings of texts that are kept, since each page of a search asks for the same
_SHORT = 16  # tokens, to which short texts are cut: the rest is padding, which the causal text tower does not need
_CANCELLED = 1e-4  # length of a sum of unit-norm embeddings below which it has no direction


class Query(NamedTuple):
  """What images should and should not be like: unit-norm embeddings are added and subtracted, all with equal weight.

  Attributes:
    texts, minus_texts: texts to add and to subtract.
    likes, unlikes: numbers of images of the source to add and to subtract.
    image: an encoded image to add, None for none.
  """

  texts: tuple[str, ...] = ()
  minus_texts: tuple[str, ...] = ()
  likes: tuple[int, ...] = ()
  unlikes: tuple[int, ...] = ()
  image: bytes | None = None


class Searcher:
  """Answers queries from several threads, one at a time, in the order of arrival: each uses all cores, or the device.

  Args:
    clip: the model.
    source: the images.
    features: their features by this model.
    folder: folder of the features, see `make_index`.

  Attributes:
    source: the images.
    index: their embeddings.
    pictures: their thumbnails and files.
  """

  def __init__(self, clip: Clip, source: Source, features: Features, folder: Path | None = None):
    self.source, self.index = source, make_index(features.embedding, features.readable, folder)
    self.pictures = Pictures(source, clip.max_pixels)
    self._clip, self._features, self._worker = clip, features, ThreadPoolExecutor(1)  # a lock would not be fair
    self._text = functools.lru_cache(_TEXTS)(self._encode_text)

  def compile(self) -> None:
    """Compiles the programs that queries need, which takes seconds: a short text, a long one and an image."""
    self._text("")
    self._text("a " * _SHORT)
    self._clip.encode_image(np.zeros((1, 1, 3), np.uint8))

  def search(self, query: Query, offset: int, limit: int) -> Hits:
    """The nearest images to a query; see `ImageIndex.search`.

    Raises:
      ValueError: the query has no terms, they cancel out, its image cannot be read, or it names an image that the
        source does not have or that cannot be read.
    """
    return self._worker.submit(self._search, query, offset, limit).result()

  def sample(self, number: int) -> dict[str, Any]:
    """Number, id, captions and class of an image of the source, as JSON."""
    label, names = int(self._features.label[number]), self.source.classnames
    return {
      "number": number,
      "id": str(self._features.id[number]),
      "captions": [*self._features.captions[number]],
      "class": None if label < 0 else names[label] if label < len(names) else str(label),
    }

  def check_number(self, number: int) -> None:
    """Rejects the number of an image that the source does not have or that cannot be read.

    Raises:
      ValueError: the message has the number and the legal ones.
    """
    count = len(self._features.readable)
    if not 0 <= number < count:
      raise ValueError(f"image {number}: expected a number from 0 to {count - 1}")
    if not self._features.readable[number]:
      raise ValueError(f"image {number} cannot be read")

  def _search(self, query: Query, offset: int, limit: int) -> Hits:
    return self.index.search(self._direction(query), offset, limit)

  def _direction(self, query: Query) -> Float32[np.ndarray, "d"]:
    for number in (*query.likes, *query.unlikes):
      self.check_number(number)
    added = [*map(self._text, query.texts), *map(self.index.unit, query.likes)]
    if query.image is not None:
      added.append(self._clip.encode_image(query.image)[0])
    subtracted = [*map(self._text, query.minus_texts), *map(self.index.unit, query.unlikes)]
    if not added and not subtracted:
      raise ValueError("the query has no terms")
    total = _sum(added) - _sum(subtracted)
    length = np.linalg.norm(total)
    if length < _CANCELLED:
      raise ValueError("the terms of the query cancel out")
    return (total / length).astype(np.float32)

  def _encode_text(self, text: str) -> Float32[np.ndarray, "d"]:
    tokens = self._clip.tokenizer([text])
    is_short = self._clip.model.towers.text.ignores_padding and self._clip.tokenizer.eot in tokens[0, :_SHORT]
    return unit_rows(self._clip.text_features(tokens[:, :_SHORT] if is_short else tokens))[0]


def _sum(embeddings: Iterable[Float32[np.ndarray, "d"]]) -> np.ndarray | float:
  return sum((embedding.astype(np.float64) for embedding in embeddings), 0.0)
