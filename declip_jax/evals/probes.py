"""Evaluators that train on the features of a split: linear probe, few shots, nearest neighbours, nearest class mean."""

from collections.abc import Sequence
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float, Int
import numpy as np

from declip_jax.data.sources import Source
from declip_jax.evals import few_shot as few_shot_lib
from declip_jax.evals import linear_probe as linear_probe_lib
from declip_jax.evals import nearest, splits
from declip_jax.evals import sgd_probe as sgd_probe_lib
from declip_jax.evals.features import EvaluationData, Split
from declip_jax.evals.intervals import student
from declip_jax.evals.metrics import merge_classes
from declip_jax.evals.results import Scores
from declip_jax.evals.rows import Labelled, ProbeData
from declip_jax.evals.scoring import criterion, score, single_label_criterion
from declip_jax.runtime.hosts import gather_rows
from declip_jax.sharding import make_mesh
from declip_jax.spelling import counted

_TOGETHER = ("track", "video")  # groupings of frames that hardly differ


def linear_probe(data: EvaluationData, pictures: Path | None, *, features: str = "pooled") -> Scores:
  """Logistic regression with CLIP's sweep over its strength, see `linear_probe.sweep`.

  The strength is chosen by the metric of the data set on `val`, or, without one, on a part of `train`, see
  `splits.carve`.

  Args:
    data: the splits.
    pictures: unused.
    features: "pooled", the output of the tower before the projection, or "joint", the joint embedding, as in the
      example of CLIP's README.

  Raises:
    ValueError: a split cannot be used, see `linear_probe.sweep`.
  """
  del pictures
  rows, rule = _three_splits(data, features)
  result = linear_probe_lib.sweep(rows)
  details = {
    "features": features,
    "validation": rule,
    "strength": result.chosen.strength,
    "converged": result.converged,
    "fits": [dataclasses.asdict(fit) for fit in result.fits],
    "refit": result.refit and dataclasses.asdict(result.refit),
  }
  return score(data, _own_logits(data, result.scores), details)


def sgd_probe(
  data: EvaluationData,
  pictures: Path | None,
  *,
  rates: Sequence[float] = sgd_probe_lib.RATES,
  epochs: int = sgd_probe_lib.SGD.epochs,
  batch_size: int = sgd_probe_lib.SGD.batch_size,
  optimizer: str = "sgd",
  features: str = "pooled",
) -> Scores:
  """A linear head trained by gradient descent, whose learning rate is chosen on `val`, see `sgd_probe.sgd_probe`.

  Args:
    data: the splits; without `val`, a part of `train` takes its place, see `splits.carve`.
    pictures: unused.
    rates: learning rates, not multiplied by the batch size.
    epochs: passes over the training split.
    batch_size: images of a step.
    optimizer: "sgd", SLIP's and MoCo v3's, or "adamw", that of CLIP_benchmark, which takes the rate 0.1, 10 epochs and
      64 images; it divides features by their norm.
    features: see `linear_probe`.

  Raises:
    ValueError: a split cannot be used, or every head diverged.
  """
  del pictures
  rows, rule = _three_splits(data, features)
  recipe = dataclasses.replace(sgd_probe_lib.RECIPES[optimizer], epochs=epochs, batch_size=batch_size)
  result = sgd_probe_lib.sgd_probe(rows, recipe=recipe, rates=tuple(rates))
  details = {
    "features": features,
    "validation": rule,
    "rate": result.rate,
    "val_scores": [list(pair) for pair in result.val_scores.items()],
    "loss": result.loss.tolist(),
  }
  return score(data, _own_logits(data, result.scores), details)


