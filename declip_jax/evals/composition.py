"""Choice between a right and a wrong caption or image: SugarCrepe (Hsieh et al. 2023), Winoground (Thrush et al. 2022).

All comparisons are strict: equal scores are wrong, so that a model that maps everything to the same point scores 0.
CLIP_benchmark counts ties of SugarCrepe as right.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Bool, Float
import numpy as np

from declip_jax.data.sources import Source, read_example
from declip_jax.evals.features import EvaluationData
from declip_jax.evals.intervals import clopper_pearson
from declip_jax.evals.results import Scores
from declip_jax.evals.similarity import Embeddings, Similarity, num_embeddings, take, unit_rows
from declip_jax.runtime.hosts import first_error, gather_rows

METRICS = ("accuracy", "group_score", "text_score", "image_score", "ties", "examples")
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


def composition(data: EvaluationData, pictures: Path | None) -> Scores:
  """The metrics of `winoground` if images are in pairs with each other's captions, else those of `choice`.

  Sources are those of `data.sources.composition`, whose images have a right and then a wrong caption. Images that
  cannot be read are left out, and so is the other image of a pair.

  Raises:
    ValueError: an image does not have two captions, or none can be read.
  """
  del pictures
  captions, error = [], ""
  try:
    captions = [_captions(data.test.source, index) for index in range(len(data.test.source))]
  except ValueError as failed:
    error = str(failed)
  if error := first_error(error):  # on every host, or the others would wait for this one
    raise ValueError(error)
  if not captions:
    raise ValueError(f"{data.test.name} has no samples")
  text = data.texts([caption for own in captions for caption in own])
  image, readable = jax.tree.map(gather_rows, data.test.images), gather_rows(data.test.readable)
  scores = caption_scores(image, text, data.similarity if data.tokens else None)
  if len(captions) % 2 == 0 and all(a == b[::-1] for a, b in zip(captions[::2], captions[1::2], strict=True)):
    kept = np.flatnonzero(readable[::2] & readable[1::2])
    correct = winoground(np.stack([scores[::2], scores[1::2, ::-1]], axis=1)[kept])
    rows = 2 * kept
  else:
    rows = np.flatnonzero(readable)
    correct = choice(scores[rows])
  if not len(rows):
    raise ValueError(f"{data.test.name}: no image can be read")
  intervals = {name: clopper_pearson(int(right.sum()), len(right)) for name, right in correct.items() if name != "ties"}
  metrics = {name: float(right.mean()) for name, right in correct.items() if name != "ties"}
  headline = next(iter(metrics))
  metrics |= {"ties": int(correct["ties"].sum()), "examples": len(rows)}
  return Scores(metrics, intervals, {"row": rows, "correct": correct[headline]})


def check(source: Source | Sequence[Any], field: str) -> None:
  """Rejects a source whose first image does not have two captions.

  Raises:
    ValueError: the message names the source.
  """
  del field
  _captions(source, 0)


def _captions(source: Source | Sequence[Any], index: int) -> tuple[str, ...]:
  captions = read_example(source, index)["captions"]
  if len(captions) != 2:
    raise ValueError(f"{source.name}: sample {index} has {len(captions)} captions: expected a right and a wrong one")
  return captions
