"""Pictures of a run: training curves, augmented views with their texts, retrieved images, comparisons of runs.

All are PNG files, written to a temporary name and renamed, so a viewer never sees half of one. Figures are plain
objects: nothing here touches pyplot, the backend or matplotlib's global settings.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import os
from pathlib import Path
import textwrap
from typing import Any
import unicodedata
import warnings

from absl import logging
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
import numpy as np

_DPI = 100
_CELL = 2.24  # inches a picture is wide: 224 pixels
_GAP = 0.12  # inches between pictures
_LINE = 0.16  # inches from one line of text to the next
_CHARACTER = 0.082  # inches a character takes
_MONOSPACE = ["DejaVu Sans Mono", "DejaVu Sans"]  # both come with matplotlib; the second knows more scripts
_INSIDE = 6  # curves up to which their legend finds a place among them
_FEW = 200  # points up to which each is marked and none is smoothed
_RIGHT, _WRONG, _INK, _FAINT = "#1a9850", "#d73027", "#222222", "#888888"


@contextlib.contextmanager
def optional(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns an error while a picture is made into a warning.

  A picture is no reason to stop a run, least of all its first process while the others wait for it.
  """
  try:
    yield
  except Exception:
    logging.warning("no picture %s", path, exc_info=True)


_NO_SCORES = ("loss", "seconds", "images", "texts", "majority_share")


