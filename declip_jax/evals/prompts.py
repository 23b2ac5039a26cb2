"""Prompts of classes, and the zero-shot classifiers that their embeddings make (Radford et al. 2021, section 3.1.4)."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
import numpy as np

from declip_jax.config import TEMPLATES
from declip_jax.evals.similarity import Embeddings, Similarity, unit_rows

# The prompts of each class, in the order of the classes; their numbers may differ.
ClassPrompts = tuple[tuple[str, ...], ...]
# For each class, the rows of its prompts among the embeddings of all.
PromptRows = Sequence[np.ndarray]


def from_templates(classnames: Sequence[str], templates: Sequence[str]) -> ClassPrompts:
  """Prompts of each class from every template; see `catalogue.DataSet.prompts` for classes with several names.

  Raises:
    ValueError: see `check_templates`.
  """
  check_templates(templates, "templates")
  return tuple(tuple(template.format(name) for template in templates) for name in classnames)


def check_templates(templates: Any, field: str) -> None:
  """Rejects prompt templates that are not texts with one `{}` each, for the name of the class, and no other braces.

  Raises:
    ValueError: the message names the template.
  """
  if not isinstance(templates, (tuple, list)) or not templates:
    raise ValueError(f"{field}={templates!r}: expected a tuple of prompt templates, such as {TEMPLATES}")
  for text in templates:
    if not isinstance(text, str) or text.count("{}") != 1 or set(text.replace("{}", "")) & {"{", "}"}:
      raise ValueError(
        f"{field}: prompt template {text!r} needs one {{}}, for the name of the class, and no other braces"
      )


def unique_prompts(prompts: Sequence[Sequence[str]]) -> tuple[list[str], PromptRows]:
  """The different prompts of all classes, each of which needs to be encoded once, and the rows of each class's."""
  row: dict[str, int] = {}
  for own in prompts:
    for prompt in own:
      row.setdefault(prompt, len(row))
  return list(row), [np.array([row[prompt] for prompt in own]) for own in prompts]


def classifier(embedding: Float[np.ndarray, "prompts d"], rows: PromptRows) -> Float[np.ndarray, "classes d"]:
  """One unit-norm embedding per class: the mean of its prompts' unit-norm embeddings, normalised again.

  Templates and synonyms share one mean. Embeddings are normalised before they are averaged: otherwise long ones would
  count more.

  Args:
    embedding: embeddings of prompts, which need not be of unit norm.
    rows: rows of each class's prompts.
  """
  unit = unit_rows(embedding)
  return unit_rows(np.stack([unit[own].mean(axis=0, dtype=np.float64) for own in rows]))


def token_classifier(
  prompt_embeddings: Embeddings, rows: PromptRows, similarity: Similarity
) -> Callable[[Embeddings], Float[np.ndarray, "n classes"]]:
  """A function from image tokens to logits: the mean, over a class's prompts, of their late interaction with the image.

  FILIP (Yao et al. 2022, section 3.3). DeCLIP's released code differs: it averages the tokens at the same position of
  all prompts of a class, padding included, and divides by the norm of the whole text, `[t e]`. Since prompts differ in
  length, this mixes unrelated words and gives each class a scale of its own. We do not reproduce it.
  """

  def logits(image: Embeddings) -> Float[np.ndarray, "n classes"]:
    scores = similarity(image, prompt_embeddings)
    return np.stack([scores[:, own].mean(axis=1) for own in rows], axis=1)

  return logits
