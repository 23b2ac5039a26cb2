"""Charts of evaluations: differences, few shots, robustness to shift, sweeps, and growth with compute and data.

Scores are fractions; the axes show percent. Colours are those of Okabe and Ito, which people with any kind of colour
vision can tell apart, followed by four of Tol's; curves also differ in their markers. Files are written as in
`pictures`.
"""

from collections.abc import Callable, Mapping, Sequence
import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from declip_jax.reporting.pictures import FAINT, INK, new_figure, save

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Path = str | os.PathLike[str]
Interval = tuple[float, float]

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_COLORS += ("#882255", "#332288", "#999933", "#AA4499")  # of Tol, for more than eight curves
_MARKERS = "osD^vP*X"
_LINES = ("-", "--", ":")
_KINDS = ("*", "o", "s", "D")  # markers of evaluators in one chart
_PERCENT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


class Points(NamedTuple):
  """The scores of a method at several sizes.

  Attributes:
    x: sizes, increasing.
    y: score at each, the mean over seeds.
    ends: interval of each score, None where there is none.
    runs: sizes and scores of single runs, drawn faint.
  """

  x: Sequence[float]
  y: Sequence[float]
  ends: Sequence[Interval | None]
  runs: Sequence[tuple[float, float]] = ()


class Growth(NamedTuple):
  """A panel of `plot_growth`.

  Attributes:
    measure: name of the measure of size.
    score: name of the score.
    lines: the lines of methods.
  """

  measure: str
  score: str
  lines: Mapping[str, Points]


class Law(NamedTuple):
  """A line through the logarithms of errors.

  Attributes:
    x, error: size and error of each run.
    fitted: function from sizes to errors.
    band: function from sizes to the lower and upper end of the band of `fitted`.
    best: positions of the runs on the frontier.
  """

  x: Sequence[float]
  error: Sequence[float]
  fitted: Callable[[np.ndarray], np.ndarray]
  band: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
  best: Sequence[int] = ()


def plot_differences(values: Mapping[str, tuple[float, Interval | None]], title: str, path: Path) -> None:
  """Draws a bar for the difference of each data set, largest first; pale where the interval contains 0 or is missing.

  Args:
    values: for each data set the difference, and its interval if it has one.
    title: what is compared.
    path: PNG file to write.
  """
  from matplotlib.ticker import FuncFormatter, MaxNLocator

  order = sorted(values, key=lambda name: values[name][0])
  figure = new_figure(9, 1.5 + 0.34 * len(order))
  axes = figure.subplots()
  for row, name in enumerate(order):
    value, ends = values[name]
    supported = ends is not None and not ends[0] <= 0 <= ends[1]
    axes.barh(row, value, color=_COLORS[0] if value > 0 else _COLORS[1], alpha=0.9 if supported else 0.3)
    if ends is not None:
      axes.errorbar(sum(ends) / 2, row, xerr=(ends[1] - ends[0]) / 2, color=INK, linewidth=1, capsize=3)
  axes.set_yticks(range(len(order)), order, parse_math=False)
  axes.margins(x=0.06)
  axes.axvline(0, color=INK, linewidth=0.8)
  axes.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:+.3g}" if x else "0"))
  without = "" if all(ends for _, ends in values.values()) else ", or there is none"
  axes.set_xlabel(f"difference in points, with its 95 % interval; pale bars: the interval contains 0{without}")
  style(axes, title)
  save(figure, path)


def plot_few_shot(
  curves: Mapping[str, Mapping[int, tuple[float, float]]],
  zero_shot: Mapping[str, float],
  title: str,
  path: Path,
  score: str = "accuracy",
) -> None:
  """Draws scores against the number of training images per class (Radford et al. 2021, figure 6).

  Args:
    curves: for each method, by number of images, the mean and the standard deviation over draws.
    zero_shot: zero-shot score of those methods that have one, drawn at 0 images.
    title: name of the data set.
    path: PNG file to write.
    score: name of the score.
  """
  figure = new_figure(9, 5)
  axes = figure.subplots()
  for index, (label, curve) in enumerate(curves.items()):
    shots, look = sorted(curve), look_of(index)
    mean, spread = np.array([curve[count] for count in shots]).T
    place = 1 + np.log2(shots) + 0.05 * (index - (len(curves) - 1) / 2)  # 0 is that of zero-shot
    axes.errorbar(place, mean, yerr=spread, capsize=3, label=label, **look)
    if label in zero_shot:
      axes.plot(0, zero_shot[label], **{**look, "linestyle": "none", "markersize": 9})
      axes.axhline(zero_shot[label], color=look["color"], linestyle=":", linewidth=1)
  used = sorted({count for curve in curves.values() for count in curve})
  zero = ([0], ["zero-shot"]) if zero_shot else ([], [])
  axes.set_xticks([*zero[0], *(1 + np.log2(used))], [*zero[1], *map(str, used)])
  axes.set(xlabel="training images per class; bars: standard deviation over draws of these images", ylabel=score)
  percent_axis(axes.yaxis)
  style(axes, title)
  legend_beside(axes)
  save(figure, path)


