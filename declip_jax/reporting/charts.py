"""Charts of evaluations: differences, few-shot curves, robustness to shift, and sweeps over the regularisation.

Scores are fractions; the axes show percent. Files are written as in `pictures`.
"""

from collections.abc import Callable, Mapping, Sequence
import os

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter
import numpy as np

from declip_jax.reporting.pictures import FAINT, INK, RIGHT, WRONG, new_figure, save

Path = str | os.PathLike[str]
Interval = tuple[float, float]


def plot_differences(values: Mapping[str, tuple[float, Interval | None]], title: str, path: Path) -> None:
  """Draws a bar for the difference of each data set, largest first; pale where the interval contains 0.

  Args:
    values: for each data set the difference, and its interval if it has one.
    title: what is compared.
    path: PNG file to write.
  """
  order = sorted(values, key=lambda name: values[name][0])
  figure = new_figure(8, 1.2 + 0.32 * len(order))
  axes = figure.subplots()
  for row, name in enumerate(order):
    value, ends = values[name]
    supported = ends is not None and not ends[0] <= 0 <= ends[1]
    axes.barh(row, value, color=RIGHT if value > 0 else WRONG, alpha=0.9 if supported else 0.3)
    if ends is not None:
      axes.plot(ends, (row, row), color=INK, linewidth=1)
  axes.set_yticks(range(len(order)), order, parse_math=False)
  axes.axvline(0, color=INK, linewidth=0.8)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:+.0f}"))
  axes.set_xlabel("difference in points, with 95 % interval; pale: the interval contains 0")
  _style(axes, title)
  save(figure, path)


def plot_few_shot(
  curves: Mapping[str, Mapping[int, tuple[float, float]]], zero_shot: Mapping[str, float], title: str, path: Path
) -> None:
  """Draws accuracy against the number of training images per class (Radford et al. 2021, figure 6).

  Args:
    curves: for each method, by number of images, the mean and the standard deviation over draws.
    zero_shot: zero-shot accuracy of those methods that have one, drawn at 0 images.
    title: name of the data set.
    path: PNG file to write.
  """
  figure = new_figure(7, 5)
  axes = figure.subplots()
  for index, (label, curve) in enumerate(curves.items()):
    shots = sorted(curve)
    mean, spread = np.array([curve[count] for count in shots]).T
    place = 1 + np.log2(shots)  # 0 is that of zero-shot
    axes.errorbar(place, mean, yerr=spread, marker="o", capsize=3, color=f"C{index % 10}", label=label)
    if label in zero_shot:
      axes.plot(0, zero_shot[label], marker="*", markersize=13, color=f"C{index % 10}", linestyle="none")
      axes.axhline(zero_shot[label], color=f"C{index % 10}", linestyle=":", linewidth=1)
  used = sorted({count for curve in curves.values() for count in curve})
  axes.set_xticks([0, *(1 + np.log2(used))], ["zero-shot", *map(str, used)])
  axes.yaxis.set_major_formatter(PercentFormatter(1))
  axes.set_xlabel("training images per class; bars: standard deviation over draws")
  axes.legend(frameon=False)
  _style(axes, title)
  save(figure, path)


def plot_robustness(
  points: Mapping[str, tuple[float, float]],
  title: str,
  path: Path,
  *,
  standard: tuple[np.ndarray, np.ndarray] | None = None,
  expected: Callable[[np.ndarray], np.ndarray] | None = None,
  band: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None,
) -> None:
  """Draws accuracy under a shift against accuracy without it, on logit scales (Taori et al. 2020, figure 1).

  Args:
    points: for each method the accuracy without shift, and under it.
    title: name of the shift.
    path: PNG file to write.
    standard: the same of models with standard training.
    expected: the line through those models, as a function of the accuracy without shift.
    band: lower and upper end of its band, as a function of the same.
  """
  figure = new_figure(6.5, 6)
  axes = figure.subplots()
  known = np.array([*points.values()])
  if standard is not None:
    axes.scatter(*standard, color=FAINT, s=14, label="standard training")
    known = np.concatenate([known, np.stack(standard, axis=1)])
  low, high = (np.clip(end, 0.002, 0.998) for end in (known.min() * 0.8, 1 - (1 - known.max()) * 0.8))
  at = _from_logit(np.linspace(_logit(low), _logit(high), 100))
  axes.plot(at, at, color=FAINT, linestyle=":", linewidth=1, label="no loss")
  if expected is not None:
    axes.plot(at, expected(at), color=INK, linewidth=1.2, label="expected")
  if band is not None:
    axes.fill_between(at, *band(at), color=INK, alpha=0.12, linewidth=0)
  for index, (label, (x, y)) in enumerate(points.items()):
    axes.plot(x, y, marker="*", markersize=14, linestyle="none", color=f"C{index % 10}", label=label)
  for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
    scale("function", functions=(_logit, _from_logit))
    axis.set_major_formatter(PercentFormatter(1, decimals=0))
  ticks = [
    tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99) if low < tick < high
  ]
  axes.set_xticks(ticks)
  axes.set_yticks(ticks)
  axes.set(xlim=(low, high), ylim=(low, high), xlabel="accuracy without shift", ylabel="accuracy under shift")
  axes.legend(frameon=False, fontsize=9)
  _style(axes, title)
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
  figure = new_figure(max(6, 1.5 + 0.35 * len(names) * (1 + len(values))), 4.5)
  axes = figure.subplots()
  for index, (label, own) in enumerate(values.items()):
    places = [names.index(name) + width * (index + 0.5) - 0.4 for name in own]
    axes.bar(places, [value for value, _ in own.values()], width, color=f"C{index % 10}", label=label)
    for place, (_, ends) in zip(places, own.values(), strict=True):
      if ends is not None:
        axes.plot((place, place), ends, color=INK, linewidth=1)
  axes.set_xticks(range(len(names)), names, rotation=20, ha="right", parse_math=False)
  axes.yaxis.set_major_formatter(PercentFormatter(1))
  axes.legend(frameon=False, fontsize=9)
  _style(axes, title)
  save(figure, path)


def plot_sweep(curves: Mapping[str, tuple[Sequence[float], Sequence[float], float]], title: str, path: Path) -> None:
  """Draws the validation score of linear probes against the regularisation, with the chosen value.

  Args:
    curves: for each method the values of C, their scores, and the chosen C.
    title: name of the data set.
    path: PNG file to write.
  """
  figure = new_figure(7, 4)
  axes = figure.subplots()
  for index, (label, (strengths, scores, chosen)) in enumerate(curves.items()):
    order = np.argsort(strengths)
    axes.plot(np.take(strengths, order), np.take(scores, order), marker="o", color=f"C{index % 10}", label=label)
    axes.axvline(chosen, color=f"C{index % 10}", linestyle=":", linewidth=1)
  axes.set_xscale("log")
  axes.yaxis.set_major_formatter(PercentFormatter(1))
  axes.set_xlabel("C, the inverse strength of the regularisation; dotted: the chosen value")
  axes.legend(frameon=False)
  _style(axes, title)
  save(figure, path)


def _style(axes: Axes, title: str) -> None:
  axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, parse_math=False)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(color="#e6e6e6", linewidth=0.8)
  axes.set_axisbelow(True)


def _logit(share: np.ndarray | float) -> np.ndarray:
  share = np.clip(share, 1e-4, 1 - 1e-4)
  return np.log(share / (1 - share))


def _from_logit(value: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-value))
