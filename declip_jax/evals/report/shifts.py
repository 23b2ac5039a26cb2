"""Robustness to distribution shift, interpolated weights, and overlap with training data."""

from collections.abc import Iterator, Mapping, Sequence
import json
from pathlib import Path
import re
import shutil
from typing import Any, NamedTuple

import numpy as np

from declip_jax.evals import catalogue, intervals, results, robustness
from declip_jax.evals.comparison import Cell, Method, average
from declip_jax.evals.intervals import Interval
from declip_jax.evals.report.compared import (
  Report,
  brackets,
  by_key,
  other_prompts,
  percent,
  prompts_name,
  share,
  tasks_by_key,
  title,
)
from declip_jax.evals.robustness import Line
from declip_jax.reporting import charts
from declip_jax.reporting.charts import Points
from declip_jax.reporting.documents import Block, Heading, Listing, Picture, Table

_FEWEST = 10  # models of a line whose bootstrap is to be trusted
KINDS = ("zero_shot", "linear_probe", "classify")  # what is compared under shift
_IMAGENET = "imagenet"
_NAMES = {"zero_shot": "zero-shot", "linear_probe": "linear probe", "classify": "fine-tuned"}


class Standard(NamedTuple):
  """Models with standard training under one shift.

  Attributes:
    accuracy, shifted: accuracy of each without and under shift.
    line: the line through them.
  """

  accuracy: np.ndarray
  shifted: np.ndarray
  line: Line


class Effective(NamedTuple):
  """The effective robustness of a method.

  Attributes:
    value: accuracy under shift minus the expected one.
    interval: its 95 % interval.
    extrapolated: whether the accuracy without shift is not among those of the models of the line.
    doubts: why the line is of no use, in words; none if it is.
  """

  value: float
  interval: Interval
  extrapolated: bool
  doubts: tuple[str, ...]

  @property
  def is_significant(self) -> bool:
    """Whether the interval excludes 0, and the line is of use."""
    return not self.doubts and not self.interval.lower <= 0 <= self.interval.upper


class ShiftLine(NamedTuple):
  """The scores of a method without and under shift.

  Attributes:
    label: the method.
    prompts: the prompt set, "" for that of each data set's own protocol.
    reference: its score without shift.
    shifted: its score under each shift, by key, and its effective robustness where that is known.
    mean: mean over all shifts, None if one is missing.
  """

  label: str
  prompts: str
  reference: Cell
  shifted: Mapping[str, tuple[Cell, Effective | None]]
  mean: Cell | None

  @property
  def name(self) -> str:
    """The method, and the prompts if these are not the own ones of the data sets."""
    return f"{self.label}, {prompts_name(self.prompts)}" if self.prompts else self.label


def sources(report: Report) -> dict[str, list[str]]:
  """The keys of the shifts of each data set: the five of ImageNet, and the user's."""
  known = {_IMAGENET: list(catalogue.suite("shifts").means["mean"])}
  return {**known, **{source: list(keys) for source, keys in report.shifts.items()}}


def _compared(source: str, key: str) -> str:
  """The key of the data set with which effective robustness compares a shift: ImageNet's images of the same classes."""
  return robustness.WITHOUT_SHIFT.get(key, source) if source == _IMAGENET else source


def lines(report: Report, methods: Sequence[Method], source: str, keys: Sequence[str], kind: str) -> list[ShiftLine]:
  """The methods that have a score without shift and one under it, with the same prompts."""
  found = [
    (method, prompts, by_key(method, kind, prompts))
    for prompts in ("", *other_prompts(methods, kind))
    for method in methods
  ]
  found = [
    (method, prompts, own) for method, prompts, own in found if source in own and any(key in own for key in keys)
  ]
  present = [key for key in keys if any(key in own for _, _, own in found)]
  rows = []
  for method, prompts, own in found:
    shifted = {}
    for key in (key for key in present if key in own):
      compared = own.get(_compared(source, key))
      standard = models(report, source, key, prompts) if compared else None
      shifted[key] = own[key], effective(standard, compared, own[key])
    mean = _mean(method, kind, prompts, present) if len(shifted) == len(present) else None
    rows.append(ShiftLine(method.label, prompts, own[source], shifted, mean))
  return rows


def _mean(method: Method, kind: str, prompts: str, keys: Sequence[str]) -> Cell | None:
  """The mean score over some data sets; None if a run lacks one of them."""
  found = tasks_by_key(method, kind, prompts)
  mean = average(method, [found[key] for key in keys])
  return mean and Cell(mean.value, mean.images if mean.seeds is None else mean.seeds, mean.runs)


