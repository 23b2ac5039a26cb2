"""Published scores beside ours, marked by how they were measured."""

from collections.abc import Iterator, Mapping, Sequence
import csv
from pathlib import Path
from typing import Any, NamedTuple

from declip_jax.evals.comparison import Cell, cell
from declip_jax.evals.report.compared import Published, Report, prompts_name
from declip_jax.reporting.documents import Block, Heading, Table

_FLAGGED = 0.01  # difference from a published score that is flagged
_KINDS = {"zero_shot": "zero_shot", "linear_probe": "linear_probe", "fine_tuned": "classify"}
_WORDS = {"zero_shot": "zero-shot", "linear_probe": "linear probe", "fine_tuned": "fine-tuned"}
_PAPERS = ("model", "source", "protocol", "kind", "prompts")


class Beside(NamedTuple):
  """A published score beside those of our methods.

  Attributes:
    model, source, protocol, data_set: what was published.
    value: the published score.
    ours: our scores by method.
    others: by method, our scores with other prompts than the published ones, by prompt set.
  """

  model: str
  source: str
  protocol: str
  data_set: str
  value: float
  ours: Mapping[str, float]
  others: Mapping[str, Mapping[str, float]]


def of_papers() -> list[Published]:
  """The scores in `published.csv`: one line per model and protocol, a column per data set, in percent."""
  text = (Path(__file__).parents[1] / "published.csv").read_text(encoding="utf-8")
  rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
  found = []
  for row in rows:
    model, source, protocol, kind, prompts = (row[name] for name in _PAPERS)
    for key, value in row.items():
      if key not in _PAPERS and value:
        found.append(Published(model, source, protocol, kind, key, prompts, float(value) / 100))
  return found


def of_config(name: str, published: Mapping[str, Any]) -> Iterator[Published]:
  """The scores in `PUBLISHED` of a config."""
  source = published.get("source", "")
  for way, value in published.get("imagenet_top1_percent", {}).items():
    prompts = ("openai7" if name.startswith("slip/") else "openai") if way == "zero_shot" else ""
    kind = "sgd_probe" if way == "linear_probe" and name.startswith(("slip/", "simclr")) else _KINDS[way]
    yield Published(name, source, _protocol(way, prompts), kind, "imagenet", prompts, value / 100)
  for way, value in published.get("top1_percent", {}).items():
    yield Published(name, source, _protocol(way, ""), _KINDS[way], name.rpartition("/")[2], "", value / 100)


def _protocol(way: str, prompts: str) -> str:
  return f"{_WORDS[way]}, {prompts_name(prompts)}" if prompts else _WORDS[way]


def compared(report: Report) -> list[Beside]:
  """The published scores of data sets and evaluators that the report has."""
  tasks = {
    (kind, report.some(next(iter(own.values()))).key): own
    for kind in report.kinds
    for own in report.protocols(kind).values()
  }
  found = []
  for row in report.published:
    ours: dict[str, float] = {}
    others: dict[str, dict[str, float]] = {}
    for prompts, task in tasks.get((row.kind, row.key), {}).items():
      for method in report.methods:
        scored = method.of(task)
        score: Cell | None = scored and cell(scored, scored[0].headline) or None
        if score is None:
          continue
        if prompts == row.prompts or not row.prompts:
          ours.setdefault(method.label, score.value)
        else:
          others.setdefault(method.label, {})[prompts] = score.value
    if ours or others:
      found.append(Beside(row.model, row.source, row.protocol, row.key, row.value, ours, others))
  return found


def published(report: Report) -> Iterator[Block]:
  """The table."""
  rows = compared(report)
  if not rows:
    return
  same = _same_config(report)
  yield Heading("Published results")
  yield (
    "Scores as their sources print them, in percent, and ours minus them in points. ‡ flags a difference of more than "
    "1 point. Scores with other prompts than the published ones have columns of their own: they cannot be compared. "
    "Most published models were trained on other data than ours; bold rows are of the config that a method here was "
    "trained with."
  )
  other = [label for label in report.labels if any(label in row.others for row in rows)]
  cells = []
  for row in rows:
    ours = [_ours(row.value, row.ours[label]) if label in row.ours else "" for label in report.labels]
    name = f"**{row.model}**" if row.model in same else row.model
    theirs = [f"{100 * row.value:.1f}", *ours, *(_others(row.others.get(label, {})) for label in other)]
    cells.append([name, row.source, row.protocol, row.data_set, *theirs])
  names = ["published model", "source", "protocol", "data set", "published", *report.labels]
  yield Table([*names, *(f"{label}, other prompts" for label in other)], cells, texts=4)


def _ours(published: float, own: float) -> str:
  difference = own - published
  return f"{100 * own:.1f} ({100 * difference:+.1f}{' ‡' if abs(difference) > _FLAGGED else ''})"


def _others(scores: Mapping[str, float]) -> str:
  return ", ".join(f"{100 * value:.1f} (`{prompts}`)" for prompts, value in scores.items())


def _same_config(report: Report) -> Sequence[str]:
  return [one.training["config"] for method in report.methods for one in method.first if "config" in one.training]
