"""Robustness to distribution shift, interpolated weights, and overlap with training data."""

from collections.abc import Iterator, Mapping, Sequence
import json
from pathlib import Path
import re
import shutil
from typing import Any, NamedTuple

import numpy as np

from declip_jax.evals import catalogue, intervals, results, robustness
from declip_jax.evals.comparison import Cell, Method
from declip_jax.evals.report.compared import Report, by_key, percent, share, title
from declip_jax.evals.robustness import Line
from declip_jax.reporting import charts
from declip_jax.reporting.charts import Points
from declip_jax.reporting.documents import Block, Heading, Picture, Table

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


class ShiftLine(NamedTuple):
  """The scores of a method without and under shift.

  Attributes:
    label: the method.
    reference: its score without shift.
    shifted: its score under each shift, by key, and its effective robustness where that is known.
    mean: mean over all shifts, None if one is missing.
    compared: the score with which its effective robustness compares, by key of the shift, see `_compared`.
  """

  label: str
  reference: Cell
  shifted: Mapping[str, tuple[Cell, float | None]]
  mean: float | None
  compared: Mapping[str, Cell]


def sources(report: Report) -> dict[str, list[str]]:
  """The keys of the shifts of each data set: the five of ImageNet, and the user's."""
  known = {_IMAGENET: list(catalogue.suite("shifts").means["mean"])}
  return {**known, **{source: list(keys) for source, keys in report.shifts.items()}}


def _compared(source: str, key: str) -> str:
  """The key of the data set with which effective robustness compares a shift: ImageNet's images of the same classes."""
  return robustness.WITHOUT_SHIFT.get(key, source) if source == _IMAGENET else source


def lines(report: Report, methods: Sequence[Method], source: str, keys: Sequence[str], kind: str) -> list[ShiftLine]:
  """The methods that have a score without shift and one under it."""
  found = {method.label: by_key(method, kind) for method in methods}
  present = [key for key in keys if any(key in own for own in found.values())]
  rows = []
  for label, own in found.items():
    if source not in own or not any(key in own for key in present):
      continue
    shifted, compared = {}, {}
    for key in (key for key in present if key in own):
      standard, above = models(report, source, key), None
      if standard and (score := own.get(_compared(source, key))):
        compared[key], above = score, float(standard.line.effective_robustness(score.value, own[key].value))
      shifted[key] = own[key], above
    values = [score.value for score, _ in shifted.values()]
    mean = float(np.mean(values)) if len(values) == len(present) else None
    rows.append(ShiftLine(label, own[source], shifted, mean, compared))
  return rows


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
      "such models, whose accuracies are drawn on a logit scale. In parentheses: none of these models is as accurate, "
      "or none as inaccurate, so that the line is extrapolated."
    )
    yield from blocks


def _shift(report: Report, source: str, keys: Sequence[str], kind: str, pictures: Path) -> Iterator[Block]:
  rows = lines(report, report.methods, source, keys, kind)
  if not rows:
    return
  present = list(dict.fromkeys(key for row in rows for key in row.shifted))
  header, cells = ["method", source], [[row.label, percent(row.reference)] for row in rows]
  for key in present:
    standard = models(report, source, key)
    header += [key, "effective robustness"] if standard else [key]
    for row, texts in zip(rows, cells, strict=True):
      score, above = row.shifted.get(key, (None, None))
      texts.append(percent(score))
      if standard:
        outside = key in row.compared and bool(standard.line.extrapolated(row.compared[key].value))
        texts.append(_effective(above, outside))
  for row, texts in zip(rows, cells, strict=True):
    texts.append(share(row.mean))
  yield Heading(f"From {source}, {title(kind).lower()}", 3)
  some = len(present) < len(keys)
  yield Table([*header, f"mean of {len(present)} of {len(keys)} shifts" if some else "mean under shift"], cells)
  if alike := [key for key in present if _compared(source, key) != source]:
    yield f"The accuracy without shift, for {', '.join(alike)}, is that on ImageNet's images of the same classes."
  bars = {
    row.label: {
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


def _effective(above: float | None, extrapolated: bool) -> str:
  if above is None:
    return ""
  text = f"{100 * above:+.1f}"
  return f"({text})" if extrapolated else text


def _robustness(report: Report, source: str, key: str, pictures: Path) -> Iterator[Block]:
  """The chart of one shift: all ways of evaluating a method, and the line of models with standard training."""
  standard = models(report, source, key)
  if standard is None:
    return
  source = _compared(source, key)
  points: dict[str, list[tuple[str, float, float]]] = {}
  for method in report.detailed:
    for kind in KINDS:
      found = by_key(method, kind)
      if source in found and key in found:
        points.setdefault(method.label, []).append((_NAMES[kind], found[source].value, found[key].value))
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


def models(report: Report, source: str, key: str) -> Standard | None:
  """Models with standard training, the user's or those of the ImageNet testbed; None if there are fewer than three.

  The user's are classified by their own classifier if all have one, otherwise by a linear probe or zero-shot.
  """
  source = _compared(source, key)
  for kind in reversed(KINDS):
    own = [by_key(method, kind) for method in report.standard]
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