def effective(standard: Standard | None, reference: Cell | None, shifted: Cell) -> Effective | None:
  """The effective robustness of a method, None without models with standard training or a score to compare with."""
  if standard is None or reference is None:
    return None
  known = [(score.value, score.interval) for score in (reference, shifted)]
  ends = robustness.effective_interval(standard.accuracy, standard.shifted, *known)
  line = standard.line
  value = float(line.effective_robustness(reference.value, shifted.value))
  return Effective(value, ends, bool(line.extrapolated(reference.value)), doubts(line))


def doubts(line: Line) -> tuple[str, ...]:
  """Why a line says nothing about the accuracy that is expected under shift, in words."""
  few = (f"the line is fitted to only {line.models} models",) if line.models < _FEWEST else ()
  lower, upper = line.slope_interval
  flat = (f"its slope may be 0 ({line.slope:.2f} [{lower:.2f}, {upper:.2f}])",) if lower <= 0 <= upper else ()
  return few + flat


def shifts(report: Report, pictures: Path) -> Iterator[Block]:
  """Accuracy under distribution shift, and effective robustness where models with standard training are known."""
  blocks: list[Block] = []
  for source, keys in sources(report).items():
    for kind in KINDS:
      blocks += _shift(report, source, keys, kind, pictures)
    for key in keys:
      blocks += _robustness(report, source, key, pictures)
  if blocks:
    yield Heading("Robustness to distribution shift")
    yield (
      "Effective robustness (Taori et al. 2020) is the accuracy under shift minus the one that a model with standard "
      "training and the same accuracy without shift is expected to have, in points. The expectation is a line through "
      "such models, whose accuracies are drawn on a logit scale. Its interval reflects which models the line is fitted "
      "to, and the intervals of both accuracies; a star marks those that exclude 0. In parentheses: none of these "
      "models is as accurate, or none as inaccurate, so that the line is extrapolated."
    )
    yield from blocks


def _shift(report: Report, source: str, keys: Sequence[str], kind: str, pictures: Path) -> Iterator[Block]:
  rows = lines(report, report.methods, source, keys, kind)
  if not rows:
    return
  present = list(dict.fromkeys(key for row in rows for key in row.shifted))
  known = {key for row in rows for key, (_, above) in row.shifted.items() if above}
  header, cells = ["method", source], [[row.name, percent(row.reference)] for row in rows]
  for key in present:
    header += [key, "effective robustness"] if key in known else [key]
    for row, texts in zip(rows, cells, strict=True):
      score, above = row.shifted.get(key, (None, None))
      texts += [percent(score), *([_effective(above)] if key in known else [])]
  for row, texts in zip(rows, cells, strict=True):
    texts.append(percent(row.mean))
  yield Heading(f"From {source}, {title(kind).lower()}", 3)
  some = len(present) < len(keys)
  yield Table([*header, f"mean of {len(present)} of {len(keys)} shifts" if some else "mean under shift"], cells)
  if alike := [key for key in present if _compared(source, key) != source]:
    yield f"The accuracy without shift, for {', '.join(alike)}, is that on ImageNet's images of the same classes."
  if remarks := [*_remarks(rows)]:
    yield "These lines are of no use, and the effective robustness that they give has no star:"
    yield Listing(remarks)
  bars = {
    row.name: {
      source: (row.reference.value, row.reference.interval),
      **{key: (score.value, score.interval) for key, (score, _) in row.shifted.items()},
    }
    for row in rows
    if row.label in [method.label for method in report.detailed]
  }
  if not bars:
    return
  path = pictures / f"{results.slug(f'shift_{source}_{kind}')}.png"
  text = f"Scores on {source} and under shift, {title(kind).lower()}"
  charts.plot_scores(bars, text, path)
  yield Picture(path, text)


def _remarks(rows: Sequence[ShiftLine]) -> Iterator[str]:
  """The lines that are of no use, and why."""
  found = {(key, above.doubts) for row in rows for key, (_, above) in row.shifted.items() if above and above.doubts}
  yield from (f"{key}: {', and '.join(reasons)}." for key, reasons in sorted(found))


def _effective(above: Effective | None) -> str:
  if above is None:
    return ""
  star = "\\*" if above.is_significant else ""
  text = f"{100 * above.value:+.1f}{star}{brackets(above.interval, '+')}"
  return f"({text})" if above.extrapolated else text


