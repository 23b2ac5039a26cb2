"""A data set is encoded once into features, and every evaluation is a function of them: the input of evaluators.

An evaluator receives an `EvaluationData`: the splits `test` and, where it needs them, `train` and `val`, and embeddings
of any texts. It never sees a model.

On several hosts each has the features of its own rows only, adjacent in the source, so that no host holds all of them.
Every host calls the evaluator; what it needs of all rows, such as predictions, it joins by `hosts.gather_rows`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
import errno
from functools import cached_property
import hashlib
import json
import os
from typing import Any, NamedTuple

import jax
from jaxtyping import Bool, Float, Int, Int8
import numpy as np

from declip_jax.data.pipeline import EvaluationBatches, parse_annotations
from declip_jax.data.sources import READ_ERROR, Source
from declip_jax.evals.encoders import Encoders, ModelClassifier, encode_texts
from declip_jax.evals.similarity import Embeddings, Similarity, concatenate, take, unit_rows
from declip_jax.runtime.hosts import any_host, first_error, gather_rows, gather_texts
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
    captions: captions of each image that could be decoded.
    image_hash: a hash of each encoded image; "" for images that are not encoded or cannot be read, and for those
      without captions in caches of older versions.
  """

  pooled: Float[np.ndarray, "n f"]
  embedding: Float[np.ndarray, "n d"] | None
  label: Int[np.ndarray, "n"]
  labels: Int8[np.ndarray, "n classes"] | None
  groups: Mapping[str, Int[np.ndarray, "n"]]
  id: Sequence[str]
  readable: Bool[np.ndarray, "n"]
  captions: Sequence[Sequence[str]]
  image_hash: Sequence[str]


# This host's batches of some rows of a source, see `read_batches`; every host has the same number of them.
Read = Callable[[Any, Encoders, range], Iterable[dict[str, np.ndarray]]]
# Features of some rows of a source, see `encode`.
Encode = Callable[[Any, Encoders, range, Read], Features]
# Embeddings of different texts, see `encoders.encode_texts`.
EncodeTexts = Callable[[Sequence[str], Encoders], Embeddings]


