"""The beginning of a report: what was trained and evaluated, by which protocols, and what is missing."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
import json
from pathlib import Path
from typing import Any

from declip_jax.evals import catalogue, results
from declip_jax.evals.comparison import Method, Scored, Task
from declip_jax.evals.report.compared import Report, title
from declip_jax.reporting.documents import Block, Heading, Listing, Table
from declip_jax.spelling import counted

# What a reader has to know about an evaluator.
PROTOCOLS = {
  "zero_shot": (
    "Each image is compared with prompts that contain the names of the classes, and nothing is trained on the data "
    "set. The embeddings of the prompts of a class, each of unit norm, are averaged."
  ),
  "retrieval": (
    "Recall at k is the share of queries whose match is among the k most similar candidates, for texts that are "
    "searched by an image and for images that are searched by a text. Equal similarities count as wrong."
  ),
  "composition": (
    "A caption has to be more similar to its image than an altered one. In WinoGAViL, the K images that are most "
    "similar to a cue are compared with the K that belong to it: the Jaccard index, of instances with 10 to 12 images. "
    "Equal similarities are wrong."
  ),
  "linear_probe": (
    "Logistic regression on the features of the frozen image tower, fitted by L-BFGS without augmentation. Its "
    "strength C is chosen on a validation split; it is then fitted again on training and validation images together."
  ),
  "sgd_probe": (
    "A linear classifier on the features of the frozen image tower, trained by gradient descent without augmentation. "
    "Its learning rate is chosen on a validation split."
  ),
  "few_shot": (
    "A classifier of the features of the frozen image tower, trained on a few images of each class. Scores are means "
    "over several draws of these images."
  ),
  "knn": "The most similar training images of each test image vote for its class, the more similar the more.",
  "nearest_mean": "Each test image gets the class whose training images have the most similar mean feature.",
  "classify": "The classifier with which the model was fine-tuned.",
}
_WORDS = {
  "openai": "those of OpenAI's CLIP (`openai`)",
  "openai7": "SLIP's seven for ImageNet (`openai7`)",
  "clip_benchmark": "those of CLIP_benchmark (`clip_benchmark`)",
  "bare": "only the name of the class (`bare`)",
  "own": "those of the data set's source (`own`)",
  "given": "that of the data file (`given`)",
  "pooled": "the output of the image tower before the projection (`pooled`)",
  "joint": "the joint embedding (`joint`)",
}
# What differs between results, and its name.
_FIELDS = {
  "prompts": "Prompts",
  "validation": "Validation split",
  "features": "Features",
  "neighbours": "Number of neighbours",
}
_NAMED = 5  # missing data sets that a sentence names


def header(report: Report) -> Iterator[Block]:
  """What was trained and evaluated, and how to read the numbers."""
  rows = [_row(method) for method in report.methods]
  names = ("method", "runs", "seeds", "weights", "step", "pairs seen", "epochs", "parameters", "evaluated")
  used = [column for column, cells in enumerate(zip(*rows, strict=True)) if column < 2 or any(cells)]
  yield Table([names[column] for column in used], [[row[column] for column in used] for row in rows])
  yield from _training_data(report)
  yield (
    "Scores are in percent, and differences in percentage points. Brackets are 95 % intervals: for a single run they "
    "reflect the choice of the test images; for several runs, their random seeds (of the mean, by Student's t)."
  )
  if report.baseline is not None:
    yield (
      f"Differences are measured from **{report.baseline.label}**. One star marks those whose 95 % interval excludes "
      "0, two stars those that remain so after Holm's adjustment for the number of differences in the table. The best "
      "score of a row is bold only if it differs from every other one in this sense."
    )
  elif len(report.methods) > 1:
    yield "The best score of a row is bold only if its difference from every other one has an interval without 0."
  yield from _data(report)
  if missing := [*_missing(report)]:
    yield Heading("What is missing")
    yield Listing(missing)


def protocol(report: Report, kind: str) -> Iterator[Block]:
  """How the scores of an evaluator were made."""
  own = [scored for scored in report.scored if scored.result.ours["kind"] == kind]
  if kind in PROTOCOLS:
    yield PROTOCOLS[kind]
  lines = []
  for field, text in _FIELDS.items():
    values: dict[str, list[str]] = {}
    for scored in own:
      value = scored.about.get(field) if field == "prompts" else scored.details.get(field)
      if value and not (field == "prompts" and kind != "zero_shot"):
        values.setdefault(_WORDS.get(str(value), str(value)), []).append(scored.result.dataset)
    for value, sets in sorted(values.items()):
      where = "" if len(values) == 1 else f" ({', '.join(dict.fromkeys(sets))})"
      lines.append(f"{text}: {value}{where}.")
  options = {json.dumps(scored.result.ours["options"], sort_keys=True) for scored in own} - {"{}"}
  if options:
    lines.append(f"Options: {'; '.join(f'`{text}`' for text in sorted(options))}.")
  if lines:
    yield Listing(lines)


def logs(method: Method) -> dict[tuple[str, str], dict[str, Any]]:
  """The lines on a method's results in the logs beside them, by folder and name of the file."""
  folders = dict.fromkeys(scored.path.parent for run in method.runs for scored in run.values())
  return {(str(folder), name): line for folder in folders for name, line in _log(folder / results.LOG).items()}


