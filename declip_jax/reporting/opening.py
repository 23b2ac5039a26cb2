"""The lines of a run before its first step, about its evaluations, and at its end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import itertools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from declip_jax.data import hangs
from declip_jax.data.images import Photo
from declip_jax.data.make_views import MakeViews, Origin
from declip_jax.data.sources import Source
from declip_jax.data.sources.heldout import Subset
from declip_jax.data.storage import files
from declip_jax.data.text.tokenizer import Tokenizer
from declip_jax.extras import grain
from declip_jax.reporting import pictures
from declip_jax.reporting.chance import recalls_at_chance
from declip_jax.reporting.metrics import score_text
from declip_jax.sharding import layout_table
from declip_jax.spelling import counted
from declip_jax.types import Batch

_SHOWN = 4  # samples in the picture of views
_PIXELS = 256  # of the longer side of an original in it, or up to twice as many


def opening_lines(
  *,
  sources: Sequence[Source],
  weights: Mapping[str, float],
  recipe: str,
  groups: Mapping[str, int],
  batch_size: int,
  start: int,
  total: int,
  mesh: Mesh,
  abstract: Any,
  changes: Sequence[str],
  total_before: int = 0,
  stages: Sequence[str] = (),
) -> Iterator[str]:
  """Describes a run; of one that is finished, only that, and what is different now.

  Args:
    sources: sources to train on.
    weights: weight of each active term.
    recipe: name of the recipe.
    groups: number of groups into which each kind of head divides a batch, 1 for none.
    batch_size: global batch size, of the last stage.
    start, total: first and last step.
    mesh: devices.
    abstract: shapes and shardings of the state.
    changes: differences from the config of the previous start.
    total_before: last step as of the previous start, 0 if it is not known.
    stages: a description of each stage, if the run has several.
  """
  changed = [f"changed since the last start: {line}" for line in changes]
  if start >= total:
    if start > total:
      yield f"nothing to train: this run has done {counted(start, 'step')}, more than the {total:,} of its config"
    else:
      yield f"nothing to train: this run has done all of its {counted(total, 'step')}"
    yield from changed
    return
  for source in sources:
    skipped = "".join(f", skipped {count:,}: {reason}" for reason, count in source.skipped.items())
    left_out = ""
    if source.left_out:
      left_out = f", left out {counted(sum(source.left_out.values()), 'file')}: {files.in_words(source.left_out)}"
    division = f", {source.division}" if isinstance(source, Subset) else ""
    yield f"{source.name}: {counted(len(source), 'sample')}{division}{skipped}{left_out}"
  terms = " + ".join(f"{weight:g} {name}" for name, weight in weights.items())
  num_params = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
  axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
  yield f"objective {terms}; recipe {recipe}; {num_params:,} parameters"
  of_examples = "" if stages else f" of {counted(batch_size, 'example')}"
  yield f"{counted(total, 'step')}{of_examples} on mesh {axes} ({mesh.devices.flat[0].device_kind})"
  yield from stages
  if mesh.size > 1:
    yield from layout_table(abstract)
  for name, count in groups.items():
    if count > 1:
      yield f"{name}: {count} groups of {counted(batch_size // count, 'pair')}"
  if start:
    yield f"resuming from step {start:,}{_of_another_length(total, total_before)}"
  yield from changed


def _of_another_length(total: int, total_before: int) -> str:
  """What it means to resume a run whose length has changed; "" if it has not."""
  if total_before in (0, total):
    return ""
  return (
    f" of a schedule that now has {counted(total, 'step')} instead of {total_before:,}: the steps so far keep the "
    "learning rates that they had; to start afresh, choose another --workdir"
  )


def draw_views(
  samples: "grain.MapDataset", make_views: MakeViews, augment: Callable[[Batch, jax.Array], Batch], path: Path
) -> str:
  """Draws the first samples of a run as the model receives them, unless the picture exists.

  Args:
    samples: samples of `make_views.with_origin`.
    make_views: what makes the samples.
    augment: the random part of the train step, a function of batch and step.
    path: PNG file to write.

  Returns:
    The texts of the samples, a table in Markdown; empty if nothing is drawn, or if the recipe has no texts.
  """
  if path.exists():
    return ""
  first = hangs.make_all(samples.__getitem__, _SHOWN, hangs.SECONDS)
  texts = [_texts(sample, make_views) for sample in first]
  fields = [name for name in ("image", "label") if name in first[0]]
  batch = jax.jit(augment)({name: np.stack([sample[name] for sample in first]) for name in fields}, 0)
  recipe, shown = make_views.recipe, np.rint(batch["image"]).astype(np.uint8)  # mixed images are not rounded
  examples = [
    _views(sample["origin"].item(), views, own, recipe.text_views)
    for sample, views, own in zip(first, shown, texts, strict=True)
  ]
  title = f"The first {_SHOWN} samples as the model receives them, and what changed each view"
  unlisted = ["colours, blur and flips of the train step"] if make_views.rendering.augment_on == "device" else []
  if recipe.mixup or recipe.cutmix:
    unlisted.append("mixing with another image")
  if "randaugment" in recipe.image_views:
    unlisted += ["RandAugment", "erasing"]
  if unlisted:
    title += f"; not listed: {', '.join(unlisted)}"
  pictures.plot_views(examples, title, path, recipe.image_views, recipe.text_views)
  return _table(recipe.text_views, texts)


def _texts(sample: Mapping[str, np.ndarray], make_views: MakeViews) -> list[str]:
  """The text views of a sample; in the masked one, the tokens to predict are marked."""
  tokenizer, texts = make_views.tokenizer, []
  for kind, ids in zip(make_views.recipe.text_views, sample.get("text", ()), strict=True):
    slots = {}
    if kind == "masked" and "mlm_position" in sample:
      fields = (sample[f"mlm_{name}"].tolist() for name in ("position", "target", "weight"))
      slots = {position: target for position, target, weight in zip(*fields, strict=True) if weight}
    texts.append(_marked(ids.tolist(), slots, tokenizer))
  return texts


def _marked(ids: Sequence[int], targets: Mapping[int, int], tokenizer: Tokenizer) -> str:
  """A text with the tokens to predict in brackets.

  Of a mask it is "[mask: dog]", of a random token "[cat: dog]", and "[dog]" if the token is still there.

  Args:
    ids: tokens of the text.
    targets: the tokens to predict, by their positions.
    tokenizer: what made the tokens.
  """

  def shown(position: int) -> str:
    now, target = (tokenizer.decode([token]) for token in (ids[position], targets[position]))
    return f"[{target}]" if now == target else f"[{now.strip('[]')}: {target}]"

  parts = []
  for is_target, run in itertools.groupby(range(len(ids)), key=targets.__contains__):
    positions = list(run)
    parts += map(shown, positions) if is_target else [tokenizer.decode([ids[position] for position in positions])]
  return " ".join(" ".join(parts).split())


def _views(origin: Origin, views: np.ndarray, texts: Sequence[str], kinds: Sequence[str]) -> pictures.Views:
  """A sample with what it was made from."""
  fields = [*origin.photos]
  boxes, changes = [], []
  for field, params in origin.views:
    photo = origin.photos[field]
    top, left, height, width = params.crop.visible
    boxes.append(
      (fields.index(field), (top / photo.height, left / photo.width, height / photo.height, width / photo.width))
    )
    changes.append(", ".join([f"crop {height * width / (photo.height * photo.width):.0%}", *params.describe()]))
  notes = {"augmented": origin.operation, "masked": f"{origin.masked} to predict, in brackets" if origin.masked else ""}
  unchanged = dict(zip(kinds, texts, strict=True)).get("raw")
  return pictures.Views(
    originals=[_thumbnail(photo) for photo in origin.photos.values()],
    views=views,
    boxes=boxes,
    changes=changes,
    texts=texts,
    notes=[
      f"{notes.get(kind, '')}{', unchanged' if kind == 'augmented' and text == unchanged else ''}"
      for kind, text in zip(kinds, texts, strict=True)
    ],
  )


def _thumbnail(photo: Photo) -> np.ndarray:
  """The whole image, not much larger than it is drawn."""
  factor = max(photo.height, photo.width) // _PIXELS
  pixels, reduced = photo.decode(factor)
  left = max(1, factor // reduced)
  return pixels[::left, ::left]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table in Markdown; empty without columns."""
  cells = [[" ".join(text.split()).replace("|", "\\|") for text in row] for row in rows]
  return "\n".join(f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *cells)) if names else ""


