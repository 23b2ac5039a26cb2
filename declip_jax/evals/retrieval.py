"""Image-text retrieval in both directions, with any number of captions per image."""

from collections.abc import Callable, Sequence
from functools import cache
import json
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Bool, Float, Int
import numpy as np

from declip_jax.data import images as image_ops
from declip_jax.data.mixture import has_captions
from declip_jax.data.sources import Source
from declip_jax.evals import ranks
from declip_jax.evals.features import EvaluationData, Split
from declip_jax.evals.results import Scores
from declip_jax.evals.similarity import take
from declip_jax.reporting.pictures import Answer, optional, plot_retrieval
from declip_jax.reporting.progress import message
from declip_jax.runtime.hosts import gather_rows, gather_texts
from declip_jax.spelling import counted

_TEXTS, _IMAGES, _BEST = 5, 4, 5  # queries in the picture, and the answers of each
METRICS = (*ranks.METRICS, "images", "texts")


def retrieval(
  data: EvaluationData, pictures: Path | None, *, equal_texts: bool = False, prefix: str = "", folds: int = 1
) -> Scores:
  """The metrics of `ranks.recalls` over a source; also draws what a few texts and images retrieve.

  If the samples of a source have one caption each, those with equal encoded images count as one image with all their
  captions. Otherwise these images would be wrong answers for each other's captions.

  Args:
    data: split to search; images that cannot be read or have no caption are skipped.
    pictures: PNG file to write, None for none.
    equal_texts: whether captions with the same wording match each other's images.
    prefix: text before every caption, such as "a photo of ".
    folds: number of parts that are searched separately, whose metrics are averaged; 5 for COCO 1K.

  Raises:
    ValueError: no image has a caption, or fewer images than folds do.
  """
  source = data.test.source
  images = jax.tree.map(gather_rows, data.test.images)
  captions = _captions(data.test)
  if not captions:
    raise ValueError(f"{source.name} has no readable image with a caption")
  kept = np.array(list(captions))
  texts = [text for own in captions.values() for text in own]
  image_of_text = np.repeat(np.arange(len(kept)), [len(own) for own in captions.values()])
  group = np.unique(texts, return_inverse=True)[1] if equal_texts else image_of_text
  image, text = take(images, kept), data.texts([prefix + text for text in texts])
  similarity = data.similarity if data.tokens else None
  found = ranks.retrieval_ranks(image, text, image_of_text, group, folds=folds, similarity=similarity)
  recalls = ranks.recalls(found)
  shown = _shown(len(kept), _IMAGES), _shown(len(texts), _TEXTS)
  # On all hosts, as `similarity` requires, although only one draws.
  of_images, of_texts = data.similarity(take(image, shown[0]), text), data.similarity(take(text, shown[1]), image)
  if pictures is not None:
    with optional(pictures):
      match = ranks.matches(image_of_text, group)
      of_group = np.unique(group, return_inverse=True)[1]
      scores = [
        (of_images, match[shown[0]].toarray()[:, of_group]),
        (of_texts, match[:, of_group[shown[1]]].toarray().T),
      ]
      title = (
        f"{source.name}: {counted(len(texts), 'text')} and {counted(len(kept), 'image')}; first place right for "
        f"{recalls['text_to_image_r1']:.1%} of the texts and {recalls['image_to_text_r1']:.1%} of the images"
      )
      _draw(title, source, kept, texts, shown, scores, pictures)
  predictions = {
    "row": kept,
    "image_of_text": image_of_text,
    "image_rank": found.image_to_text.high,
    "text_rank": found.text_to_image.high,
  }
  headline = {"mean_r1": recalls["mean_r1"]} if data.metric == "mean_recall@1" else {}
  metrics = {**headline, **recalls, "images": len(kept), "texts": len(texts)}
  return Scores(metrics, ranks.recall_intervals(found), predictions)


def _captions(split: Split) -> dict[int, list[str]]:
  """The captions of each readable image, by the position of its first sample; images without captions are left out."""
  texts = gather_texts([json.dumps(own) for own in split.captions])
  found = {index: json.loads(own) for index, own in enumerate(texts) if own != "[]"}
  hashes = gather_texts(split.image_hash)
  first: dict[Any, int] = {}  # position of each encoded image
  same = {index: first.setdefault(hashes[index] or index, index) for index in found}
  if len(first) == len(found) or any(len(own) > 1 for own in found.values()):
    return found
  joined: dict[int, list[str]] = {}
  for index, own in found.items():
    joined.setdefault(same[index], []).extend(own)
  if jax.process_index() == 0:
    _say_joined(split.name, len(found), len(joined))
  return joined


@cache
def _say_joined(name: str, samples: int, images: int) -> None:
  """Says how many images are searched, once for each source, however often it is evaluated."""
  message(f"{name}: {counted(samples, 'sample')} with {counted(images, 'different image')}, each of which counts once")


def check(source: Source | Sequence[Any], field: str, *, folds: int = 1, **options: Any) -> None:
  """Rejects a source that has classes but no captions, or fewer samples than there are folds.

  Raises:
    ValueError: the message names the source or the option.
  """
  del options
  if folds > len(source):
    raise ValueError(
      f"{field}.folds={folds}: {source.name} has {counted(len(source), 'sample')}; expected at most one fold each"
    )
  if source.classnames and not has_captions(source):
    raise ValueError(f"{source.name} has classes but no captions, which {field} needs")


def _shown(count: int, most: int) -> Int[np.ndarray, "shown"]:
  """Indices of at most `most` of `count` queries, spread over all of them."""
  return np.linspace(0, count - 1, min(most, count)).astype(int)


def _draw(
  title: str,
  source: Source | Sequence[Any],
  kept: Int[np.ndarray, "n"],
  texts: list[str],
  shown: Sequence[Int[np.ndarray, "_"]],
  scores: Sequence[tuple[Float[np.ndarray, "_ _"], Bool[np.ndarray, "_ _"]]],
  path: Path,
) -> None:
  """Draws the answers to the images and texts in `shown`; `scores` has those of all answers, and which are right."""

  @cache
  def picture(image: int) -> np.ndarray:
    return image_ops.decode(source[int(kept[image])]["image"])

  def answers(found: Callable[[int], Any], scores: np.ndarray, match: np.ndarray) -> list[Answer]:
    return [Answer(found(key), place, scores[key], bool(match[key])) for place, key in best_answers(scores, match)]

  of_images = [
    (picture(image), answers(texts.__getitem__, *own))
    for image, *own in zip(shown[0].tolist(), *scores[0], strict=True)
  ]
  of_texts = [(texts[text], answers(picture, *own)) for text, *own in zip(shown[1], *scores[1], strict=True)]
  plot_retrieval(title, of_texts, of_images, path)


def best_answers(scores: Float[np.ndarray, "keys"], match: Bool[np.ndarray, "keys"]) -> list[tuple[int, int]]:
  """Places and indices of the five highest scores, and of the best right answer if none of these is right.

  Places start at 1; of equal scores the first comes first.
  """
  order = np.argsort(-scores, kind="stable")
  places = [*range(min(_BEST, len(order)))]
  right = np.flatnonzero(match[order])
  if len(right) and right[0] >= len(places):
    places.append(int(right[0]))
  return [(place + 1, int(order[place])) for place in places]
