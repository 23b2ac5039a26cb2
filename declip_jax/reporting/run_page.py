"""The page of a run, `index.html` in its working directory: its pictures, numbers, warnings, config and commands."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
import math
from pathlib import Path
import shlex

from declip_jax.data.storage import outputs
from declip_jax.reporting.documents import Block, Code, Heading, Listing, Picture, Table, to_html
from declip_jax.reporting.metrics import is_score, number_text
from declip_jax.reporting.symptoms import link
from declip_jax.runtime import bad_samples
from declip_jax.spelling import counted

Lines = Sequence[Mapping[str, float]]

_FIRST = ("views", "curves")  # pictures
_CAPTIONS = {
  "views": "What the model sees: originals with the part that each view shows, views, and texts",
  "curves": "Curves; dashed: random answers",
}
_CHANGES = 24  # differences that are listed
_SHOWN = ("examples", "temperature", "images_per_second", "utilisation", "skipped_total")


@dataclass(frozen=True)
class Uses:
  """What a trained run can be used for.

  Attributes:
    is_evaluated: whether it has evaluations.
    export_format: format in which it can be exported.
    searched: images that it can search by texts, as a spec; "" if it cannot.
  """

  is_evaluated: bool
  export_format: str
  searched: str


@dataclass(frozen=True)
class RunPage:
  """What the page of a run says besides its metrics.

  Attributes:
    title: the run in a line: method, data, pairs.
    total: number of steps until training ends.
    command: program and arguments that started it.
    uses: what it can be used for.
    standard: the default config that it is compared with, by its method and architecture.
    changes: fields that make it train something else than that config.
    config: config as text.
  """

  title: str
  total: int
  command: Sequence[str]
  uses: Uses
  standard: str
  changes: Sequence[str]
  config: str


def write_page(workdir: Path, run: RunPage, metrics: Lines) -> None:
  """Writes `index.html`, the same bytes for the same run, metrics and names of pictures.

  Args:
    workdir: working directory, whose pictures it shows by relative links.
    run: the run.
    metrics: lines of `metrics.read_metrics`.
  """
  name = workdir.resolve().name
  blocks = [Heading(name, 1), run.title, *_progress(run, metrics), *_warnings(metrics)]
  blocks += [
    *_scores(metrics),
    *_pictures(workdir),
    *_last_values(metrics),
    *_commands(workdir, run, metrics),
    *_config(run),
  ]
  outputs.write(workdir / "index.html", to_html(blocks, name, workdir).encode(errors="replace"))


def _progress(run: RunPage, metrics: Lines) -> Iterator[Block]:
  step = max((line["step"] for line in metrics), default=0)
  yield f"{step:,} of {counted(run.total, 'step')}."
  if bad := bad_samples.total(metrics):
    yield f"Samples skipped: {bad_samples.describe(bad)}."


def _warnings(metrics: Lines) -> Iterator[Block]:
  """The symptoms that training has found, with the steps at which it has."""
  steps: dict[str, list[float]] = {}
  for line in metrics:
    for name in line:
      if name.startswith("warning/"):
        steps.setdefault(name.removeprefix("warning/"), []).append(line["step"])
  if steps:
    yield Heading("Warnings")
    yield Listing([f"`{name}`, steps {own[0]:,} to {own[-1]:,}: see {link(name)}" for name, own in steps.items()])


def _scores(metrics: Lines) -> Iterator[Block]:
  """The last and the best scores of the evaluations."""
  rows = []
  for name, values in _values(metrics).items():
    if name.startswith("eval/") and is_score(name):
      best = max(values, key=lambda step: values[step])
      evaluation, _, metric = name.removeprefix("eval/").partition("/")
      rows.append([evaluation, metric, f"{[*values.values()][-1]:.1%}", f"{values[best]:.1%}", f"{best:,}"])
  if rows:
    yield Heading("Scores")
    yield Table(["evaluation", "score", "last", "best", "at step"], rows, texts=2)


def _last_values(metrics: Lines) -> Iterator[Block]:
  """The last values of the other metrics that matter."""
  found = _values(metrics)
  names = [name for name in found if name.startswith("loss") or name in _SHOWN]
  names += [name for name in found if name.startswith("eval/") and not is_score(name)]
  if names:
    yield Heading("Last values")
    yield Table(["metric", "value"], [[name, number_text([*found[name].values()][-1])] for name in names])


def _values(metrics: Lines) -> dict[str, dict[float, float]]:
  """The finite values of the metrics by step, in the order in which they first appear."""
  found: dict[str, dict[float, float]] = {}
  for line in metrics:
    for name, value in line.items():
      if value is not None and math.isfinite(value):
        found.setdefault(name, {})[line["step"]] = value
  return found


def _pictures(workdir: Path) -> Iterator[Block]:
  """All pictures in the working directory, those of the run first."""
  paths = sorted(workdir.glob("*.png"), key=lambda path: (path.stem not in _FIRST, -(path.stem == "views"), path.name))
  for path in paths:
    yield Heading(path.stem)
    yield Picture(path, _CAPTIONS.get(path.stem, f"The evaluation {path.stem}"))


def next_commands(workdir: Path, uses: Uses) -> list[str]:
  """Lines for a shell: the commands for a trained run, each after a comment that says what it is for.

  Args:
    workdir: working directory, which they name as the run was given it.
    uses: what the run can be used for.
  """
  here, lines = shlex.quote(str(workdir)), []
  if uses.is_evaluated:
    lines += ["# evaluate it again", f"python -m declip_jax.evaluate --workdir {here}"]
  lines += [
    "# export its weights",
    f"python -m declip_jax.export --workdir {here} --format {uses.export_format} --output export",
  ]
  if uses.searched:
    lines += ["# search images by texts, on a page", _search_command(workdir, uses.searched)]
  return lines


def _commands(workdir: Path, run: RunPage, metrics: Lines) -> Iterator[Block]:
  program, *arguments = run.command or [""]
  lines = next_commands(workdir, run.uses)
  if program.endswith("declip_jax/train.py") and (not metrics or metrics[-1]["step"] < run.total):
    lines = ["# resume it", f"python -m declip_jax.train {shlex.join(arguments)}", *lines]
  if (workdir / "tensorboard").exists():
    lines += ["# its curves, with zoom", f"tensorboard --logdir {shlex.quote(str(workdir))}"]
  yield Heading("Commands")
  yield Code("\n".join(lines))


def _search_command(workdir: Path, images: str) -> str:
  return f"python -m declip_jax.search --weights {shlex.quote(str(workdir))} --images {shlex.quote(images)}"


def _config(run: RunPage) -> Iterator[Block]:
  yield Heading("Config")
  if run.changes:
    yield f"What it trains differently from the default config of {run.standard}; all fields are below:"
    others = len(run.changes) - _CHANGES
    more = [f"... and {counted(others, 'other field')}"] if others > 0 else []
    yield Code("\n".join([*run.changes[:_CHANGES], *more]))
  yield Code(run.config, "The whole config")
