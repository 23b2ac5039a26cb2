"""Finds evaluation images in training data: python -m declip_jax.overlap --test SPEC --train SPEC --workdir DIR

Without --train, finds the near-duplicates within the test images. By default images are compared by a 64-bit hash of
their lowest frequencies, which needs no model; near-duplicates differ in at most 6 bits. --weights compares them by the
features of any checkpoint that declip_jax.load reads; SimCLR's are suitable, but CLIP's are not, since different images
of the same thing have similar features. The threshold for features is the one that tells altered copies of the test
images from other test images with a precision of --precision; --threshold sets another one. A test image that has the
same pixels as one of its nearest training images counts as identical, whatever the threshold.

DIR then has overlap.json, overlap.npz with the nearest training images of each test image, and overlap.png, the pairs
around the threshold: look at them, and set --threshold where the duplicates end. --predictions names the predictions of
an evaluation on the same data, to compare its accuracy on images with and without a duplicate; the result beside them
says whether the data are the same.
"""

from collections.abc import Iterator, Sequence
import io
import json
from pathlib import Path
import sys
from typing import Any, NamedTuple

from absl import flags, logging
import jax
from jaxtyping import Bool, Float
import numpy as np

from declip_jax import command_line
from declip_jax.clip import load
from declip_jax.data import images as image_ops
from declip_jax.data.guess import guess_test, read_as
from declip_jax.data.sources import Source, open_source
from declip_jax.data.storage.indexes import cache_folder
from declip_jax.evals import overlap as lib
from declip_jax.evals import results
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.feature_cache import FeatureCache
from declip_jax.evals.features import Encode, Split, encode, read_batches, surely
from declip_jax.evals.overlap import Nearest
from declip_jax.evals.similarity import unit_rows
from declip_jax.reporting.pictures import optional, plot_pairs
from declip_jax.reporting.progress import message
from declip_jax.runtime import records
from declip_jax.runtime.command import launch
from declip_jax.runtime.hosts import gather_rows
from declip_jax.spelling import counted
from declip_jax.weights.settings import parse_settings

_BATCH_SIZE = 256
_SHOWN = 36  # pairs in the picture
_SHARD = 2**16  # rows that have a copy in memory at once
_ROUNDING = 1e-5  # by which the cosine of equal features may differ from 1


class Detector(NamedTuple):
  """What compares images.

  Attributes:
    encoders: encode functions; images are compared by their pooled features.
    threshold: smallest cosine of near-duplicates, None if it is chosen for each data set.
    encode: function that returns features of a source.
  """

  encoders: Encoders
  threshold: float | None
  encode: Encode = encode


HASH = Detector(lib.hash_encoders(_BATCH_SIZE), lib.HASH_THRESHOLD)


class Search(NamedTuple):
  """The nearest training images of all test images, and how a detector tells copies from others.

  Attributes:
    found: nearest training images; those of the test set itself where there is no other.
    rates: errors of the detector at every threshold, on altered copies of the test images.
    readable: whether each test image could be decoded; the others have no neighbours.
  """

  found: Nearest
  rates: lib.Roc
  readable: Bool[np.ndarray, "n"]


def search(test: Source, train: Source | None, detector: Detector) -> Search:
  """Encodes all images and altered copies of the test images, and searches.

  Raises:
    ValueError: no test image can be read, or only one.
  """

  def split(source: Source) -> Split:
    return Split(source, detector.encoders, encode=detector.encode, read=surely(read_batches))

  query, copy = (gather_rows(np.concatenate([*_shards(split(source))])) for source in (test, lib.Copies(test)))
  readable = ~np.isnan(query).any(axis=1)
  if readable.sum() < 2:
    raise ValueError(
      f"{test.name}: {counted(int(readable.sum()), 'image')} can be read, but a detector is calibrated on at least two"
    )
  within = lib.nearest(query, [query], within=True)
  own = (unit_rows(query) * unit_rows(copy)).sum(axis=1)
  usable = readable & ~np.isnan(own) & (within.index[:, 0] >= 0)
  rates = lib.calibration(own[usable], within.cosine[usable, 0])
  if train is None:
    return Search(within, rates, readable)
  rows = split(train)
  return Search(lib.across_hosts(lib.nearest(query, _shards(rows), first=rows.rows.start)), rates, readable)


def _shards(split: Split) -> Iterator[Float[np.ndarray, "rows d"]]:
  """Features of this host's images, some at a time; NaN for those that cannot be read, which are near none."""
  features = split.features
  for start in range(0, max(len(features.pooled), 1), _SHARD):
    part = slice(start, start + _SHARD)
    yield np.where(features.readable[part, None], features.pooled[part], np.nan).astype(np.float32)


