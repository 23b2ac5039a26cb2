"""The report of evaluations: what methods score, which differences are supported, and pictures of both."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import csv
from dataclasses import dataclass, field
import io
import json
from pathlib import Path
import shutil
from typing import Any

import numpy as np

from declip_jax.evals import catalogue, results, robustness
from declip_jax.evals.comparison import (
  Cell,
  Difference,
  Method,
  Scored,
  Task,
  adjusted,
  cell,
  difference,
  suite_means,
  tasks,
)
from declip_jax.reporting import charts
from declip_jax.reporting.documents import Block, Heading, Picture, Table

TITLES = {
  "zero_shot": "Zero-shot classification",
  "retrieval": "Retrieval",
  "composition": "Composition",
  "linear_probe": "Linear probe",
  "sgd_probe": "Linear probe by gradient descent",
  "few_shot": "Few shots",
  "knn": "Nearest neighbours",
  "nearest_mean": "Nearest class mean",
}
_RETRIEVAL = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
_WORST = 10  # confusions in a table
_WORDS = {
  "paired": "a bootstrap of the same test images",
  "Welch": "Welch's test over seeds",
}


@dataclass(frozen=True)
class Report:
  """What a report compares.

  Attributes:
    methods: methods, in the order of columns.
    baseline: the method with which the others are compared, None for none.
    shifts: for the key of a data set, the keys of the same task under a distribution shift.
    standard: models with standard training, whose line gives the expected accuracy under `shifts`.
    overlaps: working directories of `declip_jax.overlap`.
  """

  methods: Sequence[Method]
  baseline: Method | None = None
  shifts: Mapping[str, Sequence[str]] = field(default_factory=dict)
  standard: Sequence[Method] = ()
  overlaps: Sequence[Path] = ()

  @property
  def tasks(self) -> list[Task]:
    """All tasks with a result."""
    return tasks(self.methods)

  @property
  def others(self) -> list[Method]:
    """The methods that are compared with the baseline."""
    return [method for method in self.methods if method is not self.baseline]


def document(report: Report, folder: Path, published: Sequence[Sequence[str]] = ()) -> list[Block]:
  """The blocks of the report; draws its pictures.

  Args:
    report: what to compare.
    folder: folder of the report, whose folder `pictures` receives the pictures.
    published: rows of a table of published results: name, protocol, top-1 accuracy on ImageNet in percent.

  Raises:
    ValueError: methods have been evaluated on different data under one name.
  """
  pictures = folder / "pictures"
  blocks: list[Block] = [Heading("Evaluation", 1), *_header(report)]
  blocks += _suites(report)
  for kind in dict.fromkeys(task.kind for task in report.tasks):
    blocks += [Heading(TITLES.get(kind, kind.replace("_", " "))), *_protocol(report, kind)]
    blocks += _scores(report, kind)
    blocks += _differences(report, kind, pictures)
    blocks += _SECTIONS.get(kind, lambda report, pictures: [])(report, pictures)
  blocks += _shifts(report, pictures)
  blocks += _overlaps(report, pictures)
  if published and any(scored.key == "imagenet" for scored in _all(report)):
    header = ("published model", "protocol", "ImageNet top-1, %")
    blocks += [Heading("Published results"), "As printed in the papers, for comparison:", Table(header, published)]
  return [*blocks, *_cost(report)]


def to_csv(report: Report) -> str:
  """All results as a table with one row each, as `clip_benchmark build` writes it."""
  rows = []
  for scored in _all(report):
    result = scored.result
    first = {"dataset": result.dataset, "model": result.model, "pretrained": result.pretrained, "task": result.task}
    full = {"language": results.LANGUAGE, "model_fullname": f"{result.model} {result.pretrained}"}
    rows.append({**first, **full, **result.metrics})
  names = list(dict.fromkeys(name for row in rows for name in row))
  file = io.StringIO()
  writer = csv.DictWriter(file, [*names[:6], *sorted(names[6:])], lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return file.getvalue()


def to_json(report: Report) -> str:
  """All scores and differences of the report, as fractions."""
  lines = []
  for task in report.tasks:
    for metric in _metrics(report, task):
      line: dict[str, Any] = {**task._asdict(), "metric": metric, "methods": {}}
      for method in report.methods:
        if (found := cell(method.of(task), metric)) is not None:
          line["methods"][method.label] = found._asdict()
      line["differences"] = {label: own._asdict() for label, own in _differences_of(report, task, metric).items()}
      lines.append(line)
  content = {"baseline": report.baseline and report.baseline.label, "scores": lines}
  return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _all(report: Report) -> list[Scored]:
  return [run[task] for method in report.methods for run in method.runs for task in sorted(run)]


def _header(report: Report) -> Iterator[Block]:
  rows = []
  for method in report.methods:
    weights = [next(iter(run.values())).result.ours["weights"] for run in method.runs]
    steps = ", ".join(dict.fromkeys(str(own["step"]) for own in weights if own["step"] is not None))
    rows.append((method.label, str(len(method.runs)), weights[0]["origin"], steps or "-"))
  yield Table(("method", "runs", "weights", "step"), rows)
  yield (
    "Scores are in percent. Brackets are 95 % intervals: of one run those due to the choice of the test images, of "
    "several runs those of their mean, by Student's t over random seeds."
  )
  if report.baseline is not None:
    yield (
      f"Differences are points above **{report.baseline.label}**. A star marks those whose 95 % interval excludes 0, "
      "two stars those that also remain after Holm's adjustment for the number of data sets in the table."
    )


def _suites(report: Report) -> Iterator[Block]:
  """Means over the data sets of suites, for which a method has all results."""
  rows = []
  for suite in catalogue.suites().values():
    for kind in ("zero_shot", "linear_probe"):
      for mean, keys in suite.means.items():
        found = suite_means(report.methods, keys, kind, suite.metric)
        if any(own is not None for own in found):
          name = suite.name if mean == "mean" else f"{suite.name}: {mean}"
          rows.append((f"{name} ({len(keys)} sets, {TITLES[kind].lower()})", *map(_percent, found)))
  if rows:
    yield Heading("Means of suites")
    yield Table(("suite", *(method.label for method in report.methods)), rows)


def _protocol(report: Report, kind: str) -> Iterator[str]:
  """What a reader needs to know about how scores of an evaluator were made."""
  own = [scored for scored in _all(report) if scored.result.ours["kind"] == kind]
  options = {json.dumps(scored.result.ours["options"], sort_keys=True) for scored in own} - {"{}"}
  prompts = sorted({scored.result.ours.get("about", {}).get("prompts", "") for scored in own} - {""})
  if prompts and kind == "zero_shot":
    yield f"Prompts: {', '.join(prompts)}."
  if options:
    yield f"Options: {'; '.join(f'`{text}`' for text in sorted(options))}."


def _scores(report: Report, kind: str) -> Iterator[Block]:
  header = ["data set", "metric", *(method.label for method in report.methods)]
  baseline = report.baseline
  if baseline is not None:
    header += [f"{method.label} - {baseline.label}" for method in report.others]
  header += ["chance", "majority", "n"]
  rows = []
  chosen = [task for task in report.tasks if task.kind == kind]
  marks = _marks(report, chosen)
  for task in chosen:
    for metric in _metrics(report, task):
      some = next(scored for method in report.methods for scored in method.of(task))
      cells = [cell(method.of(task), metric) for method in report.methods]
      row = [str(task), metric, *_bold(report, task, metric, cells)]
      if baseline is not None:
        found = _differences_of(report, task, metric)
        labels = [method.label for method in report.others]
        row += [_points(found.get(label), marks.get((task, metric, label), "")) for label in labels]
      headline = metric == some.headline
      chance = some.result.ours.get("about", {}).get("chance") if headline else None
      majority = some.metrics.get("majority_share") if headline else None
      rows.append([*row, _share(chance), _share(majority), f"{some.metrics.get('images', 0):,}" if headline else ""])
  if rows:
    yield Table(header, rows)


def _metrics(report: Report, task: Task) -> list[str]:
  """The metrics of a task that a table shows."""
  some = next(scored for method in report.methods for scored in method.of(task))
  if task.kind == "retrieval":
    return list(dict.fromkeys([some.headline, *(name for name in _RETRIEVAL if name in some.metrics)]))
  if task.kind == "few_shot":
    return sorted((name for name in some.metrics if name.startswith("shots_")), key=lambda name: int(name[6:]))
  return [some.headline]


def _differences_of(report: Report, task: Task, metric: str) -> dict[str, Difference]:
  """The difference of each method from the baseline, by label; methods without a result are left out."""
  if report.baseline is None:
    return {}
  found = {method.label: difference(method.of(task), report.baseline.of(task), metric) for method in report.others}
  return {label: own for label, own in found.items() if own is not None}


def _marks(report: Report, chosen: Sequence[Task]) -> dict[tuple[Task, str, str], str]:
  """One star for each difference that its interval supports, two if it remains after Holm's adjustment."""
  found = {
    (task, metric, label): own
    for task in chosen
    for metric in _metrics(report, task)
    for label, own in _differences_of(report, task, metric).items()
  }
  p = adjusted(found)
  return {name: "**"[: 1 + (p[name] < 0.05)] for name, own in found.items() if own.is_significant}


