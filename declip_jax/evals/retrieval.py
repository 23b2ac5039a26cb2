"""Image-text retrieval in both directions, with any number of captions per image."""

from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

from absl import logging
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
from declip_jax.reporting.pictures import optional, plot_retrieval
from declip_jax.runtime.hosts import gather_rows, gather_texts

METRICS = (*ranks.METRICS, "images", "texts")


def retrieval(
  data: EvaluationData, pictures: Path | None, *, equal_texts: bool = False, prefix: str = "", folds: int = 1
) -> Scores:
  """The metrics of `ranks.recalls` over a source; also draws the images that a few texts retrieve.

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
  shown = _shown(len(texts))
  scores = data.similarity(take(text, shown), image)  # on all hosts, as `similarity` requires, although only one draws
  if pictures is not None:
    with optional(pictures):
      match = ranks.matches(image_of_text, group)[:, group[shown]].toarray().T
      _draw(source, kept, [texts[index] for index in shown], scores, match, pictures)
  predictions = {
    "row": kept,
    "image_of_text": image_of_text,
    "image_rank": found.image_to_text.high,
    "text_rank": found.text_to_image.high,
  }
  recalls = ranks.recalls(found)
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
  logging.info(
    "%s: %d samples show %d different images, each of which counts once", split.name, len(found), len(joined)
  )
  return joined


def check(source: Source | Sequence[Any], field: str, *, folds: int = 1, **options: Any) -> None:
  """Rejects a source that has classes but no captions, or fewer samples than there are folds.

  Raises:
    ValueError: the message names the source or the option.
  """
  del options
  if folds > len(source):
    raise ValueError(f"{field}.folds={folds}: {source.name} has {len(source)} samples; expected at most one fold each")
  if source.classnames and not has_captions(source):
    raise ValueError(f"{source.name} has classes but no captions, which {field} needs")


def _shown(texts: int) -> Int[np.ndarray, "shown"]:
  """Indices of at most eight texts, spread over all of them."""
  return np.linspace(0, texts - 1, min(8, texts)).astype(int)


def _draw(
  source: Source | Sequence[Any],
  kept: Int[np.ndarray, "n"],
  texts: list[str],
  scores: Float[np.ndarray, "shown n"],
  match: Bool[np.ndarray, "shown n"],
  path: Path,
) -> None:
  top = np.argsort(-scores, axis=1, kind="stable")[:, :5]
  pictures = [[image_ops.decode(source[int(kept[image])]["image"]) for image in images] for images in top]
  plot_retrieval(texts, pictures, np.take_along_axis(match, top, axis=1), path)