def plot_robustness(
  points: Mapping[str, Sequence[tuple[str, float, float]]],
  title: str,
  path: Path,
  *,
  names: tuple[str, str] = ("accuracy without shift", "accuracy under shift"),
  standard: tuple[np.ndarray, np.ndarray] | None = None,
  expected: Callable[[np.ndarray], np.ndarray] | None = None,
  band: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None,
) -> None:
  """Draws accuracy under a shift against accuracy without it, on logit scales (Taori et al. 2020, figure 1).

  The points of a method are joined by a line, as in figure 14 of Radford et al. 2021.

  Args:
    points: for each method how it was evaluated, its accuracy without shift, and that under it.
    title: name of the shift.
    path: PNG file to write.
    names: what the axes show.
    standard: accuracies without and under shift of models with standard training.
    expected: the line through those models, as a function of the accuracy without shift.
    band: lower and upper end of its band, as a function of the same.
  """
  figure = new_figure(9, 6)
  axes = figure.subplots()
  known = np.array([(x, y) for own in points.values() for _, x, y in own])
  if standard is not None:
    axes.scatter(*standard, color=FAINT, s=14, label=f"{len(standard[0])} models with standard training")
    known = np.concatenate([known, np.stack(standard, axis=1)])
  (left, bottom), (right, top) = (_widened(known.min(axis=0), -1), _widened(known.max(axis=0), 1))
  at = _from_logit(np.linspace(_logit(left), _logit(right), 100))
  axes.plot(at, at, color=FAINT, linestyle=":", linewidth=1, label="no loss under shift")
  if expected is not None:
    axes.plot(at, expected(at), color=INK, linewidth=1.2, label="line through these models")
  if band is not None:
    axes.fill_between(at, *band(at), color=INK, alpha=0.12, linewidth=0, label="95 % band of the line")
  kinds = list(dict.fromkeys(kind for own in points.values() for kind, _, _ in own))
  for index, (label, own) in enumerate(points.items()):
    color = look_of(index)["color"]
    axes.plot([x for _, x, _ in own], [y for _, _, y in own], color=color, linewidth=1)
    for number, (kind, x, y) in enumerate(own):
      look = {"marker": _KINDS[kinds.index(kind) % len(_KINDS)], "markersize": 11, "linestyle": "none"}
      axes.plot(x, y, color=color, markeredgecolor="white", label=label if not number else None, **look)
  for number, kind in enumerate(kinds if len(kinds) > 1 else ()):
    axes.plot([], [], color=INK, marker=_KINDS[number % len(_KINDS)], markersize=9, linestyle="none", label=kind)
  for set_scale in (axes.set_xscale, axes.set_yscale):
    set_scale("function", functions=(_logit, _from_logit))
  for axis, ends in ((axes.xaxis, (left, right)), (axes.yaxis, (bottom, top))):
    axis.set_ticks(_logit_ticks(*ends))
    axis.set_minor_locator(_no_ticks())
    percent_axis(axis)
  axes.set(xlim=(left, right), ylim=(bottom, top), xlabel=names[0], ylabel=names[1])
  style(axes, title)
  legend_beside(axes)
  save(figure, path)


def plot_scores(values: Mapping[str, Mapping[str, tuple[float, Interval | None]]], title: str, path: Path) -> None:
  """Draws the scores of methods on several data sets as groups of bars, with intervals.

  Args:
    values: for each method and data set the score, and its interval if it has one.
    title: what the scores are.
    path: PNG file to write.
  """
  names = list(dict.fromkeys(name for own in values.values() for name in own))
  width = 0.8 / len(values)
  figure = new_figure(min(max(7, 3 + 0.35 * len(names) * (1 + len(values))), 16), 4.5)
  axes = figure.subplots()
  for index, (label, own) in enumerate(values.items()):
    places = [names.index(name) + width * (index + 0.5) - 0.4 for name in own]
    axes.bar(places, [value for value, _ in own.values()], 0.92 * width, color=look_of(index)["color"], label=label)
    for place, (_, ends) in zip(places, own.values(), strict=True):
      if ends is not None:
        axes.errorbar(place, sum(ends) / 2, yerr=(ends[1] - ends[0]) / 2, color=INK, linewidth=1, capsize=3)
  axes.set_xticks(range(len(names)), names, rotation=20, ha="right", parse_math=False)
  axes.set_ylabel("score, with its 95 % interval")
  axes.set_ylim(bottom=0)
  percent_axis(axes.yaxis)
  style(axes, title)
  axes.grid(visible=False, axis="x")
  legend_beside(axes)
  save(figure, path)


