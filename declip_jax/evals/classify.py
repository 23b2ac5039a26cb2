"""Classification by the classifier of a fine-tuned model."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Int
import numpy as np

from declip_jax.evals.classes import canonical
from declip_jax.evals.features import EvaluationData
from declip_jax.evals.results import Scores
from declip_jax.evals.scoring import METRICS, score
from declip_jax.runtime.hosts import gather_rows

__all__ = ["METRICS", "classify", "columns"]


def classify(data: EvaluationData, pictures: Path | None) -> Scores:
  """The scores of the model's classifier, restricted to the classes of the data, which are matched by their names.

  Args:
    data: split to classify, and the model's classifier.
    pictures: unused.

  Raises:
    ValueError: the model has no classifier, the data has a class that the model does not know, or no labelled image.
  """
  del pictures
  classifier, name = data.classifier, data.test.name
  if classifier is None:
    raise ValueError(f"{name}: the model has no classifier; only fine-tuned models have one")
  logits = classifier.logits(data.test.features.pooled)
  if data.classnames and classifier.classnames:
    logits = logits[:, columns(data.classnames, classifier.classnames, name)]
  elif max(len(data.classnames), gather_rows(data.test.label).max(initial=-1) + 1) > logits.shape[1]:
    raise ValueError(f"{name} has more classes than the classifier, which has {logits.shape[1]}")
  return score(data, gather_rows(logits))


def columns(ours: Sequence[str], theirs: Sequence[str], name: str) -> Int[np.ndarray, "classes"]:
  """The class of the model for each class of the data.

  Args:
    ours: names of the classes of the data.
    theirs: names of the classes of the model; there may be more.
    name: name of the data, for errors.

  Raises:
    ValueError: a name that the model does not have, or that it has twice.
  """
  if tuple(ours) == tuple(theirs):
    return np.arange(len(ours))
  numbers = {canonical(one): number for number, one in enumerate(theirs)}
  if len(numbers) < len(theirs):
    raise ValueError(f"{name}: the model has two classes of one name, so its classes have to be in the same order")
  if unknown := [one for one in ours if canonical(one) not in numbers]:
    raise ValueError(f"{name} has classes that the model does not have: {', '.join(unknown[:10])}")
  return np.array([numbers[canonical(one)] for one in ours])
