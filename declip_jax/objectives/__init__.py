"""Objectives: each term is a pure function of outputs and batch, a method is a dict of weights over `TERMS`."""

from collections.abc import Callable, Mapping, Sequence
import inspect
import math
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from declip_jax.objectives.blockwise import PLAIN, Form, check_form
from declip_jax.objectives.contrastive import Metrics, clip, contrast_views, multi_view
from declip_jax.objectives.filip import filip
from declip_jax.objectives.masked_image import masked_image
from declip_jax.objectives.masked_lm import masked_lm
from declip_jax.objectives.momentum import byol, moco
from declip_jax.objectives.neighbours import nearest_neighbour
from declip_jax.objectives.sigmoid import sigmoid
from declip_jax.objectives.simclr import nt_xent
from declip_jax.objectives.simsiam import simsiam
from declip_jax.types import Batch, Outputs, Views

Options = Mapping[str, Mapping[str, Any]]
Settings = Mapping[str, Mapping[str, Any]]  # `config.objective`: of each term `weight`, `schedule` and its options


class Term(NamedTuple):
  """A loss and what it takes.

  Attributes:
    loss: of outputs and batch, and by keyword of its options and, where it compares all pairs of a batch, of `form`.
    heads: those of `models.heads.HEADS` that have to exist for it.
    needs: the outputs that it reads.
    views: the fields of `Views` that it looks at; "pair" is the first contrastive view of each modality.
  """

  loss: Callable[..., tuple[Float[Array, ""], Metrics]]
  heads: tuple[str, ...]
  needs: tuple[str, ...]
  views: tuple[str, ...]


_PAIRS = ("contrastive_image", "contrastive_text")
_MOMENTUM = ("momentum_prediction", "momentum_target")
# What `config.objective` may name.
TERMS = {
  "clip": Term(clip, ("joint",), ("image", "text"), ("pair",)),
  "mvs": Term(multi_view, ("joint",), ("image", "text"), _PAIRS),
  "sigmoid": Term(sigmoid, ("joint", "sigmoid"), ("image", "text", "bias"), ("pair",)),
  "filip": Term(filip, ("joint", "filip"), ("image_tokens", "text_tokens", "text_valid"), ("pair",)),
  "simclr": Term(nt_xent, ("simclr",), ("simclr",), ("ssl_image",)),
  "simsiam": Term(simsiam, ("joint", "simsiam"), ("simsiam_projection", "simsiam_prediction"), ("ssl_image",)),
  "moco": Term(moco, ("momentum",), _MOMENTUM, ("ssl_image",)),
  "byol": Term(byol, ("momentum",), _MOMENTUM, ("ssl_image",)),
  "mim": Term(masked_image, ("mim",), ("mim_prediction", "mim_target"), ("masked_image",)),
  "mlm": Term(masked_lm, ("joint", "mlm"), ("mlm_logits",), ("masked_text",)),
  "nns": Term(
    nearest_neighbour,
    ("joint", "bank"),
    ("image", "text", "neighbour"),
    ("contrastive_image", "pair", "neighbour_text"),
  ),
}


def active(settings: Settings) -> dict[str, float]:
  """The terms with a weight other than zero.

  Raises:
    ValueError: an unknown term, a weight that is not finite, or no term at all.
  """
  unknown = sorted(set(settings) - set(TERMS))
  if unknown:
    raise ValueError(f"config.objective names unknown terms {unknown}: choose from {sorted(TERMS)}")
  weights = {name: given["weight"] for name, given in settings.items()}
  for name, weight in weights.items():
    if not math.isfinite(weight):
      raise ValueError(f"config.objective.{name}.weight={weight}: a finite number")
  chosen = {name: float(weight) for name, weight in weights.items() if weight}
  if not chosen:
    raise ValueError(f"config.objective gives every term weight 0: set at least one of {sorted(TERMS)}")
  return chosen


def heads_for(settings: Settings) -> tuple[str, ...]:
  """The heads that exist because a term with a weight needs them."""
  return tuple(sorted({head for name in active(settings) for head in TERMS[name].heads}))


def compares_tokens(settings: Settings) -> bool:
  """Whether only tokens are trained to meet across modalities, as in FILIP, so that pooled embeddings mean nothing."""
  terms = active(settings)
  return "filip" in terms and not {"clip", "mvs", "sigmoid", "nns"} & terms.keys()


def options_of(settings: Settings) -> dict[str, dict[str, Any]]:
  """The options of terms that have any, checked.

  Raises:
    ValueError: a term or an option that does not exist, or a number that it cannot have.
  """
  options = {
    name: {option: value for option, value in given.items() if option not in ("weight", "schedule")}
    for name, given in settings.items()
  }
  for name, given in options.items():
    known = _options(name) if name in TERMS else []
    if unknown := sorted(set(given) - set(known)):
      raise ValueError(f"config.objective.{name}.{unknown[0]}: term {name!r} has the options {known}")
    temperature, smoothing = given.get("temperature", 1.0), given.get("label_smoothing", 0.0)
    if not 0 < temperature < math.inf:
      raise ValueError(f"config.objective.{name}.temperature={temperature}: more than 0")
    if not 0 <= smoothing <= 1:
      raise ValueError(f"config.objective.{name}.label_smoothing={smoothing}: 0 to 1")
  return {name: dict(given) for name, given in options.items() if given}


def _options(term: str) -> list[str]:
  return [name for name in inspect.signature(TERMS[term].loss).parameters if name not in ("outputs", "batch", "form")]


