"""Examples of what a classifier confuses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from declip_jax.data import images as image_ops
from declip_jax.data.sources import Source
from declip_jax.evals import metrics
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
  pairs = metrics.confusions(label, predicted)[:_PAIRS]
  if not pairs:
    return

  def name(index: int) -> str:
    return classnames[index] if index < len(classnames) else str(index)

  with optional(path):
    found = []
    for true, answer, _ in pairs:
      own = rows[(label == true) & (predicted == answer)]
      pictures = [image_ops.decode(source[int(row)]["image"]) for row in own[:_IMAGES]]
      found.append((f"{name(true)}, taken for {name(answer)}: {len(own):,}", pictures))
    mistakes = int(((label != predicted) & (predicted >= 0)).sum())  # -1 is no answer
    title = f"{source.name}: {mistakes:,} of {len(label):,} images taken for another class; the most frequent mistakes"
    plot_examples(title, found, path)
