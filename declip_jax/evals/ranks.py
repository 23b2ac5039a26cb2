"""Ranks of images and texts that retrieve each other, counted in blocks on the devices, and what is reported of them.

Protocol: Karpathy and Fei-Fei (2015), as CLIP and SLIP report it; an image may have any number of texts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int8, Shaped
import numpy as np
from scipy import sparse

from declip_jax.evals import intervals
from declip_jax.evals.similarity import Embeddings, Similarity, num_embeddings, padded_size, take, unit_rows
from declip_jax.sharding import batch_rows, batch_sharding, make_mesh, replicated, to_global

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
# The metrics of `recalls`.
METRICS = (
  *(f"{way}_r{k}" for way in DIRECTIONS for k in RECALL_AT),
  *(f"{way}_{statistic}_rank" for way in DIRECTIONS for statistic in ("mean", "median")),
  "mean_recall",
  "mean_r1",
)
_BLOCK = 1024  # queries whose scores are in memory at once
_MATCH, _OTHER, _EXCLUDED = 1, 0, -1  # a key, as seen from a query

# Function from positions of queries to what each key is to each of them: `_MATCH`, `_OTHER` or `_EXCLUDED`.
Relevance = Callable[[Int[np.ndarray, "block"]], Int8[np.ndarray, "block keys"]]


@dataclass(frozen=True)
class Ranks:
  """For each query, the number of keys that do not match it and score higher than its best match.

  Attributes:
    low: ranks if keys with equal scores count as lower: ties count for the model.
    high: ranks if they count as higher: ties count against the model. Scores that are NaN always count as higher.
    fold: the fold of each query; only keys of the same fold are candidates.
  """

  low: Int[np.ndarray, "queries"]
  high: Int[np.ndarray, "queries"]
  fold: Int[np.ndarray, "queries"]


@dataclass(frozen=True)
class RetrievalRanks:
  """Ranks in both directions.

  Attributes:
    images: indices of the images that have a text; the others are neither queries nor candidates.
    image_to_text: ranks of the best text of each of these images.
    text_to_image: ranks of the image of each text.
    image_of_text: position among `images` of each text's image.
  """

  images: Int[np.ndarray, "n"]
  image_to_text: Ranks
  text_to_image: Ranks
  image_of_text: Int[np.ndarray, "m"]


def retrieval_ranks(
  image: Embeddings,
  text: Embeddings,
  image_of_text: Int[np.ndarray, "m"],
  group: Int[np.ndarray, "m"] | None = None,
  *,
  folds: int = 1,
  similarity: Similarity | None = None,
) -> RetrievalRanks:
  """The rank of the best own text among all texts for each image, and of the best own image for each text.

  Scores are computed for 1,024 queries at a time, split over the devices of all hosts, and only counts leave the
  devices. Every host calls this with the same arrays and receives all ranks.

  Args:
    image, text: embeddings of images and of `m` texts; arrays `[n d]` need not be of unit norm.
    image_of_text: index of each text's image.
    group: group of each text; an image matches all texts of the groups of its own texts, such as those with the same
      wording. By default, it matches only its own.
    folds: number of folds that are searched separately; image `i` of the `n` with a text belongs to fold
      `folds * i // n` (5 for COCO 1K).
    similarity: scores of queries against keys, for embeddings that are not arrays `[n d]`; cosines by default.

  Raises:
    ValueError: there is no text, there are fewer images with a text than folds, or numbers of texts differ.
  """
  if not num_embeddings(text) == len(image_of_text) or (group is not None and len(group) != len(image_of_text)):
    raise ValueError(f"{num_embeddings(text)} texts, but the images of {len(image_of_text)}")
  images, owner = np.unique(image_of_text, return_inverse=True)
  if not len(images) or not 1 <= folds <= len(images):
    raise ValueError(f"{len(images)} images with a text: expected at least {max(folds, 1)}, one for each fold")
  match = matches(owner, owner if group is None else group)
  columns = match.tocsc()
  group = owner if group is None else np.unique(group, return_inverse=True)[1]
  image_fold = folds * np.arange(len(images)) // len(images)
  text_fold = image_fold[owner]

  def of_images(rows: Int[np.ndarray, "block"]) -> Int8[np.ndarray, "block m"]:
    return _relevance(match[rows].toarray()[:, group], image_fold[rows], text_fold)

  def of_texts(rows: Int[np.ndarray, "block"]) -> Int8[np.ndarray, "block n"]:
    return _relevance(columns[:, group[rows]].toarray().T, text_fold[rows], image_fold)

  image, ranks = take(image, images), _cosine_ranks if similarity is None else partial(_ranks, similarity=similarity)
  to_text = Ranks(*ranks(image, text, of_images), image_fold)
  return RetrievalRanks(images, to_text, Ranks(*ranks(text, image, of_texts), text_fold), owner)


def matches(image_of_text: Int[np.ndarray, "m"], group: Int[np.ndarray, "m"]) -> sparse.csr_array:
  """Whether an image matches the texts of a group, bool `[images groups]`; groups in the order of `np.unique`."""
  numbers = np.unique(group, return_inverse=True)[1]
  shape = image_of_text.max() + 1, numbers.max() + 1
  return sparse.csr_array((np.ones(len(group), bool), (image_of_text, numbers)), shape, dtype=bool)


def recalls(ranks: RetrievalRanks) -> dict[str, float]:
  """Recalls at 1, 5 and 10, as fractions, mean and median ranks, which begin at 1, and two means of recalls.

  A query counts as found at k if one of its matches is among the k nearest. Ties count against the model, so that a
  model that maps everything to the same point scores 0 and not 1. With several folds, each value is the mean of those
  of the folds. `mean_recall` is the mean of all six recalls (a sixth of rSum), `mean_r1` that of both recalls at 1, as
  DataComp reports.
  """
  found: dict[str, float] = {}
  for way in DIRECTIONS:
    own: Ranks = getattr(ranks, way)
    folds = [own.high[own.fold == fold] for fold in np.unique(own.fold)]
    for k in RECALL_AT:
      found[f"{way}_r{k}"] = float(np.mean([(rank < k).mean() for rank in folds]))
    for name, statistic in (("mean", np.mean), ("median", np.median)):
      found[f"{way}_{name}_rank"] = float(np.mean([1 + statistic(rank) for rank in folds]))
  found["mean_recall"] = float(np.mean([found[f"{way}_r{k}"] for way in DIRECTIONS for k in RECALL_AT]))
  found["mean_r1"] = float(np.mean([found[f"{way}_r1"] for way in DIRECTIONS]))
  return {name: found[name] for name in METRICS}


def recall_intervals(ranks: RetrievalRanks) -> dict[str, intervals.Interval]:
  """95 % intervals of the recalls at 1, 5 and 10 and of their means; none if there are several folds.

  An image with all its texts is one example of a bootstrap, since its texts are not independent. Recalls of texts for
  images have Clopper-Pearson intervals.
  """
  if ranks.image_to_text.fold.any():
    return {}
  owner = ranks.image_of_text
  texts = np.bincount(owner)
  found_text = {k: ranks.image_to_text.high < k for k in RECALL_AT}
  found_image = {k: np.bincount(owner, ranks.text_to_image.high < k).astype(int) for k in RECALL_AT}

  def mean(*columns: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "r"]:
    *hits, texts, times = columns
    to_text, to_image = hits[: len(hits) // 2], hits[len(hits) // 2 :]
    parts = [(times @ x) / times.sum(axis=-1) for x in to_text] + [(times @ x) / (times @ texts) for x in to_image]
    return np.mean(parts, axis=0)

  result = {}
  for k in RECALL_AT:
    result[f"image_to_text_r{k}"] = intervals.clopper_pearson(int(found_text[k].sum()), len(texts))
    values = intervals.bootstrap(intervals.ratio, found_image[k], texts)
    result[f"text_to_image_r{k}"] = intervals.percentiles(values)
  for name, cutoffs in (("mean_recall", RECALL_AT), ("mean_r1", (1,))):
    columns = [found[k] for found in (found_text, found_image) for k in cutoffs]
    result[name] = intervals.percentiles(intervals.bootstrap(mean, *columns, texts))
  return result


def _relevance(
  match: np.ndarray, query_fold: Int[np.ndarray, "block"], key_fold: Int[np.ndarray, "keys"]
) -> Int8[np.ndarray, "block keys"]:
  relevance = np.where(match, np.int8(_MATCH), np.int8(_OTHER))
  return np.where(query_fold[:, None] == key_fold, relevance, np.int8(_EXCLUDED))


def _cosine_ranks(
  query: Float[np.ndarray, "queries d"], key: Float[np.ndarray, "keys d"], relevance: Relevance
) -> tuple[Int[np.ndarray, "queries"], Int[np.ndarray, "queries"]]:
  """Lowest and highest ranks by cosines, on all devices: each has all keys and its share of a block of queries."""
  mesh = make_mesh(-1, 1)
  sharding = batch_sharding(mesh)
  query, key = unit_rows(query), to_global(unit_rows(key), replicated(mesh))
  size = padded_size(min(len(query), _BLOCK), mesh.size)
  own, count, ranks = batch_rows(sharding, size), _cosine_counts(mesh), []
  for start in range(0, len(query), size):
    rows = np.minimum(start + own, len(query) - 1)  # padded with the last one
    counts = count(to_global(query[rows], sharding), key, to_global(relevance(rows), sharding))
    ranks.append(np.asarray(counts)[:, : len(query) - start])
  low, high = np.concatenate(ranks, axis=1)
  return low, high


@cache
def _cosine_counts(mesh: Mesh) -> Callable[..., Int[Array, "2 block"]]:
  """A compiled function from unit-norm queries, keys and relevance to `_count`, which every host receives."""

  def count(query: Float[Array, "block d"], key: Float[Array, "keys d"], relevance: Int8[Array, "block keys"]):
    return _count(jnp.einsum("qd,kd->qk", query, key, precision=jax.lax.Precision.HIGHEST), relevance)

  return jax.jit(count, out_shardings=replicated(mesh))


def _ranks(
  query: Embeddings, key: Embeddings, relevance: Relevance, similarity: Similarity
) -> tuple[Int[np.ndarray, "queries"], Int[np.ndarray, "queries"]]:
  """Lowest and highest ranks by any similarity, whose scores every host receives."""
  ranks, number = [], num_embeddings(query)
  for start in range(0, number, _BLOCK):
    rows = np.arange(start, min(start + _BLOCK, number))
    ranks.append(np.asarray(_count(similarity(take(query, rows), key), relevance(rows))))
  low, high = np.concatenate(ranks, axis=1)
  return low, high


@jax.jit
def _count(scores: Float[Array, "block keys"], relevance: Int8[Array, "block keys"]) -> Int[Array, "2 block"]:
  """The number of keys that do not match and score higher than the best match, without and with equal ones."""
  best = jnp.where(relevance == _MATCH, scores, -jnp.inf).max(axis=1, keepdims=True)
  other = relevance == _OTHER
  # Comparisons with NaN are false: no score counts as lower than NaN, and NaN not as lower than any score.
  return jnp.stack([(other & ~(scores <= best)).sum(axis=1), (other & ~(scores < best)).sum(axis=1)])