def _robustness(report: Report, source: str, key: str, pictures: Path) -> Iterator[Block]:
  """The chart of one shift: all ways of evaluating a method, and the line of models with standard training."""
  standard = models(report, source, key)
  if standard is None:
    return
  source = _compared(source, key)
  points: dict[str, list[tuple[str, float, float]]] = {}
  for method in report.detailed:
    for kind in KINDS:
      for prompts in ("", *other_prompts([method], kind)):
        found, by = by_key(method, kind, prompts), f", {prompts_name(prompts)}" if prompts else ""
        if source in found and key in found:
          point = f"{_NAMES[kind]}{by}", found[source].value, found[key].value
          points.setdefault(method.label, []).append(point)
  if not points:
    return
  path = pictures / f"{results.slug(f'robustness_{source}_{key}')}.png"
  charts.plot_robustness(
    points,
    f"Accuracy on {key} against {source}",
    path,
    names=(f"accuracy on {source}", f"accuracy on {key}"),
    standard=(standard.accuracy, standard.shifted),
    expected=standard.line.expected,
    band=lambda at: robustness.band(standard.accuracy, standard.shifted, at)[:2],
  )
  line = standard.line
  fitted = f"slope {line.slope:.2f}, intercept {line.intercept:.2f}, r = {line.r:.3f}"
  yield Picture(
    path, f"Accuracy on {key} against {source}, on logit scales; the line is fitted to {line.models} models ({fitted})"
  )


def models(report: Report, source: str, key: str, prompts: str = "") -> Standard | None:
  """Models with standard training, the user's or those of the ImageNet testbed; None if there are fewer than three.

  The user's are classified by their own classifier if all have one, otherwise by a linear probe or zero-shot, with
  `prompts` in place of those of each data set's own protocol if there are any.
  """
  source = _compared(source, key)
  for kind in reversed(KINDS):
    own = [by_key(method, kind, prompts if kind == "zero_shot" else "") for method in report.standard]
    pairs = [(found[source].value, found[key].value) for found in own if source in found and key in found]
    pairs = [pair for pair in pairs if min(pair) > 0 and max(pair) < 1]
    if len({x for x, _ in pairs}) > 2:
      accuracy, shifted = np.transpose(pairs)
      return Standard(accuracy, shifted, robustness.fit_line(accuracy, shifted))
  if robustness.WITHOUT_SHIFT.get(key) == source:
    _, accuracy, shifted = robustness.baseline(key)
    return Standard(accuracy, shifted, robustness.fit_line(accuracy, shifted))
  return None


def interpolation(report: Report, pictures: Path) -> Iterator[Block]:
  """Scores of weights between two models, by the share of the second one (WiSE-FT, Wortsman et al. 2022)."""
  if not report.interpolated:
    return
  yield Heading("Interpolated weights")
  yield (
    "Each parameter is (1 - share) times that of one model plus share times that of another one, as a rule of a "
    "pretrained model and of the same model after fine-tuning (WiSE-FT, Wortsman et al. 2022)."
  )
  found = curves(report)
  scores: dict[str, dict[str, Points]] = {}
  for name, own in found.items():
    keys = list(dict.fromkeys(key for cells in own.values() for key in cells))
    yield Heading(f"{name}", 3)
    ways = [_way(key, [*own.values()]) for key in keys]
    rows = [[f"{at:g}", *(percent(cells.get(key)) for key in keys)] for at, cells in own.items()]
    yield Table(("share", *ways), rows)
    lines_of = {}
    for key, way in zip(keys, ways, strict=True):
      at = [value for value, cells in own.items() if key in cells]
      lines_of[way] = Points(at, [own[x][key].value for x in at], [own[x][key].interval for x in at])
    scores[name] = lines_of
  against = _against(report, found)
  references = {key for own in found.values() for cells in own.values() for key in cells if key[1] in sources(report)}
  reference = f"score on {references.pop()[1]}" if len(references) == 1 else "score without shift"
  names = (reference, "mean score under shift")
  path = pictures / "interpolation.png"
  charts.plot_interpolation(scores, against, names, path)
  right = "; right: mean under shift against the score without shift" if against else ""
  yield Picture(path, f"Scores of interpolated weights by their share{right}")


_Curve = dict[float, dict[tuple[str, str], Cell]]  # by share, and by evaluator and key of a data set