def _log(path: Path) -> dict[str, dict[str, Any]]:
  found = {}
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      fields = json.loads(line)
      found[fields["file"]] = fields
    except (ValueError, LookupError, TypeError):  # a line that was cut off
      continue
  return found


def _row(method: Method) -> list[str]:
  first = method.first
  times = [float(line["time"]) for line in logs(method).values() if "time" in line]

  def join(values: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))

  def facts(name: str) -> list[Any]:
    return [one.training.get(name) for one in first]

  return [
    method.label,
    str(len(method.runs)),
    join(facts("seed")),
    join([_weights(one) for one in first]),
    join([one.weights.get("step") for one in first]),
    join([value and f"{value:,}" for value in facts("pairs_seen")]),
    join([value and f"{value:g}" for value in facts("epochs")]),
    join([value and f"{value:,}" for value in (one.weights.get("parameters") for one in first)]),
    datetime.fromtimestamp(max(times), UTC).date().isoformat() if times else "",
  ]


def _weights(one: Scored) -> str | None:
  """The path of the weights that were evaluated, and what kind of file it is unless it is a run, which has a step."""
  path, origin, average = (one.weights.get(name) for name in ("path", "origin", "average"))
  if not path:
    return origin
  is_run = one.weights.get("step") is not None
  remark = f"moving average, decay {average:g}" if average else "" if is_run else origin
  return f"`{path}` ({remark})" if remark else f"`{path}`"


def _training_data(report: Report) -> Iterator[Block]:
  found: dict[str, list[str]] = {}
  for method in report.methods:
    for one in method.first:
      named = [f"`{name}` ({count:,})" for name, count in one.training.get("data", {}).items()]
      start = f", starting from `{one.training['init_from']}`" if "init_from" in one.training else ""
      if named:
        found.setdefault(", ".join(named) + start, []).append(method.label)
  items = [f"{', '.join(dict.fromkeys(labels))}: {data}" for data, labels in found.items()]
  if items:
    yield "Training data, with its number of samples:"
    yield Listing(items)


def _data(report: Report) -> Iterator[Block]:
  rows = []
  for dataset in dict.fromkeys(task.dataset for task in report.tasks):
    own = [scored for scored in report.scored if scored.result.dataset == dataset]
    splits: dict[str, Any] = {}
    for scored in own:
      splits = {**scored.result.ours["data"], **splits}
    if not splits:
      continue
    cells = [f"`{of['source']}` ({of['samples']:,})" if (of := splits.get(name)) else "" for name in _SPLITS]
    rows.append([dataset, *cells])
  if rows:
    used = [0, *(column for column in range(1, 4) if any(row[column] for row in rows))]
    yield Heading("Data sets")
    header = ("data set", *(f"{_SPLITS[name]} (samples)" for name in _SPLITS))
    yield Table([header[column] for column in used], [[row[column] for column in used] for row in rows], texts=4)


_SPLITS = {"test": "test split", "train": "training split", "val": "validation split"}


def _missing(report: Report) -> Iterator[str]:
  for method in report.methods:
    lacking = [task for task in report.tasks if not method.of(task)]
    if lacking:
      yield f"{method.label} has no result of {_named([f'{title(task.kind).lower()} on {task}' for task in lacking])}."
    partly = [task for task in report.tasks if 0 < len(method.of(task)) < len(method.runs)]
    if partly:
      yield f"Not all runs of {method.label} have a result of {_named([_task(task) for task in partly])}."
  unreadable: dict[str, int] = {}
  for scored in report.scored:
    count = int(scored.metrics.get("unreadable", 0))
    unreadable[scored.result.dataset] = max(count, unreadable.get(scored.result.dataset, 0))
  for name, count in unreadable.items():
    if count:
      yield f"{counted(count, 'image')} of {name} could not be read, and {'does' if count == 1 else 'do'} not count."
  yield from _suites(report)
  if not any("training" in scored.result.ours for scored in report.scored):
    yield "The results do not say how the models were trained, so scores are not drawn against compute or data."


def _suites(report: Report) -> Iterator[str]:
  have = {scored.key for scored in report.scored} - {""}
  few = []
  for suite in catalogue.suites().values():
    lacking = suite.missing(have)
    if not lacking or len(lacking) == len(suite.keys):
      continue
    if 2 * len(lacking) > len(suite.keys):
      few.append(f"{suite.name} ({len(suite.keys) - len(lacking)} of {len(suite.keys)})")
    else:
      yield f"The mean of the suite {suite.name} needs {', '.join(lacking)}, too."
  if few:
    yield f"There are no means of suites of which fewer than half of the data sets have results: {', '.join(few)}."


def _task(task: Task) -> str:
  return f"{title(task.kind).lower()} on {task}"


def _named(names: Sequence[str]) -> str:
  more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
  return f"{', '.join(names[:_NAMED])}{more}"
