"""The pictures: files have the right contents for any texts, and no global state changes."""

import warnings

import matplotlib
from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import pytest

from declip_jax.reporting import pictures
from declip_jax.reporting.pictures import (
  Answer,
  Tile,
  Views,
  plot_examples,
  plot_pairs,
  plot_retrieval,
  plot_tiles,
  plot_views,
)

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
GREY, PURPLE = (128, 128, 128), (200, 0, 200)
RIGHT_RGB, WRONG_RGB = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def pixels(path):
  with Image.open(path) as image:
    return np.asarray(image.convert("RGB"))


def where(picture, color):
  """The rows and columns of the pixels of about this colour."""
  return np.nonzero((np.abs(picture.astype(int) - color) <= 2).all(-1))


def views(colors, texts=("a dog", "a [mask]")):
  """An example whose views have one colour each, of an original in purple."""
  count = len(colors)
  return Views(
    originals=[np.full((60, 40, 3), PURPLE, np.uint8)],
    views=np.broadcast_to(np.array(colors, np.uint8)[:, None, None], (count, 32, 32, 3)),
    boxes=[(0, (0.5, 0.0, 0.5, 0.5))] * count,
    changes=["crop 25%, brightness 1.20, grey, blur 1.3 px, flipped"] * count,
    texts=texts,
    notes=["", "1 to predict"],
  )


def test_originals_are_left_of_their_views_and_texts_right_of_them(tmp_path):
  colors, path = [[RED, GREEN], [BLUE, YELLOW], [RED, GREEN], [BLUE, YELLOW]], tmp_path / "views.png"
  plot_views([views(own) for own in colors], "title", path, ["first", "second"], ["raw", "masked"])
  picture = pixels(path)
  assert picture.shape[1] == 1000
  assert picture.shape[0] <= 1000  # a grid that fits a screen
  assert picture.shape[0] >= 4 * 120
  red, green, blue, yellow, purple = [where(picture, color) for color in (RED, GREEN, BLUE, YELLOW, PURPLE)]
  assert all(len(rows) == pytest.approx(2 * 120**2, rel=0.1) for rows, _ in (red, green, blue, yellow))
  assert purple[1].max() < red[1].min()
  assert red[1].max() < green[1].min()
  assert red[0].min() < blue[0].min() < red[0].max() < blue[0].max()
  inked = (picture < 100).all(-1)
  texts = inked[red[0].min() : red[0].min() + 120, green[1].max() + 10 :]
  assert 100 < texts.sum() < 5000
  below = inked[red[0].min() + 125 : blue[0].min() - 5, red[1].min() : green[1].max()]
  assert 100 < below.sum() < 5000  # what changed the views


def test_the_box_of_a_view_is_drawn_on_its_original(tmp_path):
  path = tmp_path / "views.png"
  plot_views([views([GREEN])], "", path, ["view"], ["raw", "masked"])
  picture = pixels(path)
  rows, columns = where(picture, PURPLE)
  framed_rows, framed_columns = where(picture, RIGHT_RGB)
  inside = framed_columns < where(picture, GREEN)[1].min() - 10  # not the frame of the view
  middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
  assert framed_rows[inside].min() == pytest.approx(middle[0], abs=3)
  assert framed_rows[inside].max() == pytest.approx(rows.max(), abs=3)
  assert framed_columns[inside].min() == pytest.approx(columns.min(), abs=3)
  assert framed_columns[inside].max() == pytest.approx(middle[1], abs=3)


NASTY = [
  "emoji 😀🎉👩‍👩‍👧 and flags 🇪🇺",
  "مرحبا بالعالم שלום",
  "漢字かな交じり文 한국어 ไทย हिन्दी",
  "costs $5, not \\frac{$6",
  "control \x00\x1b\n\t and half a pair \ud83d",
  "unbroken" * 500,
  "words " * 500,
  "",
]


@pytest.mark.filterwarnings("error")
def test_any_text_is_drawn_without_a_warning_and_without_touching_globals(tmp_path):
  filters, settings = list(warnings.filters), dict(matplotlib.rcParams)
  image = np.full((20, 30, 3), 128, np.uint8)
  shown = [views([RED], texts=[text, "x"]) for text in NASTY]
  plot_views(shown, NASTY[5], tmp_path / "views.png", ["$view"], ["raw", "masked"])
  found = [(image, [Answer(text, 1, 0.5, True)]) for text in NASTY]
  plot_retrieval(NASTY[6], [(text, [Answer(image, 1, 0.5, True)]) for text in NASTY], found, tmp_path / "retrieval.png")
  plot_tiles(NASTY[5], [Tile(image, text, text) for text in NASTY] + [Tile(None, "", "")], tmp_path / "tiles.png")
  plot_examples(NASTY[3], [(text, [image]) for text in NASTY], tmp_path / "examples.png")
  assert list(warnings.filters) == filters
  assert dict(matplotlib.rcParams) == settings
  for name in (
    "views.png",
    "retrieval.png",
    "tiles.png",
    "examples.png",
  ):  # long texts are cut: no ink reaches the border
    picture = pixels(tmp_path / name)
    assert (picture[:, -8:] == 255).all()
    assert (picture[-8:] == 255).all()


