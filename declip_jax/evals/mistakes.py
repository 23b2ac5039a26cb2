"""Examples of what a classifier confuses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
import numpy as np

from declip_jax.data import images as image_ops
from declip_jax.data.sources import Source
from declip_jax.evals.results import Scores
from declip_jax.reporting.pictures import optional, plot_examples

_PAIRS, _IMAGES = 8, 6  # confused pairs of classes in the picture, and images of each


def draw_confusions(
  source: Source | Sequence[Any], classnames: Sequence[str], scores: Scores, path: Path | None
) -> None:
  """Draws the first images of the most frequent confusions; nothing without single labels or mistakes.

  Args:
    source: images that were classified.
    classnames: names of the classes.
    scores: scores of a classifier on it, see `scoring.score`.
    path: PNG file to write, None for none.
  """
  if path is None or not {"label", "predicted"} <= scores.predictions.keys():
    return
  label, predicted, rows = (scores.predictions[name].astype(np.int64) for name in ("label", "predicted", "row"))
  pairs = confused(label, predicted)
  if not pairs:
    return

  def name(index: int) -> str:
    return classnames[index] if index < len(classnames) else str(index)

  with optional(path):
    found = []
    for true, answer in pairs:
      own = rows[(label == true) & (predicted == answer)]
      pictures = [image_ops.decode(source[int(row)]["image"]) for row in own[:_IMAGES]]
      found.append((f"{name(true)}, taken for {name(answer)}: {len(own):,}", pictures))
    plot_examples(found, path)


def confused(label: Int[np.ndarray, "n"], predicted: Int[np.ndarray, "n"]) -> list[tuple[int, int]]:
  """The most frequent pairs of a class and a wrong answer; of equally frequent ones the first classes."""
  wrong = label != predicted
  pairs, count = np.unique(np.stack([label[wrong], predicted[wrong]], axis=1), axis=0, return_counts=True)
  order = np.argsort(-count, kind="stable")[:_PAIRS]
  return [(int(true), int(answer)) for true, answer in pairs[order]]
