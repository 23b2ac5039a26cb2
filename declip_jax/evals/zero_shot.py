"""Zero-shot classification through prompts (Radford et al. 2021, section 3.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from declip_jax.config import TEMPLATES
from declip_jax.data.sources import Source
from declip_jax.evals.features import EvaluationData
from declip_jax.evals.mistakes import draw_confusions
from declip_jax.evals.prompts import classifier, from_templates, token_classifier, unique_prompts
from declip_jax.evals.results import Scores
from declip_jax.evals.scoring import METRICS, score
from declip_jax.runtime.hosts import gather_rows

__all__ = ["METRICS", "check", "zero_shot"]
_SCALE = 100.0  # CLIP's inverse temperature


def zero_shot(data: EvaluationData, pictures: Path | None, *, templates: Sequence[str] = TEMPLATES) -> Scores:
  """The metrics of `scoring.score`, of cosines with the classes' prompts; images without a label are skipped.

  Where images have several labels and each class ranks all images, scores are logarithms of probabilities, of a softmax
  of 100 times the cosines, since these are comparable between images (openai/CLIP#153). Classes with the same prompts
  have the same scores, so that the first of them is answered: "missile" and "sunglasses" are two of ImageNet's each.

  Args:
    data: split to classify, and embeddings of prompts.
    pictures: PNG file of the most frequent confusions, None for none.
    templates: prompts with `{}` for the class name, for data without prompts of its own.

  Raises:
    ValueError: the source has no labelled image; see also `check` and `check_templates`.
  """
  prompts = data.prompts
  if prompts is None:
    check(data.test.source, "zero_shot")
    prompts = from_templates(data.classnames, templates)
  kinds = {own: number for number, own in enumerate(dict.fromkeys(map(tuple, prompts)))}
  texts, rows = unique_prompts([*kinds])
  embeddings = data.texts(texts)
  if data.tokens:
    logits = data.test.map_images(token_classifier(embeddings, rows, data.similarity))
  else:
    logits = data.similarity(data.test.images, classifier(embeddings, rows))
  logits = gather_rows(logits)[:, [kinds[tuple(own)] for own in prompts]]
  if data.test.labels is not None and data.metric != "any_label":
    logits = log_softmax(_SCALE * logits.astype(np.float64), axis=1)
  scores = score(data, logits)
  draw_confusions(data.test.source, data.classnames, scores, pictures)
  return scores


def check(source: Source | Sequence[Any], field: str, **options: Any) -> None:
  """Rejects a source without class names.

  Raises:
    ValueError: the message names the source.
  """
  del options
  if not source.classnames:
    raise ValueError(
      f"{source.name} has no class names, which {field} needs: put a classnames.txt, with one name per line, next to "
      "its first file"
    )
