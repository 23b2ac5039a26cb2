"""Metrics of evaluations, as pure functions of arrays."""

from collections.abc import Callable

from jaxtyping import Bool, Float, Int
import numpy as np

from declip_jax.evals.similarity import Embeddings, Similarity, cosines, num_embeddings, take

RECALL_AT = (1, 5, 10)
_CHUNK = 1024  # queries whose similarities are in memory at once


def accuracies(logits: Float[np.ndarray, "n classes"], label: Int[np.ndarray, "n"]) -> dict[str, float]:
  """Top-1, top-5 and mean per-class top-1 accuracy, as fractions, and the share of the largest class.

  The share is the accuracy of always predicting the most frequent class. Classes without images do not count.
  """
  order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
  hits = order == label[:, None]
  totals = np.bincount(label, minlength=logits.shape[1])
  correct = np.bincount(label, weights=hits[:, 0], minlength=logits.shape[1])
  present = totals > 0
  return {
    "top1": float(hits[:, 0].mean()),
    "top5": float(hits.any(axis=1).mean()),
    "mean_per_class": float((correct[present] / totals[present]).mean()),
    "majority_share": float(totals.max() / totals.sum()),
  }


def recall(
  image: Embeddings,
  text: Embeddings,
  match: Bool[np.ndarray, "n g"],
  group: Int[np.ndarray, "m"],
  similarity: Similarity = cosines,
) -> dict[str, float]:
  """Recall at 1, 5 and 10, as fractions, of texts for images and of images for texts.

  A query counts as found at k if one of its matches is among the k nearest. Ties count against the model, so that a
  model that maps everything to the same point scores 0 and not 1.

  Args:
    image, text: embeddings of `n` images and `m` texts.
    match: whether an image matches the texts of a group.
    group: group of each text; texts of one group have the same matches.
    similarity: scores of embeddings; that of an image to a text may differ from that of the text to the image.
  """
  to_text = _ranks(image, text, similarity, lambda chunk: match[chunk][:, group])
  to_image = _ranks(text, image, similarity, lambda chunk: match[:, group[chunk]].T)
  ranks = {"image_to_text": to_text, "text_to_image": to_image}
  return {f"{way}_r{k}": float((rank < k).mean()) for way, rank in ranks.items() for k in RECALL_AT}


def _ranks(
  query: Embeddings, key: Embeddings, similarity: Similarity, matches: Callable[[slice], np.ndarray]
) -> Int[np.ndarray, "n"]:
  """For each query, the number of non-matching keys that are at least as near as its nearest match; NaN counts as near.

  Args:
    query, key: embeddings.
    similarity: scores of queries against keys.
    matches: function from a slice of the queries to whether each key matches each of them.
  """
  ranks = []
  for start in range(0, num_embeddings(query), _CHUNK):
    chunk = slice(start, start + _CHUNK)
    scores, matching = similarity(take(query, chunk), key), matches(chunk)
    best = np.where(matching, scores, -np.inf).max(axis=1, keepdims=True)
    ranks.append((~matching & ~(scores < best)).sum(axis=1))
  return np.concatenate(ranks)
