"""Pictures of a run: training curves, augmented views with their texts, retrieved images, comparisons of runs.

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
from typing import TYPE_CHECKING, Any
import unicodedata
import warnings

from absl import logging
import numpy as np

from declip_jax.data.storage import outputs

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_DPI = 100
_CELL = 2.24  # width of a picture in inches: 224 pixels
_GAP = 0.12  # inches between pictures
_LINE = 0.16  # inches between two lines of text
_CHARACTER = 0.082  # width of a character in inches
_MONOSPACE = ["DejaVu Sans Mono", "DejaVu Sans"]  # both are part of matplotlib; the second covers more scripts
_PAIRS = 6  # pairs of pictures in a row
_INSIDE = 6  # number of curves up to which the legend is inside the axes
_FEW = 200  # number of points up to which each is marked and none is smoothed
RIGHT, WRONG, INK, FAINT = "#1a9850", "#d73027", "#222222", "#888888"


@contextlib.contextmanager
def optional(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns an error in drawing a picture into a warning: a picture must not stop a run."""
  try:
    yield
  except Exception:
    logging.warning("%s could not be drawn", path, exc_info=True)


def plot_views(
  images: np.ndarray,
  texts: Sequence[Sequence[str]],
  path: str | os.PathLike[str],
  view_names: Sequence[str],
  text_names: Sequence[str],
) -> None:
  """Draws a contact sheet: one row per example with its image views, and its text views below them.

  Args:
    images: uint8 `[b v h w 3]`.
    texts: `b` lists of `u` texts, as the model receives them.
    path: PNG file to write.
    view_names: `v` names, written above the pictures.
    text_names: `u` names, written before the texts.

  Raises:
    ValueError: `images` has another shape or type, or the numbers of names and texts do not match.
  """
  _check_views(images, texts, view_names, text_names)
  (count, views, height, width), margin = images.shape[:4], 2 * _GAP
  cell_height = _CELL * height / width
  sheet_width = views * (_CELL + _GAP) - _GAP
  notes = [_note(row, text_names, round(sheet_width / _CHARACTER)) for row in texts]
  block_heights = [cell_height + (note.count("\n") + 2.5) * _LINE for note in notes]
  sheet = _Sheet(sheet_width + 2 * margin, sum(block_heights) + 2 * margin + _LINE)
  for view, name in enumerate(view_names):
    sheet.write(margin + view * (_CELL + _GAP), margin, name, color=FAINT)
  top = margin + _LINE
  for example in range(count):
    for view in range(views):
      sheet.place(margin + view * (_CELL + _GAP), top, _CELL, cell_height, images[example, view])
    sheet.write(margin, top + cell_height + _LINE / 2, notes[example], family=_MONOSPACE)
    top += block_heights[example]
  save(sheet.figure, path)


