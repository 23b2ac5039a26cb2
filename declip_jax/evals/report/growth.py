"""How scores grow with compute, data and parameters, and how many pairs one method needs for another one's score."""

from collections.abc import Iterator, Mapping, Sequence
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from declip_jax.evals import catalogue, intervals, results, scaling
from declip_jax.evals.comparison import Items, Scored, Task
from declip_jax.evals.report.compared import Report, single_metrics, title
from declip_jax.evals.scaling import Efficiency, PowerLaw
from declip_jax.reporting import charts
from declip_jax.reporting.charts import Growth, Law, Points
from declip_jax.reporting.documents import Block, Heading, Listing, Picture, Table

# Measures of size -> their name, and what runs on one line have in common; the first choice that joins two runs.
MEASURES = {
  "flops": ("training FLOPs", ((),)),
  "pairs_seen": ("pairs seen in training", (("parameters", "unique_pairs"), ("parameters",))),
  "unique_pairs": ("different training pairs", (("parameters", "pairs_seen"), ("parameters",))),
  "parameters": ("parameters", (("unique_pairs", "pairs_seen"), ("unique_pairs",), ())),
}
_UNITS = {"parameters": "parameters", "unique_pairs": "different pairs", "pairs_seen": "pairs seen"}
_KINDS = ("zero_shot", "retrieval", "linear_probe", "classify")
_MOST = 6  # data sets that are drawn one by one
# What is drawn of a data set that is not in the catalogue; of other evaluators it is the headline metric.
_OWN_METRICS = {
  "zero_shot": ("mean_per_class",),
  "retrieval": ("image_to_text_r10", "text_to_image_r10"),
  "linear_probe": (),
  "few_shot": (),
}
_FOR_FLOOR = 4  # runs of different sizes from which a law with a floor can be fitted


class Run(NamedTuple):
  """A run with a score.

  Attributes:
    name: its model.
    facts: how it was trained, and its `parameters`.
    score: its score.
  """

  name: str
  facts: Mapping[str, Any]
  score: float

  @property
  def method(self) -> tuple[str, str]:
    """Its method, and what tells variants of it apart."""
    return self.facts["method"], self.facts.get("recipe", "")


Lines = dict[str, list[Run]]  # by label


class Needed(NamedTuple):
  """The pairs at which a method reaches the score of another one.

  Attributes:
    score: name of the score.
    measure: a key of `MEASURES`.
    reference: the line of the other method.
    size, target: its pairs, and its score there.
    method: the line of the method.
    sizes: the pairs of its runs.
    best: its best score.
    found: the result.
  """

  score: str
  measure: str
  reference: str
  size: float
  target: float
  method: str
  sizes: Sequence[float]
  best: float
  found: Efficiency


def runs(report: Report, items: Items) -> list[Run]:
  """The runs that have all of some tasks, and say how they were trained from random parameters.

  Their score is the mean over the tasks, of each the mean over its metrics.
  """
  found = []
  for run, first, facts in _trained(report):
    if all(task in run and metric in run[task].metrics for task, metric in items):
      of_tasks: dict[Task, list[float]] = {}
      for task, metric in items:
        of_tasks.setdefault(task, []).append(run[task].metrics[metric])
      found.append(Run(first.result.model, facts, float(np.mean([np.mean(own) for own in of_tasks.values()]))))
  return found


def _trained(report: Report) -> Iterator[tuple[Mapping[Task, Scored], Scored, dict[str, Any]]]:
  """The runs, a result of each, and facts on their training."""
  for method in report.methods:
    for run, first in zip(method.runs, method.first, strict=True):
      facts = {**first.training, "parameters": first.weights.get("parameters")}
      if "method" in facts and "init_from" not in facts:
        yield run, first, facts


def lines(found: Sequence[Run], measure: str) -> Lines:
  """The lines of methods along a measure, each with runs of two or more sizes; none if no two runs can be joined."""
  known = [run for run in found if run.facts.get(measure)]
  if measure == "unique_pairs":
    known = _last(known)
  for fixed in MEASURES[measure][1]:
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in known:
      groups.setdefault((run.method, *(run.facts.get(name) for name in fixed)), []).append(run)
    groups = {key: own for key, own in groups.items() if len({run.facts[measure] for run in own}) > 1}
    if groups:
      return {_label(key, fixed, groups): own for key, own in groups.items()}
  return {}


