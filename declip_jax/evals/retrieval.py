"""Image-text retrieval, both ways, with any number of captions per image."""

from collections.abc import Callable, Iterator
from pathlib import Path

from jaxtyping import Bool, Float, Int
import numpy as np

from declip_jax.data import images as image_ops
from declip_jax.data.sources import Source
from declip_jax.evals.embed import Encoders, Rows, Similarity, cosines, count, embed_images, embed_texts, take
from declip_jax.reporting.pictures import optional, plot_retrieval

KS = (1, 5, 10)
_CHUNK = 1024  # queries whose similarities are held at once


def recall(
  image: Rows,
  text: Rows,
  match: Bool[np.ndarray, "n g"],
  group: Int[np.ndarray, "m"],
  similarity: Similarity = cosines,
) -> dict[str, float]:
  """Recall at 1, 5 and 10, as fractions, of texts for images and of images for texts.

  A query counts as found at k if one of its matches is among the k nearest. Ties count against the model, so that one
  that maps everything to the same point scores 0 and not 1.

  Args:
    image, text: `n` and `m` rows.
    match: whether an image matches the texts of a group.
    group: of each text; texts of one group have the same matches.
    similarity: of the rows; that of an image to a text need not be that of the text to the image.
  """
  to_text = _ranks(image, text, similarity, lambda rows: match[rows][:, group])
  to_image = _ranks(text, image, similarity, lambda rows: match[:, group[rows]].T)
  found = {"image_to_text": to_text, "text_to_image": to_image}
  return {f"{way}_r{k}": float((ranks < k).mean()) for way, ranks in found.items() for k in KS}


def retrieval(
  source: Source, encoders: Encoders, pictures: Path | None, *, equal_texts: bool
) -> Iterator[tuple[str, float]]:
  """Yields the `recall` over a source, and draws what a few texts retrieve to `pictures`.

  Args:
    source: to search; images that cannot be read or have no caption are left out.
    encoders: what to measure.
    pictures: a PNG file to write, None for none.
    equal_texts: whether captions of the same wording match each other's images.

  Raises:
    ValueError: no image has a caption.
  """
  images = embed_images(source, encoders)
  captions = [source[index]["captions"] if ok else () for index, ok in enumerate(images.readable)]
  kept = np.flatnonzero([bool(texts) for texts in captions])
  if not len(kept):
    raise ValueError(f"{source.name} has no readable image with a caption")
  texts = [text for index in kept for text in captions[index]]
  owner = np.repeat(np.arange(len(kept)), [len(captions[index]) for index in kept])
  group = np.unique(texts, return_inverse=True)[1] if equal_texts else owner
  match = np.zeros((len(kept), group.max() + 1), bool)
  match[owner, group] = True
  image, text = take(images.rows, kept), embed_texts(texts, encoders)
  yield from recall(image, text, match, group, encoders.similarity).items()
  yield "images", len(kept)
  yield "texts", len(texts)
  shown = _shown(len(texts))
  similarity = encoders.similarity(take(text, shown), image)  # by all hosts, although only one draws
  if pictures is not None:
    with optional(pictures):
      _draw(source, kept, [texts[index] for index in shown], similarity, match[:, group[shown]].T, pictures)


def _ranks(
  query: Rows, key: Rows, similarity_of: Similarity, matches_of: Callable[[slice], np.ndarray]
) -> Int[np.ndarray, "n"]:
  """For each query how many keys that do not match it are at least as near as its nearest match; NaN counts as near."""
  ranks = []
  for start in range(0, count(query), _CHUNK):
    rows = slice(start, start + _CHUNK)
    similarity, matches = similarity_of(take(query, rows), key), matches_of(rows)
    best = np.where(matches, similarity, -np.inf).max(axis=1, keepdims=True)
    ranks.append((~matches & ~(similarity < best)).sum(axis=1))
  return np.concatenate(ranks)


def _shown(texts: int) -> Int[np.ndarray, "shown"]:
  return np.linspace(0, texts - 1, min(8, texts)).astype(int)


def _draw(
  source: Source,
  kept: Int[np.ndarray, "n"],
  texts: list[str],
  similarity: Float[np.ndarray, "shown n"],
  match: Bool[np.ndarray, "shown n"],
  path: Path,
) -> None:
  top = np.argsort(-similarity, axis=1, kind="stable")[:, :5]
  pictures = [[image_ops.decode(source[int(kept[image])]["image"]) for image in row] for row in top]
  plot_retrieval(texts, pictures, np.take_along_axis(match, top, axis=1), path)