def few_shot(
  data: EvaluationData,
  pictures: Path | None,
  *,
  shots: Sequence[int] = few_shot_lib.CLIP_SHOTS,
  seeds: Sequence[int] = few_shot_lib.SEEDS,
  method: str = "logistic",
  strength: float = few_shot_lib.STRENGTH,
  features: str = "pooled",
) -> Scores:
  """Accuracy after training on a few images per class: the mean over draws of these images.

  Its interval is Student's over the draws; the images of the test split are the same for all. Numbers of shots that
  some class does not have are left out. Predictions have `row`, `label`, and for each number of shots whether the
  answers are correct, `correct_shots_4` `[n seeds]`.

  Args:
    data: the splits.
    pictures: unused.
    shots: images per class.
    seeds: seeds of the draws.
    method: "logistic" regression as in CLIP's figure 6, or big_vision's "ridge" regression.
    strength: C of logistic regression, which "ridge" ignores; 0 chooses it on as many further images of each class.
    features: see `linear_probe`.

  Raises:
    ValueError: a split cannot be used, or a class has no image.
  """
  del pictures
  rows = _two_splits(data, features)
  label = gather_rows(rows.train.label)
  counts = np.bincount(label[label >= 0], minlength=rows.classes)
  fewest = int(counts.min())
  chooses = method == "logistic" and not strength
  used = [count for count in shots if (2 * count if chooses else count) <= fewest]
  if not used:
    rarest = _trained(data)[int(counts.argmin())]
    least = 2 * min(shots) if chooses else min(shots)
    raise ValueError(
      f"{data.train.name}: {counted(fewest, 'image')} of {rarest!r}; expected at least {least} of each class"
    )

  def metric(logits: np.ndarray, label: np.ndarray) -> float:
    return criterion(data.metric)(_own_logits(data, logits), label)

  def correct(logits: np.ndarray, label: np.ndarray) -> Bool[np.ndarray, "n"]:
    return few_shot_lib.first_is_correct(_own_logits(data, logits), label)

  logistic = partial(few_shot_lib.logistic, strength=strength or None)
  fit = few_shot_lib.ridge if method == "ridge" else logistic
  found = fit(dataclasses.replace(rows, score=metric), shots=used, seeds=seeds, correct=correct)
  metrics = {f"shots_{count}": float(value) for count, value in zip(used, found.mean, strict=True)}
  deviations = {} if found.std is None else dict(zip(metrics, found.std.tolist(), strict=True))
  headline = f"shots_{used[-1]}"
  details = {
    "features": features,
    "method": method,
    "metric": single_label_criterion(data.metric),
    "std": deviations,
    "by_seed": {str(seed): row for seed, row in zip(seeds, found.scores.tolist(), strict=True)},
    "strengths": None if found.strengths is None else found.strengths.tolist(),
    "left_out": [count for count in shots if count not in used],
  }
  several = len(seeds) > 1
  intervals = {name: _interval(found.scores[:, place]) for place, name in enumerate(metrics)} if several else {}
  label = gather_rows(rows.test.label)
  answers = {f"correct_{name}": found.correct[:, :, place] for place, name in enumerate(metrics)}
  predictions = {"row": np.flatnonzero(label >= 0).astype(np.int32), "label": label[label >= 0], **answers}
  return Scores(
    {headline: metrics[headline], **metrics, "images": len(predictions["row"])}, intervals, predictions, details
  )


def _interval(values: Float[np.ndarray, "seeds"]) -> tuple[float, float]:
  """Student's interval of the mean of some fractions, within 0 and 1."""
  lower, upper = student(values)
  return max(lower, 0.0), min(upper, 1.0)


def knn(
  data: EvaluationData,
  pictures: Path | None,
  *,
  neighbours: Sequence[int] = nearest.NEIGHBOURS,
  headline: int = 20,
  temperature: float = nearest.TEMPERATURE,
  features: str = "pooled",
) -> Scores:
  """Classification by weighted votes of the nearest training images (Wu et al. 2018, as in DINO).

  Args:
    data: the splits.
    pictures: unused.
    neighbours: numbers of neighbours; those larger than the training split are left out.
    headline: the one of `neighbours` whose scores are reported in full; the largest that is possible if the training
      split has fewer images.
    temperature: of the weights, more than 0.
    features: see `linear_probe`.

  Raises:
    ValueError: a split cannot be used.
  """
  del pictures
  rows = _two_splits(data, features)
  shared = {"classes": rows.classes, "mesh": rows.mesh, "neighbours": neighbours, "temperature": temperature}
  counts, label = nearest.knn(rows.train, rows.test, **shared)
  chosen, used = headline if headline in counts else max(counts), label >= 0
  details = {"features": features, "neighbours": chosen, "temperature": temperature}
  scores = score(data, _own_logits(data, counts[chosen]()), details)
  metrics = {f"k_{size}": rows.score(_own_logits(data, votes())[used], label[used]) for size, votes in counts.items()}
  return dataclasses.replace(scores, metrics={**scores.metrics, **metrics})


