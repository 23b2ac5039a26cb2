"""Zero-shot classification through prompts (Radford et al. 2021, section 3.1)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
import numpy as np

from declip_jax.config import TEMPLATES
from declip_jax.data.sources import Source
from declip_jax.evals.features import EvaluationData
from declip_jax.evals.metrics import accuracies, predict
from declip_jax.evals.results import Scores
from declip_jax.evals.similarity import Embeddings, Similarity
from declip_jax.runtime.hosts import gather_rows

METRICS = ("top1", "top5", "mean_per_class", "majority_share", "images")


def zero_shot(data: EvaluationData, pictures: Path | None, *, templates: Sequence[str] = TEMPLATES) -> Scores:
  """The metrics of `accuracies` for a source with class names; images without a label are skipped.

  Args:
    data: split to classify, and embeddings of prompts.
    pictures: unused.
    templates: prompts with `{}` for the class name.

  Raises:
    ValueError: the source has no labelled image; see also `check`.
  """
  del pictures
  source = data.test.source
  check(source, "zero_shot", templates=templates)
  prompt_embeddings = data.texts(prompts(source.classnames, templates))
  classes = len(source.classnames)
  if data.tokens:
    logits = data.test.map_images(token_classifier(prompt_embeddings, classes, data.similarity))
  else:
    logits = data.similarity(data.test.images, classifier(prompt_embeddings, classes))
  logits, label = gather_rows(logits), gather_rows(data.test.label)
  used = label >= 0  # -1 also where an image cannot be read
  if not used.any():
    raise ValueError(f"{source.name} has no readable image with a class label")
  return Scores({**accuracies(predict(logits[used], label[used])), "images": int(used.sum())})


def check(source: Source | Sequence[Any], field: str, *, templates: Any = TEMPLATES) -> None:
  """Rejects a source without class names, and templates that are not texts with one `{}` each.

  Raises:
    ValueError: the message names the source or the template.
  """
  check_templates(templates, f"{field}.templates")
  if not source.classnames:
    raise ValueError(
      f"{source.name} has no class names, which {field} needs: put a classnames.txt, with one name per line, next to "
      "its first file"
    )


def check_templates(templates: Any, field: str) -> None:
  """Rejects prompt templates that are not texts with one `{}` each, for the name of the class, and no other braces.

  Raises:
    ValueError: the message names the template.
  """
  if isinstance(templates, str) or not templates:
    raise ValueError(f"{field}={templates!r}: expected a tuple of prompt templates, such as {TEMPLATES}")
  for text in templates:
    if not isinstance(text, str) or text.count("{}") != 1 or set(text.replace("{}", "")) & {"{", "}"}:
      raise ValueError(
        f"{field}: prompt template {text!r} needs one {{}}, for the name of the class, and no other braces"
      )


def prompts(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
  """Prompts made from every template for the first class, then for the second, and so on.

  Raises:
    ValueError: see `check_templates`.
  """
  check_templates(templates, "templates")
  return [template.format(name) for name in classnames for template in templates]


def classifier(prompt_embeddings: Float[np.ndarray, "prompts d"], classes: int) -> Float[np.ndarray, "classes d"]:
  """One unit-norm embedding per class: the mean of its prompts' unit-norm embeddings, normalised again."""
  means = prompt_embeddings.reshape(classes, -1, prompt_embeddings.shape[1]).mean(axis=1)
  return means / np.linalg.norm(means, axis=1, keepdims=True)


def token_classifier(
  prompt_embeddings: Embeddings, classes: int, similarity: Similarity
) -> Callable[[Embeddings], Float[np.ndarray, "n classes"]]:
  """A function from image tokens to logits: the mean, over a class's prompts, of their late interaction with the image.

  FILIP (Yao et al. 2022, section 3.3). DeCLIP's released code differs: it averages the tokens at the same position of
  all prompts of a class, padding included, and divides by the norm of the whole text, `[t e]`. Since prompts differ in
  length, this mixes unrelated words and gives each class a scale of its own. We do not reproduce it.
  """

  def logits(image: Embeddings) -> Float[np.ndarray, "n classes"]:
    scores = similarity(image, prompt_embeddings)
    return scores.reshape(len(scores), classes, -1).mean(axis=2)

  return logits