def describe(result: Search, threshold: float, within: bool) -> dict[str, Any]:
  """The fields of overlap.json that depend on the images."""
  nearest = result.found.cosine[result.readable, 0]
  known = nearest[np.isfinite(nearest)]
  counts, edges = np.histogram(known.clip(-1, 1), bins=np.linspace(-1, 1, 101))
  chosen = lib.at(result.rates, threshold)
  found = {
    "threshold": threshold,
    "precision": chosen.precision,
    "recall": chosen.recall,
    "images": int(result.readable.sum()),
    "unreadable": int((~result.readable).sum()),
    "overlap": int((nearest >= threshold).sum()),
    "contamination": float((nearest >= threshold).mean()),
    "histogram": {f"{edge:.2f}": int(count) for edge, count in zip(edges, counts, strict=False) if count},
  }
  if within:
    found |= lib.cluster_summary(lib.clusters(result.found, threshold)[result.readable])
  return found


def identical(test: Source, train: Source, found: Nearest) -> int:
  """Number of test images one of whose nearest training images has the same pixels."""

  def same(row: int) -> bool:
    candidates = found.index[row, found.cosine[row] >= 1 - _ROUNDING]
    return any(np.array_equal(_pixels(test, row), _pixels(train, index)) for index in candidates)

  return sum(same(row) for row in range(len(found.index)))


def _pixels(source: Source, index: int) -> np.ndarray:
  return image_ops.decode(source[int(index)]["image"])


