"""Mixtures of two models in weight space, WiSE-FT (Wortsman et al. 2022), as models to evaluate."""

from collections.abc import Iterator, Sequence
from typing import Any

from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
import jax
import numpy as np

from declip_jax.clip import Clip
from declip_jax.evals.classes import names_for_prompts
from declip_jax.reporting.progress import message
from declip_jax.weights.interpolate import interpolate

Tree = Any
_UNLIKE = ("initializer", "norm_groups", "context_length", "vocab_size", "buckets")  # no matter, or one of shapes


def mixtures(start: Clip, end: Clip, shares: Sequence[float], templates: Sequence[str]) -> Iterator[tuple[float, Clip]]:
  """`end` with its weights, and batch statistics, interpolated from those of `start`; see `weights.interpolate`.

  If `end` is fine-tuned and has a classifier that `start` lacks, that of `start` consists of the embeddings of the
  names of its classes, and what a fine-tuned model lacks, such as the text tower, is left out.

  Args:
    start: the model before fine-tuning, on the devices of `end`.
    end: the model after it.
    shares: shares of `end`, 0 to 1.
    templates: prompts for the names of classes.

  Yields:
    Each share, and the mixture.

  Raises:
    ValueError: the models are not of the same architecture, or `start` cannot have the classifier.
  """
  _check_alike(start, end)
  before, after = (
    jax.tree.map(np.asarray, {"params": clip.params, "collections": clip.collections}) for clip in (start, end)
  )
  if "classifier" in after["params"]["heads"] and "classifier" not in before["params"]["heads"]:
    before = _with_classifier(before, after, _zero_shot_rows(start, end, templates))
  for share in shares:
    yield share, end.with_weights(**interpolate(before, after, share))


def _check_alike(start: Clip, end: Clip) -> None:
  """Rejects models that compute different things from arrays of the same shapes."""
  pairs = [("image", start.fields["image"], end.fields["image"])]
  if "text" in end.params["towers"]:
    pairs.append(("text", start.fields["text"], end.fields["text"]))
  for side, ours, theirs in pairs:
    for name in sorted({*ours, *theirs} - set(_UNLIKE), key=lambda name: (name != "kind", name)):
      if ours.get(name) != theirs.get(name):
        raise ValueError(
          f"{side}.{name}={ours.get(name)!r} of the weights to start from ({start.origin}) does not match "
          f"{theirs.get(name)!r} of the model ({end.origin}): "
          "only models of one architecture can be mixed"
        )
  for name in ("mean", "std"):
    ours, theirs = getattr(start.view, name), getattr(end.view, name)
    if not np.allclose(ours, theirs, atol=1e-6):
      raise ValueError(f"{start.origin} normalises pixels with {name} {ours}, and {end.origin} with {theirs}")


def _zero_shot_rows(start: Clip, end: Clip, templates: Sequence[str]) -> np.ndarray:
  """The zero-shot classifier of `start` for the classes of `end`, `[classes d]`."""
  shape = end.params["heads"]["classifier"]["kernel"].shape
  names, remark = names_for_prompts(end.classnames)
  if remark and jax.process_index() == 0:
    message(remark)
  rows = start.classifier(names, templates)
  if rows.T.shape != shape:
    raise ValueError(
      f"the classifier of {end.origin} has the shape {shape}, and the embeddings of its class names {rows.T.shape}: "
      "only a classifier that reads joint embeddings, as --config=finetune:head=text makes it, can be mixed"
    )
  return rows


def _with_classifier(before: Tree, after: Tree, rows: np.ndarray) -> Tree:
  """The arrays of `before` that `after` has, too, and a classifier with these rows and a bias of 0."""
  classifier = {"kernel": rows.T, "bias": np.zeros(len(rows), np.float32)}
  wanted = flatten_dict(after, keep_empty_nodes=True)
  empty = {path: leaf for path, leaf in wanted.items() if leaf is empty_node}
  given = {**flatten_dict(before), **flatten_dict({"params": {"heads": {"classifier": classifier}}})}
  return unflatten_dict({**empty, **{path: leaf for path, leaf in given.items() if path in wanted}})
