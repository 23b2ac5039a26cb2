"""Classification by the classifier of a fine-tuned model."""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Any

from absl import logging
import numpy as np

from declip_jax.evals.catalogue import DataSet, data_set
from declip_jax.evals.classes import align_model
from declip_jax.evals.features import EvaluationData
from declip_jax.evals.metrics import merge_classes
from declip_jax.evals.mistakes import draw_confusions
from declip_jax.evals.results import Scores
from declip_jax.evals.scoring import METRICS, score
from declip_jax.runtime.hosts import gather_rows

__all__ = ["METRICS", "classify", "columns"]

_BY_NUMBER = "by number: neither the model nor the data has names of classes"


def classify(data: EvaluationData, pictures: Path | None) -> Scores:
  """The scores of the model's classifier, restricted to the classes of the data, see `columns`.

  A class that comprises several of the model's has the largest of their logits.

  Args:
    data: split to classify, and the model's classifier.
    pictures: PNG file of the most frequent confusions, None for none.

  Raises:
    ValueError: the model has no classifier, its classes do not map onto those of the data, or no image has a label.
  """
  classifier, name = data.classifier, data.test.name
  if classifier is None:
    raise ValueError(f"{name}: the model has no classifier; only fine-tuned models have one")
  found = columns(data.test, data.classnames, classifier.classnames, data.key, name)
  logits = classifier.logits(data.test.features.pooled)
  if found is not None:
    if (names := len(classifier.classnames)) != logits.shape[1]:
      raise ValueError(f"heads.classnames has {names} names, but the classifier of the model {logits.shape[1]} classes")
    scores = score(data, gather_rows(merge_classes(logits, found)))
    draw_confusions(data.test.source, data.classnames, scores, pictures)
    return scores
  if gather_rows(data.test.label).max(initial=-1) >= logits.shape[1]:
    raise ValueError(f"{name} has more classes than the classifier, which has {logits.shape[1]}")
  logging.log_first_n(logging.WARNING, "%s: classes are matched %s", 1, name, _BY_NUMBER)
  scores = score(data, gather_rows(logits), {"classes": _BY_NUMBER})
  draw_confusions(data.test.source, (), scores, pictures)
  return scores


def columns(
  test: Any, ours: Sequence[str], theirs: Sequence[str], key: str, place: str
) -> Sequence[Sequence[int]] | None:
  """The classes of the model that each class of the data comprises, by their names.

  Of a data set in the catalogue, its other names of classes count, and the classes of its parent, see `align_model`.
  Classes are never matched by number, except where neither the model nor the data has any names: then this is None.

  Args:
    test: the data, a `Split` or a `jobs.DataSource`. If its labels are called as the classes of the model, they are
      the same classes.
    ours: names of the classes of the data.
    theirs: names of the classes of the model; there may be more.
    key: key of the data set in the catalogue, empty for none.
    place: start of messages.

  Raises:
    ValueError: the names do not map one to one, or only one side has names; the message says how to set the others.
  """
  if not ours and not theirs:
    return None
  if not theirs:
    raise ValueError(
      f"{place}: the classes of the model have no names, by which to match them with {', '.join(ours[:5])}, ...: set "
      "them, in the order of the labels that it was trained on, by config.model.heads.classnames before training, or "
      """by --settings="heads.classnames=('cat', 'dog')" in an evaluation"""
    )
  if not ours:
    raise ValueError(
      f"{place}: the classes of the data have no names, by which to match them with {', '.join(theirs[:5])}, ...: put "
      "a classnames.txt, with one name per line, next to its first file"
    )
  if tuple(test.source.classnames) == tuple(theirs):
    numbers = np.arange(len(theirs)) if test.classes is None else test.classes
    return [np.flatnonzero(numbers == number).tolist() for number in range(len(ours))]
  return align_model(_entry(key or test.source.name, ours, in_catalogue=bool(key)), theirs, place)


def _entry(key: str, classnames: Sequence[str], *, in_catalogue: bool) -> DataSet:
  """The entry of a data set, with the classes of its source if it has none of its own."""
  found = data_set(key) if in_catalogue else DataSet(key, key, "classification", None)
  return found if found.classes else dataclasses.replace(found, classes=tuple(classnames))
