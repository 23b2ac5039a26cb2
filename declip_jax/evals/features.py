"""A data set is encoded once into features, and every evaluation is a function of them: the input of evaluators.

An evaluator receives an `EvaluationData`: the splits `test` and, where it needs them, `train` and `val`, and embeddings
of any texts. It never sees a model.

On several hosts each has the features of its own rows only, adjacent in the source, so that no host holds all of them.
Every host calls the evaluator; what it needs of all rows, such as predictions, it joins by `hosts.gather_rows`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jaxtyping import Bool, Float, Int, Int8
import numpy as np

from declip_jax.data.pipeline import EvaluationBatches
from declip_jax.data.sources import Source
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.similarity import Embeddings, Similarity, concatenate, take, unit_rows
from declip_jax.sharding import local_rows


@dataclass(frozen=True)
class Features:
  """This host's images of a source, in the order of the source, after one forward pass.

  Attributes:
    pooled: output of the tower before the projection, see `Model.encode_image_features`; not normalised.
    embedding: joint embedding, not normalised; None without a joint space.
    label: class of each image, -1 for none and for images that cannot be read.
    labels: for data with several labels per image, 1 for a class that is present, 0 for one to ignore (VOC's difficult
      objects), -1 for one that is absent; None for other data.
    groups: group of each image, by the name of the grouping, -1 for none.
    id: where each image comes from.
    readable: whether each image could be decoded; the features of others are meaningless.
  """

  pooled: Float[np.ndarray, "n f"]
  embedding: Float[np.ndarray, "n d"] | None
  label: Int[np.ndarray, "n"]
  labels: Int8[np.ndarray, "n classes"] | None
  groups: Mapping[str, Int[np.ndarray, "n"]]
  id: Sequence[str]
  readable: Bool[np.ndarray, "n"]


class Split:
  """A split of a data set with its features, which are encoded when an evaluation first reads them, and only once.

  Attributes:
    source: images, captions and labels.
    rows: this host's rows of the source.
  """

  def __init__(self, source: Source | Sequence[Any], encoders: Encoders):
    self.source, self._encoders = source, encoders
    self.rows = host_rows(len(source), jax.process_index(), jax.process_count())

  @property
  def name(self) -> str:
    """The spec of the source, for messages."""
    return self.source.name

  @cached_property
  def features(self) -> Features:
    """Features of this host's images."""
    return encode(self.source, self._encoders, self.rows)

  @property
  def label(self) -> Int[np.ndarray, "n"]:
    """`Features.label`, without a forward pass of its own after `map_images`."""
    return self._fields["label"]

  @property
  def readable(self) -> Bool[np.ndarray, "n"]:
    """`Features.readable`, without a forward pass of its own after `map_images`."""
    return self._fields["readable"]

  @cached_property
  def _fields(self) -> Mapping[str, np.ndarray]:
    return {"label": self.features.label, "readable": self.features.readable}

  @cached_property
  def images(self) -> Embeddings:
    """What `EvaluationData.similarity` compares with texts: unit-norm joint embeddings, or tokens (FILIP).

    All tokens of a split fit in memory only if it is small; see `map_images`.
    """
    if self._encoders.image_tokens is None:
      return unit_rows(_joint(self.features, self.name))
    return self.map_images(lambda tokens: tokens)

  def map_images(self, function: Callable[[Embeddings], Embeddings]) -> Embeddings:
    """A function of `images`, applied to one batch after the other, of which only its results are kept."""
    size = self._encoders.batch_size
    if self._encoders.image_tokens is None or "images" in vars(self):
      images, count = self.images, len(self.rows)
      return concatenate([function(take(images, slice(start, start + size))) for start in range(0, count, size)])
    own, encoded, fields = self._encoders.batch_rows, [], []
    for batch in _batches(self.source, self._encoders, self.rows):
      encoded.append(take(function(self._encoders.image_tokens(batch.pop("image"))), own))
      fields.append(batch)
    self._fields = concatenate(fields, len(self.rows))
    return concatenate(encoded, len(self.rows))


