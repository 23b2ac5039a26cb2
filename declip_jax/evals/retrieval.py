"""Image-text retrieval, both ways, with any number of captions per image."""

from collections.abc import Callable, Iterator
from pathlib import Path

from jaxtyping import Bool, Float, Int
import numpy as np

from declip_jax.data import images as image_ops
from declip_jax.data.sources import Source
from declip_jax.evals.embed import Encoders, embed_images, embed_texts
from declip_jax.pictures import optional, plot_retrieval

KS = (1, 5, 10)
_CHUNK = 1024  # queries whose similarities are held at once


def recall(
  image: Float[np.ndarray, "n d"],
  text: Float[np.ndarray, "m d"],
  match: Bool[np.ndarray, "n g"],
  group: Int[np.ndarray, "m"],
) -> dict[str, float]:
  """Recall at 1, 5 and 10, as fractions, of texts for images and of images for texts.

  A query counts as found at k if one of its matches is among the k nearest. Ties count against the model, so that one
  that maps everything to the same point scores 0 and not 1.

  Args:
    image, text: unit rows.
    match: whether an image matches the texts of a group.
    group: of each text; texts of one group have the same matches.
  """
  to_text = _ranks(image, text, lambda rows: match[rows][:, group])
  to_image = _ranks(text, image, lambda rows: match[:, group[rows]].T)
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
  image, text = images.embedding[kept], embed_texts(texts, encoders)
  yield from recall(image, text, match, group).items()
  yield "images", len(kept)
  yield "texts", len(texts)
  if pictures is not None:
    with optional(pictures):
      _draw(source, kept, texts, image @ text[_shown(len(texts))].T, match[:, group[_shown(len(texts))]], pictures)


def _ranks(query: np.ndarray, key: np.ndarray, matches_of: Callable[[slice], np.ndarray]) -> Int[np.ndarray, "n"]:
  """For each query how many keys that do not match it are at least as near as its nearest match; NaN counts as near."""
  ranks = []
  for start in range(0, len(query), _CHUNK):
    rows = slice(start, start + _CHUNK)
    similarity, matches = query[rows] @ key.T, matches_of(rows)
    best = np.where(matches, similarity, -np.inf).max(axis=1, keepdims=True)
    ranks.append((~matches & ~(similarity < best)).sum(axis=1))
  return np.concatenate(ranks)


def _shown(count: int) -> Int[np.ndarray, "shown"]:
  return np.linspace(0, count - 1, min(8, count)).astype(int)


def _draw(
  source: Source,
  kept: Int[np.ndarray, "n"],
  texts: list[str],
  similarity: Float[np.ndarray, "n shown"],
  match: Bool[np.ndarray, "n shown"],
  path: Path,
) -> None:
  top = np.argsort(-similarity, axis=0, kind="stable")[:5].T
  pictures = [[image_ops.decode(source[int(kept[image])]["image"]) for image in row] for row in top]
  correct = np.take_along_axis(match.T, top, axis=1)
  plot_retrieval([texts[index] for index in _shown(len(texts))], pictures, correct, path)