def _draw(test: Source, train: Source, found: Nearest, threshold: float, path: Path) -> None:
  """Draws pairs around the threshold, nearest first: as many above it as below it, where there are enough."""
  order = np.argsort(-found.cosine[:, 0], kind="stable")
  order = order[np.isfinite(found.cosine[order, 0])]
  above = int((found.cosine[order, 0] >= threshold).sum())
  start = max(0, min(above - _SHOWN // 2, len(order) - _SHOWN))
  shown = order[start : start + _SHOWN]
  pairs = [(_pixels(test, index), _pixels(train, found.index[index, 0])) for index in shown]
  title = f"{test.name}, and the nearest image of {train.name}: pairs around the threshold {threshold:.3f}"
  plot_pairs(title, pairs, found.cosine[shown, 0], threshold, path)


def overlap(
  test: str,
  train: str,
  detector: Detector,
  workdir: Path,
  *,
  threshold: float | None = None,
  precision: float = 0.99,
  predictions: Path | None = None,
) -> dict[str, Any]:
  """Searches, and writes overlap.json, overlap.npz and overlap.png to `workdir`; returns the fields of the first.

  Args:
    test, train: specs of sources; "" as `train` for the test images themselves.
    detector: what compares images, such as `HASH`.
    workdir: folder to write to.
    threshold: smallest cosine of near-duplicates; None for that of the detector, or the one of `precision`.
    precision: least precision on altered copies.
    predictions: file of predictions with the array `row`, and `correct` or `rank`.

  Raises:
    OSError: the predictions, or the result to which they belong, cannot be read.
    ValueError: a source cannot be opened, no threshold has the precision, or the predictions are of other data; or,
      before anything is read, `threshold` or `precision` is out of its range.
  """
  for name, value, least in (("threshold", threshold, -1), ("precision", precision, 0)):
    if value is not None and not least <= value <= 1:
      raise ValueError(f"{name}={value}: expected a number from {least} to 1")
  query, rows = open_source(test), open_source(train) if train else None
  if predictions is not None:
    _check_predictions(predictions, query)
  result = search(query, rows, detector)
  if threshold is None:
    threshold = detector.threshold
  if threshold is None:
    threshold = lib.choose_threshold(result.rates, precision).cosine
  about = {"test": test, "train": train or test, **describe(result, threshold, within=not train)}
  about["identical"] = identical(query, rows or query, result.found)
  if about["precision"] < precision:
    logging.warning(
      "the threshold %.4g has a precision of %.4g on altered copies, less than %.4g: look at overlap.png, and give a "
      "higher --threshold or other --weights",
      *(threshold, about["precision"], precision),
    )
  overlaps = result.found.cosine[:, 0] >= threshold
  if predictions is not None:
    about["effect"] = _effect(overlaps, predictions)
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    np.savez_compressed(file, index=result.found.index, cosine=result.found.cosine, overlaps=overlaps)
    records.write(workdir / "overlap.npz", file.getvalue())
    with optional(workdir / "overlap.png"):
      _draw(query, rows or query, result.found, threshold, workdir / "overlap.png")
    records.write(workdir / "overlap.json", (json.dumps(about, indent=2, allow_nan=False) + "\n").encode())
  return about


def _check_predictions(predictions: Path, test: Source) -> None:
  """Rejects predictions that are not of the test images, by the result to which they belong.

  Raises:
    OSError: the result does not exist.
    ValueError: it is of other images, or no result.
  """
  about = results.read(results.result_path(predictions)).ours["data"]["test"]
  if [about["samples"], about["stamp"]] != [len(test), test.stamp]:
    changed = ", which has changed since" if [about["samples"], about["source"]] == [len(test), test.name] else ""
    raise ValueError(
      f"{predictions} has the predictions of {about['source']}, {counted(about['samples'], 'sample')}; expected those "
      f"of --test={test.name}, {counted(len(test), 'sample')}{changed}"
    )


def _effect(overlaps: Bool[np.ndarray, "n"], predictions: Path) -> dict[str, float]:
  with np.load(predictions, allow_pickle=False) as file:
    if "row" not in file.files or not {"correct", "rank"} & set(file.files):
      raise ValueError(f"{predictions} has the arrays {file.files}: expected the predictions of a classification")
    row, correct = file["row"], file["correct"].astype(bool) if "correct" in file.files else file["rank"] == 0
  if len(row) and row.max() >= len(overlaps):
    raise ValueError(f"{predictions} has a prediction for image {row.max()}, but --test has {len(overlaps)}")
  return lib.effect(overlaps[row], correct)


def _summary(about: dict[str, Any]) -> Sequence[str]:
  lines = [f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}" for name, value in about.items()]
  return [line for line in lines if not line.startswith("histogram")]


def _detector() -> Detector:
  """The detector of the flags, whose features are kept in the same cache as those of `evaluate`.

  Raises:
    ValueError: a flag would have no effect, or the weights cannot be used.
  """
  given = flags.FLAGS
  for name in ("settings", "batch_size"):
    if given[name].present and not given.weights:
      raise ValueError(f"--{name} has an effect only with --weights: the hash has no model")
  cache = None if given.cache == "off" else Path(given.cache or cache_folder() / "features")
  if not given.weights:
    kept = FeatureCache(cache, "none", {"detector": "64-bit DCT hash"}, (64, 0)) if cache else None
    return HASH._replace(encode=kept.encode if kept else encode)
  with command_line.naming("--weights"):
    clip = load(given.weights, parse_settings(given.settings, "--settings"))
  encoders = clip.encoders(given.batch_size, needs_text=False, field="--batch_size")
  if cache is None:
    return Detector(encoders, None)
  return Detector(encoders, None, clip.feature_cache(cache).encode)


def _command(workdir: Path) -> None:
  given = flags.FLAGS
  about = overlap(
    read_as(given.test, "--test", guess_test),
    read_as(given.train, "--train") if given.train else "",
    _detector(),
    workdir,
    threshold=given.threshold,
    precision=given.precision,
    predictions=Path(given.predictions) if given.predictions else None,
  )
  if jax.process_index() == 0:
    message("\n".join(_summary(about)), stream=sys.stdout)


def main() -> None:
  """Runs the command."""
  flags.DEFINE_string("test", None, "Evaluation images, a path or source such as webdataset:/data/test-*.tar.")
  flags.DEFINE_string("train", "", "Training images, a path or source; by default, the test images themselves.")
  flags.DEFINE_string(
    "weights", None, "Run, checkpoint or hf-hub:ORG/NAME whose image features to compare, not a hash."
  )
  flags.DEFINE_multi_string(
    "settings", [], "Setting that the checkpoint does not contain, such as text.activation=gelu."
  )
  flags.DEFINE_integer("batch_size", _BATCH_SIZE, "Images encoded at once.", lower_bound=1)
  flags.DEFINE_string("cache", None, "Folder of features, or off; by default in the user's cache folder.")
  flags.DEFINE_float(
    "threshold", None, "Smallest cosine of near-duplicates; for the hash, 1 - (bits that differ) / 32.", -1, 1
  )
  flags.DEFINE_float("precision", 0.99, "Minimum precision, on altered copies, of the threshold that is chosen.", 0, 1)
  flags.DEFINE_string("predictions", None, "Predictions of an evaluation on the test images (predictions/*.npz).")
  launch(_command, __doc__, required=("test",))


if __name__ == "__main__":
  main()
