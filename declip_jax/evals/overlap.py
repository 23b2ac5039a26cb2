"""Overlap of training and evaluation data: near-duplicate images, and their effect (Radford et al. 2021, section 5).

A detector is any function from images to features; two images are near-duplicates if the cosine of their features is at
least a threshold. Features of CLIP are a poor choice, since images of the same meaning are near. `HASH_VIEW` and
`dct_hash` are a detector without a model: rows of 64 signs, whose cosine is `1 - h / 32` at Hamming distance `h`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import cv2
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8
import numpy as np
import scipy
from scipy import fft, sparse

from declip_jax.data.images import Augmentation, EvalView, open_photo, random_view
from declip_jax.data.sources import Example, Source, read_example
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.intervals import clopper_pearson
from declip_jax.evals.similarity import padded_size, unit_rows
from declip_jax.sharding import batch_sharding, make_mesh, replicated
from declip_jax.unit_norm import unit_norm

HASH_VIEW = EvalView(32, squash=True)  # the pixels that `dct_hash` reads
HASH_THRESHOLD = 1 - 6 / 32  # a Hamming distance of at most 6 of 64 bits
NEIGHBOURS = 5
_LOW = 8  # frequencies along each axis of a hash
_QUERIES, _ROWS = 4096, 8192  # queries and rows whose cosines are in memory at once: 128 MiB
_COPY = Augmentation(scale=(0.7, 1.0), jitter=(0.2, 0.2, 0.2, 0.05), jitter_probability=1.0)
_COPY_SIZE, _COPY_QUALITY = (0.5, 1.0), 50  # range of a copy's side, relative to the shorter one; quality of its JPEG


def dct_hash(images: UInt8[np.ndarray, "b 32 32 3"]) -> Float[np.ndarray, "b 64"]:
  """64 signs per image, as unit-norm rows: which of the lowest 8 x 8 frequencies exceed their median.

  This is the perceptual hash pHash, of pixels by `HASH_VIEW`. It recognises images that were resized or encoded again,
  and few that were cropped. Coefficients are rounded, so that all images of one colour have the same hash.
  """
  grey = images @ np.array([0.299, 0.587, 0.114])
  low = fft.dctn(grey, axes=(1, 2), norm="ortho")[:, :_LOW, :_LOW].reshape(len(images), -1).round(6)
  signs = np.where(low > np.median(low, axis=1, keepdims=True), 1, -1)
  return (signs / _LOW).astype(np.float32)


def hash_encoders(batch_size: int) -> Encoders:
  """`dct_hash` as a detector; it has no texts.

  Args:
    batch_size: images of this host that are read at once.
  """
  return Encoders(
    image=lambda images: (dct_hash(images), None),
    text=_no_texts,
    tokenizer=_no_texts,
    view=HASH_VIEW,
    batch_size=batch_size,
    batch_rows=np.arange(batch_size),
  )


def _no_texts(texts: Any) -> Any:
  raise ValueError("a hash of images cannot be compared with texts")


class Copies:
  """A source of altered copies of another source's images, on which a detector is calibrated.

  A copy is a crop of 70 to 100 % of the area with another aspect ratio and other colours, resized to a square of half
  to all of the image's shorter side and encoded as a JPEG of quality 50. It depends on the seed and its index only.
  """

  def __init__(self, source: Source | Sequence[Any], seed: int = 0):
    self._source, self._seed = source, seed
    self.name = f"copies of {source.name}"
    self.classnames, self.skipped, self.left_out = source.classnames, source.skipped, source.left_out
    self.stamp = f"{getattr(source, 'stamp', '')} copies {seed}"

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    example = read_example(self._source, index)
    photo, rng = open_photo(example["image"]), np.random.default_rng([self._seed, index])
    size = max(1, round(min(photo.height, photo.width) * rng.uniform(*_COPY_SIZE)))
    pixels = random_view(photo, _COPY, rng, size=size, engine="exact")
    _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _COPY_QUALITY])
    return {**example, "image": data.tobytes()}


@dataclass(frozen=True)
class Nearest:
  """The nearest rows of each query, nearest first, and of equally near ones the first.

  Attributes:
    index: positions of the rows; -1 where there are fewer rows than asked for.
    cosine: their cosines; -inf where there is no row, and for rows and queries with NaN.
  """

  index: Int[np.ndarray, "queries k"]
  cosine: Float[np.ndarray, "queries k"]


def nearest(
  query: Float[np.ndarray, "queries d"],
  shards: Iterable[Float[np.ndarray, "_ d"]],
  k: int = NEIGHBOURS,
  *,
  first: int = 0,
  within: bool = False,
) -> Nearest:
  """Searches all rows for the nearest of each query, exactly, by inner products of 8,192 rows at a time.

  Queries are split over the devices of this host; see `across_hosts` where each host has other rows. Unlike those of
  `evals.nearest`, rows need not fit on the devices.

  Args:
    query: features of any norm.
    shards: features of any norm and floating type, in order, such as memory-mapped files.
    k: number of rows to find for each query.
    first: position of the first row among those of all hosts.
    within: whether the queries are the rows, so that a query is not its own neighbour.
  """
  mesh = make_mesh(-1, 1, jax.local_devices())
  own = np.arange(len(query)) if within else np.full(len(query), -1)
  size = padded_size(min(len(query), _QUERIES), mesh.size)
  blocks, place = [], partial(jax.device_put, device=batch_sharding(mesh))
  for start in range(0, len(query), size):
    rows = np.minimum(np.arange(start, start + size), len(query) - 1)  # padded with the last one
    found = np.full((size, k), -1, np.int32), np.full((size, k), -np.inf, np.float32)
    blocks.append((place(unit_rows(query[rows])), place(own[rows].astype(np.int32)), *map(place, found)))
  merge = _compiled_merge(mesh, k)
  for position, chunk, count in _chunks(shards, first):
    rows = jax.device_put(chunk, replicated(mesh))
    blocks = [(q, own, *merge(q, own, *found, rows, position, count)) for q, own, *found in blocks]
  index, cosine = (np.concatenate([np.asarray(block[part]) for block in blocks])[: len(query)] for part in (2, 3))
  return Nearest(index, cosine)


def _chunks(shards: Iterable[np.ndarray], first: int) -> Iterator[tuple[int, np.ndarray, int]]:
  """Yields blocks of rows, padded to one size: the position of the first row, the block, and its number of rows."""
  for shard in shards:
    for start in range(0, len(shard), _ROWS):
      chunk = np.asarray(shard[start : start + _ROWS])
      count = len(chunk)
      yield first, np.pad(chunk, ((0, padded_size(count, 1) - count), (0, 0))), count
      first += count


@cache
def _compiled_merge(mesh: Mesh, k: int) -> Any:
  """A compiled function that merges the nearest rows so far with those of another block."""

  def merge(
    query: Float[Array, "q d"],
    own: Int[Array, "q"],
    index: Int[Array, "q k"],
    cosine: Float[Array, "q k"],
    rows: Float[Array, "r d"],
    first: Int[Array, ""],
    count: Int[Array, ""],
  ) -> tuple[Int[Array, "q k"], Float[Array, "q k"]]:
    products = jnp.einsum("qd,rd->qr", query, unit_norm(rows), precision=jax.lax.Precision.HIGHEST)
    number = jnp.arange(len(rows))[None]
    usable = (number < count) & (first + number != own[:, None]) & ~jnp.isnan(products)
    best, place = jax.lax.top_k(jnp.where(usable, products, -jnp.inf), min(k, len(rows)))
    place = jnp.where(best == -jnp.inf, -1, first + place)
    index, cosine = jnp.concatenate([index, place], axis=1), jnp.concatenate([cosine, best], axis=1)
    cosine, order = jax.lax.top_k(cosine, k)  # of equal cosines the first, which is the one found earlier
    return jnp.take_along_axis(index, order, axis=1), cosine

  split = batch_sharding(mesh)
  return jax.jit(merge, out_shardings=(split, split))


def across_hosts(found: Nearest) -> Nearest:
  """The nearest rows of all hosts, each of which has searched its own rows for the same queries."""
  if jax.process_count() == 1:
    return found
  index, cosine = multihost_utils.process_allgather((found.index, found.cosine), tiled=False)
  return joined([Nearest(*part) for part in zip(index, cosine, strict=True)])


def joined(parts: Sequence[Nearest]) -> Nearest:
  """The nearest rows of several searches for the same queries; of equally near ones those of the first search."""
  index, cosine = (np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("index", "cosine"))
  order = np.argsort(-cosine, axis=1, kind="stable")[:, : parts[0].index.shape[1]]
  return Nearest(np.take_along_axis(index, order, axis=1), np.take_along_axis(cosine, order, axis=1))


@dataclass(frozen=True)
class Roc:
  """Rates at every threshold, from the largest score down; the first threshold, infinity, accepts nothing.

  Attributes:
    threshold: smallest score that is accepted.
    false_positive_rate: share of the negatives that are accepted.
    true_positive_rate: share of the positives that are accepted (recall).
    precision: share of positives among the accepted, 1 if there are none.
  """

  threshold: Float[np.ndarray, "t"]
  false_positive_rate: Float[np.ndarray, "t"]
  true_positive_rate: Float[np.ndarray, "t"]
  precision: Float[np.ndarray, "t"]


def roc(positive: Bool[np.ndarray, "n"], score: Float[np.ndarray, "n"]) -> Roc:
  """Receiver operating characteristic; equal scores are accepted together.

  Raises:
    ValueError: all examples are positive, or all are negative.
  """
  if positive.all() or not positive.any():
    raise ValueError(
      f"all {len(positive)} examples are {'positive' if len(positive) and positive.all() else 'negative'}"
    )
  threshold, level = np.unique(-score, return_inverse=True)
  hits = np.cumsum(np.bincount(level, weights=positive))
  errors = np.cumsum(np.bincount(level, weights=~positive))
  start = np.zeros(1)
  return Roc(
    np.concatenate([[np.inf], -threshold]),
    np.concatenate([start, errors / errors[-1]]),
    np.concatenate([start, hits / hits[-1]]),
    np.concatenate([start + 1, hits / (hits + errors)]),
  )


@dataclass(frozen=True)
class Threshold:
  """A threshold, and its precision and recall on the pairs that it was chosen from."""

  cosine: float
  precision: float
  recall: float


def choose_threshold(rates: Roc, least_precision: float = 0.99) -> Threshold:
  """The threshold of largest recall among those of a precision; of equal ones the largest.

  Raises:
    ValueError: no threshold has this precision; the message names the best.
  """
  usable = (rates.precision >= least_precision) & np.isfinite(rates.threshold)
  if not usable.any():
    best = rates.precision[1:].max()
    raise ValueError(f"no threshold has a precision of {least_precision}: the largest is {best:.4f}")
  place = int(np.where(usable, rates.true_positive_rate, -1).argmax())
  return Threshold(*(float(x[place]) for x in (rates.threshold, rates.precision, rates.true_positive_rate)))


def at(rates: Roc, threshold: float) -> Threshold:
  """Precision and recall at any threshold."""
  place = int(np.searchsorted(-rates.threshold, -threshold, side="right")) - 1
  return Threshold(threshold, float(rates.precision[place]), float(rates.true_positive_rate[place]))


def calibration(copy: Float[np.ndarray, "n"], stranger: Float[np.ndarray, "m"]) -> Roc:
  """How well a detector tells copies from other images, without labels.

  Args:
    copy: cosine of each evaluation image and its altered copy, see `Copies`.
    stranger: cosine of each evaluation image and the nearest other one. Duplicates among them count as errors, so the
      precision is at least the measured one.
  """
  return roc(np.repeat([True, False], [len(copy), len(stranger)]), np.concatenate([copy, stranger]))


def effect(overlaps: Bool[np.ndarray, "n"], correct: Bool[np.ndarray, "n"]) -> dict[str, float]:
  """The share of an evaluation set that overlaps with the training data, and how accuracies differ.

  `p` is the probability of an accuracy on the overlap as large as the one found, if it were that on the clean images
  (one-sided binomial test); see `intervals.bonferroni` for several sets. The accuracy on the overlap has a 99.5 %
  Clopper-Pearson interval. `all_minus_clean` is the inflation of the reported accuracy. Values that need overlapping
  or clean images are absent without them; `p` is 1 then.

  Args:
    overlaps: whether each evaluation image has a near-duplicate in the training data.
    correct: whether its prediction is correct.

  Raises:
    ValueError: the set has no images.
  """
  if not len(correct):
    raise ValueError("the set has no images")
  parts = {"all": correct, "clean": correct[~overlaps], "overlap": correct[overlaps]}
  found = {"contamination": float(overlaps.mean()), "p": 1.0}
  found |= {f"accuracy_{name}": float(part.mean()) for name, part in parts.items() if len(part)}
  if 0 < overlaps.sum() < len(overlaps):
    found["all_minus_clean"] = found["accuracy_all"] - found["accuracy_clean"]
    found["overlap_minus_clean"] = found["accuracy_overlap"] - found["accuracy_clean"]
    hits, number = int(parts["overlap"].sum()), int(overlaps.sum())
    found["accuracy_overlap_lower"], found["accuracy_overlap_upper"] = clopper_pearson(hits, number, 0.995)
    found["p"] = float(scipy.stats.binomtest(hits, number, found["accuracy_clean"], alternative="greater").pvalue)
  return found


def clusters(found: Nearest, threshold: float) -> Int[np.ndarray, "n"]:
  """The number of each image's cluster: images are together if a chain of near-duplicates leads from one to the other.

  Args:
    found: nearest rows of a search with `within`.
    threshold: smallest cosine of near-duplicates.
  """
  near = found.cosine >= threshold
  pairs = np.nonzero(near)[0], found.index[near]
  size = len(near)
  graph = sparse.coo_array((np.ones(len(pairs[0]), bool), pairs), shape=(size, size))
  return sparse.csgraph.connected_components(graph, directed=False)[1]


def cluster_summary(cluster: Int[np.ndarray, "n"]) -> dict[str, float]:
  """The number of clusters with several images, and the share of images that are copies of another one's."""
  sizes = np.bincount(cluster)
  return {"clusters": int((sizes > 1).sum()), "duplicate_share": float((len(cluster) - len(sizes)) / len(cluster))}