def used_views(views: Views, settings: Settings) -> Views:
  """The parts of a recipe's views that some active term looks at; the others emptied.

  Where there is a joint space the first pair stays, so that a model has both towers or the image tower alone.
  """
  parts = {part for name in active(settings) for part in TERMS[name].views}
  if "joint" in heads_for(settings):
    parts.add("pair")
  used = {}
  for field in Views._fields:
    view = getattr(views, field)
    if field in parts:
      used[field] = view
    elif field in _PAIRS and "pair" in parts:
      used[field] = view[:1]
    else:
      used[field] = None if field.startswith("masked") else ()
  if used["neighbour_text"]:  # the bank holds embeddings
    needed = {*used["contrastive_text"], *used["neighbour_text"]}
    used["contrastive_text"] = tuple(view for view in views.contrastive_text if view in needed)
  return Views(**used)


def check_views(views: Views, settings: Settings, recipe: str) -> None:
  """Refuses a term that looks at a view which the recipe does not make.

  Raises:
    ValueError: names the term, the missing field of `Views` and the recipe.
  """
  for name, weight in active(settings).items():
    parts = [part for part in TERMS[name].views if part != "pair"] + [*(_PAIRS if "joint" in TERMS[name].heads else ())]
    missing = [part for part in parts if getattr(views, part) in ((), None)]
    if not missing and name == "mvs" and len(views.contrastive_image) * len(views.contrastive_text) == 1:
      missing = ["contrastive_text[1]"]
    if missing:
      raise ValueError(
        f"term {name!r} (config.objective.{name}.weight={weight}) needs Views.{missing[0]}, a view which the "
        f"recipe {recipe!r} does not make: choose another config.data.recipe or set the weight to 0"
      )


def check_inputs(outputs: Outputs, settings: Settings, recipe: str) -> None:
  """Refuses, before anything compiles, a term whose inputs the recipe does not produce.

  Raises:
    ValueError: names the term, the missing field of `Outputs` and the recipe.
  """
  for name, weight in active(settings).items():
    for field in TERMS[name].needs:
      if getattr(outputs, field) is None:
        raise ValueError(
          f"term {name!r} (config.objective.{name}.weight={weight}) needs Outputs.{field}, which the recipe {recipe!r} "
          "does not give: choose another config.data.recipe or set the weight to 0"
        )


def weight_at(points: Sequence[tuple[int, float]], weight: float, step: Int[Array, ""]) -> float | Float[Array, ""]:
  """A weight times the factor that `points`, pairs of a step and a factor, give at a step, linear between them."""
  if not points:
    return weight
  steps, factors = zip(*points, strict=True)
  return weight * jnp.interp(step, jnp.asarray(steps, jnp.float32), jnp.asarray(factors, jnp.float32))


Objective = Callable[[Outputs, Batch, Int[Array, ""]], tuple[Float[Array, ""], Metrics]]


def make_objective(settings: Settings, form: Form = PLAIN) -> Objective:
  """The `total_loss` of the active terms as a function of outputs, batch and 0-based step.

  Args:
    settings: each term's weight (0 leaves it out), the schedule of that weight (points of `weight_at`; empty if the
      weight is constant) and the term's options.
    form: how all pairs of a batch are compared.

  Raises:
    ValueError: an unknown term, option or form.
  """
  chosen, checked = active(settings), options_of(settings)
  schedule = {name: given.get("schedule", ()) for name, given in settings.items()}
  check_form(form)
  for name, points in schedule.items():
    if points and name not in chosen:
      raise ValueError(f"config.objective.{name}.schedule={points}: config.objective.{name}.weight is 0")
    if not all(isinstance(point, Sequence) and len(point) == 2 for point in points):
      raise ValueError(
        f"config.objective.{name}.schedule={points}: pairs of a step and a factor: ((0, 0.0), (2500, 1.0))"
      )
    if not all(math.isfinite(factor) for _, factor in points):
      raise ValueError(f"config.objective.{name}.schedule={points}: factors have to be finite")
    if [step for step, _ in points] != sorted({step for step, _ in points}):
      raise ValueError(f"config.objective.{name}.schedule={points}: steps have to ascend")

  def objective(outputs: Outputs, batch: Batch, step: Int[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
    scheduled = {name: weight_at(schedule.get(name, ()), weight, step) for name, weight in chosen.items()}
    return total_loss(outputs, batch, scheduled, checked, form)

  return objective


def total_loss(
  outputs: Outputs,
  batch: Batch,
  weights: Mapping[str, float | Array],
  options: Options = MappingProxyType({}),
  form: Form = PLAIN,
) -> tuple[Float[Array, ""], Metrics]:
  """The weighted sum of all terms that `weights` names.

  Metrics are each unweighted term as `loss/<term>`, its part in the sum of all absolute weighted terms as
  `share/<term>`, and the terms' own.
  """
  gradients = {options.get(name, {}).get("full_gradient", True) for name in ("clip", "mvs") if name in weights}
  if {"clip", "mvs"} <= weights.keys() and len(gradients) == 1:  # one pass over the candidates for both
    outputs = outputs.replace(pairs=contrast_views(outputs, form, full_gradient=gradients.pop()))
  weighted, metrics = {}, {}
  for name, weight in weights.items():
    loss_of = TERMS[name].loss
    formed = {"form": form} if "form" in inspect.signature(loss_of).parameters else {}
    loss, details = loss_of(outputs, batch, **formed, **options.get(name, {}))
    weighted[name] = weight * loss
    metrics |= {f"loss/{name}": loss, **details}
  whole = sum(abs(part) for part in weighted.values())
  if len(weighted) > 1:
    metrics |= {f"share/{name}": abs(part) / jnp.maximum(whole, 1e-12) for name, part in weighted.items()}
  total = sum(weighted.values())
  return total, {"loss": total, **metrics}
