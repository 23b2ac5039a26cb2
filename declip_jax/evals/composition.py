"""Choice between right and wrong captions or images, of SugarCrepe, Winoground and WinoGAViL.

SugarCrepe is by Hsieh et al. (2023), Winoground by Thrush et al. (2022) and WinoGAViL by Bitton et al. (2022).

All comparisons are strict: equal scores are wrong, so that a model that maps everything to the same point scores 0.
CLIP_benchmark counts ties of SugarCrepe as right, and DataComp breaks those of WinoGAViL by the order of the data.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Bool, Float
import numpy as np

from declip_jax.data.sources import Source, read_example
from declip_jax.data.sources.composition import CANDIDATES, INSTANCE
from declip_jax.evals import metrics
from declip_jax.evals.features import EvaluationData, Split
from declip_jax.evals.intervals import bootstrap, clopper_pearson, percentiles
from declip_jax.evals.results import Scores
from declip_jax.evals.similarity import Embeddings, Similarity, num_embeddings, take, unit_rows
from declip_jax.runtime.hosts import any_host, first_error, gather_rows, gather_texts
from declip_jax.spelling import counted

METRICS = ("accuracy", "group_score", "text_score", "image_score", *metrics.JACCARD_METRICS, "ties", "examples")
_BLOCK = 64  # images whose scores with all captions of the block are computed at once


def caption_scores(
  image: Embeddings, text: Embeddings, similarity: Similarity | None = None
) -> Float[np.ndarray, "n captions"]:
  """Scores of each image with its own captions only.

  Args:
    image: embeddings of `n` images.
    text: embeddings of the captions of the first image, of the second, and so on, equally many for each.
    similarity: scores of images against texts, for embeddings that are not arrays `[n d]`; cosines by default.

  Raises:
    ValueError: the captions cannot be split evenly.
  """
  count, texts = num_embeddings(image), num_embeddings(text)
  if not count or not texts or texts % count:
    raise ValueError(f"{texts} captions for {count} images: expected equally many for each")
  if similarity is None:
    return np.einsum("nd,ncd->nc", unit_rows(image), unit_rows(text).reshape(count, texts // count, -1))
  each = texts // count
  rows = []
  for start in range(0, count, _BLOCK):
    block = slice(start, start + _BLOCK)
    scores = similarity(take(image, block), take(text, slice(start * each, (start + _BLOCK) * each)))
    own = np.arange(len(scores))
    rows.append(scores.reshape(len(scores), len(scores), each)[own, own])
  return np.concatenate(rows)


def choice(scores: Float[np.ndarray, "n 2"]) -> dict[str, Bool[np.ndarray, "n"]]:
  """SugarCrepe: `accuracy`, whether the right caption, the first one, scores higher, and `ties` of the two."""
  right, wrong = scores.T
  return {"accuracy": right > wrong, "ties": right == wrong}


def winoground(scores: Float[np.ndarray, "n 2 2"]) -> dict[str, Bool[np.ndarray, "n"]]:
  """Winoground: which examples count for its group, text and image scores, and which have ties.

  A random model has 16.7, 25 and 25 %.

  Args:
    scores: `scores[:, i, j]` of image `i` of each example with its caption `j`; 0 belongs to 0, and 1 to 1.
  """
  own = np.stack([scores[:, 0, 0], scores[:, 1, 1]], axis=1)
  other_text = np.stack([scores[:, 0, 1], scores[:, 1, 0]], axis=1)
  other_image = other_text[:, ::-1]
  text, image = (own > other_text).all(axis=1), (own > other_image).all(axis=1)
  ties = ((own == other_text) | (own == other_image)).any(axis=1)
  return {"group_score": text & image, "text_score": text, "image_score": image, "ties": ties}


def jaccard(scores: Float[np.ndarray, "n"], right: Bool[np.ndarray, "n"]) -> tuple[float, bool]:
  """The Jaccard index of the K images that are right and the K with the highest scores, and whether a tie decides it.

  An image is among those with the highest scores if fewer than K others score at least as high. If equal scores leave
  places of the K open, these count as wrong images, and so does an image with the score NaN.

  Args:
    scores: scores of the candidates of an instance with its cue.
    right: which of them are its associations; K of them are.

  Raises:
    ValueError: no candidate is right.
  """
  size = int(right.sum())
  if not size:
    raise ValueError("no candidate is right")
  others = (~(scores < scores[:, None])).sum(axis=1) - 1  # that score at least as high
  chosen = others < size
  hits = int((chosen & right).sum())
  return hits / (2 * size - hits), int(chosen.sum()) < size


def composition(data: EvaluationData, pictures: Path | None) -> Scores:
  """The choice between right and wrong captions or images, over the sources of `data.sources.composition`.

  The metrics are those of WinoGAViL if images are candidates of instances, see `jaccard`; those of `winoground` if
  images are in pairs with each other's captions; else those of `choice`. Images that cannot be read are left out, and
  so is the other image of a pair, or all of an instance.

  Raises:
    ValueError: an image does not have two captions, none can be read, or no instance of at least 10 images can be.
  """
  del pictures
  image = jax.tree.map(gather_rows, data.test.images)
  if any_host({INSTANCE, CANDIDATES} <= set(data.test.groups)):
    return _associations(data, image)
  readable, captions = gather_rows(data.test.readable), _two_captions(data.test)
  pairs = readable[::2] & readable[1::2] if len(readable) % 2 == 0 else np.zeros(0, bool)
  firsts = 2 * np.flatnonzero(pairs)
  in_pairs = len(firsts) and all(captions[row] == captions[row + 1][::-1] for row in firsts)
  rows = np.flatnonzero(np.repeat(pairs, 2) if in_pairs else readable)
  if not len(rows):
    raise ValueError(f"{data.test.name}: no image can be read")
  text = data.texts([caption for row in rows for caption in captions[row]])
  scores = caption_scores(take(image, rows), text, data.similarity if data.tokens else None)
  if in_pairs:
    correct, rows = winoground(np.stack([scores[::2], scores[1::2, ::-1]], axis=1)), firsts
  else:
    correct = choice(scores)
  intervals = {name: clopper_pearson(int(right.sum()), len(right)) for name, right in correct.items() if name != "ties"}
  shares = {name: float(right.mean()) for name, right in correct.items() if name != "ties"}
  counts = {"ties": int(correct["ties"].sum()), "examples": len(rows)}
  return Scores({**shares, **counts}, intervals, {"row": rows, "correct": correct[next(iter(shares))]})


def _two_captions(split: Split) -> list[tuple[str, str]]:
  """The captions of the images of all hosts; those of images that cannot be read are empty.

  Raises:
    ValueError: an image has another number of captions; the same on every host.
  """
  of_images = [own if readable else ("", "") for own, readable in zip(split.captions, split.readable, strict=True)]
  wrong = ((row, len(own)) for row, own in zip(split.rows, of_images, strict=True) if len(own) != 2)
  if error := first_error(next((_not_two(split.name, *found) for found in wrong), "")):
    raise ValueError(error)
  captions = gather_texts([caption for own in of_images for caption in own])
  return [*zip(captions[::2], captions[1::2], strict=True)]


def _associations(data: EvaluationData, image: Embeddings) -> Scores:
  """The scores of WinoGAViL's instances, as DataComp defines them; see `_jaccard_scores`.

  Args:
    data: the test split.
    image: embeddings of the images of all hosts.
  """
  instance, candidates = (
    gather_rows(data.test.groups.get(name, np.full(len(data.test.label), -1, np.int32)))
    for name in (INSTANCE, CANDIDATES)
  )
  right = gather_rows(data.test.label) == 1
  cues = gather_texts([own[0] if own else "" for own in data.test.captions])
  _, number, readable = np.unique(instance, return_inverse=True, return_counts=True)
  rows = np.flatnonzero((instance >= 0) & (readable[number] == candidates))  # an unreadable image has no instance
  if not (candidates[rows] >= 10).any():
    raise ValueError(f"{data.test.name}: there is no instance of at least 10 images that can all be read")
  text = data.texts([prompt(cues[row]) for row in rows])
  scores = caption_scores(take(image, rows), text, data.similarity if data.tokens else None)[:, 0]
  _, first, number = np.unique(instance[rows], return_index=True, return_inverse=True)
  parts = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])
  values, tied = map(np.array, zip(*(jaccard(scores[part], right[rows[part]]) for part in parts), strict=True))
  return _jaccard_scores({"row": rows[first], "jaccard": values, "candidates": candidates[rows[first]]}, tied)


def _jaccard_scores(predictions: dict[str, np.ndarray], tied: Bool[np.ndarray, "n"]) -> Scores:
  """Means over instances of different sizes; `ties` and `examples` are those of the first.

  Args:
    predictions: of each instance, its first row in the source, its Jaccard index and its number of candidates.
    tied: whether a tie decides its Jaccard index.
  """
  columns = {name: metric.columns(predictions) for name, metric in metrics.JACCARD_METRICS.items()}
  columns = {name: own for name, own in columns.items() if own[1].any()}
  means = {name: float(metrics.mean_of(*own)) for name, own in columns.items()}
  intervals = {name: percentiles(bootstrap(metrics.mean_of, *own)) for name, own in columns.items()}
  counted = columns["jaccard"][1]
  sizes = [(int(size), predictions["candidates"] == size) for size in np.unique(predictions["candidates"])]
  by_size = [[size, float(predictions["jaccard"][own].mean()), int(own.sum())] for size, own in sizes]
  counts = {"ties": int(tied[counted].sum()), "examples": int(counted.sum())}
  return Scores({**means, **counts}, intervals, predictions, {"jaccard_by_candidates": by_size})


def prompt(cue: str) -> str:
  """The text that a cue of WinoGAViL is compared as: "An" or "A" and the cue in lower case."""
  cue = cue.lower()
  return f"{'An' if cue.startswith(('a', 'e', 'i', 'o', 'u')) else 'A'} {cue}"


def check(source: Source | Sequence[Any], field: str) -> None:
  """Rejects a source whose first image neither has two captions nor is a candidate of an instance.

  Raises:
    ValueError: the message names the source.
  """
  del field
  example = read_example(source, 0)
  if {INSTANCE, CANDIDATES} <= set(example.get("groups", ())):
    return
  if (count := len(example["captions"])) != 2:
    raise ValueError(_not_two(source.name, 0, count))


def _not_two(name: str, sample: int, captions: int) -> str:
  return f"{name}: sample {sample} has {counted(captions, 'caption')}: expected a right and a wrong one"
