"""Objectives: each term is a pure function of outputs and batch, a method is a dict of weights over `TERMS`."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxtyping import Array, Float

from declip_jax.objectives.contrastive import Metrics, clip, multi_view
from declip_jax.objectives.masked_lm import masked_lm
from declip_jax.objectives.neighbours import nearest_neighbour
from declip_jax.objectives.simclr import nt_xent
from declip_jax.objectives.simsiam import simsiam
from declip_jax.types import Batch, Outputs


class Term(NamedTuple):
  """A loss, the head that has to exist for it (None: the projections are enough), and the outputs that it reads."""

  loss: Callable[[Outputs, Batch], tuple[Float[Array, ""], Metrics]]
  head: str | None
  needs: tuple[str, ...]


# What `config.weights` may name.
TERMS = {
  "clip": Term(clip, None, ("image", "text")),
  "mvs": Term(multi_view, None, ("image", "text")),
  "simclr": Term(nt_xent, "simclr", ("simclr",)),
  "simsiam": Term(simsiam, "simsiam", ("simsiam_projection", "simsiam_prediction")),
  "mlm": Term(masked_lm, "mlm", ("mlm_logits",)),
  "nns": Term(nearest_neighbour, "bank", ("image", "text", "neighbour")),
}


def active(weights: Mapping[str, float]) -> dict[str, float]:
  """The terms with a weight other than zero.

  Raises:
    ValueError: an unknown term, or no term at all.
  """
  unknown = sorted(set(weights) - set(TERMS))
  if unknown:
    raise ValueError(f"config.weights names unknown terms {unknown}: choose from {sorted(TERMS)}")
  chosen = {name: float(weight) for name, weight in weights.items() if weight}
  if not chosen:
    raise ValueError(f"config.weights gives every term weight 0: set at least one of {sorted(TERMS)}")
  return chosen


def heads_for(weights: Mapping[str, float]) -> tuple[str, ...]:
  """The heads that exist because a term with a weight needs them."""
  return tuple(sorted({TERMS[name].head for name in active(weights)} - {None}))


def check_inputs(outputs: Outputs, weights: Mapping[str, float], recipe: str) -> None:
  """Refuses, before anything compiles, a term whose inputs the recipe does not produce.

  Raises:
    ValueError: names the term, the missing field of `Outputs` and the recipe.
  """
  for name in active(weights):
    for field in TERMS[name].needs:
      if getattr(outputs, field) is None:
        raise ValueError(
          f"term {name!r} (config.weights.{name}={weights[name]}) needs Outputs.{field}, which the recipe {recipe!r} "
          "does not give: choose another config.data.recipe or set the weight to 0"
        )


def total_loss(outputs: Outputs, batch: Batch, weights: Mapping[str, float]) -> tuple[Float[Array, ""], Metrics]:
  """The weighted sum of all active terms, with each unweighted term as `loss/<term>` and its own metrics."""
  total, metrics = 0.0, {}
  for name, weight in active(weights).items():
    loss, details = TERMS[name].loss(outputs, batch)
    total += weight * loss
    metrics |= {f"loss/{name}": loss, **details}
  return total, {"loss": total, **metrics}