def _last(found: Sequence[Run]) -> list[Run]:
  """Of several checkpoints of a run the last one."""
  last: dict[tuple[Any, ...], Run] = {}
  for run in found:
    data = run.facts.get("data")
    key = (run.name, run.method, run.facts.get("seed"), run.facts.get("parameters"), str(data))
    if key not in last or run.facts.get("pairs_seen", 0) > last[key].facts.get("pairs_seen", 0):
      last[key] = run
  return [*last.values()]


def _label(key: tuple[Any, ...], fixed: Sequence[str], groups: Mapping[tuple[Any, ...], Sequence[Run]]) -> str:
  """The method, or what the names of its runs begin with if it has variants; and what else tells its lines apart."""
  method = key[0]
  variants = {other[0] for other in groups if other[0][0] == method[0]}
  names = [run.name for run in groups[key]]
  parts = [method[0] if len(variants) == 1 else os.path.commonprefix(names).rstrip("-_.0123456789") or method[0]]
  same = [other for other in groups if other[0] == method]
  for place, name in enumerate(fixed, 1):
    if len({other[place] for other in same}) > 1:
      parts.append(f"{charts.amount(key[place] or 0)} {_UNITS[name]}")
  return ", ".join(parts)


def _by_size(line: Sequence[Run], measure: str) -> dict[float, list[Run]]:
  """The runs of a line by size, increasing."""
  sizes: dict[float, list[Run]] = {}
  for run in sorted(line, key=lambda run: run.facts[measure]):
    sizes.setdefault(float(run.facts[measure]), []).append(run)
  return sizes


def _points(line: Sequence[Run], measure: str) -> Points:
  sizes = _by_size(line, measure)
  values = [np.array([run.score for run in own]) for own in sizes.values()]
  ends = [intervals.student(own) if len(own) > 1 else None for own in values]
  every = [(run.facts[measure], run.score) for run in line] if any(len(own) > 1 for own in values) else []
  return Points([*sizes], [float(own.mean()) for own in values], ends, every)


def efficiencies(report: Report) -> list[Needed]:
  """For every size of the reference method, the pairs at which the others reach its score.

  The reference is the method of the baseline, or that of the first run.
  """
  found = []
  drawn = scores(report)
  known = [items for _, items in drawn]
  for data_set, own_items in own_scores(report).items():
    drawn += [(f"{name}, {data_set}", items) for name, items in own_items if items not in known]
  for name, items in drawn:
    own = runs(report, items)
    if not own:
      continue
    of_baseline = {scored.result.model for scored in report.baseline.first} if report.baseline else ()
    reference = next((run.method for run in own if run.name in of_baseline), own[0].method)
    epochs = {
      round(run.facts["pairs_seen"] / run.facts["unique_pairs"], 2) for run in own if "unique_pairs" in run.facts
    }
    # After as many epochs each, both numbers of pairs say the same.
    for measure in ("unique_pairs",) if len(epochs) == 1 else ("pairs_seen", "unique_pairs"):
      every = lines(own, measure)
      for label, line in every.items():
        if line[0].method == reference:
          rest = {other: runs_of for other, runs_of in every.items() if runs_of[0].method != reference}
          found += _needed(name, measure, label, line, rest)
  return found


def _needed(name: str, measure: str, label: str, line: Sequence[Run], others: Lines) -> Iterator[Needed]:
  for other, own in others.items():
    sizes, table = _table(own, measure)
    for size, reference in _by_size(line, measure).items():
      target = np.array([run.score for run in reference])
      result = scaling.data_efficiency(np.array(sizes), table, size, target)
      best = float(table.mean(axis=0).max())
      yield Needed(name, measure, label, size, float(target.mean()), other, sizes, best, result)


def _table(line: Sequence[Run], measure: str) -> tuple[list[float], np.ndarray]:
  """Sizes, and scores with a row for each seed; a single row of means if the sizes do not have the same seeds."""
  sizes = _by_size(line, measure)
  by_seed = [{run.facts.get("seed"): run.score for run in own} for own in sizes.values()]
  seeds = set(by_seed[0])
  if all(set(own) == seeds and len(own) == len(runs_of) for own, runs_of in zip(by_seed, sizes.values(), strict=True)):
    return [*sizes], np.array([[own[seed] for own in by_seed] for seed in sorted(seeds, key=str)])
  return [*sizes], np.array([[np.mean([run.score for run in own]) for own in sizes.values()]])


