"""The report as a document: its sections in order, and what the evaluations cost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from declip_jax.evals.comparison import Method
from declip_jax.evals.report.compared import Report
from declip_jax.evals.report.growth import growth
from declip_jax.evals.report.header import header, logs
from declip_jax.evals.report.headline import headline
from declip_jax.evals.report.published import published
from declip_jax.evals.report.scores import scores
from declip_jax.evals.report.shifts import interpolation, overlaps, shifts
from declip_jax.reporting.documents import Block, Heading, Table


def document(report: Report, folder: Path) -> list[Block]:
  """The blocks of the report; draws its pictures.

  Args:
    report: what to compare.
    folder: folder of the report, whose folder `pictures` receives the pictures.

  Raises:
    ValueError: methods have been evaluated on different data under one name.
  """
  pictures = folder / "pictures"
  blocks: list[Block] = [Heading("Evaluation", 1), *header(report), *headline(report)]
  for kind in report.kinds:
    blocks += scores(report, kind, pictures)
  blocks += shifts(report, pictures)
  blocks += interpolation(report, pictures)
  blocks += growth(report, pictures)
  blocks += overlaps(report, pictures)
  return [*blocks, *published(report), *_cost(report)]


def _cost(report: Report) -> Iterator[Block]:
  """What each data set has cost, as far as the logs beside the results say."""
  rows = [row for method in report.methods for row in _costs(method)]
  if rows:
    yield Heading("Cost")
    yield (
      "Seconds of all evaluations on a data set. Images whose features were on disk were not encoded again. Images per "
      "second are those that were encoded, divided by the seconds of the evaluations that encoded them, and so include "
      "reading, texts and scoring."
    )
    header = ("method", "data set", "evaluations", "seconds", "images encoded", "images from disk", "images/s")
    yield Table((*header, "machine"), rows, texts=2)


def _costs(method: Method) -> Iterator[list[str]]:
  found = logs(method)
  by_set: dict[str, list[dict[str, Any]]] = {}
  for run in method.runs:
    for task, scored in sorted(run.items()):
      line = found.get((str(scored.path.parent), scored.path.name))
      if line is not None:
        by_set.setdefault(task.dataset, []).append(line)
  before = ""
  for dataset, own in by_set.items():
    encoded, cached = (sum(line.get(name, 0) for line in own) for name in ("encoded", "cached"))
    seconds = sum(line["seconds"] for line in own if line.get("encoded"))
    rate = f"{encoded / seconds:,.0f}" if seconds else ""
    machine = ", ".join(dict.fromkeys(line["machine"] for line in own if "machine" in line))
    known = [f"{encoded:,}", f"{cached:,}"] if any("encoded" in line for line in own) else ["", ""]
    total = f"{sum(line.get('seconds', 0) for line in own):,.1f}"
    yield ["" if method.label == before else method.label, dataset, str(len(own)), total, *known, rate, machine]
    before = method.label