def read_batches(source: Source | Sequence[Any], encoders: Encoders, rows: range) -> Iterator[dict[str, np.ndarray]]:
  """Decoded images of some rows, with labels, in batches; see `EvaluationBatches`."""
  local, most = len(encoders.batch_rows), gather_rows(np.array([len(rows)])).max()
  yield from EvaluationBatches(
    source,
    rows,
    local,
    -(-int(most) // local),
    encoders.view,
    encoders.reading,
  )


def surely(read: Read) -> Read:
  """`read` for results that are kept: it ends at an image that may be readable at another time.

  Without images that a disk or network fails to deliver, a result would be kept in place of the right one. The OSError
  that it raises names the first of them. A label that is not among the classes raises ValueError: the names of the
  classes are those of other data. Both are raised on every host, whichever has the image.
  """

  def reading(source: Source | Sequence[Any], encoders: Encoders, rows: range) -> Iterator[dict[str, np.ndarray]]:
    for batch in read(source, encoders, rows):
      late, unknown = (next(iter(_errors(batch, kind)), "") for kind in (READ_ERROR, "no label"))
      if any_host(bool(late or unknown)):
        if error := first_error(late):
          raise OSError(errno.EIO, f"{error}; start this again once the image can be read, and it continues here")
        raise ValueError(f"{first_error(unknown)}; are these the class names of this data set?")
      yield batch

  return reading


def _errors(batch: Mapping[str, np.ndarray], kind: str) -> list[str]:
  """Why images of a batch cannot be used, for those errors that are of one kind."""
  return [error for error in batch["error"].tolist() if error.startswith(f"{kind}: ")]


class DecodedImages:
  """`read_batches` of a run that is evaluated again and again: small sources are decoded once and stay in memory.

  Sources are read again as long as an image fails that may be readable at another time.

  Args:
    limit: bytes of decoded images of all sources on a host.
  """

  def __init__(self, limit: int):
    self._free, self._known = limit, {}

  def __call__(
    self, source: Source | Sequence[Any], encoders: Encoders, rows: range
  ) -> Iterator[dict[str, np.ndarray]]:
    """Batches of a source that exists as long as this; `rows` are always the same."""
    if id(source) in self._known:
      yield from self._known[id(source)]
      return
    size = 3 * encoders.view.size**2 * -(-len(source) // jax.process_count())  # the same on every host
    if size > self._free:
      yield from read_batches(source, encoders, rows)
      return
    batches = []
    for batch in read_batches(source, encoders, rows):
      batches.append(batch)
      yield batch
    if not any_host(any(_errors(batch, READ_ERROR) for batch in batches)):
      self._free -= size
      self._known[id(source)] = batches


def encode_batches(
  source: Source | Sequence[Any], encoders: Encoders, rows: range, read: Read = read_batches
) -> Iterator[Features]:
  """Features of one batch after the other; see `encode`.

  While a batch is on the devices, the next one is read; its results are fetched one batch late.
  """
  pending, left = None, len(rows)

  def fetch(batch: Mapping[str, np.ndarray], encoded: tuple[Any, Any]) -> Features:
    size = min(left, len(batch["label"]))  # without padding
    found = jax.tree.map(lambda x: local_rows(x)[:size], encoded)
    if encoders.features_dtype != "float32":
      found = _rounded(found, encoders.features_dtype, source.name)
    return _features(*found, {name: values[:size] for name, values in batch.items()})

  for batch in read(source, encoders, rows):
    encoded = encoders.image(batch["image"])
    if pending is not None:
      yield fetch(*pending)
      left = max(left - len(pending[0]["label"]), 0)
    pending = {name: values for name, values in batch.items() if name != "image"}, encoded
  if pending is not None:
    yield fetch(*pending)


def encode(source: Source | Sequence[Any], encoders: Encoders, rows: range, read: Read = read_batches) -> Features:
  """Encodes images of a source; the result depends on neither batch size nor number of devices or hosts.

  Args:
    source: images to encode.
    encoders: encode functions.
    rows: this host's rows.
    read: function that reads them.

  Raises:
    ValueError: the source has no samples.
  """
  if not len(source):
    raise ValueError(f"{source.name} has no samples")
  return join([*encode_batches(source, encoders, rows, read)])


def _features(pooled: np.ndarray, embedding: np.ndarray | None, batch: Mapping[str, np.ndarray]) -> Features:
  """Features from arrays and the other fields of a batch."""
  labels, groups, captions, image_hash = parse_annotations(batch["annotations"].tolist())
  place, readable = batch["id"].tolist(), batch["readable"]
  return Features(pooled, embedding, batch["label"], labels, groups, place, readable, captions, image_hash)


def _rounded(arrays: tuple[Any, Any], dtype: str, name: str) -> tuple[Any, Any]:
  """Arrays in float32 with the values that they have in another dtype.

  Raises:
    ValueError: a value is too large for it, on any host.
  """
  with np.errstate(over="ignore"):
    found = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), arrays)
  pairs = zip(jax.tree.leaves(arrays), jax.tree.leaves(found), strict=True)
  large = [float(np.abs(x[np.isinf(y) & np.isfinite(x)]).max(initial=0)) for x, y in pairs]
  if error := first_error(f"{name}: a feature is {max(large):.6g}" if any(large) else ""):
    raise ValueError(f"{error}, too large for {dtype}: encode with --features_dtype=float32")
  return found


def join(parts: Sequence[Features]) -> Features:
  """Joins features of adjacent rows; parts without a readable image lack the labels and groups that others have."""
  classes = max((part.labels.shape[1] for part in parts if part.labels is not None), default=0)
  names = dict.fromkeys(name for part in parts for name in part.groups)

  def labels(part: Features) -> Int8[np.ndarray, "n classes"]:
    return np.zeros((len(part.label), classes), np.int8) if part.labels is None else part.labels

  def group(part: Features, name: str) -> Int[np.ndarray, "n"]:
    return part.groups.get(name, np.full(len(part.label), -1, np.int32))

  pooled, embedding, label, readable = concatenate([(p.pooled, p.embedding, p.label, p.readable) for p in parts])
  return Features(
    pooled,
    embedding,
    label,
    np.concatenate([*map(labels, parts)]) if classes else None,
    {name: np.concatenate([group(part, name) for part in parts]) for name in names},
    [text for part in parts for text in part.id],
    readable,
    [own for part in parts for own in part.captions],
    [one for part in parts for one in part.image_hash],
  )