def scores(report: Report) -> list[tuple[str, Items]]:
  """What is drawn: the mean over the data sets of each evaluator, and single ones where they are few."""
  found = []
  for kind in (kind for kind in _KINDS if kind in report.kinds):
    items = report.items(kind)
    if len(items) > 1:
      found.append((f"{title(kind)}, mean of {len(items)} data sets", items))
    if len(items) <= _MOST:
      found += [(f"{title(kind)}, {task}", [(task, metric)]) for task, metric in items]
  return found


def own_scores(report: Report) -> dict[str, list[tuple[str, Items]]]:
  """The scores of each data set that is not in the catalogue, and their mean."""
  found: dict[str, list[tuple[str, Items]]] = {}
  for kind, metrics in _OWN_METRICS.items():
    for task in report.of_kind(kind):
      if not task.dataset.startswith(catalogue.OWN):
        continue
      known = [metric for metric in metrics if metric in report.some(task).metrics]
      items = [(task, metric) for metric in known or report.metrics(task)[-1:]]
      metric = "recall at 10" if kind == "retrieval" and known else single_metrics(items)
      variants = len({other.variant for other in report.of_kind(kind) if other.dataset == task.dataset})
      variant = f" ({task.variant})" if variants > 1 else ""
      found.setdefault(task.dataset, []).append((f"{title(kind)}{variant}, {metric}", items))
  return {
    name: [
      *own,
      *([(f"Mean of these {len(own)}", [item for _, items in own for item in items])] if len(own) > 1 else []),
    ]
    for name, own in found.items()
  }


def growth(report: Report, pictures: Path) -> Iterator[Block]:
  """The section of scaling and data efficiency; nothing without runs of different sizes."""
  blocks: list[Block] = [*_own_curves(report, pictures)]
  for name, items in scores(report):
    own = runs(report, items)
    drawn = {measure: found for measure in MEASURES if (found := lines(own, measure))}
    if drawn:
      blocks += _curves(name, single_metrics(items), drawn, pictures)
      blocks += _laws(name, drawn, pictures)
  if not blocks:
    return
  yield Heading("Scaling and data efficiency")
  yield (
    "Training FLOPs are those of the matrix products of the model in all train steps, forward and backward. Pairs seen "
    "are the examples of all batches; different pairs are those of the training data, as far as they were seen. A "
    "point is the mean over runs that differ only in their seed, with its 95 % interval by Student's t; points "
    "without a bar are single runs."
  )
  if twice := [*_twice(report)]:
    yield Listing(twice)
  yield from _efficiency(report)
  yield from blocks


def _curves(name: str, score: str, drawn: Mapping[str, Lines], pictures: Path) -> Iterator[Block]:
  panels = [
    Growth(MEASURES[measure][0], score, {label: _points(line, measure) for label, line in found.items()})
    for measure, found in drawn.items()
  ]
  path = pictures / f"{results.slug(f'scaling_{name}')}.png"
  charts.plot_growth(panels, f"{name}: score against size of training", path)
  yield Picture(path, f"{name}: {score} against {', '.join(panel.measure for panel in panels)}")


def _own_curves(report: Report, pictures: Path) -> Iterator[Block]:
  """All scores of a data set that is not in the catalogue, against pairs, in one picture."""
  name, measure = MEASURES["unique_pairs"][0], "unique_pairs"
  for data_set, own in own_scores(report).items():
    panels = [
      Growth(name, score, {label: _points(line, measure) for label, line in found.items()})
      for score, items in own
      if (found := lines(runs(report, items), measure))
    ]
    if panels:
      path = pictures / f"{results.slug(f'scaling_{data_set}')}.png"
      charts.plot_growth(panels, f"{data_set}: scores against {name}", path)
      yield Picture(path, f"{data_set}: scores against {name}")


def laws(found: Lines, measure: str) -> dict[str, tuple[PowerLaw, np.ndarray, np.ndarray]]:
  """Power laws of the errors of lines with three or more sizes, with sizes and errors."""
  fitted = {}
  for label, line in found.items():
    x = np.array([run.facts[measure] for run in line], float)
    error = np.array([1 - run.score for run in line])
    if len({*x.tolist()}) > 2 and (error > 0).all():
      fitted[label] = scaling.fit_power_law(x, error), x, error
  return fitted