def _bold(report: Report, task: Task, metric: str, cells: Sequence[Cell | None]) -> list[str]:
  """Cells as text; the best of two or more methods is bold if it differs from the baseline beyond its interval."""
  texts = [_percent(own) for own in cells]
  known = [own.value for own in cells if own is not None]
  if report.baseline is None or len(known) < 2:
    return texts
  best = max(range(len(cells)), key=lambda index: -np.inf if cells[index] is None else cells[index].value)
  found = _differences_of(report, task, metric)
  label = report.methods[best].label
  significant = [own.is_significant for name, own in found.items() if name == label or label == report.baseline.label]
  if significant and all(significant):
    texts[best] = f"**{texts[best]}**"
  return texts


def _differences(report: Report, kind: str, pictures: Path) -> Iterator[Block]:
  """A chart of the differences of each method from the baseline, if there are several data sets."""
  if report.baseline is None:
    return
  chosen = [task for task in report.tasks if task.kind == kind]
  for method in report.others:
    values = {}
    for task in chosen:
      for metric in _metrics(report, task):
        own = _differences_of(report, task, metric).get(method.label)
        if own is not None:
          name = str(task) if len(_metrics(report, task)) == 1 else f"{task} {metric}"
          values[name] = (own.value, own.interval)
    if len(values) > 1:
      tests = {
        own.test
        for task in chosen
        for m in _metrics(report, task)
        for own in _differences_of(report, task, m).values()
        if own.test
      }
      path = pictures / f"{results.slug(f'{kind}_{method.label}_minus_{report.baseline.label}')}.png"
      title = f"{TITLES.get(kind, kind)}: {method.label} minus {report.baseline.label}"
      charts.plot_differences(values, title, path)
      by = f", by {' or '.join(_WORDS[test] for test in sorted(tests))}" if tests else ""
      yield Picture(path, f"{title}{by}")


