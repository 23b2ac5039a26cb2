"""Zero-shot classification through prompts (Radford et al. 2021, section 3.1)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxtyping import Float
import numpy as np

from declip_jax.data.sources import Source
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.features import embed_images, embed_texts
from declip_jax.evals.metrics import accuracies
from declip_jax.evals.similarity import Embeddings


def classifier(
  classnames: Sequence[str], templates: Sequence[str], encoders: Encoders
) -> Float[np.ndarray, "classes d"]:
  """One unit row per class: the mean over templates of unit-norm text embeddings, normalised again.

  Raises:
    ValueError: a template has no `{}` for the name.
  """
  rows = embed_texts(prompts(classnames, templates), encoders)
  rows = rows.reshape(len(classnames), len(templates), -1).mean(axis=1)
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def token_classifier(
  classnames: Sequence[str], templates: Sequence[str], encoders: Encoders
) -> Callable[[Embeddings], Float[np.ndarray, "n classes"]]:
  """The logits of images by their tokens: the mean over templates of the late interaction with a class's prompts.

  FILIP (Yao et al. 2022, section 3.3). DeCLIP's released code differs: it takes the mean over prompts of the tokens at
  the same position, padding included, and divides it by the norm of the whole text, `[t e]`. The prompts of a class
  differ in length, so that words of all kinds are mixed, and each class gets a scale of its own. We do not repeat that.

  Raises:
    ValueError: a template has no `{}` for the name.
  """
  rows = embed_texts(prompts(classnames, templates), encoders)

  def logits(image: Embeddings) -> Float[np.ndarray, "n classes"]:
    return encoders.similarity(image, rows).reshape(-1, len(classnames), len(templates)).mean(axis=2)

  return logits


def prompts(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
  """All templates filled in for the first class, then for the next.

  Raises:
    ValueError: a template has no `{}` for the name.
  """
  for template in templates:
    if "{}" not in template:
      raise ValueError(f"prompt template {template!r} has no {{}} for the class name")
  return [template.format(name) for name in classnames for template in templates]


def zero_shot(
  source: Source, encoders: Encoders, pictures: Path | None, *, templates: Sequence[str]
) -> Iterator[tuple[str, float]]:
  """Yields the `scores` of classifying a source with class names; images without a label are left out.

  Raises:
    ValueError: the source has no class names or no labelled image.
  """
  del pictures
  if not source.classnames:
    raise ValueError(f"{source.name} has no class names: files have them in a classnames.txt beside the first")
  if encoders.tokens:
    images = embed_images(source, encoders, then=token_classifier(source.classnames, templates, encoders))
  else:
    weights = classifier(source.classnames, templates, encoders)
    images = embed_images(source, encoders)
  used = images.label >= 0  # -1 also where an image cannot be read
  if not used.any():
    raise ValueError(f"{source.name} has no readable image with a class label")
  logits = images.embeddings[used] if encoders.tokens else encoders.similarity(images.embeddings[used], weights)
  yield from accuracies(logits, images.label[used]).items()
  yield "images", int(used.sum())
