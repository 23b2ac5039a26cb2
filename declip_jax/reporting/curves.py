"""The curves of one run over its steps. Colours and files are those of `charts`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
import itertools
import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from declip_jax.reporting.chance import recalls_at_chance
from declip_jax.reporting.charts import amount, legend_beside, look_of, percent_axis, style
from declip_jax.reporting.metrics import is_score
from declip_jax.reporting.pictures import FAINT, INK, new_figure, save, wrap

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_FEW = 60  # number of points up to which each is marked
_SMOOTHED = 200  # number of points above which a curve is smoothed
_COLUMNS = {True: 2, False: 4}  # of panels with a legend, and without
_TITLE = 120  # characters in a line of the title
_STAGE = 12  # characters of the name of a stage
# Losses that are not comparable with the contrastive ones, and the names of their panels.
_OWN_SCALE = {
  "mlm": "loss of masked tokens",
  "mim": "loss of masked patches",
  "simsiam": "loss of SimSiam",
  "byol": "loss of BYOL",
}
_SINGLE = {
  "lr": "learning rate",
  "temperature": "temperature",
  "dense_temperature": "temperature of tokens",
  "images_per_second": "images per second",
}
_FROM_ZERO = ("lr", "images_per_second")
_DIRECTIONS = ("image to text", "text to image")

Series = tuple[np.ndarray, np.ndarray]  # steps and values


@dataclass(frozen=True)
class Described:
  """What the curves of a run say besides its metrics.

  Attributes:
    title: the run in a line: method, data, pairs.
    chance: loss of random answers by term.
    one_image: names of the evaluations of retrieval in which exactly one image is right for each text.
    stages: last step of each stage before the last one, by its name.
  """

  title: str
  chance: Mapping[str, float] = field(default_factory=dict)
  one_image: tuple[str, ...] = ()
  stages: Mapping[str, int] = field(default_factory=dict)


class _Panel(NamedTuple):
  """Curves on one scale.

  Attributes:
    title: its title.
    curves: series by label.
    chance: values of random answers by label.
    share: whether values are fractions, shown as percentages from 0.
    from_zero: whether the axis starts at 0.
    full: step of the first line after the neighbour bank was full, None if there is none.
  """

  title: str
  curves: Mapping[str, Series]
  chance: Mapping[str, float] = {}
  share: bool = False
  from_zero: bool = False
  full: float | None = None

  @property
  def is_labelled(self) -> bool:
    return any(self.curves)

  @property
  def height(self) -> float:
    """Inches, enough for the legend."""
    return max(2.35, 0.7 + 0.18 * (len(self.curves) + len(self.chance) + (self.full is not None)))


def plot_curves(metrics: Sequence[Mapping[str, Any]], run: Described, path: str | os.PathLike[str]) -> None:
  """Draws the curves of one run: losses, a panel for each evaluation, learning rate, temperature, features and speed.

  Contrastive losses share a panel; those on another scale, such as masked language modelling, have their own. An
  evaluation's panel has its scores, but not its losses, durations and counts. Dashed lines are the values of random
  answers, where they are known exactly. A dotted line marks the first values after the neighbour bank was full; before,
  its loss is 0 and not shown. Thin lines mark the ends of stages, with their names. The deviation of the features of
  each branch is about 1, and falls to 0 where a branch collapses. Long series are drawn light, with a smoothed line on
  top. Panels without series are left out.

  Args:
    metrics: lines of `metrics.read_metrics`; a None or a number that is not finite is a missing point.
    run: title and values of random answers.
    path: PNG file to write.
  """
  wide = [*_losses(metrics, run), *_evaluations(metrics, run), _deviations(metrics)]
  blocks = [_rows(panels) for panels in ([panel for panel in wide if panel.curves], [*_single(metrics)]) if panels]
  heights = [[max(panel.height for panel in row if panel) for row in rows] for rows in blocks]
  figure = new_figure(10, 0.6 + max(sum(map(sum, heights)), 2))
  parts = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=[*map(sum, heights)])[:, 0] if blocks else []
  last = max((line["step"] for line in metrics), default=0)
  for part, rows, ratios in zip(parts, blocks, heights, strict=True):
    grid = part.subplots(len(rows), len(rows[0]), squeeze=False, height_ratios=ratios)
    for axes, panel in zip(grid.flat, itertools.chain(*rows), strict=True):
      _draw(axes, panel, last, run.stages) if panel else axes.set_axis_off()
  if not blocks:
    figure.text(0.5, 0.5, "no metrics yet", ha="center", color=FAINT)
  name = {"x": 0.01, "ha": "left", "fontsize": 11, "fontweight": "bold", "color": INK}
  figure.suptitle(wrap(run.title, _TITLE, 3), **name, parse_math=False)
  save(figure, path)


def _rows(panels: Sequence[_Panel]) -> list[list[_Panel | None]]:
  """Panels in rows of two, or of four if they have no legend; the last row is filled with None."""
  count = min(_COLUMNS[panels[0].is_labelled], len(panels))
  filled = [*panels, *[None] * (-len(panels) % count)]
  return [filled[start : start + count] for start in range(0, len(filled), count)]


def _losses(metrics: Sequence[Mapping[str, Any]], run: Described) -> Iterator[_Panel]:
  """The total with the contrastive losses, and the losses on other scales."""
  terms = [name.removeprefix("loss/") for name in _names(metrics) if name.startswith("loss/")]
  curves = {term: _series(metrics, f"loss/{term}") for term in terms}
  total = _series(metrics, "loss")
  full = _first_after_zeros(curves.get("nns"))
  if "nns" in curves and not curves["nns"][1].any():  # the bank has never been full
    del curves["nns"]
  if full is not None:
    x, y = curves["nns"]
    curves["nns"] = x[x >= full], y[x >= full]
  shared = {term: curve for term, curve in curves.items() if term not in _OWN_SCALE}
  if len(terms) != 1 or not np.array_equal(total[1], curves[terms[0]][1]):
    shared = {"total": total, **shared}
  chance = {f"{term} at chance": run.chance[term] for term in shared if term in run.chance}
  if len(set(chance.values())) == 1:  # several terms of as many candidates
    chance = {"at chance": next(iter(chance.values()))}
  yield _Panel("loss", _known(shared), chance, full=full)
  for term in (term for term in terms if term in _OWN_SCALE):
    own = {"at chance": run.chance[term]} if term in run.chance else {}
    yield _Panel(_OWN_SCALE[term], _known({term: curves[term]}), own)


def _evaluations(metrics: Sequence[Mapping[str, Any]], run: Described) -> Iterator[_Panel]:
  """A panel for each evaluation."""
  found: dict[str, list[str]] = {}
  for name in _names(metrics):
    if name.startswith("eval/"):
      found.setdefault(name.split("/")[1], []).append(name)
  for evaluation, names in found.items():
    prefix = f"eval/{evaluation}/"
    scores = [name for name in names if is_score(name)]
    curves = {name.removeprefix(prefix).replace("_", " "): _series(metrics, name) for name in scores}
    chance = {}
    if len(largest := _series(metrics, f"{prefix}majority_share")[1]):
      chance["largest class"] = largest[-1]
    images, texts = (_series(metrics, f"{prefix}{side}")[1] for side in ("images", "texts"))
    if evaluation in run.one_image and len(images) and len(texts):
      chance |= _recalls_at_chance(curves, images[-1], texts[-1])
    yield _Panel(evaluation.replace("_", " "), _known(curves), chance, share=True)


def _recalls_at_chance(labels: Iterable[str], images: float, texts: float) -> dict[str, float]:
  """Those of random orders for each recall, or for both directions at once where they are the same."""
  found = {}
  for label in labels:
    if recall := re.fullmatch(rf"({'|'.join(_DIRECTIONS)}) r(\d+)", label):
      both = recalls_at_chance(int(recall[2]), images, texts)
      name = f"r{recall[2]}" if images == texts else label
      found[f"{name} at chance"] = both[_DIRECTIONS.index(recall[1])]
  return found


def _deviations(metrics: Sequence[Mapping[str, Any]]) -> _Panel:
  names = [name for name in _names(metrics) if name.startswith("diagnostics/") and name.endswith("/deviation")]
  curves = {name.split("/")[1].replace("_", " "): _series(metrics, name) for name in names}
  return _Panel("deviation of features", _known(curves), from_zero=True)


def _single(metrics: Sequence[Mapping[str, Any]]) -> Iterator[_Panel]:
  """Panels of one curve without a legend, whose title has the last value."""
  for name, title in _SINGLE.items():
    curve = _series(metrics, name)
    if len(curve[1]):
      yield _Panel(f"{title}, last {curve[1][-1]:.3g}", {"": curve}, from_zero=name in _FROM_ZERO)


def _names(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
  """The names of all metrics, in the order in which they first appear."""
  return list(dict.fromkeys(name for line in metrics for name in line))


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> Series:
  """The points of a metric, without those that are missing or not finite."""
  points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
  x, y = np.array(points, float).reshape(-1, 2).T
  return x[np.isfinite(y)], y[np.isfinite(y)]


def _known(curves: Mapping[str, Series]) -> dict[str, Series]:
  return {label: curve for label, curve in curves.items() if len(curve[0])}


def _first_after_zeros(curve: Series | None) -> float | None:
  """The step of the first value that is not 0 after some that are; None if there is none."""
  if curve is None or not len(curve[1]) or curve[1][0]:
    return None
  (found,) = np.nonzero(curve[1])
  return float(curve[0][found[0]]) if len(found) else None


def _draw(axes: "Axes", panel: _Panel, last: float, stages: Mapping[str, int]) -> None:
  """Draws a panel with its legend beside the axes, where it covers nothing, and the ends of stages."""
  from matplotlib.ticker import FuncFormatter, MaxNLocator

  style(axes, panel.title)
  axes.title.set_fontsize(10)
  shown = (lambda y: f"{100 * y:.3g} %") if panel.share else (lambda y: f"{y:.4g}")
  for index, (label, curve) in enumerate(panel.curves.items()):
    _line(axes, index, curve, f"{label}  {shown(curve[1][-1])}" if label else "")
  for label, value in panel.chance.items():
    axes.axhline(value, color=FAINT, linestyle="--", linewidth=1, label=f"{label}  {shown(value)}")
  if panel.full is not None:
    axes.axvline(panel.full, color=INK, linestyle=":", linewidth=1, label=f"bank full by step {panel.full:,.0f}")
  axes.set_xlim(0, max(last, 1) * 1.03)
  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: amount(x) if x else "0"))
  axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
  axes.yaxis.set_major_formatter("{x:.4g}")
  if panel.share:
    percent_axis(axes.yaxis)
  values = np.concatenate([y for _, y in panel.curves.values()])
  if (panel.share or panel.from_zero) and values.min() >= 0:
    axes.set_ylim(0, 1.06 * max(values.max(), *panel.chance.values(), 1e-12))
  _mark_stages(axes, {name: end for name, end in stages.items() if end <= last})
  axes.set_xlabel("step", fontsize=8)
  axes.tick_params(labelsize=8)
  if panel.is_labelled:
    legend_beside(axes, fontsize=8, handlelength=1.6, borderaxespad=0)


def _mark_stages(axes: "Axes", ends: Mapping[str, int]) -> None:
  """Marks the end of each stage by a line and its name, which the curves cover."""
  covered = {"bbox": {"color": "white", "pad": 0.5}, "zorder": 0.6, "clip_on": True, "parse_math": False}
  for name, end in ends.items():
    axes.axvline(end, color=FAINT, linewidth=0.6, zorder=0.7)
    text = {"ha": "right", "va": "top", "fontsize": 7, "color": FAINT} | covered
    axes.text(end, 0.98, f"{wrap(name, _STAGE, 1)} ", transform=axes.get_xaxis_transform(), **text)


def _line(axes: "Axes", index: int, curve: Series, label: str) -> None:
  x, y = curve
  look = look_of(index) | {"linewidth": 1.4, "markersize": 4 if len(x) <= _FEW else 0, "markevery": None}
  if len(x) > _SMOOTHED:
    axes.plot(x, y, color=look["color"], linewidth=0.6, alpha=0.25)
    y = _smooth(y, len(y) // 50)
  axes.plot(x, y, label=label, **look)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
  """Averages with a bell-shaped window of about `width` points; at the ends with the points that exist."""
  bell = np.hanning(2 * width + 1)
  return np.convolve(values, bell, "same") / np.convolve(np.ones_like(values), bell, "same")