class Split:
  """A split of a data set with its features, which are encoded when an evaluation first reads them, and only once.

  Args:
    source: images, captions and labels.
    encoders: encode functions.
    classes: class of each label of the source, -1 for labels that are left out, where the classes of the data set are
      in another order; see `classes.align`. By default, they are the labels.
    encode: function that returns features.
    read: function that reads images.

  Attributes:
    source: images, captions and labels.
    classes: class of each label of the source; None if they are the labels.
    rows: this host's rows of the source.
  """

  def __init__(
    self,
    source: Source | Sequence[Any],
    encoders: Encoders,
    *,
    classes: Int[np.ndarray, "labels"] | None = None,
    encode: Encode = encode,
    read: Read = read_batches,
  ):
    self.source, self.classes, self._encoders = source, classes, encoders
    self._encode, self._read = encode, read
    self.rows = host_rows(len(source), jax.process_index(), jax.process_count())

  @property
  def name(self) -> str:
    """The spec of the source, for messages."""
    return self.source.name

  @cached_property
  def features(self) -> Features:
    """Features of this host's images."""
    return self._aligned(self._encode(self.source, self._encoders, self.rows, self._read))

  @property
  def label(self) -> Int[np.ndarray, "n"]:
    """`Features.label`; like the following ones, without a forward pass of its own after `map_images`."""
    return self._labelled.label

  @property
  def labels(self) -> Int8[np.ndarray, "n classes"] | None:
    """`Features.labels`."""
    return self._labelled.labels

  @property
  def groups(self) -> Mapping[str, Int[np.ndarray, "n"]]:
    """`Features.groups`."""
    return self._labelled.groups

  @property
  def readable(self) -> Bool[np.ndarray, "n"]:
    """`Features.readable`."""
    return self._labelled.readable

  @property
  def captions(self) -> Sequence[Sequence[str]]:
    """`Features.captions`."""
    return self._labelled.captions

  @property
  def image_hash(self) -> Sequence[str]:
    """`Features.image_hash`."""
    return self._labelled.image_hash

  @cached_property
  def content(self) -> dict[str, Any]:
    """What tells other data apart, of all hosts, which all have to ask for it.

    `readable` is the number of images that can be read, and `content` a hash of their rows, ids, labels and captions,
    and of encoded images that have captions. What all ids begin with, such as a folder, does not count. `images` is a
    hash of all encoded images; it is absent if they are not encoded.
    """
    labels = [None] * len(self.label) if self.labels is None else self.labels.tolist()
    own = zip(self._labelled.id, self.label.tolist(), labels, self.captions, self.image_hash, strict=True)
    every, readable = gather_texts([json.dumps(fields) for fields in own]), gather_rows(self.readable)
    found = {int(row): json.loads(every[row]) for row in np.flatnonzero(readable)}
    start = len(os.path.commonprefix([place for place, *_ in found.values()]))
    digest, images = hashlib.sha256(), hashlib.sha256()
    for row, (place, *fields, captions, image) in found.items():
      about = [row, place[start:], *fields, captions, image if captions else ""]
      digest.update(f"{json.dumps(about)}\n".encode())
      images.update(f"{image}\n".encode())
    are_known = found and all(image for *_, image in found.values())
    known = {"images": images.hexdigest()[:32]} if are_known else {}
    return {"readable": len(found), "content": digest.hexdigest()[:32], **known}

  @cached_property
  def _labelled(self) -> Features:
    return self.features

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
      images, starts = self.images, range(0, max(len(self.rows), 1), size)
      return concatenate([function(take(images, slice(start, start + size))) for start in starts])
    own, encoded, fields = self._encoders.batch_rows, [], []
    for batch in self._read(self.source, self._encoders, self.rows):
      encoded.append(take(function(self._encoders.image_tokens(batch["image"])), own))
      fields.append({name: values for name, values in batch.items() if name != "image"})
    nothing = np.zeros((len(self.rows), 0), np.float32)
    self._labelled = self._aligned(_features(nothing, None, concatenate(fields, len(self.rows))))
    return concatenate(encoded, len(self.rows))

  def _aligned(self, found: Features) -> Features:
    """Features with the classes of the data set in place of the labels of the source."""
    return replace(found, label=self._classes_of(found.label), labels=self._columns(found.labels))

  def _classes_of(self, label: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Classes of the data set, from labels of the source.

    Raises:
      ValueError: on every host; a label is not a class of the source.
    """
    count, error = len(self.source.classnames) if self.classes is None else len(self.classes), ""
    if count and len(label) and label.max() >= count:
      row = self.rows[int(label.argmax())]
      error = f"{self.name}: sample {row} has label {label.max()}, but there are {count} classes"
    if error := first_error(error):
      raise ValueError(error)
    return label if self.classes is None else np.where(label < 0, -1, self.classes[label]).astype(np.int32)

  def _columns(self, labels: Int8[np.ndarray, "n labels"] | None) -> Int8[np.ndarray, "n classes"] | None:
    """Labels by class of the data set, from those of the source."""
    if labels is None or self.classes is None:
      return labels
    kept = self.classes >= 0
    columns = np.full((len(labels), int(self.classes.max()) + 1), -1, np.int8)
    columns[:, self.classes[kept]] = labels[:, kept]
    return columns


class ParentClasses(NamedTuple):
  """The classes of splits to train on, where those of the data set are a part of them: ImageNet's for ImageNet-R.

  Attributes:
    classnames: their names.
    ids: for each class of the data set, those that it comprises.
  """

  classnames: Sequence[str]
  ids: Sequence[Sequence[int]]


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
    classnames: names of the classes, in the order of labels; empty without classes.
    parent: classes of `train` and `val` if they are not those of `test`.
    prompts: prompts of each class; None if the evaluator makes them.
    metric: the metric that papers report for the data set, one of `catalogue.METRICS`.
    grouping, ignored_groups: the grouping of images for metrics of groups, and groups that do not count.
    validation_per_class: images of each class in a validation split that is carved, 0 for a share of them.
    has_difficult: whether some objects of the data set are difficult, see `Features.labels`; the source may not say
      which.
    classifier: the model's own classifier, if it has one.
    key: for that classifier, key of the data set in the catalogue, which has further names of the classes; empty for
      data without one.
  """

  test: Split
  texts: Callable[[Sequence[str]], Embeddings]
  similarity: Similarity
  tokens: bool = False
  train: Split | None = None
  val: Split | None = None
  classnames: Sequence[str] = ()
  parent: ParentClasses | None = None
  prompts: Sequence[Sequence[str]] | None = None
  metric: str = "top1"
  grouping: str = ""
  ignored_groups: Sequence[int] = ()
  validation_per_class: int = 0
  has_difficult: bool = False
  classifier: ModelClassifier | None = None
  key: str = ""


class Texts:
  """Embeddings of texts by one model, each text encoded once; of tokens (FILIP), each list of texts.

  Args:
    encoders: encode functions.
    encode: function that encodes texts that are not known yet, unless embeddings are tokens.
  """

  def __init__(self, encoders: Encoders, encode: EncodeTexts | None = None):
    self._encoders, self._encode, self._known = encoders, encode or encode_texts, {}

  def __call__(self, texts: Sequence[str]) -> Embeddings:
    """Embeddings of any texts, on every host."""
    if self._encoders.image_tokens is not None:  # lists differ in the padding that is trimmed
      key = tuple(texts)
      if key not in self._known:
        self._known[key] = encode_texts(key, self._encoders)
      return self._known[key]
    self.add(texts)
    return np.stack([self._known[text] for text in texts])

  def add(self, texts: Iterable[str]) -> None:
    """Encodes texts of several evaluations in one pass; of tokens (FILIP), which take much memory, none."""
    new = [text for text in dict.fromkeys(texts) if text not in self._known]
    if new and self._encoders.image_tokens is None:
      self._known |= zip(new, self._encode(new, self._encoders), strict=True)

  def drop_tokens(self) -> None:
    """Forgets the tokens of lists of texts, which take much memory; embeddings remain."""
    if self._encoders.image_tokens is not None:
      self._known.clear()


def make_data(encoders: Encoders, texts: Texts, test: Split, **others: Any) -> EvaluationData:
  """The input of one evaluator.

  Args:
    encoders: encode functions.
    texts: embeddings of texts, which several evaluators may share.
    test: the split to evaluate.
    others: other attributes of `EvaluationData`; by default, the names of classes are those of the source.
  """
  found = {"classnames": tuple(test.source.classnames), "classifier": encoders.classifier, **others}
  return EvaluationData(test, texts, encoders.similarity, encoders.image_tokens is not None, **found)


def host_rows(size: int, host: int, hosts: int) -> range:
  """The rows of a source that a host encodes: adjacent, so that the rows of all hosts, in order, are the source's."""
  share = -(-size // hosts)
  return range(min(host * share, size), min((host + 1) * share, size))


def _joint(features: Features, name: str) -> Float[np.ndarray, "n d"]:
  if features.embedding is None:
    raise ValueError(f"{name}: the model has no joint space of images and texts")
  return features.embedding