def plot_sweep(curves: Mapping[str, tuple[Sequence[float], Sequence[float], float]], title: str, path: Path) -> None:
  """Draws the validation score of linear probes against the regularisation, with the chosen value.

  Args:
    curves: for each method the values of C, their scores, and the chosen C.
    title: name of the data set.
    path: PNG file to write.
  """
  figure = new_figure(9, 4.5)
  axes = figure.subplots()
  for index, (label, (strengths, scores, chosen)) in enumerate(curves.items()):
    order, look = np.argsort(strengths), look_of(index)
    axes.plot(np.take(strengths, order), np.take(scores, order), label=f"{label}: C = {chosen:.3g}", **look)
    axes.axvline(chosen, color=look["color"], linestyle=":", linewidth=1)
    if chosen in strengths:
      best = scores[list(strengths).index(chosen)]
      axes.plot(chosen, best, marker="o", markersize=14, markerfacecolor="none", color=look["color"])
  axes.set_xscale("log")
  axes.set_xlabel("C, the inverse strength of the regularisation; ring: the chosen value")
  axes.set_ylabel("score on the validation split")
  percent_axis(axes.yaxis)
  style(axes, title)
  legend_beside(axes)
  save(figure, path)


def plot_growth(panels: Sequence[Growth], title: str, path: Path) -> None:
  """Draws scores against measures of size, one line per method; panels of one score have one scale."""
  columns = min(len(panels), 2 if len(panels) <= 4 else 3)
  rows = -(-len(panels) // columns)
  figure = new_figure(10 if columns > 1 else 5.5, 0.8 + (3.6 if columns < 3 else 3.2) * rows)
  labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
  grid = figure.subplots(rows, columns, squeeze=False, sharey=len({panel.score for panel in panels}) == 1)
  for axes in grid.flat[len(panels) :]:
    axes.set_visible(False)
  for axes, (measure, score, lines) in zip(grid.flat, panels, strict=False):
    for label, line in lines.items():
      look = look_of(labels.index(label))
      ends = np.array([end or (y, y) for end, y in zip(line.ends, line.y, strict=True)])
      spread = np.abs(ends.T - np.asarray(line.y))
      for x, y in line.runs:
        axes.plot(x, y, color=look["color"], marker=".", alpha=0.35)
      axes.errorbar(line.x, line.y, yerr=spread, capsize=3, label=label, **look)
    _size_axis(axes, [x for line in lines.values() for x in line.x], measure)
    axes.tick_params(labelleft=True)
    axes.set_ylabel(score.replace(", ", ",\n"))
    percent_axis(axes.yaxis)
    style(axes, "")
  figure.suptitle(
    title,
    x=0.01,
    ha="left",
    fontsize=11,
    fontweight="bold",
    color=INK,
    parse_math=False,
  )
  _legend_below(figure, grid.flat[: len(panels)])
  save(figure, path)


def plot_training(
  lines: Mapping[str, Points], title: str, path: Path, score: str, baselines: Mapping[str, float] = MappingProxyType({})
) -> None:
  """Draws scores of methods against the pairs seen, the best at the end first, with the range over seeds as bars.

  Args:
    lines: for each method its scores, at the numbers of pairs seen.
    title: what is compared.
    path: PNG file to write.
    score: name of the score.
    baselines: scores of something else by name, dashed lines.
  """
  from matplotlib.ticker import FuncFormatter

  figure = new_figure(10, 5.5)
  axes = figure.subplots()
  most = max((x for line in lines.values() for x in line.x), default=1)
  for index, label in enumerate(sorted(lines, key=lambda label: -lines[label].y[-1] if len(lines[label].y) else 0)):
    line, look = lines[label], look_of(list(lines).index(label))
    if not len(line.y):
      continue
    x = np.asarray(line.x, float) + (index - (len(lines) - 1) / 2) * most / 250  # the bars do not cover each other
    ends = np.array([end or (y, y) for end, y in zip(line.ends, line.y, strict=True)]).T
    last = f"{100 * line.y[-1]:.1f} %" + (f" ± {50 * np.ptp(line.ends[-1]):.1f}" if line.ends[-1] else "")
    axes.errorbar(x, line.y, yerr=np.abs(ends - np.asarray(line.y)), capsize=2, label=f"{label}  {last}", **look)
  for label, value in baselines.items():
    axes.axhline(value, color=FAINT, linestyle="--", linewidth=1, label=f"{label}  {100 * value:.1f} %")
  axes.set(xlabel="pairs seen; points are shifted so that bars do not overlap", ylabel=score)
  axes.set_ylim(bottom=0)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: amount(x) if x else "0"))
  percent_axis(axes.yaxis)
  style(axes, title)
  legend_beside(axes)
  save(figure, path)


