"""The tables of a report, one for each evaluator, with their charts and examples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
import shutil

import numpy as np

from declip_jax.evals import few_shot as few_shot_lib
from declip_jax.evals import results
from declip_jax.evals.comparison import Cell, Scored, Task, cell
from declip_jax.evals.report.compared import MANY, Report, metric_name, percent, points, prompts_name, share, title
from declip_jax.evals.report.groups import groups
from declip_jax.evals.report.header import protocol
from declip_jax.reporting import charts
from declip_jax.reporting.documents import Block, Heading, Picture, Table

_WORST = 10  # classes and confusions in a table
_WORDS = {"paired": "a bootstrap of the same test images", "Welch": "Welch's test over seeds"}


def scores(report: Report, kind: str, pictures: Path) -> Iterator[Block]:
  """All that the report has of an evaluator.

  Args:
    report: the report.
    kind: the evaluator.
    pictures: folder to draw in.
  """
  yield Heading(title(kind))
  yield from protocol(report, kind)
  yield _table(report, kind)
  if len(report.methods) > MANY:
    yield f"Curves and examples are those of {', '.join(method.label for method in report.detailed)}."
  yield from _differences(report, kind, pictures)
  yield from groups(report, kind)
  yield from _SECTIONS.get(kind, lambda report, pictures: iter(()))(report, pictures)


def _table(report: Report, kind: str) -> Table:
  """A row for each data set and metric, with columns of methods; of many methods, each has a row instead."""
  marks, rows, baseline = report.marks(kind), [], report.baseline
  several = len(report.methods) > MANY
  for task in report.of_kind(kind):
    some = report.some(task)
    for metric in report.metrics(task):
      headline = metric == some.headline
      chance = some.about.get("chance") if headline else None
      majority = some.metrics.get("majority_share") if headline else None
      about = [share(chance), share(majority), f"{some.examples:,}" if headline else ""]
      found = report.differences(task, metric)
      texts = [points(found.get(label), marks.get((task, metric, label), "")) for label in report.labels]
      cells, name = _cells(report, task, metric), [str(task), metric_name(metric)]
      if several:
        parts = zip(report.labels, cells, texts, strict=True)
        rows += [[*name, label, score, text, *about] for label, score, text in parts if score]
      else:
        chosen = [text for text, method in zip(texts, report.methods, strict=True) if method in report.others]
        rows.append([*name, *cells, *(chosen if baseline else []), *about])
  labels = [f"{method.label} minus {baseline.label}" for method in report.others] if baseline else []
  if several:
    labels = [f"minus {baseline.label}" if baseline else ""]
  names = ["method", "score", *labels] if several else [*report.labels, *labels]
  header = ["data set", "metric", *names, "chance", "most frequent class", "images"]
  used = [column for column in range(len(header)) if column < 2 or any(row[column] for row in rows)]
  table = [[row[column] for column in used] for row in rows]
  return Table([header[column] for column in used], table, texts=3 if several else 2)


def _cells(report: Report, task: Task, metric: str) -> list[str]:
  """Scores as text; the best is bold if its difference from every other one is significant."""
  cells: list[Cell | None] = [cell(method.of(task), metric) for method in report.methods]
  texts = [percent(own) for own in cells]
  known = [index for index, own in enumerate(cells) if own is not None]
  if len(known) < 2:
    return texts
  best = max(known, key=lambda index: cells[index].value)  # pyrefly: ignore[missing-attribute]
  own = report.methods[best]
  found = [report.difference(own, report.methods[other], task, metric) for other in known if other != best]
  if all(one is not None and one.is_significant for one in found):
    texts[best] = f"**{texts[best]}**"
  return texts


def _differences(report: Report, kind: str, pictures: Path) -> Iterator[Block]:
  """A chart of the differences of each method from the baseline, if there are several."""
  if report.baseline is None:
    return
  tests: set[str] = set()
  for method in (method for method in report.detailed if method is not report.baseline):
    values = {}
    for task in report.of_kind(kind):
      shown = report.metrics(task) if kind == "retrieval" else [report.some(task).headline]
      for metric in shown:
        own = report.differences(task, metric).get(method.label)
        if own is not None:
          name = str(task) if len(shown) == 1 else f"{task}: {metric_name(metric)}"
          values[name] = (own.value, own.interval)
          tests |= {own.test} - {""}
    if len(values) > 1:
      path = pictures / f"{results.slug(f'{kind}_{method.label}_minus_{report.baseline.label}')}.png"
      text = f"{title(kind)}: {method.label} minus {report.baseline.label}"
      charts.plot_differences(values, text, path)
      by = f"; intervals by {' or '.join(_WORDS[test] for test in sorted(tests))}" if tests else ""
      yield Picture(path, f"{text}, in points{by}")


def _few_shot(report: Report, pictures: Path) -> Iterator[Block]:
  for task in report.of_kind("few_shot"):
    curves = {method.label: _few_shot_curve(own) for method in report.detailed if (own := method.of(task))}
    some = report.some(task)
    metric = some.details.get("metric") or "top1"
    zero_shot = _zero_shot_scores(report, task.dataset, metric)
    first, several = next(iter(zero_shot), ""), len(zero_shot) > 1
    path = pictures / f"{results.slug(f'few_shot_{task}')}.png"
    what = f"Few shots on {task}, {some.details['method']} regression"
    dots = {label: score.value for label, score in zero_shot.get(first, {}).items() if label in curves}
    charts.plot_few_shot(curves, dots, what, path, metric_name(metric))
    by = f", with {prompts_name(first)}" if several else ""
    yield Picture(path, f"{what}; the dotted lines are zero-shot scores{by}")
    rows = []
    for prompts, own in zero_shot.items():
      for label, curve in curves.items():
        if label in own:
          named = [prompts_name(prompts)] if several else []
          rows.append([label, *named, percent(own[label]), _reached(curve, own[label].value)])
    if rows:
      yield f"Images per class of {task} with which the classifier is as good as zero-shot classification:"
      yield Table(["method", *(["prompts"] if several else []), "zero-shot", "images per class"], rows, 1 + several)


def _zero_shot_scores(report: Report, dataset: str, metric: str) -> dict[str, dict[str, Cell]]:
  """The zero-shot scores of a data set by prompt set and method; prompt sets without any are left out."""
  found = {}
  for prompts, task in report.protocols("zero_shot").get(dataset, {}).items():
    own = {method.label: cell(method.of(task), metric) for method in report.methods}
    found[prompts] = {label: score for label, score in own.items() if score is not None}
  return {prompts: own for prompts, own in found.items() if own}


def _reached(curve: Mapping[int, tuple[float, float]], value: float) -> str:
  """The number of images per class with which a score is reached, in words."""
  shots = sorted(curve)
  needed = few_shot_lib.crossing(shots, np.array([curve[count][0] for count in shots]), value)
  return "not reached" if needed is None else _at_most(needed, shots[0])


def _at_most(needed: float, smallest: int) -> str:
  return f"at most {smallest}" if needed <= smallest else f"{needed:.1f}"


def _few_shot_curve(scored: Sequence[Scored]) -> dict[int, tuple[float, float]]:
  """Mean and standard deviation by the number of shots; over the runs of a method, the means of both."""
  curve = {}
  for name in scored[0].metrics:
    if name.startswith("shots_"):
      value = float(np.mean([one.metrics[name] for one in scored if name in one.metrics]))
      spread = float(np.mean([one.details["std"].get(name, 0.0) for one in scored]))
      curve[int(name.removeprefix("shots_"))] = value, spread
  return curve


def _linear_probe(report: Report, pictures: Path) -> Iterator[Block]:
  """The sweeps, and a remark on those whose chosen fit did not converge."""
  stopped = [
    f"{scored.result.model} on {scored.result.dataset}"
    for scored in report.scored
    if scored.result.ours["kind"] == "linear_probe" and not scored.details.get("converged", True)
  ]
  if stopped:
    yield f"The chosen fit stopped before it converged: {', '.join(stopped)}."
  for task in report.of_kind("linear_probe"):
    curves = {}
    for method in report.detailed:
      for scored in method.of(task)[:1]:
        fits = [fit for fit in scored.details.get("fits", ()) if fit.get("score") is not None]
        if fits:
          strengths, values = zip(*((fit["strength"], fit["score"]) for fit in fits), strict=True)
          curves[method.label] = strengths, values, scored.details["strength"]
    if curves:
      path = pictures / f"{results.slug(f'sweep_{task}')}.png"
      charts.plot_sweep(curves, f"Linear probes on {task}: choice of C", path)
      yield Picture(path, f"Score of linear probes on the validation split of {task} by their C; rings: the chosen C")


def _zero_shot(report: Report, pictures: Path) -> Iterator[Block]:
  """The classes with the lowest accuracy, and the most frequent confusions of each method, with examples."""
  for task in report.of_kind("zero_shot"):
    worst, confused = {}, {}
    for method in report.detailed:
      for scored in method.of(task)[:1]:
        classes = sorted(scored.details.get("accuracy_by_class", ()), key=lambda pair: pair[1])[:_WORST]
        pairs = scored.details.get("confusions", ())[:_WORST]
        worst[method.label] = [f"{name}: {100 * value:.1f}" for name, value in classes]
        confused[method.label] = [f"{true} as {answer}: {count:,}" for true, answer, count in pairs]
    if any(worst.values()):
      yield Heading(f"Classes of {task} with the lowest accuracy, in percent", 3)
      yield _ranking(worst)
    if any(confused.values()):
      yield Heading(f"Most frequent confusions on {task}, with their number of images", 3)
      yield _ranking(confused)
    yield from _examples(report, task, pictures, "Images of the most frequent confusions of {} on {}")


def _ranking(columns: Mapping[str, Sequence[str]]) -> Table:
  """Lists side by side, one per method."""
  longest = max(map(len, columns.values()))
  rows = [
    (str(rank + 1), *(own[rank] if rank < len(own) else "" for own in columns.values())) for rank in range(longest)
  ]
  return Table(("rank", *columns), rows, texts=1 + len(columns))


def _retrieval(report: Report, pictures: Path) -> Iterator[Block]:
  for task in report.of_kind("retrieval"):
    text = "Images that {} finds for texts of {}, the most similar first; a solid frame: right, a dashed one: wrong"
    yield from _examples(report, task, pictures, text)


def _examples(report: Report, task: Task, pictures: Path, text: str) -> Iterator[Block]:
  """Copies the picture that an evaluation has drawn, of the first run of each method."""
  for method in report.detailed:
    for scored in method.of(task)[:1]:
      drawn = results.picture_path(scored.path)
      if drawn.exists():
        path = pictures / f"{results.slug(f'{task.kind}_{task}_{method.label}')}_examples.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(drawn, path)
        yield Picture(path, text.format(method.label, task))


_SECTIONS: Mapping[str, Callable[[Report, Path], Iterator[Block]]] = {
  "few_shot": _few_shot,
  "linear_probe": _linear_probe,
  "retrieval": _retrieval,
  "zero_shot": _zero_shot,
}