def plot_retrieval(
  query_texts: Sequence[str],
  images: Sequence[Sequence[np.ndarray]] | np.ndarray,
  correct: np.ndarray | Sequence[Sequence[bool]],
  path: str | os.PathLike[str],
) -> None:
  """Draws the images that each text retrieves, best first: a solid green frame if correct, a dashed red one if not.

  Args:
    query_texts: `n` texts.
    images: `n` rows of `k` pictures, each uint8 `[h w 3]`; sizes may differ.
    correct: whether each picture belongs to its text, `[n k]`.
    path: PNG file to write.

  Raises:
    ValueError: the three have different numbers of queries, or `images` and `correct` different numbers of pictures.
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
      sheet.place(*place, _CELL, _CELL, picture, frame=RIGHT if mark else WRONG)
  save(sheet.figure, path)


def plot_examples(rows: Sequence[tuple[str, Sequence[np.ndarray]]], path: str | os.PathLike[str]) -> None:
  """Draws a row of pictures for each of some texts.

  Args:
    rows: texts, each with some pictures, uint8 `[h w 3]`; sizes and numbers may differ.
    path: PNG file to write.
  """
  margin, cell = 2 * _GAP, _CELL / 2
  most = max((len(pictures) for _, pictures in rows), default=0)
  pitch = cell + _GAP
  sheet = _Sheet(2 * margin + _CELL + _GAP + most * pitch, 2 * margin + max(len(rows), 1) * pitch - _GAP)
  for row, (text, pictures) in enumerate(rows):
    top = margin + row * pitch
    sheet.write(margin, top, _wrap(text, round(_CELL / _CHARACTER), 6))
    for place, picture in enumerate(pictures):
      sheet.place(margin + _CELL + _GAP + place * pitch, top, cell, cell, picture)
  save(sheet.figure, path)


def plot_pairs(
  pairs: Sequence[tuple[np.ndarray, np.ndarray]],
  scores: Sequence[float],
  threshold: float,
  path: str | os.PathLike[str],
) -> None:
  """Draws pairs of images in order, each with its score, and a green frame if it is at least the threshold.

  Args:
    pairs: two pictures each, uint8 `[h w 3]`; sizes may differ.
    scores: score of each pair.
    threshold: smallest score of a pair that counts.
    path: PNG file to write.

  Raises:
    ValueError: the numbers of pairs and scores differ.
  """
  if len(pairs) != len(scores):
    raise ValueError(f"{len(pairs)} pairs and {len(scores)} scores: must be equally many")
  margin, width, height = 2 * _GAP, _CELL + 3 * _GAP, _CELL / 2 + 2 * _LINE
  rows = -(-len(pairs) // _PAIRS) or 1
  sheet = _Sheet(2 * margin + _PAIRS * width, 2 * margin + rows * height)
  for number, (pair, score) in enumerate(zip(pairs, scores, strict=True)):
    left, top = margin + number % _PAIRS * width, margin + number // _PAIRS * height
    for side, picture in enumerate(pair):
      frame = RIGHT if score >= threshold else ""
      sheet.place(left + side * (_CELL / 2 + _GAP / 2), top, _CELL / 2, _CELL / 2, picture, frame=frame)
    sheet.write(left, top + _CELL / 2 + _GAP / 2, f"{score:.3f}")
  save(sheet.figure, path)


class _Sheet:
  """A figure on which pictures and texts are placed in inches from the top left corner."""

  def __init__(self, width: float, height: float):
    from matplotlib.figure import Figure

    self.figure = Figure(figsize=(width, height), dpi=_DPI)
    self._size = width, height

  def place(self, left: float, top: float, width: float, height: float, picture: np.ndarray, frame: str = "") -> None:
    """Draws a picture as large as the box allows, at its top, with a frame of the colour `frame`."""
    scale = min(width / picture.shape[1], height / picture.shape[0])
    across, down = scale * picture.shape[1], scale * picture.shape[0]
    box = self._across(left + (width - across) / 2), self._up(top + down)
    axes = self.figure.add_axes((*box, self._across(across), down / self._size[1]), xticks=[], yticks=[])
    axes.imshow(picture, aspect="auto")
    # Wrong ones are dashed for people who do not tell red from green.
    dashes = (0, (2, 1)) if frame == WRONG else "-"
    axes.spines[:].set(visible=bool(frame), linewidth=4, color=frame or INK, linestyle=dashes, capstyle="butt")

  def write(self, left: float, top: float, text: str, **style: Any) -> None:
    """Writes a text from its top left corner."""
    style = {"fontsize": 9, "color": INK, "verticalalignment": "top", "parse_math": False} | style
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
    raise ValueError(
      f"texts, view names, text names, texts per example: {found}; expected {expected} for images of this shape"
    )


def _note(texts: Sequence[str], names: Sequence[str], width: int) -> str:
  indent = max(map(len, names), default=0) + 2
  wrapped = [_wrap(text, max(20, width - indent), 6) for text in texts]
  blocks = [
    f"{name:<{indent}}" + text.replace("\n", "\n" + " " * indent) for name, text in zip(names, wrapped, strict=True)
  ]
  return "\n".join(blocks)


def _wrap(text: str, width: int, lines: int) -> str:
  # Broken captions contain half surrogate pairs and control characters, which a font cannot draw.
  printable = "".join(c if c.isprintable() else " " for c in text.encode(errors="replace").decode())
  # Letters of scripts that the font lacks become boxes, nearly twice as wide as Latin letters.
  wide = any(unicodedata.category(c) in ("Lo", "So") for c in printable)
  return textwrap.fill(printable, width // 2 if wide else width, max_lines=lines, placeholder=" ...")


def new_figure(width: float, height: float) -> "Figure":
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
  figure.get_layout_engine().set(w_pad=_GAP, h_pad=_GAP)
  return figure


def save(figure: "Figure", path: str | os.PathLike[str]) -> None:
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  file = io.BytesIO()
  with warnings.catch_warnings():
    # The font lacks emoji and most scripts of Asia, and draws boxes instead.
    warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
    figure.savefig(file, format="png", facecolor="white")
  outputs.write(path, file.getvalue())