def plot_laws(laws: Mapping[str, Law], measure: str, title: str, path: Path) -> None:
  """Draws errors against a measure of size on logarithmic scales, fitted lines with bands, and residuals below.

  Args:
    laws: law of each method.
    measure: name of the measure of size.
    title: what the errors are of.
    path: PNG file to write.
  """
  figure = new_figure(9, 6.5)
  upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  for index, (label, law) in enumerate(laws.items()):
    look, x, error = look_of(index), np.asarray(law.x, float), np.asarray(law.error, float)
    at = np.geomspace(x.min() / 1.1, x.max() * 1.1, 100)
    upper.plot(x, error, label=label, **{**look, "linestyle": "none"})
    upper.plot(at, law.fitted(at), color=look["color"], linewidth=1.2)
    upper.fill_between(at, *law.band(at), color=look["color"], alpha=0.12, linewidth=0)
    if len(law.best):
      best = np.asarray(law.best)
      ring = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "linestyle": "none"}
      upper.plot(x[best], error[best], color=look["color"], **ring)
    lower.plot(x, 100 * (error / law.fitted(x) - 1), **{**look, "linestyle": "none"})
  upper.set_yscale("log")
  known = np.concatenate([law.error for law in laws.values()])
  upper.set_yticks(_between(_PERCENT, known.min() * 0.85, known.max() * 1.15, 0.01))
  upper.yaxis.set_minor_locator(_no_ticks())
  percent_axis(upper.yaxis)
  upper.set_ylabel("error (100 % minus score)")
  lower.axhline(0, color=INK, linewidth=0.8)
  lower.set_ylabel("off the line, %")
  style(upper, title)
  style(lower, "")
  _size_axis(lower, [x for law in laws.values() for x in law.x], measure)
  legend_beside(upper)
  save(figure, path)


def plot_interpolation(
  scores: Mapping[str, Mapping[str, Points]],
  shifts: Mapping[str, Points],
  names: tuple[str, str],
  path: Path,
) -> None:
  """Draws the scores of interpolated weights against the share of the second ones, and shift against reference score.

  Args:
    scores: for each model and data set the scores by share, 0 to 1.
    shifts: for each model the score under shift (`y`) by the reference score (`x`), by increasing share; may be empty.
    names: names of the reference score and of that under shift.
    path: PNG file to write.
  """
  figure = new_figure(10, 5.2)
  grid = figure.subplots(1, 2 if shifts else 1, squeeze=False)[0]
  lines = {(model, name): line for model, own in scores.items() for name, line in own.items()}
  for index, ((model, name), line) in enumerate(lines.items()):
    label = name if len(scores) == 1 else f"{model}: {name}"
    ends = np.array([end or (y, y) for end, y in zip(line.ends, line.y, strict=True)])
    grid[0].errorbar(line.x, line.y, yerr=np.abs(ends.T - np.asarray(line.y)), label=label, capsize=2, **look_of(index))
  grid[0].set(xlabel="share of the fine-tuned weights", ylabel="score, with its 95 % interval", xlim=(-0.04, 1.04))
  percent_axis(grid[0].yaxis)
  style(grid[0], "Score by share of the fine-tuned weights")
  for index, (model, line) in enumerate(shifts.items()):
    look = look_of(len(lines) + index)
    grid[1].plot(line.x, line.y, label=f"{model}, by share" if len(shifts) > 1 else "", **look)
    for place, text in ((0, "share 0"), (-1, "share 1")):
      at = {"xy": (line.x[place], line.y[place]), "xytext": (6, 6), "textcoords": "offset points"}
      grid[1].annotate(text, fontsize=9, color=INK, **at)
    best = int(np.argmax(line.y))
    ring = {"marker": "o", "markersize": 14, "markerfacecolor": "none", "linestyle": "none"}
    grid[1].plot(line.x[best], line.y[best], color=look["color"], **ring)
  if shifts:
    grid[1].margins(0.2)
    grid[1].set(xlabel=names[0], ylabel=names[1])
    percent_axis(grid[1].xaxis)
    percent_axis(grid[1].yaxis)
    style(grid[1], "Mean under shift; ring: its best share")
  _legend_below(figure, grid)
  save(figure, path)