def test_the_right_image_is_shown_apart_with_its_place(tmp_path):
  wrong = [Answer(np.full((40, 40, 3), GREY, np.uint8), place, 1 / place, False) for place in range(1, 6)]
  right = Answer(np.full((40, 40, 3), GREEN, np.uint8), 37, 0.01, True)
  texts = [(np.full((40, 40, 3), YELLOW, np.uint8), [Answer("a dog", 1, 0.5, True), Answer("a cat", 2, 0.4, False)])]
  path = tmp_path / "retrieval.png"
  plot_retrieval("title", [("a dog", [*wrong, right])], texts, path)
  picture = pixels(path)
  assert picture.shape[1] == 1000
  grey, green, yellow = (where(picture, color) for color in (GREY, GREEN, YELLOW))
  assert len(grey[0]) == pytest.approx(5 * 120**2, rel=0.1)
  assert green[1].min() > grey[1].max() + 20
  assert green[1].max() < 990
  assert yellow[0].min() > grey[0].max()
  framed = where(picture, RIGHT_RGB)
  assert framed[1][framed[0] < grey[0].max()].min() > grey[1].max()  # no frame of a wrong image is blue
  assert where(picture, WRONG_RGB)[1][where(picture, WRONG_RGB)[0] < grey[0].max()].max() < green[1].min()


def test_bad_samples_are_crossed_boxes(tmp_path):
  tiles = [Tile(np.full((30, 60, 3), GREEN, np.uint8), "cat", "a cat"), Tile(None, "broken", "s.tar:1: broken")]
  plot_tiles("title", tiles, tmp_path / "tiles.png")
  picture = pixels(tmp_path / "tiles.png")
  green, crossed = where(picture, GREEN), where(picture, WRONG_RGB)
  assert len(green[0]) == pytest.approx(149 * 149 / 2, rel=0.1)
  assert crossed[1].min() > green[1].max()
  assert (np.diag(picture[crossed[0].min() :, crossed[1].min() :, 0])[:100] != 0xEE).mean() > 0.5


def test_no_file_is_larger_than_the_limit(tmp_path, monkeypatch):
  rng, path = np.random.default_rng(0), tmp_path / "noise.png"
  noise = [("noise", list(rng.integers(0, 256, (6, 200, 200, 3), np.uint8)))] * 2
  for limit in (200_000, 50_000):  # fewer colours suffice, or do not
    monkeypatch.setattr(pictures, "MOST_BYTES", limit)
    plot_examples("title", noise, path)
    assert limit / 2 < path.stat().st_size <= limit
    assert (pixels(path).shape[1] == 1000) == (limit == 200_000)
    assert len(np.unique(pixels(path).reshape(-1, 3), axis=0)) <= 256


def test_pairs_are_framed_from_the_threshold_on(tmp_path):
  pairs = [[np.full((40, 20 + 20 * side, 3), 128, np.uint8) for side in range(2)] for _ in range(8)]
  path = tmp_path / "pairs.png"
  plot_pairs("title", pairs, [0.99, *[0.9] * 5, 0.8, 0.7], 0.8, path)
  picture = pixels(path)
  rows, columns = where(picture, RIGHT_RGB)
  second = rows > picture.shape[0] * 0.6
  assert columns[second].max() < picture.shape[1] / 5  # the first of the two pairs of the second row
  assert columns[~second].max() > picture.shape[1] * 4 / 5
  assert len(where(picture, GREY)[0]) > 8 * 3600


def test_wrong_shapes_are_named(tmp_path):
  example, path = views([RED]), tmp_path / "x.png"
  with pytest.raises(ValueError, match=r"float32 \[1, 32, 32, 3\]: expected uint8"):
    plot_views([example._replace(views=example.views.astype(np.float32))], "", path, ["v"], ["raw", "masked"])
  with pytest.raises(ValueError, match=r"\[1, 1, 1, 2, 2\]; expected \[1, 1, 1, 1, 1\]"):
    plot_views([example], "", path, ["v"], ["raw"])
  with pytest.raises(ValueError, match="2 pairs and 1 scores"):
    plot_pairs("", [(example.originals[0],) * 2] * 2, [0.5], 0.5, path)
  assert not path.exists()


def test_a_crash_while_writing_leaves_the_old_picture(tmp_path, monkeypatch):
  path, pairs = tmp_path / "pairs.png", np.full((1, 2, 8, 8, 3), 128, np.uint8)
  plot_pairs("title", pairs, [0.9], 0.5, path)
  before = path.read_bytes()

  def crash(self, file, **_):
    file.write(b"half")
    raise OSError("disk full")

  monkeypatch.setattr(Figure, "savefig", crash)
  with pytest.raises(OSError, match="disk full"):
    plot_pairs("title", pairs, [0.1], 0.5, path)
  assert path.read_bytes() == before