def _few_shot(report: Report, pictures: Path) -> Iterator[Block]:
  for task in report.tasks:
    if task.kind != "few_shot":
      continue
    curves, zero_shot = {}, {}
    for method in report.methods:
      if scored := method.of(task):
        curves[method.label] = _few_shot_curve(scored)
        at = cell(method.of(Task(task.dataset, "zero_shot", "")), scored[0].details.get("metric", "top1"))
        if at is not None:
          zero_shot[method.label] = at.value
    path = pictures / f"{results.slug(f'few_shot_{task}')}.png"
    some = next(scored for method in report.methods for scored in method.of(task))
    charts.plot_few_shot(curves, zero_shot, f"{task}: {some.details['method']} regression", path)
    yield Picture(path, f"Few shots on {task}; a star is zero-shot accuracy")


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
    for scored in _all(report)
    if scored.result.ours["kind"] == "linear_probe" and not scored.details.get("converged", True)
  ]
  if stopped:
    yield f"The chosen fit stopped before it converged: {', '.join(stopped)}."
  for task in report.tasks:
    if task.kind != "linear_probe":
      continue
    curves = {}
    for method in report.methods:
      for scored in method.of(task)[:1]:
        fits = [fit for fit in scored.details.get("fits", ()) if fit.get("score") is not None]
        if fits:
          strengths, scores = zip(*((fit["strength"], fit["score"]) for fit in fits), strict=True)
          curves[method.label] = strengths, scores, scored.details["strength"]
    if curves:
      path = pictures / f"{results.slug(f'sweep_{task}')}.png"
      charts.plot_sweep(curves, f"{task}: score on the validation split", path)
      yield Picture(path, f"Linear probes on {task}")


