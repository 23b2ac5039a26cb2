"""Sheets of pictures: augmented views with their texts, retrieved images, samples, mistakes, pairs.

All are PNG files, written under a temporary name and renamed, so that a viewer never sees an incomplete file. Figures
are plain objects: nothing here changes pyplot, the backend or matplotlib's global settings. matplotlib is imported only
when something is drawn: most commands draw nothing.
"""

from collections.abc import Iterator, Sequence
import contextlib
import io
import os
from pathlib import Path
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple
import unicodedata
import warnings

from absl import logging
import numpy as np
from PIL import Image

from declip_jax.data.storage import outputs

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

MOST_BYTES = 2**20  # of a file
_DPI = 100
_WIDTH = 10.0  # of a sheet, in inches
_CELL, _PAIR = 1.2, 0.7  # width of a picture, and of one of a pair
_PITCH = 1.55  # from a view to the next
_TEXT = 1.6  # width of a column of texts
_GAP = 0.12  # between pictures
_LINE, _SMALL_LINE = 0.16, 0.135  # from a line of text, and of small text, to the next
_CHARACTER, _SMALL, _BOLD = 0.075, 0.064, 0.1  # width of a character of a text, a small text and a title
_PAIRS = 6  # pairs of pictures in a row
_BEST = 5  # answers of a query that are not drawn apart
RIGHT, WRONG, INK, FAINT = "#0072B2", "#D55E00", "#222222", "#777777"
_VIEW_COLORS = (RIGHT, WRONG, "#009E73", "#CC79A7")


