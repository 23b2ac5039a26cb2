"""The accuracy of each group of images, such as the regions that they are from, and how far groups are apart."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy

from declip_jax.evals.comparison import Cell, Scored, Task
from declip_jax.evals.intervals import clopper_pearson, student
from declip_jax.evals.report.compared import Report, percent
from declip_jax.reporting.documents import Block, Heading, Table

_BY = "accuracy_by_"  # start of the names of details, before that of a grouping
_OTHERS = ("class", "video", "track")  # of details that are not about groups of images, or about frames of one scene
_MOST = 30  # groups in a table


class Groups(NamedTuple):
  """The groups of a method in one grouping of the images of a task.

  Attributes:
    task: the task.
    grouping: name of the grouping.
    label: the method.
    scores: top-1 accuracy of each group, by its number in the source.
    images: number of images of each group; nothing where the results do not say it.
    p: p-value of equal accuracies of all groups, by a chi-squared test; None for several runs, or without `images`.
  """

  task: Task
  grouping: str
  label: str
  scores: Mapping[int, Cell]
  images: Mapping[int, int]
  p: float | None

  @property
  def best(self) -> int:
    """The group with the highest accuracy, of equal ones the first."""
    return max(self.scores, key=lambda group: self.scores[group].value)

  @property
  def worst(self) -> int:
    """The group with the lowest accuracy, of equal ones the first."""
    return min(self.scores, key=lambda group: self.scores[group].value)

  @property
  def difference(self) -> float:
    """The highest minus the lowest accuracy."""
    return self.scores[self.best].value - self.scores[self.worst].value


def compared(report: Report, task: Task) -> list[Groups]:
  """The groups of all methods in all groupings of the images of a task."""
  found = []
  for method in report.methods:
    runs = method.of(task)
    for grouping in dict.fromkeys(name for one in runs for name in _groupings(one)):
      own = [one for one in runs if grouping in _groupings(one)]
      found.append(_groups(task, grouping, method.label, own))
  return found


def groups(report: Report, kind: str) -> Iterator[Block]:
  """The tables of an evaluator, one for each data set and grouping of its images."""
  labels = [method.label for method in report.detailed]
  tables = []
  for task in report.of_kind(kind):
    own = [one for one in compared(report, task) if one.label in labels]
    for grouping in dict.fromkeys(one.grouping for one in own):
      tables += _table(task, grouping, {one.label: one for one in own if one.grouping == grouping}, labels)
  if tables:
    yield (
      "Top-1 accuracy by group of images; groups have their numbers in the source. A star marks a difference of the "
      "best and the worst group of a run whose groups are further apart than chance explains: the accuracies of all "
      "groups differ at a level of 5 % by a chi-squared test."
    )
    yield from tables


def _groupings(scored: Scored) -> list[str]:
  names = [name.removeprefix(_BY) for name, of in scored.details.items() if name.startswith(_BY) and of]
  return [name for name in names if name not in _OTHERS]


def _groups(task: Task, grouping: str, label: str, runs: Sequence[Scored]) -> Groups:
  """The groups of some runs of a method."""
  values: dict[int, list[float]] = {}
  images: dict[int, int] = {}
  for one in runs:
    for group, value in one.details[f"{_BY}{grouping}"].items():
      values.setdefault(int(group), []).append(value)
    images = {int(group): count for group, count in one.details.get(f"images_by_{grouping}", {}).items()} or images
  scores = {group: _cell(own, images.get(group)) for group, own in sorted(values.items())}
  counts = [images.get(group, 0) for group in scores]
  p = _p_value([own[0] for _, own in sorted(values.items())], counts) if len(runs) == 1 and all(counts) else None
  return Groups(task, grouping, label, scores, images, p)


def _cell(values: Sequence[float], images: int | None) -> Cell:
  if len(values) > 1:
    own = np.array(values, np.float64)
    return Cell(float(own.mean()), student(own), len(own))
  return Cell(values[0], clopper_pearson(round(values[0] * images), images) if images else None, 1)


def _p_value(accuracy: Sequence[float], images: Sequence[int]) -> float:
  """p-value of a chi-squared test that groups have equal accuracies."""
  right = np.rint(np.multiply(accuracy, images))
  table = np.stack([right, images - right])
  if len(accuracy) < 2 or not table.any(axis=1).all():  # one group, or all answers are right or all are wrong
    return 1.0
  return float(scipy.stats.chi2_contingency(table, correction=False).pvalue)


def _table(task: Task, grouping: str, of: Mapping[str, Groups], labels: Sequence[str]) -> Iterator[Block]:
  images = next((own.images for own in of.values() if own.images), {})
  every = sorted({group for own in of.values() for group in own.scores})
  if len(every) < 2:
    return
  shown = sorted(sorted(every, key=lambda group: -images.get(group, 0))[:_MOST])
  yield Heading(f"Groups of {task} by {grouping}", 3)
  if len(shown) < len(every):
    yield f"The {len(shown)} groups with the most images, of {len(every)}:"
  rows = [
    [str(group), f"{images[group]:,}" if group in images else ""]
    + [percent(of[label].scores.get(group)) if label in of else "" for label in labels]
    for group in shown
  ]
  rows.append(["best minus worst", "", *(_difference(of[label]) if label in of else "" for label in labels)])
  used = [column for column in range(len(labels) + 2) if column != 1 or images]
  header = ["group", "images", *labels]
  yield Table([header[column] for column in used], [[row[column] for column in used] for row in rows])


def _difference(own: Groups) -> str:
  star = "\\*" if own.p is not None and own.p < 0.05 else ""
  return f"{100 * own.difference:.1f}{star} ({own.best} minus {own.worst})"