def _laws(name: str, drawn: Mapping[str, Lines], pictures: Path) -> Iterator[Block]:
  """Power laws of the error for the first measure that has them."""
  for measure, found in drawn.items():
    fitted = laws(found, measure)
    if not fitted:
      continue
    best = _frontier(fitted)
    path = pictures / f"{results.slug(f'law_{name}')}.png"
    shown = {
      label: Law(x.tolist(), error.tolist(), law.predict, law.band, best[label])
      for label, (law, x, error) in fitted.items()
    }
    words = MEASURES[measure][0]
    charts.plot_laws(shown, words, f"{name}: error against {words}", path)
    yield Picture(
      path,
      f"{name}: error against {words} on logarithmic scales, lines fitted by least squares with their 95 % bands, and "
      "relative residuals below; rings: no run has a smaller error at the same size or a smaller one",
    )
    rows = [_law(label, law, x, error) for label, (law, x, error) in fitted.items()]
    header = ("method", "runs", "exponent", "R²", f"factor of {words} for half the error", "error that remains")
    yield Table(header, rows)
    return


def _frontier(fitted: Mapping[str, tuple[PowerLaw, np.ndarray, np.ndarray]]) -> dict[str, list[int]]:
  """The positions in each line of the runs that are on the frontier of all."""
  every = [(label, place) for label, (_, x, _) in fitted.items() for place in range(len(x))]
  x, error = (np.concatenate([own[side] for own in fitted.values()]) for side in (1, 2))
  chosen = [every[index] for index in scaling.frontier(x, error).tolist()]
  return {label: [place for own, place in chosen if own == label] for label in fitted}


def _law(label: str, law: PowerLaw, x: np.ndarray, error: np.ndarray) -> tuple[str, ...]:
  factor, floor = law.factor(0.5), ""
  if law.slope < 0 and len({*x.tolist()}) >= _FOR_FLOOR:
    floor = f"{100 * scaling.fit_saturating_law(x, error).floor:.1f} %"
  exponent = f"{law.slope:.3f} [{law.slope_interval.lower:.3f}, {law.slope_interval.upper:.3f}]"
  return label, str(len(x)), exponent, f"{law.r2:.3f}", "never" if factor is None else f"{factor:.3g}", floor


def _twice(report: Report) -> Iterator[str]:
  """Runs that are not seeds of each other although they have the same method, sizes and seed."""
  seen: dict[tuple[Any, ...], str] = {}
  for _, first, facts in _trained(report):
    if "seed" not in facts:
      continue
    key, name = (
      tuple(str(facts.get(name)) for name in ("method", "recipe", "seed", "data", *MEASURES)),
      first.result.model,
    )
    if key in seen:
      yield f"{seen[key]} and {name} have the same method, size, data and seed; both count as runs of one point."
    seen.setdefault(key, name)


def _efficiency(report: Report) -> Iterator[Block]:
  found = efficiencies(report)
  if not found:
    return
  yield Heading("Data efficiency", 3)
  yield (
    "How many pairs a method needs to reach the score of another one, interpolated between its runs in the logarithm "
    "of pairs. The factor is by how many times these are fewer; its 95 % interval resamples the seeds of both methods, "
    "so it needs two or more of each."
  )
  rows, before = [], ("", "")
  for own in found:
    first = own.score, MEASURES[own.measure][0]
    reference = f"{own.reference}: {100 * own.target:.1f} at {charts.amount(own.size)}"
    rows.append([*(("", "") if first == before else first), reference, own.method, _reached(own), *_factor(own)])
    before = first
  header = (
    "score",
    "counted",
    "score to reach",
    "method",
    "pairs at which it does",
    "factor",
    "interval of the factor",
  )
  yield Table(header, rows, texts=4)


def _reached(own: Needed) -> str:
  """The pairs, or why there is no number."""
  if own.found.pairs is not None:
    return charts.amount(own.found.pairs)
  if own.best < own.target:
    return f"not reached (at most {100 * own.best:.1f})"
  return f"fewer than {charts.amount(own.sizes[0])}, its smallest run"


def _factor(own: Needed) -> tuple[str, str]:
  """The factor and its interval, or what is known of them where the score is outside of those that were measured."""
  most, least = own.size / own.sizes[0], own.size / own.sizes[-1]
  before = own.found.pairs is None and own.best >= own.target  # reached before the first measurement
  after = own.found.pairs is None and not before
  value = f"more than {most:.2f}" if before else f"less than {least:.2f}" if after else f"{own.found.factor:.2f}"
  if own.found.interval is None or own.found.interval == (None, None):
    return value, ""
  lower, upper = own.found.interval
  low = f"more than {most:.2f}" if before else "not reached"
  high = f"less than {least:.2f}" if after else f"more than {most:.2f}"
  return value, f"[{low if lower is None else f'{lower:.2f}'}, {high if upper is None else f'{upper:.2f}'}]"
