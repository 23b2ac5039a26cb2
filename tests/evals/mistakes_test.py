"""Examples of what a classifier confuses."""

from pathlib import Path

from greys import Greys
import numpy as np
from PIL import Image
import pytest

from declip_jax.evals import mistakes
from declip_jax.evals.mistakes import draw_confusions
from declip_jax.evals.results import Scores


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
  """Titles of the rows of pictures, which are not drawn."""
  found: list[str] = []
  monkeypatch.setattr(mistakes, "plot_examples", lambda title, rows, path: found.extend(title for title, _ in rows))
  return found


def test_the_most_frequent_confusions_come_first(drawn: list[str], tmp_path: Path) -> None:
  """An image whose logits are NaN has no answer, and is not taken for the last class."""
  label, predicted = np.array([0, 0, 1, 1, 1, 2, 2, 0, 0, 0]), np.array([1, 0, 2, 2, 0, 2, 0, -1, -1, -1])
  predictions = {"row": np.arange(10), "label": label, "predicted": predicted}
  source = Greys([(grey, 0) for grey in range(10)])
  draw_confusions(source, ("cat", "dog", "owl"), Scores({"top1": 0.5}, predictions=predictions), tmp_path / "a.png")
  assert drawn == ["dog, taken for owl: 2", "cat, taken for dog: 1", "dog, taken for cat: 1", "owl, taken for cat: 1"]


def test_images_of_confusions_are_drawn(tmp_path: Path) -> None:
  source = Greys([(grey, 0) for grey in (10, 60, 110, 160)])
  predictions = {"row": np.array([0, 2, 3]), "label": np.array([0, 0, 1]), "predicted": np.array([1, 1, 1])}
  path = tmp_path / "confusions.png"
  draw_confusions(source, ("cat", "dog"), Scores({"top1": 0.5}, predictions=predictions), path)
  colours, number = np.unique(np.asarray(Image.open(path).convert("L")), return_counts=True)
  large = {int(colour) for colour, count in zip(colours, number, strict=True) if count > 5000}
  assert large == {10, 110, 255}  # those that are wrong, on white
  path.unlink()
  right = {**predictions, "label": predictions["predicted"]}
  for scores in (Scores({"top1": 0.5}, predictions=right), Scores({"top1": 0.5})):
    draw_confusions(source, ("cat", "dog"), scores, path)
  draw_confusions(source, (), Scores({"top1": 0.5}, predictions=predictions), None)
  assert not path.exists()