def _zero_shot(report: Report, pictures: Path) -> Iterator[Block]:
  """The most frequent confusions of each method."""
  del pictures
  for task in report.tasks:
    if task.kind != "zero_shot":
      continue
    columns = {}
    for method in report.methods:
      for scored in method.of(task)[:1]:
        if confusions := scored.details.get("confusions"):
          columns[method.label] = [f"{true} as {answer} ({count})" for true, answer, count in confusions[:_WORST]]
    if columns:
      yield Heading(f"Most frequent confusions on {task}", 3)
      longest = max(map(len, columns.values()))
      rows = [
        (str(rank + 1), *(own[rank] if rank < len(own) else "" for own in columns.values())) for rank in range(longest)
      ]
      yield Table(("", *columns), rows)


_SECTIONS: Mapping[str, Callable[[Report, Path], Iterator[Block]]] = {
  "few_shot": _few_shot,
  "linear_probe": _linear_probe,
  "zero_shot": _zero_shot,
}


def _shifts(report: Report, pictures: Path) -> Iterator[Block]:
  """Accuracy under distribution shift, and effective robustness where models with standard training are known."""
  known = {
    source: [key for key, of in robustness.WITHOUT_SHIFT.items() if of == source]
    for source in dict.fromkeys(robustness.WITHOUT_SHIFT.values())
  }
  blocks: list[Block] = []
  for source, keys in {**known, **report.shifts}.items():
    for kind in ("zero_shot", "linear_probe"):
      blocks += _shift(report, source, keys, kind, pictures)
  if blocks:
    yield Heading("Robustness to distribution shift")
    yield (
      "Effective robustness (Taori et al. 2020) is the accuracy under shift minus the accuracy that a model with "
      "standard training and the same accuracy without shift is expected to have, in points."
    )
    yield from blocks


def _shift(report: Report, source: str, keys: Sequence[str], kind: str, pictures: Path) -> Iterator[Block]:
  own = {method.label: _by_key(method, kind) for method in report.methods}
  own = {label: found for label, found in own.items() if source in found and any(key in found for key in keys)}
  if not own:
    return
  present = [key for key in keys if any(key in found for found in own.values())]
  rows = []
  for label, found in own.items():
    row = [label, _percent(found[source])]
    for key in present:
      row += [_percent(found.get(key)), _effective(report, source, key, kind, found)]
    shifted = [found[key].value for key in present if key in found]
    rows.append([*row, _share(float(np.mean(shifted))) if len(shifted) == len(present) else ""])
  header = ["method", source, *(text for key in present for text in (key, "effective")), "mean under shift"]
  yield Heading(f"From {source}, {TITLES[kind].lower()}", 3)
  yield Table(header, rows)
  bars = {
    label: {key: (found[key].value, found[key].interval) for key in (source, *present) if key in found}
    for label, found in own.items()
  }
  path = pictures / f"{results.slug(f'shift_{source}_{kind}')}.png"
  charts.plot_scores(bars, f"{source} and its shifts, {TITLES[kind].lower()}", path)
  yield Picture(path, f"Accuracy on {source} and under shift")
  for key in present:
    points = {label: (found[source].value, found[key].value) for label, found in own.items() if key in found}
    path = pictures / f"{results.slug(f'robustness_{source}_{key}_{kind}')}.png"
    yield from _robustness(report, source, key, kind, points, path)


def _robustness(
  report: Report, source: str, key: str, kind: str, points: Mapping[str, tuple[float, float]], path: Path
) -> Iterator[Block]:
  """The chart of one shift, with the line of models with standard training."""
  standard = _standard(report, source, key, kind)
  if standard is None:
    return
  line = robustness.fit_line(*standard)
  charts.plot_robustness(
    points,
    f"{key} against {source}",
    path,
    standard=standard,
    expected=line.expected,
    band=lambda at: robustness.band(*standard, at)[:2],
  )
  yield Picture(path, f"Accuracy on {key} against {source}; the line is fitted to {line.models} models")