def score_lines(step: int, results: Mapping[str, float]) -> Iterator[str]:
  """Describes the metrics of an evaluation, one line per evaluator."""
  for name in dict.fromkeys(metric.split("/")[1] for metric in results):
    prefix = f"eval/{name}/"
    scores = {key.removeprefix(prefix): value for key, value in results.items() if key.startswith(prefix)}
    yield f"step {step:,}  {name}: {'  '.join(score_text(key, value) for key, value in scores.items())}"


def closing_lines(
  workdir: Path,
  final: Mapping[str, float],
  plain_retrievals: Sequence[str],
  commands: Sequence[str],
  is_try: bool = False,
) -> Iterator[str]:
  """Describes what a run has reached, beside chance or the most frequent class, and what to do next.

  Args:
    workdir: working directory.
    final: final metrics of the run, of which those named eval/... count.
    plain_retrievals: names of retrievals that search all images at once.
    commands: lines of `run_page.next_commands`.
    is_try: True for a length that --steps set.
  """
  for name in dict.fromkeys(metric.split("/")[1] for metric in final if metric.startswith("eval/")):
    scores = {key.rpartition("/")[2]: value for key, value in final.items() if key.startswith(f"eval/{name}/")}
    if "top1" in scores and "majority_share" in scores:
      yield f"{name}: top-1 {scores['top1']:.1%}; always the most frequent class: {scores['majority_share']:.1%}"
    if (found := scores.get("text_to_image_r10")) is not None and scores.get("images"):
      both = _directions(scores["image_to_text_r10"], found)
      chance = ""
      if name in plain_retrievals:
        chance = f"; chance: {_directions(*recalls_at_chance(10, scores['images'], scores['texts']))}"
      yield f"{name}: recall at 10 is {both}{chance}"
  if (page := workdir / "index.html").exists():
    yield f"pictures and scores: {page}"
  yield "commands to type next:"
  yield from commands
  if is_try:
    yield "--steps set the length of this run: train the whole run without --steps, in another --workdir"


def _directions(image_to_text: float, text_to_image: float) -> str:
  return f"{image_to_text:.1%} from image to text and {text_to_image:.1%} from text to image"
