"""Results of evaluations, in memory and as files: one JSON file per model, data set and task, and its predictions.

The first six keys of a file are those of CLIP_benchmark, with its names of tasks and metrics, so that `clip_benchmark
build` merges our files with its own; the key `declip_jax` has everything else, see `Result`. A file depends only on
what was evaluated, and not on when, where and how fast; that is in `results.jsonl` beside the files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
import io
import json
import math
import os
from pathlib import Path
import re
from typing import Any

import numpy as np

from declip_jax.runtime import records

LANGUAGE = "en"
PREDICTIONS, PICTURES, LOG = "predictions", "pictures", "results.jsonl"


@dataclass(frozen=True)
class Scores:
  """What an evaluator returns.

  Attributes:
    metrics: fractions, and counts as integers; an undefined metric is absent. The first one is the headline.
    intervals: lower and upper end of the 95 % interval of a metric, by its name.
    predictions: arrays with one row per evaluated image or query, for comparisons of models on the same data; `row`
      is the row in the source.
    details: anything else that a reader needs to know, such as the regularisation that was chosen, for JSON.

  Raises:
    ValueError: a metric or an interval is not finite.
  """

  metrics: Mapping[str, float]
  intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
  predictions: Mapping[str, np.ndarray] = field(default_factory=dict)
  details: Mapping[str, Any] = field(default_factory=dict)

  def __post_init__(self) -> None:
    for name, value in self.metrics.items():
      if not math.isfinite(value):
        raise ValueError(f"metric {name} is {value}: an undefined metric has to be left out")
    for name, ends in self.intervals.items():
      if name not in self.metrics or not all(map(math.isfinite, ends)):
        raise ValueError(f"interval {ends} of metric {name}: expected finite ends, of one of {[*self.metrics]}")

  @property
  def headline(self) -> str:
    """Name of the metric that stands for all."""
    return next(iter(self.metrics))


@dataclass(frozen=True)
class Result:
  """The result of a task on a data set by a model, as its file has it.

  Attributes:
    dataset: name of the data set, CLIP_benchmark's where it has one.
    model, pretrained: names of the model and of its weights.
    task: CLIP_benchmark's name of the task, or ours where it has none.
    metrics: CLIP_benchmark's names of those metrics that it has, and their values.
    ours: everything else:
      `key`: hash of everything that the result depends on;
      `kind`: the evaluator, a key of `EVALUATORS`; `variant`: tells results apart that differ in nothing above;
      `headline`: name of the headline metric;
      `metrics`, `intervals`, `details`: those of `Scores`;
      `about`: what the evaluation says about the data set, see `jobs.Job`, and the `chance` of the headline metric, its
        value if all answers are guessed, where that is known;
      `data`: for each split its source, stamp and number of samples; of `test` also `Split.content`;
      `options`: those of the evaluator;
      `weights`: path, origin, step, hash and number of `parameters`; `average`, the decay of the moving average of the
        weights of a run that they are, if they are one; of a mixture `share`, that of these weights in it, and
        `interpolated_with`, the same of the other weights;
      `training`: of a run, how it was trained until then, see `planning.training_facts`;
      `view`: preprocessing; `dtype`: compute dtype; `model`: fields of the model;
      `numerics`: backend and precision of products; `features_dtype`: that of features of images;
      `versions`: of this package and of libraries.
  """

  dataset: str
  model: str
  pretrained: str
  task: str
  metrics: Mapping[str, float]
  ours: Mapping[str, Any]

  @property
  def stem(self) -> str:
    """Name of the file, without its suffix; CLIP_benchmark's, and the variant if there is one."""
    variant = self.ours.get("variant", "")
    task = f"{self.task}_{variant}" if variant else self.task
    return slug(f"{self.dataset}_{self.pretrained}_{self.model}_{LANGUAGE}_{task}")

  def to_json(self) -> str:
    """The content of the file.

    Raises:
      ValueError: a number is not finite.
    """
    first = {name: getattr(self, name) for name in ("dataset", "model", "pretrained", "task", "metrics")}
    return (
      json.dumps(_plain({**first, "language": LANGUAGE, "declip_jax": self.ours}), indent=2, allow_nan=False) + "\n"
    )


def write(folder: Path, result: Result, predictions: Mapping[str, np.ndarray]) -> Path:
  """Writes the predictions of a result, and then its JSON file, each completely or not at all; returns the latter.

  Raises:
    ValueError: a number is not finite.
    OSError: a file cannot be written.
  """
  content, path = result.to_json(), folder / f"{result.stem}.json"
  (folder / PREDICTIONS).mkdir(parents=True, exist_ok=True)
  if predictions:
    file = io.BytesIO()
    np.savez_compressed(file, **predictions)
    records.write(predictions_path(path), file.getvalue())
  else:
    predictions_path(path).unlink(missing_ok=True)  # those of an earlier result
  records.write(path, content.encode())
  return path


def read(path: Path) -> Result:
  """Reads a file of `write`.

  Raises:
    ValueError: it is not one; the message names the file.
  """
  try:
    return parse(path.read_bytes())
  except (ValueError, LookupError, TypeError) as error:
    raise ValueError(f"{path}: not a result of declip_jax.evaluate ({type(error).__name__}: {error})") from error


def parse(content: bytes) -> Result:
  """The result in a file with this content; raises ValueError, LookupError or TypeError if it has none."""
  fields = json.loads(content.decode())
  names = ("dataset", "model", "pretrained", "task", "metrics")
  return Result(*(fields[name] for name in names), ours=fields["declip_jax"])


def read_all(folders: Iterable[str | os.PathLike[str]]) -> list[tuple[Path, Result]]:
  """All results in some folders, by folder and then by name, with their paths; other JSON files are skipped."""
  found = []
  for folder in folders:
    for path in sorted(Path(folder).glob("*.json")):
      try:
        found.append((path, read(path)))
      except ValueError:
        continue
  return found


def predictions_path(path: Path) -> Path:
  """The file of the predictions of a result."""
  return path.parent / PREDICTIONS / f"{path.stem}.npz"


def result_path(predictions: Path) -> Path:
  """The file of the result to which predictions belong."""
  return predictions.absolute().parent.parent / f"{predictions.stem}.json"


def picture_path(path: Path) -> Path:
  """The file of the picture of a result, which not every evaluation draws."""
  return path.parent / PICTURES / f"{path.stem}.png"


def slug(text: str) -> str:
  """A text as part of a file name: a slash becomes an underscore, as in CLIP_benchmark, and other signs a hyphen."""
  return re.sub(r"[^\w.@+=,-]+", "-", text.replace("/", "_"))


def _plain(value: Any) -> Any:
  """A value as JSON has it, without types of NumPy."""
  if isinstance(value, Mapping):
    return {str(name): _plain(entry) for name, entry in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(entry) for entry in value]
  if isinstance(value, (np.ndarray, np.generic)):
    return _plain(value.tolist())
  return value
