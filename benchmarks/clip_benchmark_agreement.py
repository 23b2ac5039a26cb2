"""Evaluates our features by CLIP_benchmark's functions, and compares the numbers with our results."""

from collections.abc import Callable, Iterator, Sequence
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from clip_benchmark_folders import TEMPLATES, Folder
import numpy as np
from optional_imports import optional_import

import declip_jax
from declip_jax.data.sources import open_source
from declip_jax.evals import results
from declip_jax.evals.features import encode

torch, open_clip = optional_import("torch"), optional_import("open_clip")
zeroshot_classification = optional_import("clip_benchmark.metrics.zeroshot_classification")
zeroshot_retrieval = optional_import("clip_benchmark.metrics.zeroshot_retrieval")

TOLERANCE = 1e-6
_BATCH = 256


class Stored:
  """A model whose images are rows of features, and whose texts are encoded by a function."""

  def __init__(self, images: np.ndarray, encode_text: Callable[[list[str]], np.ndarray]):
    self._images, self._encode_text, self._texts = torch.from_numpy(images), encode_text, []

  def tokenizer(self, texts: Sequence[str]) -> Any:
    """Numbers of texts."""
    first = len(self._texts)
    self._texts.extend(texts)
    return torch.arange(first, len(self._texts))

  def encode_image(self, rows: Any) -> Any:
    """Features of rows."""
    return self._images[rows]

  def encode_text(self, numbers: Any) -> Any:
    """Embeddings of texts."""
    return torch.from_numpy(self._encode_text([self._texts[number] for number in numbers.tolist()]))


class Loader:
  """Batches of rows with what belongs to each; `dataset.classes` is what CLIP_benchmark reads of a data set."""

  def __init__(self, values: Sequence[Any], classes: Sequence[str]):
    self._values, self.dataset = values, SimpleNamespace(classes=list(classes))

  def __iter__(self) -> Iterator[tuple[Any, Any]]:
    for start in range(0, len(self._values), _BATCH):
      values = self._values[start : start + _BATCH]
      labels = torch.tensor(values) if self.dataset.classes else values
      yield torch.arange(start, start + len(values)), labels


def print_agreement(place: Path, sets: Sequence[Folder]) -> None:
  """Prints every metric of both on the same features, and what CLIP_benchmark found with its own.

  Raises:
    AssertionError: two numbers differ by more than `TOLERANCE`, and there are no ties.
  """
  clip = declip_jax.load(place / "export")
  encoders = clip.encoders(_BATCH)
  read = [own for _, own in results.read_all([place / "ours-cold"])]
  found = {(own.ours["about"]["key"].removeprefix("own/"), own.task): own for own in read}
  print("| data set | task | metric | ours | CLIP_benchmark, same features | its own features |")
  print("|---|---|---|---|---|---|")
  for one in sets:
    source = open_source(f"clip_benchmark:{one.path}?split=test")
    features = encode(source, encoders, range(len(source)))
    same = _evaluate(one, source, Stored(features.embedding, clip.encode_text))
    for task in one.tasks:
      own = found[one.name, task]
      theirs = json.loads((place / f"theirs-{one.name}-{task}.json").read_text())["metrics"]
      for name, value in own.metrics.items():
        reference = "" if task == "linear_probe" else f"{same[name]:.6f}"
        print(f"| {one.name} | {task} | {name} | {value:.6f} | {reference} | {theirs[name]:.6f} |")
        if reference and not own.ours["metrics"].get("ties"):
          assert abs(value - same[name]) <= TOLERANCE, f"{one.name}: {name} differs on the same features"


def _evaluate(one: Folder, source: Any, model: Stored) -> dict[str, float]:
  """CLIP_benchmark's metrics of a model."""
  if one.classnames:
    loader = Loader([source[row]["label"] for row in range(len(source))], one.classnames)
    names, templates = list(one.classnames), list(TEMPLATES)
    return zeroshot_classification.evaluate(model, loader, model.tokenizer, names, templates, "cpu", amp=False)
  loader = Loader([source[row]["captions"] for row in range(len(source))], ())
  return zeroshot_retrieval.evaluate(model, loader, model.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