def plot_curves(metrics: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
  """Draws the curves of one run over its steps: losses, evaluations, learning rate, temperature, features and speed.

  Long series are drawn light, with a smoothed line on top. The loss panel holds "loss" and every "loss/<term>"; the
  evaluation panel every "eval/..." that is a score, and no loss, duration or count; the deviation of the
  features of every branch, about 1, falls to 0 where one collapses. Missing series leave their panel empty.

  Args:
    metrics: the rows of `metrics.read_metrics`; a None or a number that is not finite is a missing point.
    path: the PNG file to write.
  """
  figure = _figure(14, 8)
  small = ("lr", "temperature", "images_per_second")
  panels = figure.subplot_mosaic([["loss", "loss", "eval", "eval"], ["lr", "temperature", "deviation", small[-1]]])
  names = sorted({name for row in metrics for name in row})
  losses = [name for name in names if name == "loss" or name.startswith("loss/")]
  scores = [name for name in names if name.startswith("eval/") and not name.endswith(_NO_SCORES)]
  _panel(panels["loss"], "loss", {name.removeprefix("loss/"): _series(metrics, name) for name in losses})
  _panel(panels["eval"], "evaluation", {name.removeprefix("eval/"): _series(metrics, name) for name in scores})
  spread = [name for name in names if name.startswith("diagnostics/") and name.endswith("/deviation")]
  _panel(panels["deviation"], "deviation", {name.split("/")[1]: _series(metrics, name) for name in spread})
  for name in small:
    _panel(panels[name], name.replace("_", " "), {"last": _series(metrics, name)}, smooth=name == "images_per_second")
  for name in ("loss", "eval"):
    panels[name].set_xlabel("step")
  _save(figure, path)


def plot_comparison(
  runs: Mapping[str, Sequence[Mapping[str, Any]]],
  metric_names: Sequence[str],
  path: str | os.PathLike[str],
  baselines: Mapping[str, float] | None = None,
) -> None:
  """Draws one metric or several, a panel each, of several runs over the examples seen.

  Args:
    runs: label to the rows of `metrics.read_metrics`. The axis is "examples" if all rows have it, else "step".
    metric_names: the metrics to draw.
    path: the PNG file to write.
    baselines: label to a value known from elsewhere, a dashed line in every panel.
  """
  rows = [row for run in runs.values() for row in run]
  axis = "examples" if all("examples" in row for row in rows) else "step"
  figure = _figure(7 * len(metric_names), 5)
  for axes, name in zip(figure.subplots(1, len(metric_names), squeeze=False)[0], metric_names, strict=True):
    _panel(axes, name.removeprefix("eval/"), {label: _series(run, name, axis) for label, run in runs.items()})
    axes.set_xlabel({"examples": "examples seen", "step": "step"}[axis])
    for label, value in (baselines or {}).items():
      axes.axhline(value, color=_FAINT, linestyle="--", linewidth=1)
      place = {"xy": (0, value), "xytext": (4, 3), "xycoords": axes.get_yaxis_transform()}
      axes.annotate(label, **place, textcoords="offset points", color=_FAINT, fontsize=8, parse_math=False)
  _save(figure, path)


def plot_views(
  images: np.ndarray,
  texts: Sequence[Sequence[str]],
  path: str | os.PathLike[str],
  view_names: Sequence[str],
  text_names: Sequence[str],
) -> None:
  """Draws a contact sheet: a row per example with its image views, its text views underneath.

  Args:
    images: uint8 `[b v h w 3]`.
    texts: `b` lists of `u` texts, as the model sees them.
    path: the PNG file to write.
    view_names: `v` names, written above the pictures.
    text_names: `u` names, written before the texts.

  Raises:
    ValueError: `images` has another shape or type, or a number of names or texts does not fit.
  """
  _check_views(images, texts, view_names, text_names)
  (count, views, height, width), margin = images.shape[:4], 2 * _GAP
  cell_height = _CELL * height / width
  sheet_width = views * (_CELL + _GAP) - _GAP
  notes = [_note(row, text_names, round(sheet_width / _CHARACTER)) for row in texts]
  block_heights = [cell_height + (note.count("\n") + 2.5) * _LINE for note in notes]
  sheet = _Sheet(sheet_width + 2 * margin, sum(block_heights) + 2 * margin + _LINE)
  for view, name in enumerate(view_names):
    sheet.write(margin + view * (_CELL + _GAP), margin, name, color=_FAINT)
  top = margin + _LINE
  for example in range(count):
    for view in range(views):
      sheet.place(margin + view * (_CELL + _GAP), top, _CELL, cell_height, images[example, view])
    sheet.write(margin, top + cell_height + _LINE / 2, notes[example], family=_MONOSPACE)
    top += block_heights[example]
  _save(sheet.figure, path)


def plot_retrieval(
  query_texts: Sequence[str],
  images: Sequence[Sequence[np.ndarray]] | np.ndarray,
  correct: np.ndarray | Sequence[Sequence[bool]],
  path: str | os.PathLike[str],
) -> None:
  """Draws the images that each text retrieves, best first, framed green where correct and red where not.

  Args:
    query_texts: `n` texts.
    images: `n` rows of `k` pictures, each uint8 `[h w 3]`; sizes may differ.
    correct: `[n k]` whether the picture belongs to the text.
    path: the PNG file to write.

  Raises:
    ValueError: the three do not have the same number of queries, or a row of `images` not that of `correct`.
  """
  correct = np.asarray(correct, bool)
  if not len(query_texts) == len(images) == len(correct):
    raise ValueError(
      f"{len(query_texts)} texts, {len(images)} rows of images, {len(correct)} of correct: must be equal"
    )
  margin, pitch = 2 * _GAP, _CELL + 2 * _GAP
  sheet = _Sheet(2 * margin + (1 + correct.shape[1]) * pitch, 2 * margin + len(images) * pitch - 2 * _GAP)
  for row, (text, pictures, marks) in enumerate(zip(query_texts, images, correct, strict=True)):
    sheet.write(margin, margin + row * pitch, _wrap(text, round(_CELL / _CHARACTER), 12))
    for rank, (picture, mark) in enumerate(zip(pictures, marks, strict=True)):
      place = margin + (1 + rank) * pitch, margin + row * pitch
      sheet.place(*place, _CELL, _CELL, picture, frame=_RIGHT if mark else _WRONG)
  _save(sheet.figure, path)


class _Sheet:
  """A figure on which pictures and texts are placed by the inch, from the top left corner."""

  def __init__(self, width: float, height: float):
    self.figure = Figure(figsize=(width, height), dpi=_DPI)
    self._size = width, height

  def place(self, left: float, top: float, width: float, height: float, picture: np.ndarray, frame: str = "") -> None:
    """Draws a picture as large as fits at the top of the box, framed in the colour `frame`."""
    scale = min(width / picture.shape[1], height / picture.shape[0])
    across, down = scale * picture.shape[1], scale * picture.shape[0]
    box = self._across(left + (width - across) / 2), self._up(top + down)
    axes = self.figure.add_axes((*box, self._across(across), down / self._size[1]), xticks=[], yticks=[])
    axes.imshow(picture, aspect="auto")
    axes.spines[:].set(visible=bool(frame), linewidth=4, color=frame or _INK)

  def write(self, left: float, top: float, text: str, **style: Any) -> None:
    """Writes a text whose top left corner is given."""
    style = {"fontsize": 9, "color": _INK, "verticalalignment": "top", "parse_math": False} | style
    self.figure.text(self._across(left), self._up(top), text, **style)

  def _across(self, inches: float) -> float:
    return inches / self._size[0]

  def _up(self, inches: float) -> float:
    return 1 - inches / self._size[1]


def _check_views(images: np.ndarray, texts: Sequence[Sequence[str]], *names: Sequence[str]) -> None:
  if images.ndim != 5 or images.shape[-1] != 3 or images.dtype != np.uint8:
    raise ValueError(f"images {images.dtype} {list(images.shape)}: expected uint8 [b v h w 3]")
  found = len(texts), *map(len, names), {len(row) for row in texts}
  expected = len(images), images.shape[1], len(names[1]), {len(names[1])}
  if found != expected:
    raise ValueError(f"texts, view names, text names, texts per example: {found}; expected {expected} for these images")


def _note(texts: Sequence[str], names: Sequence[str], width: int) -> str:
  indent = max(map(len, names), default=0) + 2
  wrapped = [_wrap(text, max(20, width - indent), 6) for text in texts]
  blocks = [
    f"{name:<{indent}}" + text.replace("\n", "\n" + " " * indent) for name, text in zip(names, wrapped, strict=True)
  ]
  return "\n".join(blocks)


def _wrap(text: str, width: int, lines: int) -> str:
  # A font cannot draw half of a surrogate pair, nor control characters, which broken captions contain.
  printable = "".join(c if c.isprintable() else " " for c in text.encode(errors="replace").decode())
  # Letters of the scripts that the font lacks become boxes, nearly twice as wide as Latin ones.
  wide = any(unicodedata.category(c) in ("Lo", "So") for c in printable)
  return textwrap.fill(printable, width // 2 if wide else width, max_lines=lines, placeholder=" ...")


def _series(rows: Sequence[Mapping[str, Any]], name: str, axis: str = "step") -> tuple[np.ndarray, np.ndarray]:
  """The points `(x, y)` of a metric, without the missing ones and those that are not finite."""
  points = [(row[axis], row[name]) for row in rows if row.get(name) is not None]
  x, y = np.array(points, float).reshape(-1, 2).T
  return x[np.isfinite(y)], y[np.isfinite(y)]


def _figure(width: float, height: float) -> Figure:
  figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
  figure.get_layout_engine().set(w_pad=_GAP, h_pad=_GAP)
  return figure


def _panel(axes: Axes, title: str, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, smooth: bool = True) -> None:
  """Draws curves with their last value in the legend, which stands beside them if they are many.

  More than ten also differ in line style.
  """
  axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK, parse_math=False)
  axes.spines[["top", "right"]].set_visible(False)
  curves = {label: curve for label, curve in curves.items() if len(curve[0])}
  if not curves:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=_FAINT)
    return
  axes.grid(color="#e6e6e6", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.xaxis.set_major_formatter(EngFormatter(sep=""))
  axes.yaxis.set_major_formatter("{x:.4g}")
  for index, (label, (x, y)) in enumerate(curves.items()):
    style = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":", "-.")[index // 10 % 4], "linewidth": 1.6}
    if len(x) <= _FEW:
      style |= {"marker": "o", "markersize": 3}
    elif smooth:
      axes.plot(x, y, color=style["color"], linewidth=0.6, alpha=0.25)
      y = _smooth(y, len(y) // 50)
    axes.plot(x, y, label=f"{label}  {y[-1]:.4g}", **style)
  beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(curves) > _INSIDE else {}
  for text in axes.legend(frameon=False, fontsize=9, **beside).get_texts():
    text.set_parse_math(False)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
  """A centred average under a bell about `width` points wide; at the ends it takes the points there are."""
  bell = np.hanning(2 * width + 1)
  return np.convolve(values, bell, "same") / np.convolve(np.ones_like(values), bell, "same")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  with warnings.catch_warnings():
    # The font lacks emoji and most scripts of Asia; it draws boxes, which is all one can ask.
    warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
    figure.savefig(temporary, format="png", facecolor="white")
  os.replace(temporary, path)