def nearest_mean(data: EvaluationData, pictures: Path | None, *, features: str = "pooled") -> Scores:
  """Classification by the nearest mean of a class's unit-norm features.

  Args:
    data: the splits.
    pictures: unused.
    features: see `linear_probe`.

  Raises:
    ValueError: a split cannot be used.
  """
  del pictures
  rows = _two_splits(data, features)
  logits, _ = nearest.nearest_mean(rows.train, rows.test, classes=rows.classes)
  return score(data, _own_logits(data, logits), {"features": features})


def check(source: Source | Sequence[Any], field: str, **options: Any) -> None:
  """Rejects a source without class names.

  Raises:
    ValueError: the message names the source.
  """
  del options
  if not source.classnames:
    raise ValueError(f"{source.name} has no class names, which {field} needs")


def _classes(data: EvaluationData) -> int:
  """The number of classes of the training split."""
  if not _trained(data):
    raise ValueError(f"{data.test.name} has no class names")
  return len(_trained(data))


def _trained(data: EvaluationData) -> Sequence[str]:
  """The names of the classes of the training split."""
  return data.classnames if data.parent is None else data.parent.classnames


def _own_logits(data: EvaluationData, logits: Float[np.ndarray, "n trained"]) -> Float[np.ndarray, "n classes"]:
  """The logits of the classes of the data set, from those of the classes of the training split."""
  return logits if data.parent is None else merge_classes(logits, data.parent.ids)


def _labelled(split: Split, kind: str) -> Labelled:
  """The features of a split with its labels; images that cannot be read have none."""
  found = split.features
  features = found.pooled if kind == "pooled" else found.embedding
  if features is None:
    raise ValueError(f"{split.name}: the model has no joint space, so features={kind!r} does not exist")
  if found.labels is not None:
    return Labelled(features, np.where(found.readable[:, None], found.labels, 0).astype(np.int8))
  return Labelled(features, np.where(found.readable, found.label, -1))


def _two_splits(data: EvaluationData, features: str) -> ProbeData:
  """Training and test rows, judged by the metric of the data set, on all devices."""
  train, test = _labelled(data.train, features), _labelled(data.test, features)
  used = test.label >= 0 if test.label.ndim == 1 else (test.label != 0).any(axis=1)
  if not gather_rows(used).any():  # before anything is trained
    raise ValueError(f"{data.test.name}: no readable image has a class label")
  return ProbeData(train, test, criterion(data.metric), _classes(data), make_mesh(-1, 1))


def _three_splits(data: EvaluationData, features: str) -> tuple[ProbeData, str]:
  """Training, validation and test rows, and where the validation rows are from."""
  found = _two_splits(data, features)
  if data.val is not None:
    return dataclasses.replace(found, val=_labelled(data.val, features)), "given"
  train, val, rule = _carve(found.train, data.train, data.validation_per_class)
  return dataclasses.replace(found, train=train, val=val), rule


def _carve(train: Labelled, split: Split, per_class: int) -> tuple[Labelled, Labelled, str]:
  """This host's rows of a part of the training split to train on, those of one to choose hyperparameters on, the rule.

  Images of one track or video, by the grouping of this name, stay together.
  """
  label = gather_rows(train.label)
  kinds = label if label.ndim == 1 else np.where((label != 0).any(axis=1), 0, -1)  # several labels: one stratum
  together = next((name for name in _TOGETHER if name in split.groups), "")
  group = gather_rows(split.groups[together]) if together else None
  rule = splits.RULE.replace("20 %", f"{per_class} images") if per_class else splits.RULE
  fitted, held_out = splits.carve(kinds, group, per_class or None)
  rule = f"{rule}, each {together} in one part" if together else rule
  return _take(train, _own(fitted, split)), _take(train, _own(held_out, split)), rule


def _own(rows: Int[np.ndarray, "m"], split: Split) -> Int[np.ndarray, "k"]:
  """Those of some rows of a source that this host has, counted from its first one."""
  return rows[(rows >= split.rows.start) & (rows < split.rows.stop)] - split.rows.start


def _take(rows: Labelled, index: Int[np.ndarray, "k"]) -> Labelled:
  return Labelled(rows.features[index], rows.label[index])