def look_of(index: int) -> dict[str, Any]:
  """Colour, marker and line of the curve at a position; more than twelve also differ in their lines."""
  place, again = index % len(_COLORS), index // len(_COLORS) % len(_LINES)
  return {
    "color": _COLORS[place],
    "marker": _MARKERS[(place + again) % len(_MARKERS)],
    "linestyle": _LINES[again],
    "linewidth": 1.6,
    "markersize": 6,
  }


def style(axes: "Axes", title: str) -> None:
  axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, parse_math=False, wrap=True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(color="#e6e6e6", linewidth=0.8)
  axes.set_axisbelow(True)


def legend_beside(axes: "Axes", **look: Any) -> None:
  """A legend beside the axes, where it covers nothing."""
  legend = axes.legend(**{"frameon": False, "fontsize": 9, "loc": "upper left", "bbox_to_anchor": (1.01, 1)} | look)
  for text in legend.get_texts():
    text.set_parse_math(False)


def _legend_below(figure: "Figure", grid: Sequence["Axes"]) -> None:
  """A legend of all axes below them."""
  found = {}
  for axes in grid:
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
      found.setdefault(label, handle)
  found.pop("", None)
  if found:
    columns = min(len(found), 4 if max(map(len, found)) < 24 else 2)
    legend = figure.legend(
      [*found.values()], [*found], frameon=False, fontsize=9, loc="outside lower center", ncols=columns
    )
    for text in legend.get_texts():
      text.set_parse_math(False)


def percent_axis(axis: Any) -> None:
  from matplotlib.ticker import FuncFormatter

  axis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 6):g} %"))


def _size_axis(axes: "Axes", values: Sequence[float], measure: str) -> None:
  """A logarithmic axis with ticks at the sizes themselves, where these are few and far enough apart."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

  axes.set_xscale("log")
  low, high = min(values), max(values)
  reach = max((high / low) ** 0.06, 1.03)
  axes.set_xlim(low / reach, high * reach)
  ticks: list[float] = []
  for value in sorted({*values}):
    if not ticks or value / ticks[-1] >= (high / low) ** 0.12 * 1.01:
      ticks.append(value)
  if len(ticks) <= 7:
    axes.set_xticks(ticks)
  else:
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
  axes.xaxis.set_minor_locator(NullLocator())
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: amount(x)))
  axes.set_xlabel(measure)


def amount(value: float) -> str:
  """A number for people, such as 12.5k."""
  if value >= 1e12:
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"
  size, letter = next(
    ((size, letter) for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if value >= size), (1, "")
  )
  return f"{value / size:.3g}{letter}"


def _no_ticks() -> Any:
  from matplotlib.ticker import NullLocator

  return NullLocator()


def _widened(share: np.ndarray, side: int) -> np.ndarray:
  """Shares a little further out on the logit scale."""
  return _from_logit(_logit(np.clip(share, 0.002, 0.998)) + 0.25 * side)


def _logit_ticks(low: float, high: float) -> list[float]:
  for step in (None, 0.1, 0.05, 0.02, 0.01):
    ticks = _between(_PERCENT if step is None else np.arange(step, 1, step), low, high)
    if len(ticks) >= 4:
      return ticks
  return ticks


def _between(values: Sequence[float] | np.ndarray, low: float, high: float, step: float = 0.0) -> list[float]:
  """The values in a range; multiples of `step` if they are fewer than three."""
  found = [float(value) for value in values if low < value < high]
  if len(found) >= 3 or not step:
    return found
  finer = max(step, round((high - low) / 5, 2))
  return [float(value) for value in np.arange(finer, 1, finer) if low < value < high]


def _logit(share: np.ndarray | float) -> np.ndarray:
  share = np.clip(share, 1e-4, 1 - 1e-4)
  return np.log(share / (1 - share))


def _from_logit(value: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-value))
