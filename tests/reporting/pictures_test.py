"""The pictures: files have the right contents for any texts, and no global state changes."""

import warnings

import matplotlib
from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import pytest

from declip_jax.reporting.pictures import plot_pairs, plot_retrieval, plot_views

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)


def pixels(path):
  with Image.open(path) as image:
    return np.asarray(image.convert("RGB"))


def where(picture, color):
  """The rows and columns of the pixels of about this colour."""
  return np.nonzero((np.abs(picture.astype(int) - color) <= 2).all(-1))


def test_views_are_drawn_in_a_grid_with_texts_underneath(tmp_path):
  colors = np.array([[RED, GREEN], [BLUE, YELLOW]], np.uint8)
  images = np.broadcast_to(colors[:, :, None, None], (2, 2, 32, 32, 3))
  path = tmp_path / "views.png"
  plot_views(images, [["a dog", "a <mask>"], ["a cat", "a cat"]], path, ["first", "second"], ["raw", "masked"])
  picture = pixels(path)
  (red, green), (blue, yellow) = [[where(picture, color) for color in row] for row in colors.tolist()]
  assert all(len(rows) == pytest.approx(224**2, rel=0.03) for rows, _ in (red, green, blue, yellow))
  assert red[1].max() < green[1].min()
  assert blue[1].max() < yellow[1].min()
  assert red[0].max() < blue[0].min()
  between = picture[red[0].max() + 2 : blue[0].min() - 2]
  assert 100 < (between < 100).all(-1).sum() < 5000  # ink of the first example's texts


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
  images = np.full((len(NASTY), 1, 20, 30, 3), 128, np.uint8)
  plot_views(images, [[text, "x"] for text in NASTY], tmp_path / "views.png", ["$view"], ["raw", "masked"])
  plot_retrieval(NASTY, images, np.ones((len(NASTY), 1)), tmp_path / "retrieval.png")
  assert list(warnings.filters) == filters
  assert dict(matplotlib.rcParams) == settings
  for name in ("views.png", "retrieval.png"):  # long texts are cut: no ink reaches the border
    picture = pixels(tmp_path / name)
    assert (picture[:, -8:] == 255).all()
    assert (picture[-8:] == 255).all()


def test_retrieved_images_are_framed_by_correctness(tmp_path):
  images = [[np.full((40, 20 + 20 * rank, 3), 128, np.uint8) for rank in range(3)] for _ in range(2)]
  path = tmp_path / "retrieval.png"
  plot_retrieval(["a dog", "a cat"], images, [[True, False, False], [False, False, True]], path)
  picture = pixels(path).astype(int)
  middle = picture.shape[0] // 2
  green = picture[..., 1] > picture[..., 0] + 60
  red = picture[..., 0] > picture[..., 1] + 60
  assert np.nonzero(green[:middle])[1].max() < np.nonzero(red[:middle])[1].min()
  assert np.nonzero(green[middle:])[1].min() > np.nonzero(red[middle:])[1].max()
  assert len(where(picture, (128, 128, 128))[0]) > 40_000


def test_pairs_are_framed_from_the_threshold_on(tmp_path):
  pairs = [[np.full((40, 20 + 20 * side, 3), 128, np.uint8) for side in range(2)] for _ in range(8)]
  path = tmp_path / "pairs.png"
  plot_pairs(pairs, [0.99, *[0.9] * 5, 0.8, 0.7], 0.8, path)
  picture = pixels(path).astype(int)
  middle = picture.shape[0] // 2  # between the two rows
  green = picture[..., 1] > picture[..., 0] + 60
  framed = np.nonzero(green[middle:])[1]
  assert framed.max() < picture.shape[1] / 6  # the first of the two pairs of the second row
  assert np.nonzero(green[:middle])[1].max() > picture.shape[1] * 5 / 6
  assert len(where(picture, (128, 128, 128))[0]) > 8 * 9000


def test_wrong_shapes_are_named(tmp_path):
  images, path = np.zeros((2, 1, 8, 8, 3), np.uint8), tmp_path / "x.png"
  with pytest.raises(ValueError, match=r"float32 \[2, 1, 8, 8, 3\]: expected uint8"):
    plot_views(images.astype(np.float32), [["a"]] * 2, path, ["v"], ["raw"])
  with pytest.raises(ValueError, match="texts per example"):
    plot_views(images, [["a"], ["a", "b"]], path, ["v"], ["raw"])
  with pytest.raises(ValueError, match="3 texts, 2 rows of images, 2 of correct"):
    plot_retrieval(["a", "b", "c"], images, np.ones((2, 1)), path)
  with pytest.raises(ValueError, match="2 pairs and 1 scores"):
    plot_pairs([(image[0], image[0]) for image in images], [0.5], 0.5, path)
  assert not path.exists()


def test_a_crash_while_writing_leaves_the_old_picture(tmp_path, monkeypatch):
  path, pairs = tmp_path / "pairs.png", np.full((1, 2, 8, 8, 3), 128, np.uint8)
  plot_pairs(pairs, [0.9], 0.5, path)
  before = path.read_bytes()

  def crash(self, file, **_):
    file.write(b"half")
    raise OSError("disk full")

  monkeypatch.setattr(Figure, "savefig", crash)
  with pytest.raises(OSError, match="disk full"):
    plot_pairs(pairs, [0.1], 0.5, path)
  assert path.read_bytes() == before