def curves(report: Report) -> dict[str, _Curve]:
  """For each pair of models the scores by share, increasing."""
  found: dict[str, _Curve] = {}
  for method in sorted(report.interpolated, key=lambda method: method.share or 0.0):
    first = method.first[0]
    model = first.result.model
    name = re.sub(r"-\d+$", "", model) if len(method.runs) > 1 else model
    start = Path(str(first.weights.get("interpolated_with", {}).get("path", ""))).name
    pair = name if len(method.runs) > 1 else f"{name} and {start}"
    cells = {(kind, key): score for kind in KINDS for key, score in by_key(method, kind).items() if score is not None}
    found.setdefault(pair, {})[float(method.share or 0.0)] = cells
  return found


def _way(key: tuple[str, str], all_cells: Sequence[Mapping[tuple[str, str], Cell]]) -> str:
  kinds = {kind for cells in all_cells for kind, _ in cells}
  return key[1] if len(kinds) == 1 else f"{key[1]}, {_NAMES[key[0]]}"


def _against(report: Report, found: Mapping[str, _Curve]) -> dict[str, Points]:
  """For each pair of models the mean score under shift by the score without it."""
  lines_of = {}
  for name, own in found.items():
    for source, keys in sources(report).items():
      for kind in KINDS:
        present = [key for key in keys if all((kind, key) in cells for cells in own.values())]
        if present and all((kind, source) in cells for cells in own.values()):
          x = [cells[kind, source].value for cells in own.values()]
          y = [float(np.mean([cells[kind, key].value for key in present])) for cells in own.values()]
          lines_of[f"{name}, {source}, {_NAMES[kind]}"] = Points(x, y, [None] * len(x))
  return lines_of


def overlaps(report: Report, pictures: Path) -> Iterator[Block]:
  """Evaluation images that have near-duplicates among training images, and what these do to the accuracy.

  Raises:
    FileNotFoundError: a folder is not one of `declip_jax.overlap`.
    ValueError: a folder has an overlap.json that is not one of `declip_jax.overlap`.
  """
  rows, effects, sheets = [], [], []
  for number, folder in enumerate(report.overlaps, 1):
    about, row = _overlap(folder / "overlap.json")
    rows.append(row)
    if "effect" in about:
      effects.append((about["test"], about["effect"]))
    if (folder / "overlap.png").exists():
      text = f"Images of {about['test']} and the nearest training images; framed: near-duplicates"
      sheets.append(Picture(pictures / f"{results.slug(f'overlap_{number}_{folder.name}')}.png", text))
      sheets[-1].path.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(folder / "overlap.png", sheets[-1].path)
  if not rows:
    return
  yield Heading("Overlap of training and evaluation data")
  yield (
    "Near-duplicates are evaluation images whose similarity to a training image is at least the threshold. The "
    "precision is that on altered copies of the evaluation images: where it is low, most of them are different images."
  )
  header = (
    "evaluation images",
    "training images",
    "images",
    "threshold",
    "near-duplicates",
    "same pixels",
    "precision",
  )
  yield Table(header, rows, texts=2)
  if effects:
    p = intervals.bonferroni(np.array([effect["p"] for _, effect in effects]))
    names = ("accuracy_all", "accuracy_clean", "accuracy_overlap")
    cells = [
      [test, *(share(effect.get(name)) for name in names), _inflation(effect), f"{value:.2g}"]
      for (test, effect), value in zip(effects, p, strict=True)
    ]
    yield (
      "Accuracy with and without these images; p is that of a one-sided binomial test, after Bonferroni's adjustment "
      f"for {len(effects)} data set{'s' if len(effects) > 1 else ''}:"
    )
    yield Table(("evaluation images", "all", "without", "only these", "all minus without", "p"), cells)
  yield from sheets


def _overlap(path: Path) -> tuple[Mapping[str, Any], list[str]]:
  """The fields of an overlap.json, and its row of the table.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is not one of `declip_jax.overlap`; the message names it.
  """
  content = path.read_bytes()
  try:
    about = json.loads(content.decode())
    duplicates = f"{about['overlap']:,} ({100 * about['contamination']:.1f} %)"
    row = [about["test"], about["train"] or "itself", f"{about['images']:,}", f"{about['threshold']:.3f}", duplicates]
    row += [f"{about['identical']:,}" if "identical" in about else "", share(about.get("precision"))]
    if "effect" in about:
      float(about["effect"]["p"])
    return about, row
  except (ValueError, LookupError, TypeError) as error:
    raise ValueError(f"{path}: not a result of declip_jax.overlap ({type(error).__name__}: {error})") from error


def _inflation(effect: Mapping[str, float]) -> str:
  return f"{100 * effect['all_minus_clean']:+.2f}" if "all_minus_clean" in effect else ""
