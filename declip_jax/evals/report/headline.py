"""The headline table of a report: ImageNet, means of suites, and means of the data sets that all methods have."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from declip_jax.evals import EVALUATORS, catalogue, variant_of
from declip_jax.evals.catalogue import Suite
from declip_jax.evals.comparison import Average, Items, Method, Scored, Task, average, average_difference
from declip_jax.evals.report.compared import Report, brackets, prompts_name, single_metrics, title
from declip_jax.reporting.documents import Block, Heading, Listing, Table

_IMAGENET = {"zero_shot": "zero-shot", "linear_probe": "linear probe", "classify": "fine-tuned"}
_UNITS = {"shots": "images per class", "neighbours": "neighbours"}
_WITHOUT_TRAINING = ("zero_shot", "retrieval", "composition")


class Line(NamedTuple):
  """A score in the headline table.

  Attributes:
    quantity: what it is a score of.
    method: of which method.
    score: the score.
    difference: its difference from the baseline, None for the baseline itself.
    data_sets: names of the data sets of which the score is the mean.
  """

  quantity: str
  method: Method
  score: Average
  difference: Average | None
  data_sets: tuple[str, ...]


def lines(report: Report) -> list[Line]:
  """The headline scores of all methods that have all of their data sets."""
  found = []
  for name, items in _quantities(report):
    for method in report.methods:
      if (score := average(method, items)) is None:
        continue
      baseline = report.baseline
      known = None if baseline is None or method is baseline else average_difference(method, baseline, items)
      found.append(Line(name, method, score, known, tuple(task.dataset for task, _ in items)))
  return found


def headline(report: Report) -> Iterator[Block]:
  """The table."""
  found = lines(report)
  if not found:
    return
  seeds = any(line.score.seeds is not None for line in found)
  names = ["quantity", "method", "score", *_intervals("interval", seeds)]
  if report.baseline is not None:
    names += [f"minus {report.baseline.label}", *_intervals("interval", seeds)]
  rows, before = [], ""
  for line in found:
    row = ["" if line.quantity == before else line.quantity, line.method.label, f"{100 * line.score.value:.1f}"]
    row += _ends(line.score, seeds)
    if report.baseline is not None:
      own = line.difference
      star = "\\*" if own is not None and own.is_significant else ""
      row += [f"{100 * own.value:+.1f}{star}", *_ends(own, seeds, "+")] if own else [""] * (2 + seeds)
    rows.append(row)
    before = line.quantity
  yield Heading("Headline")
  if seeds:
    yield (
      "There are two kinds of interval: over test images (how much a score depends on which images were drawn for the "
      "test set) and over seeds (how much it depends on the randomness of training). A star needs both."
    )
  yield Table(names, rows, texts=2)
  if members := [*_members(report)]:
    yield (
      "A mean that is not that of a suite is over the data sets that all methods have. Results with options of their "
      "own are not in it, and neither are further results of a data set with other prompts, nor data sets with fewer "
      "images per class or neighbours than the others:"
    )
    yield Listing(members)


def _members(report: Report) -> Iterator[str]:
  """For each mean of an evaluator, its data sets, and the results that are not in it."""
  for kind, items in _means(report):
    members, used = ", ".join(str(task) for task, _ in items), {task for task, _ in items}
    others = [_with_size(report, task) for task in report.of_kind(kind) if task not in used]
    if len(items) > 1 or others:
      without = f"; without {', '.join(others)}" if others else ""
      yield f"{title(kind)}: {members}{without}."


def _with_size(report: Report, task: Task) -> str:
  size = report.training_size(task)
  return str(task) if size is None else f"{task} ({size.number} {_UNITS[size.unit]})"


def _means(report: Report) -> Iterator[tuple[str, Items]]:
  """The evaluators with a mean over the data sets that all methods have, which may be one, and these data sets."""
  for kind in report.kinds:
    items = report.items(kind)
    if items and [report.some(task).key for task, _ in items] != ["imagenet"]:
      yield kind, items


def _quantities(report: Report) -> Iterator[tuple[str, Items]]:
  for kind, name in _IMAGENET.items():
    for own in report.protocols(kind).values():
      for prompts, task in own.items():
        if (some := report.some(task)).key == "imagenet":
          by = f", {prompts_name(prompts)}" if task.variant else ""
          yield f"ImageNet, {name}{by}", [(task, some.headline)]
  for suite in catalogue.suites().values():
    for kinds, name in ((_WITHOUT_TRAINING, ""), (("linear_probe",), ", linear probe")):
      for mean, keys in suite.means.items():
        if items := _suite_items(report, suite, keys, kinds):
          own = f"{suite.name}" if mean == "mean" else f"{suite.name}, {mean}"
          yield f"{own}: mean of {len(keys)} data sets{name}", items
  for kind, items in _means(report):
    sets = f"mean of {len(items)} data sets" if len(items) > 1 else str(items[0][0])
    yield f"{title(kind)}: {sets} ({single_metrics(items)})", items


def _suite_items(report: Report, suite: Suite, keys: Sequence[str], kinds: Sequence[str]) -> Items:
  """The tasks and metrics of a mean of a suite; none if a data set is missing or was evaluated by another protocol."""
  tasks: dict[str, Task] = {}
  for task in report.tasks:
    some = report.some(task)
    if task.kind in kinds and some.key in keys and _follows(some, suite):
      tasks[some.key] = task
  if set(keys) - tasks.keys():
    return ()
  return [(tasks[key], suite.metric(key) or report.some(tasks[key]).headline) for key in keys]


def _follows(scored: Scored, suite: Suite) -> bool:
  """Whether a result has the prompts of a suite and the default options, and was fitted by the suite's metric."""
  ours, metric = scored.result.ours, suite.metric(scored.key)
  if variant_of(ours["kind"], ours.get("options", {})):
    return False
  if EVALUATORS[ours["kind"]].needs_text:
    return scored.about.get("prompts", "") in ("", suite.prompt_set(scored.key))
  return scored.about.get("metric", metric) == (metric or "")


def _intervals(name: str, seeds: bool) -> list[str]:
  return [f"{name}, test images", f"{name}, seeds"] if seeds else [name]


def _ends(score: Average, seeds: bool, sign: str = "") -> list[str]:
  known = [score.images, score.seeds] if seeds else [score.images]
  return [brackets(ends, sign).strip() for ends in known]
