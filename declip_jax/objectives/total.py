"""The objective of a run: the weighted sum of its terms, and the heads and views that they need."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from declip_jax.objectives.blockwise import PLAIN, Method, check_method
from declip_jax.objectives.contrastive import Metrics, contrast_views
from declip_jax.objectives.terms import PAIR, ActiveTerm, active_terms, compares_pairs
from declip_jax.types import Batch, Outputs
from declip_jax.views import Views


@dataclasses.dataclass(frozen=True)
class Objective:
  """The weighted terms of a run; called with outputs, batch and 0-based step, it returns the loss and metrics.

  Metrics are each unweighted term as `loss/<term>`, its share of the sum of all absolute weighted terms
  as `share/<term>`, and the terms' own.

  Attributes:
    terms: the terms with a weight other than zero.
    method: how all pairs of a batch are compared.
  """

  terms: tuple[ActiveTerm, ...]
  method: Method = PLAIN

  def __call__(self, outputs: Outputs, batch: Batch, step: int | Int[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
    outputs = self._with_shared_pairs(outputs)
    weighted, metrics = {}, {}
    for active in self.terms:
      method = {"method": self.method} if compares_pairs(active.term.loss) else {}
      loss, details = active.term.loss(outputs, batch, **method, **active.options)
      weighted[active.name] = weight_at(active.schedule, active.weight, step) * loss
      metrics |= {f"loss/{active.name}": loss, **details}
    whole = sum(abs(value) for value in weighted.values())
    if len(weighted) > 1:
      metrics |= {f"share/{name}": abs(value) / jnp.maximum(whole, 1e-12) for name, value in weighted.items()}
    total = sum(weighted.values())
    return total, {"loss": total, **metrics}

  @property
  def weights(self) -> dict[str, float]:
    """The weight of each term, by its name."""
    return {active.name: active.weight for active in self.terms}

  @property
  def heads(self) -> tuple[str, ...]:
    """The heads that the terms need, by name."""
    return tuple(sorted({head for active in self.terms for head in active.term.heads}))

  @property
  def compares_embeddings(self) -> bool:
    """Whether embeddings of whole images are compared with those of whole texts."""
    return any(active.term.compares_embeddings for active in self.terms)

  @property
  def compares_tokens(self) -> bool:
    """Whether only tokens are compared across modalities, as in FILIP, so pooled embeddings mean nothing."""
    return any(active.term.compares_tokens for active in self.terms) and not self.compares_embeddings

  def used_views(self, views: Views) -> Views:
    """A recipe's views with only the roles that some term uses; the others are empty.

    Where there is a joint space the first pair remains, so that a model has both towers or the image tower alone.
    """
    roles = {role for active in self.terms for role in active.term.views}
    if "joint" in self.heads:
      roles.add("pair")
    used: dict[str, Any] = {}
    for role in views:
      view = getattr(views, role)
      if role in roles:
        used[role] = view
      elif role in PAIR and "pair" in roles:
        used[role] = view[:1]
      else:
        used[role] = () if isinstance(view, tuple) else None
    if used["neighbour_text"]:  # the bank holds embeddings
      needed = {*used["contrastive_text"], *used["neighbour_text"]}
      used["contrastive_text"] = tuple(view for view in views.contrastive_text if view in needed)
    return Views(**used)

  def check_views(self, views: Views, recipe: str) -> None:
    """Rejects a term that uses a view that the recipe does not make.

    Raises:
      ValueError: the message names the term, the missing role of `Views` and the recipe.
    """
    for active in self.terms:
      roles = [role for role in active.term.views if role != "pair"]
      roles += PAIR if "joint" in active.term.heads else ()
      missing = [role for role in roles if not views.numbers(role)]
      if not missing and active.term.more_pairs and len(views.contrastive_image) * len(views.contrastive_text) == 1:
        missing = ["contrastive_text[1]"]
      if missing:
        raise ValueError(_lacks(active, f"Views.{missing[0]}", recipe))

  def check_inputs(self, outputs: Outputs, recipe: str) -> None:
    """Rejects, before anything compiles, a term whose inputs the recipe does not produce.

    Raises:
      ValueError: the message names the term, the missing entry of `Outputs` and the recipe.
    """
    for active in self.terms:
      for name in active.term.needs:
        if name not in outputs:
          raise ValueError(_lacks(active, f"Outputs.{name}", recipe))

  def _with_shared_pairs(self, outputs: Outputs) -> Outputs:
    """Adds `pairs`, computed once for all terms that read it, if their `full_gradient` is the same."""
    gradients = [active.options.get("full_gradient", True) for active in self.terms if active.term.shares_pairs]
    if len(gradients) < 2 or len(set(gradients)) > 1:
      return outputs
    return outputs.replace(pairs=contrast_views(outputs, self.method, full_gradient=gradients[0]))


def make_objective(settings: Mapping[str, Mapping[str, Any]], method: Method = PLAIN) -> Objective:
  """Makes the objective of a config.

  Args:
    settings: `config.objective` as nested dicts: for each term `weight`, `schedule` and its options.
    method: how all pairs of a batch are compared.

  Raises:
    ValueError: an unknown term, option or method, or an invalid number.
  """
  check_method(method)
  return Objective(active_terms(settings), method)


def weight_at(
  points: Sequence[tuple[int, float]], weight: float, step: int | Int[Array, ""]
) -> float | Float[Array, ""]:
  """A weight times the factor at a step: linear between `points`, which are pairs of a step and a factor."""
  if not points:
    return weight
  steps, factors = zip(*points, strict=True)
  return weight * jnp.interp(step, jnp.asarray(steps, jnp.float32), jnp.asarray(factors, jnp.float32))


def _lacks(active: ActiveTerm, what: str, recipe: str) -> str:
  return (
    f"term {active.name!r} (config.objective.{active.name}.weight={active.weight}) needs {what}, which the recipe "
    f"{recipe!r} does not make: choose another config.data.recipe or set the weight to 0"
  )