@contextlib.contextmanager
def optional(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns an error in drawing a picture into a warning: a picture must not stop a run."""
  try:
    yield
  except (OSError, ValueError) as error:  # mostly of the data, of which the run itself says more
    logging.warning("%s could not be drawn: %s", path, error)
  except Exception:
    logging.warning("%s could not be drawn", path, exc_info=True)


class Views(NamedTuple):
  """An example as the model receives it, and what it was made from.

  Attributes:
    originals: pictures from which the views were made, uint8 `[h w 3]`.
    views: image views, uint8 `[v h w 3]`.
    boxes: for each view the number of its original, and the part of it that the view shows: top, left, height and
      width as shares of the original's.
    changes: for each view what changed it.
    texts: text views.
    notes: for each text view what changed it.
  """

  originals: Sequence[np.ndarray]
  views: np.ndarray
  boxes: Sequence[tuple[int, tuple[float, float, float, float]]]
  changes: Sequence[str]
  texts: Sequence[str]
  notes: Sequence[str]


def plot_views(
  examples: Sequence[Views],
  title: str,
  path: str | os.PathLike[str],
  view_names: Sequence[str],
  text_names: Sequence[str],
) -> None:
  """Draws a row for each example: its originals with the part that each view shows, the views, and the texts.

  Args:
    examples: examples of equally many originals, `v` views and `u` texts.
    title: what the examples are.
    path: PNG file to write.
    view_names: `v` names, written above the views.
    text_names: `u` names, written above the texts.

  Raises:
    ValueError: views have another shape or type, or numbers differ.
  """
  for example in examples:
    _check_views(example, view_names, text_names)
  originals = max((len(example.originals) for example in examples), default=1)
  left = 2 * _GAP + (originals + len(view_names)) * _PITCH
  width = max(_WIDTH, left + 2.5 * bool(text_names))
  changes = [[wrap(text, round(_PITCH / _SMALL), 6) for text in example.changes] for example in examples]
  notes = [_notes(example, text_names, round((width - left - 2 * _GAP) / _CHARACTER)) for example in examples]
  heights = []
  for own, text in zip(changes, notes, strict=True):
    below = max((change.count("\n") + 1 for change in own), default=0)
    heights.append(max(_CELL + below * _SMALL_LINE, (text.count("\n") + 1) * _LINE) + 2 * _GAP)
  sheet = _Sheet(title, width, sum(heights) + 1.5 * _LINE)
  names = ["original", "other image"][:originals] + [f"{n}: {name}" for n, name in enumerate(view_names, 1)]
  for column, name in enumerate(names):
    sheet.write(2 * _GAP + column * _PITCH, 0, name, color=([FAINT] * originals + [*_VIEW_COLORS] * len(names))[column])
  top = 1.5 * _LINE
  for example, own, text, height in zip(examples, changes, notes, heights, strict=True):
    _draw_views(sheet, top, example, originals, own)
    sheet.write(left, top, text)
    top += height
  sheet.save(path)


def _draw_views(sheet: "_Sheet", top: float, example: Views, originals: int, changes: Sequence[str]) -> None:
  """Draws the pictures of an example, with what changed each view below it."""
  colors = [_VIEW_COLORS[view % len(_VIEW_COLORS)] for view in range(len(example.views))]
  for number, original in enumerate(example.originals):
    boxes = [(box, color) for (of, box), color in zip(example.boxes, colors, strict=True) if of == number]
    sheet.place(2 * _GAP + number * _PITCH, top, _CELL, _CELL, original, boxes=boxes)
  for view, (picture, change, color) in enumerate(zip(example.views, changes, colors, strict=True)):
    place = 2 * _GAP + (originals + view) * _PITCH
    sheet.place(place, top, _CELL, _CELL, picture, frame=color, thickness=1.5)
    sheet.write(place, top + _CELL + _GAP / 2, change, fontsize=7.5)


class Answer(NamedTuple):
  """A picture or text that was found for a query.

  Attributes:
    found: picture, uint8 `[h w 3]`, or text.
    place: its place among all candidates, 1 for the highest score.
    score: its similarity to the query.
    is_right: whether it belongs to the query.
  """

  found: np.ndarray | str
  place: int
  score: float
  is_right: bool


def plot_retrieval(
  title: str,
  of_texts: Sequence[tuple[str, Sequence[Answer]]],
  of_images: Sequence[tuple[np.ndarray, Sequence[Answer]]],
  path: str | os.PathLike[str],
) -> None:
  """Draws the images that some texts find, and the texts that some images find, each with its place and score.

  Args:
    title: data and scores.
    of_texts: texts with their answers, pictures of which the first five are the best; a sixth is drawn apart.
    of_images: pictures with their answers, which are texts.
    path: PNG file to write.
  """
  across = 2 * _GAP + _TEXT, _WIDTH / 2
  row, block = _CELL + _LINE + 2 * _GAP, max(_CELL, (_BEST + 1) * _LINE) + 2 * _GAP
  second = 1.5 * _LINE * bool(of_texts) + len(of_texts) * row
  sheet = _Sheet(title, _WIDTH, second + (1.5 * _LINE + -(-len(of_images) // 2) * block) * bool(of_images))
  if of_texts:
    sheet.write(2 * _GAP, 0, "text to image: the best images, and the right one if it is not among them", color=FAINT)
  for number, (text, answers) in enumerate(of_texts):
    top = 1.5 * _LINE + number * row
    sheet.write(2 * _GAP, top, wrap(text, round(_TEXT / _CHARACTER), 7))
    for column, answer in enumerate(answers):
      place = across[0] + column * (_CELL + _GAP) + 2 * _GAP * (column >= _BEST)
      sheet.place(
        place, top, _CELL, _CELL, answer.found, frame=_frame(answer), dashed=not answer.is_right, thickness=2.5
      )
      sheet.write(place, top + _CELL + _GAP / 2, _mark(answer), color=_frame(answer), fontsize=8)
  if of_images:
    sheet.write(
      2 * _GAP, second, "image to text: the best texts, and the right one if it is not among them", color=FAINT
    )
  for number, (picture, answers) in enumerate(of_images):
    left, top = 2 * _GAP + number % 2 * across[1], second + 1.5 * _LINE + number // 2 * block
    sheet.place(left, top, _CELL, _CELL, picture)
    width = round((across[1] - _CELL - 4 * _GAP) / _SMALL)
    for line, answer in enumerate(answers):
      text = wrap(f"{_mark(answer)}  {answer.found}", width, 1)
      sheet.write(left + _CELL + _GAP, top + line * _LINE, text, color=_frame(answer), fontsize=8)
  sheet.save(path)


def _frame(answer: Answer) -> str:
  return RIGHT if answer.is_right else WRONG


def _mark(answer: Answer) -> str:
  return f"{'✓' if answer.is_right else '✗'} {answer.place:,}.  {answer.score:.2f}"


class Tile(NamedTuple):
  """A sample of a contact sheet.

  Attributes:
    picture: uint8 `[h w 3]`; None if it cannot be shown.
    name: its class; or what is wrong with it.
    text: its caption; or the name of a bad sample.
  """

  picture: np.ndarray | None
  name: str
  text: str


def plot_tiles(title: str, tiles: Sequence[Tile], path: str | os.PathLike[str], columns: int = 6) -> None:
  """Draws a contact sheet; a sample that cannot be shown is a crossed box.

  Args:
    title: data, and how many samples are bad.
    tiles: samples, row by row.
    path: PNG file to write.
    columns: number of tiles in a row.
  """
  pitch = (_WIDTH - 3 * _GAP) / columns
  cell, width = pitch - _GAP, round((pitch - _GAP) / _SMALL)
  height = cell + 4 * _LINE + _GAP
  sheet = _Sheet(title, _WIDTH, -(-len(tiles) // columns) * height)
  for number, tile in enumerate(tiles):
    left, top = 2 * _GAP + number % columns * pitch, number // columns * height
    if tile.picture is None:
      sheet.cross(left, top, cell)
    else:
      sheet.place(left, top, cell, cell, tile.picture)
    name = wrap(tile.name, width, 1)
    text = wrap(tile.text, width, 4 - bool(name))
    color = INK if tile.picture is not None else WRONG
    sheet.write(left, top + cell + _GAP / 2, name, fontsize=8, fontweight="bold", color=color)
    sheet.write(left, top + cell + _GAP / 2 + _LINE * bool(name), text, fontsize=8)
  sheet.save(path)


def plot_examples(title: str, rows: Sequence[tuple[str, Sequence[np.ndarray]]], path: str | os.PathLike[str]) -> None:
  """Draws a row of pictures for each of some texts.

  Args:
    title: what the rows are.
    rows: texts, each with some pictures, uint8 `[h w 3]`; sizes and numbers may differ.
    path: PNG file to write.
  """
  most = max((len(pictures) for _, pictures in rows), default=0)
  pitch = _CELL + _GAP
  sheet = _Sheet(title, max(_WIDTH, 4 * _GAP + _TEXT + most * pitch), max(len(rows), 1) * pitch)
  for row, (text, pictures) in enumerate(rows):
    sheet.write(2 * _GAP, row * pitch, wrap(text, round(_TEXT / _CHARACTER), 7))
    for column, picture in enumerate(pictures):
      sheet.place(2 * _GAP + _TEXT + column * pitch, row * pitch, _CELL, _CELL, picture)
  sheet.save(path)


def plot_pairs(
  title: str,
  pairs: Sequence[tuple[np.ndarray, np.ndarray]],
  scores: Sequence[float],
  threshold: float,
  path: str | os.PathLike[str],
) -> None:
  """Draws pairs of images in order, each with its score, and a blue frame if it is at least the threshold.

  Args:
    title: what is compared.
    pairs: two pictures each, uint8 `[h w 3]`; sizes may differ.
    scores: score of each pair.
    threshold: smallest score of a pair that counts.
    path: PNG file to write.

  Raises:
    ValueError: the numbers of pairs and scores differ.
  """
  if len(pairs) != len(scores):
    raise ValueError(f"{len(pairs)} pairs and {len(scores)} scores: must be equally many")
  width, height = (_WIDTH - 2 * _GAP) / _PAIRS, _PAIR + 2 * _LINE
  sheet = _Sheet(title, _WIDTH, (-(-len(pairs) // _PAIRS) or 1) * height)
  for number, (pair, score) in enumerate(zip(pairs, scores, strict=True)):
    left, top = 2 * _GAP + number % _PAIRS * width, number // _PAIRS * height
    for side, picture in enumerate(pair):
      frame = RIGHT if score >= threshold else ""
      sheet.place(left + side * (_PAIR + _GAP / 2), top, _PAIR, _PAIR, picture, frame=frame)
    sheet.write(left, top + _PAIR + _GAP / 2, f"{score:.3f}")
  sheet.save(path)


class _Sheet:
  """A figure with a title, on which pictures and texts are placed in inches from the top left corner below it.

  Args:
    title: title.
    width: width in inches.
    height: height in inches below the title.
  """

  def __init__(self, title: str, width: float, height: float):
    from matplotlib.figure import Figure

    title = wrap(title, round((width - 4 * _GAP) / _BOLD), 3)
    self._top = 2 * _GAP + (title.count("\n") + 1) * 1.3 * _LINE + _GAP if title else 2 * _GAP
    self._size = width, self._top + height + 2 * _GAP
    self._figure = Figure(figsize=self._size, dpi=_DPI)
    self.write(2 * _GAP, 2 * _GAP - self._top, title, fontsize=11, fontweight="bold")

  def save(self, path: str | os.PathLike[str]) -> None:
    save(self._figure, path)

  def place(
    self,
    left: float,
    top: float,
    width: float,
    height: float,
    picture: np.ndarray,
    *,
    frame: str = "",
    dashed: bool = False,
    thickness: float = 3.0,
    boxes: Sequence[tuple[tuple[float, float, float, float], str]] = (),
  ) -> None:
    """Draws a picture as large as the space allows, at its top.

    Args:
      left, top, width, height: space in inches.
      picture: uint8 `[h w 3]`.
      frame: colour of its frame; "" for none.
      dashed: whether the frame is dashed.
      thickness: that of the frame, in points.
      boxes: top, left, height and width of boxes, as shares of the picture's, each with its colour.
    """
    from matplotlib.patches import Rectangle

    scale = min(width / picture.shape[1], height / picture.shape[0])
    across, down = scale * picture.shape[1], scale * picture.shape[0]
    axes = self._axes(left + (width - across) / 2, top, across, down)
    axes.imshow(picture, aspect="auto", extent=(0, 1, 1, 0))
    dashes = (0, (2, 1)) if dashed else "-"
    axes.spines[:].set(visible=bool(frame), linewidth=thickness, color=frame or INK, linestyle=dashes, capstyle="butt")
    for number, ((y, x, tall, wide), color) in enumerate(boxes):
      style = {"edgecolor": color, "linewidth": 1.5, "linestyle": ("-", "--", ":")[number % 3], "clip_on": False}
      axes.add_patch(Rectangle((x, y), wide, tall, fill=False, **style))

  def cross(self, left: float, top: float, side: float) -> None:
    """Draws a crossed box."""
    axes = self._axes(left, top, side, side)
    axes.plot([0, 1, np.nan, 0, 1], [0, 1, np.nan, 1, 0], color=WRONG, linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), facecolor="#eeeeee")
    axes.spines[:].set(color=WRONG)

  def write(self, left: float, top: float, text: str, **style: Any) -> None:
    """Writes a text from its top left corner."""
    style = {"fontsize": 9, "color": INK, "verticalalignment": "top", "parse_math": False} | style
    self._figure.text(left / self._size[0], self._up(top), text, **style)

  def _axes(self, left: float, top: float, width: float, height: float) -> "Axes":
    box = left / self._size[0], self._up(top + height), width / self._size[0], height / self._size[1]
    return self._figure.add_axes(box, xticks=[], yticks=[])

  def _up(self, inches: float) -> float:
    return 1 - (self._top + inches) / self._size[1]


def _check_views(example: Views, view_names: Sequence[str], text_names: Sequence[str]) -> None:
  images = example.views
  if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
    raise ValueError(f"views {images.dtype} {list(images.shape)}: expected uint8 [v h w 3]")
  found = [*map(len, (images, example.boxes, example.changes, example.texts, example.notes))]
  expected = [len(view_names)] * 3 + [len(text_names)] * 2
  if found != expected:
    raise ValueError(f"views, boxes, changes, texts and notes: {found}; expected {expected}, as many as names")


def _notes(example: Views, names: Sequence[str], width: int) -> str:
  """The texts of an example, each under its name and what changed it."""
  blocks = []
  for name, note, text in zip(names, example.notes, example.texts, strict=True):
    blocks += [f"{name}{', ' if note else ''}{note}:", textwrap.indent(wrap(text, width - 4, 4), "    ")]
  return "\n".join(blocks)


def wrap(text: str, width: int, lines: int) -> str:
  """A text in at most `lines` lines of `width` Latin letters, without what a font cannot draw."""
  # Broken captions contain half surrogate pairs and control characters, which a font cannot draw.
  printable = "".join(c if c.isprintable() else " " for c in text.encode(errors="replace").decode())
  # Letters of scripts that the font lacks become boxes, nearly twice as wide as Latin letters.
  wide = any(unicodedata.category(c) in ("Lo", "So") and c not in "°✓✗" for c in printable)
  return textwrap.fill(printable, width // 2 if wide else width, max_lines=lines, placeholder=" ...")


def new_figure(width: float, height: float) -> "Figure":
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
  figure.get_layout_engine().set(w_pad=_GAP, h_pad=_GAP)
  return figure


def save(figure: "Figure", path: str | os.PathLike[str]) -> None:
  """Writes a figure as PNG, with 256 colours and then at lower resolution if it is larger than `MOST_BYTES`."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  file = io.BytesIO()
  with warnings.catch_warnings():
    # The font lacks emoji and most scripts of Asia, and draws boxes instead.
    warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
    figure.savefig(file, format="png", facecolor="white")
  outputs.write(path, _bounded(file.getvalue()))


def _bounded(png: bytes) -> bytes:
  if len(png) <= MOST_BYTES:
    return png
  with Image.open(io.BytesIO(png)) as opened:
    image = opened.convert("RGB")
  while True:
    file = io.BytesIO()
    image.quantize(256).save(file, "PNG", optimize=True)
    if file.tell() <= MOST_BYTES:
      return file.getvalue()
    image = image.resize([max(1, round(0.8 * side)) for side in image.size])
