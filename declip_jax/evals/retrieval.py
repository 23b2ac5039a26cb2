"""Image-text retrieval, both ways, with any number of captions per image."""

from collections.abc import Iterator
from pathlib import Path

from jaxtyping import Bool, Float, Int
import numpy as np

from declip_jax.data import images as image_ops
from declip_jax.data.sources import Source
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.features import embed_images, embed_texts
from declip_jax.evals.metrics import recall
from declip_jax.evals.similarity import take
from declip_jax.reporting.pictures import optional, plot_retrieval


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
  image, text = take(images.embeddings, kept), embed_texts(texts, encoders)
  yield from recall(image, text, match, group, encoders.similarity).items()
  yield "images", len(kept)
  yield "texts", len(texts)
  shown = _shown(len(texts))
  similarity = encoders.similarity(take(text, shown), image)  # by all hosts, although only one draws
  if pictures is not None:
    with optional(pictures):
      _draw(source, kept, [texts[index] for index in shown], similarity, match[:, group[shown]].T, pictures)


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
