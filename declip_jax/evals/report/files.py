"""The numbers of a report for other programs: as CSV, and as JSON."""

from collections.abc import Iterator
import csv
import io
import json
from typing import Any

from declip_jax.evals import results
from declip_jax.evals.comparison import cell
from declip_jax.evals.report import groups, growth, headline, published, shifts
from declip_jax.evals.report.compared import Report


def to_csv(report: Report) -> str:
  """All results as a table with one row each, as `clip_benchmark build` writes it."""
  rows = []
  for scored in report.scored:
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
  """All numbers of the report; scores and differences are fractions."""
  content = {
    "baseline": report.baseline and report.baseline.label,
    "headline": [
      {
        **line._asdict(),
        "method": line.method.label,
        "score": line.score._asdict(),
        "difference": _dict(line.difference),
      }
      for line in headline.lines(report)
    ],
    "scores": [*_scores(report)],
    "groups": [*_groups(report)],
    "published": [row._asdict() for row in published.compared(report)],
    "shifts": _shifts(report),
    "interpolation": _interpolation(report),
    "scaling": _scaling(report),
    "data_efficiency": [
      {**own._asdict(), "sizes": list(own.sizes), "found": vars(own.found)} for own in growth.efficiencies(report)
    ],
  }
  return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _dict(value: Any) -> dict[str, Any] | None:
  return None if value is None else value._asdict()


def _scores(report: Report) -> list[dict[str, Any]]:
  lines = []
  for task in report.tasks:
    for metric in report.metrics(task):
      line: dict[str, Any] = {**task._asdict(), "metric": metric, "methods": {}}
      for method in report.methods:
        if (found := cell(method.of(task), metric)) is not None:
          line["methods"][method.label] = found._asdict()
      line["differences"] = {label: own._asdict() for label, own in report.differences(task, metric).items()}
      lines.append(line)
  return lines


def _groups(report: Report) -> Iterator[dict[str, Any]]:
  for task in report.tasks:
    for own in groups.compared(report, task):
      scores = {str(group): {**score._asdict(), "images": own.images.get(group)} for group, score in own.scores.items()}
      difference = {"value": own.difference, "best": own.best, "worst": own.worst, "p": own.p}
      about = {**task._asdict(), "grouping": own.grouping, "method": own.label}
      yield {**about, "groups": scores, "best_minus_worst": difference}


def _shifts(report: Report) -> list[dict[str, Any]]:
  found = []
  for source, keys in shifts.sources(report).items():
    for kind in shifts.KINDS:
      for line in shifts.lines(report, report.methods, source, keys, kind):
        under = {key: {**score._asdict(), **_above(above)} for key, (score, above) in line.shifted.items()}
        own = {"source": source, "kind": kind, "method": line.label, "prompts": line.prompts}
        mean = line.mean and {"value": line.mean.value, "interval": line.mean.interval}
        found.append({**own, "without_shift": line.reference._asdict(), "under_shift": under, "mean_under_shift": mean})
  return found


def _above(above: shifts.Effective | None) -> dict[str, Any]:
  return {
    "effective_robustness": None if above is None else {**above._asdict(), "is_significant": above.is_significant}
  }


def _interpolation(report: Report) -> list[dict[str, Any]]:
  return [
    {"models": name, "share": at, "kind": kind, "data_set": key, **score._asdict()}
    for name, own in shifts.curves(report).items()
    for at, cells in own.items()
    for (kind, key), score in cells.items()
  ]


def _scaling(report: Report) -> list[dict[str, Any]]:
  found = []
  for name, items in growth.scores(report):
    own = growth.runs(report, items)
    for measure in growth.MEASURES:
      every = growth.lines(own, measure)
      fitted = growth.laws(every, measure)
      for label, line in every.items():
        sizes = [
          {"run": run.name, "seed": run.facts.get("seed"), "size": run.facts[measure], "score": run.score}
          for run in line
        ]
        law = fitted[label][0] if label in fitted else None
        numbers = {} if law is None else {"exponent": law.slope, "interval": law.slope_interval, "r2": law.r2}
        found.append({"score": name, "measure": measure, "line": label, "runs": sizes, "law": numbers})
  return found