def _effective(report: Report, source: str, key: str, kind: str, found: Mapping[str, Cell]) -> str:
  """Effective robustness in points; in parentheses if the expectation is an extrapolation."""
  standard = _standard(report, source, key, kind)
  if standard is None or key not in found:
    return ""
  line = robustness.fit_line(*standard)
  text = f"{100 * float(line.effective_robustness(found[source].value, found[key].value)):+.1f}"
  return f"({text})" if line.extrapolated(found[source].value) else text


def _standard(report: Report, source: str, key: str, kind: str) -> tuple[np.ndarray, np.ndarray] | None:
  """Accuracies without and under shift of models with standard training; None if there are fewer than three."""
  own = [_by_key(method, kind) for method in report.standard]
  pairs = [(found[source].value, found[key].value) for found in own if source in found and key in found]
  pairs = [pair for pair in pairs if min(pair) > 0 and max(pair) < 1]
  if len({x for x, _ in pairs}) > 2:
    return tuple(np.array(side) for side in zip(*pairs, strict=True))
  if robustness.WITHOUT_SHIFT.get(key) == source:
    return tuple(robustness.baseline(key)[1:])
  return None


def _by_key(method: Method, kind: str) -> dict[str, Cell]:
  """The headline score of an evaluator on each data set of the catalogue."""
  found = {}
  for task in dict.fromkeys(task for run in method.runs for task in run):
    scored = method.of(task)
    if task.kind == kind and not task.variant and scored[0].key:
      found[scored[0].key] = cell(scored, scored[0].headline)
  return found


def _overlaps(report: Report, pictures: Path) -> Iterator[Block]:
  """Evaluation images that have near-duplicates among training images.

  Raises:
    FileNotFoundError: a folder is not one of `declip_jax.overlap`.
  """
  rows, sheets = [], []
  for folder in report.overlaps:
    about = json.loads((folder / "overlap.json").read_text())
    share = f"{about['overlap']:,} ({100 * about['contamination']:.1f} %)"
    rows.append((about["test"], about["train"] or "itself", f"{about['images']:,}", f"{about['threshold']:.3f}", share))
    if (folder / "overlap.png").exists():
      sheets.append(Picture(pictures / f"{results.slug(f'overlap_{folder.name}')}.png", f"Pairs of {about['test']}"))
      sheets[-1].path.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(folder / "overlap.png", sheets[-1].path)
  if rows:
    yield Heading("Overlap of training and evaluation data")
    yield Table(("evaluation images", "training images", "n", "threshold", "near-duplicates"), rows)
    yield from sheets


def _cost(report: Report) -> Iterator[Block]:
  """Seconds of each evaluation, as far as the logs beside the results have them."""
  rows = []
  for method in report.methods:
    for run in method.runs:
      seconds = {}
      for folder in dict.fromkeys(scored.path.parent for scored in run.values()):
        seconds |= _seconds(folder / results.LOG)
      known = [seconds[scored.path.name] for scored in run.values() if scored.path.name in seconds]
      if known:
        rows.append((next(iter(run.values())).result.model, str(len(known)), f"{sum(known):,.0f}"))
  if rows:
    yield Heading("Cost")
    yield Table(("model", "results", "seconds"), rows)


def _seconds(log: Path) -> dict[str, float]:
  found = {}
  for line in log.read_text().splitlines() if log.exists() else ():
    try:
      fields = json.loads(line)
      found[fields["file"]] = fields["seconds"]
    except (ValueError, LookupError, TypeError):  # a line that was cut off
      continue
  return found


def _percent(found: Cell | None) -> str:
  if found is None:
    return ""
  text = f"{100 * found.value:.1f}"
  return text if found.interval is None else f"{text} [{100 * found.interval[0]:.1f}, {100 * found.interval[1]:.1f}]"


def _points(found: Difference | None, mark: str) -> str:
  if found is None:
    return ""
  ends = "" if found.interval is None else " [{:+.1f}, {:+.1f}]".format(*(100 * end for end in found.interval))
  stars = "\\*" * len(mark)
  return f"{100 * found.value:+.1f}{stars}{ends}"


def _share(value: float | None) -> str:
  return "" if value is None else f"{100 * value:.1f}"
