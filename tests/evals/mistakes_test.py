"""Examples of what a classifier confuses."""

from pathlib import Path

from greys import Greys
import numpy as np
from PIL import Image

from declip_jax.evals.mistakes import confused, draw_confusions
from declip_jax.evals.results import Scores


def test_the_most_frequent_confusions_come_first() -> None:
  label, predicted = np.array([0, 0, 1, 1, 1, 2, 2]), np.array([1, 0, 2, 2, 0, 2, 0])
  assert confused(label, predicted) == [(1, 2), (0, 1), (1, 0), (2, 0)]
  assert confused(label, label) == []


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