@dataclass(frozen=True)
class EvaluationData:
  """All that an evaluator sees.

  Attributes:
    test: the split to evaluate.
    train, val: splits to train a classifier on, and to choose its hyperparameters on; None where not given.
    texts: function from texts to the embeddings that `similarity` compares, on every host; all hosts must make the
      same calls. Embeddings of the same texts are computed once.
    similarity: scores of embeddings, on every host; all hosts must make the same calls.
    tokens: whether `similarity` compares tokens (FILIP) instead of embeddings.
  """

  test: Split
  texts: Callable[[Sequence[str]], Embeddings]
  similarity: Similarity
  tokens: bool = False
  train: Split | None = None
  val: Split | None = None


class Texts:
  """Embeddings of texts by one model, each list of texts encoded once."""

  def __init__(self, encoders: Encoders):
    self._encoders, self._known = encoders, {}

  def __call__(self, texts: Sequence[str]) -> Embeddings:
    """Embeddings of any texts, on every host."""
    key = tuple(texts)
    if key not in self._known:
      self._known[key] = encode_texts(key, self._encoders)
    return self._known[key]


def make_data(
  encoders: Encoders, texts: Texts, test: Split, train: Split | None = None, val: Split | None = None
) -> EvaluationData:
  """The input of one evaluator, from splits and texts that several may share."""
  return EvaluationData(test, texts, encoders.similarity, encoders.image_tokens is not None, train, val)


def host_rows(size: int, host: int, hosts: int) -> range:
  """The rows of a source that a host encodes: adjacent, so that the rows of all hosts, in order, are the source's."""
  share = -(-size // hosts)
  return range(min(host * share, size), min((host + 1) * share, size))


def encode(source: Source | Sequence[Any], encoders: Encoders, rows: range) -> Features:
  """Encodes images of a source; the result depends on neither batch size nor number of devices or hosts.

  While a batch is on the devices, the next one is read; its results are fetched one batch late.

  Args:
    source: images to encode.
    encoders: encode functions.
    rows: this host's rows.
  """
  parts, labels, pending = [], [], None
  for batch in _batches(source, encoders, rows):
    encoded = encoders.image(batch.pop("image"))
    labels.append(batch)
    if pending is not None:
      parts.append(jax.tree.map(local_rows, pending))
    pending = encoded
  if pending is None:
    raise ValueError(f"{source.name} has no samples")
  parts.append(jax.tree.map(local_rows, pending))
  pooled, embedding = concatenate(parts, len(rows))
  fields = concatenate(labels, len(rows))
  return Features(pooled, embedding, fields["label"], None, {}, fields["id"].tolist(), fields["readable"])


def encode_texts(texts: Sequence[str], encoders: Encoders) -> Embeddings:
  """Encodes texts in batches of one size; where embeddings are tokens, padding common to all texts is trimmed."""
  tokens = encoders.tokenizer(texts)
  if encoders.image_tokens is not None:
    tokens = tokens[:, : _longest(tokens)]
  size = encoders.batch_size
  padded = np.concatenate([tokens, np.repeat(tokens[-1:], -len(tokens) % size, axis=0)])
  encoded = [encoders.text(batch[encoders.batch_rows]) for batch in padded.reshape(-1, size, tokens.shape[1])]
  return concatenate(encoded, len(tokens))


def _batches(source: Source | Sequence[Any], encoders: Encoders, rows: range) -> Iterator[dict[str, np.ndarray]]:
  """This host's batches; every host has the same number of them."""
  largest_share = len(host_rows(len(source), 0, jax.process_count()))
  local = len(encoders.batch_rows)
  yield from EvaluationBatches(
    source,
    rows,
    local,
    -(-largest_share // local),
    encoders.view,
    encoders.workers,
    encoders.threads,
    max_pixels=encoders.max_pixels,
  )


def _joint(features: Features, name: str) -> Float[np.ndarray, "n d"]:
  if features.embedding is None:
    raise ValueError(f"{name}: the model has no joint space of images and texts")
  return features.embedding


def _longest(tokens: Int[np.ndarray, "n t"]) -> int:
  """Length of the longest text, rounded up to a multiple of 16, so that few lengths are compiled."""
  return int(-(-(np.flatnonzero(tokens.any(axis=0))[-1] + 1) // 16) * 16)
