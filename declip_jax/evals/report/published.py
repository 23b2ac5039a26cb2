"""Published scores beside ours, marked by how they were measured."""

from collections.abc import Iterator, Mapping, Sequence
import csv
from pathlib import Path
from typing import Any, NamedTuple

from declip_jax.evals.comparison import Cell, Task, cell
from declip_jax.evals.report.compared import Published, Report
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
    ours: our scores by method, and whether they were measured in the same way.
  """

  model: str
  source: str
  protocol: str
  data_set: str
  value: float
  ours: Mapping[str, tuple[float, bool]]


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
  return {"openai": "zero-shot, OpenAI's prompts", "openai7": "zero-shot, SLIP's seven prompts"}.get(
    prompts, _WORDS[way]
  )


def compared(report: Report) -> list[Beside]:
  """The published scores of data sets and evaluators that the report has."""
  tasks: dict[tuple[str, str], Task] = {}
  for task in report.tasks:
    if not task.variant:
      tasks[task.kind, report.some(task).key] = task
  found = []
  for row in report.published:
    if (task := tasks.get((row.kind, row.key))) is None:
      continue
    ours = {}
    for method in report.methods:
      scored = method.of(task)
      score: Cell | None = scored and cell(scored, scored[0].headline) or None
      if score is not None:
        ours[method.label] = score.value, scored[0].about.get("prompts", "") == row.prompts or not row.prompts
    found.append(Beside(row.model, row.source, row.protocol, row.key, row.value, ours))
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
    "1 point. § marks a score of ours that was measured with other prompts: it cannot be compared. Most published "
    "models were trained on other data than ours; bold rows are of the config that a method here was trained with."
  )
  cells = []
  for row in rows:
    ours = [_ours(row, label) for label in report.labels]
    name = f"**{row.model}**" if row.model in same else row.model
    cells.append([name, row.source, row.protocol, row.data_set, f"{100 * row.value:.1f}", *ours])
  yield Table(("published model", "source", "protocol", "data set", "published", *report.labels), cells, texts=4)


def _ours(row: Beside, label: str) -> str:
  if label not in row.ours:
    return ""
  value, comparable = row.ours[label]
  if not comparable:
    return f"{100 * value:.1f} §"
  difference = value - row.value
  return f"{100 * value:.1f} ({100 * difference:+.1f}{' ‡' if abs(difference) > _FLAGGED else ''})"


def _same_config(report: Report) -> Sequence[str]:
  return [one.training["config"] for method in report.methods for one in method.first if "config" in one.training]
