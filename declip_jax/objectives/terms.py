"""The terms that an objective may sum, and what each of them needs."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import inspect
import math
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from declip_jax.objectives.classify import classify
from declip_jax.objectives.contrastive import Metrics, clip, multi_view
from declip_jax.objectives.filip import filip
from declip_jax.objectives.masked_image import masked_image
from declip_jax.objectives.masked_lm import masked_lm
from declip_jax.objectives.momentum import byol, moco
from declip_jax.objectives.neighbours import nearest_neighbour
from declip_jax.objectives.sigmoid import sigmoid
from declip_jax.objectives.simclr import nt_xent
from declip_jax.objectives.simsiam import simsiam
from declip_jax.spelling import did_you_mean

Loss = Callable[..., tuple[Float[Array, ""], Metrics]]


class Term(NamedTuple):
  """A loss and its requirements.

  Attributes:
    loss: function of outputs and batch; its options are keyword arguments, and so is `method` where it compares all
      pairs of a batch.
    heads: names of `models.heads.HEADS`.
    needs: entries of `Outputs`.
    views: roles of `Views`; "pair" is the first contrastive view of each modality.
    shares_pairs: whether the loss reads `Outputs.pairs`, the comparison of all contrastive views, if it exists.
    more_pairs: whether the term needs more than one pair of contrastive views.
  """

  loss: Loss
  heads: tuple[str, ...]
  needs: tuple[str, ...]
  views: tuple[str, ...]
  shares_pairs: bool = False
  more_pairs: bool = False

  @property
  def compares_embeddings(self) -> bool:
    """Whether embeddings of whole images are compared with those of whole texts."""
    return {"image", "text"} <= {*self.needs}

  @property
  def compares_tokens(self) -> bool:
    """Whether tokens of images are compared with tokens of texts, as in FILIP."""
    return {"image_tokens", "text_tokens"} <= {*self.needs}


PAIR = ("contrastive_image", "contrastive_text")
_MOMENTUM = ("momentum_prediction", "momentum_target")
# The terms of `config.objective`.
TERMS = {
  "clip": Term(clip, ("joint",), ("image", "text"), ("pair",), shares_pairs=True),
  "mvs": Term(multi_view, ("joint",), ("image", "text"), PAIR, shares_pairs=True, more_pairs=True),
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
  "classify": Term(classify, ("classifier",), ("class_logits",), ("classified_image",)),
}
# The fields of a user's own term in `config.objective.<term>`, see `config.term`.
_OWN = ("loss", "heads", "needs", "views")


@dataclasses.dataclass(frozen=True)
class ActiveTerm:
  """A term with a weight other than zero.

  Attributes:
    name: its name in `config.objective`.
    term: its loss and what that needs.
    weight: its weight in the sum.
    schedule: points of `total.weight_at`; empty if the weight is constant.
    options: keyword arguments of its loss.
  """

  name: str
  term: Term
  weight: float
  schedule: tuple[tuple[int, float], ...]
  options: Mapping[str, Any]


def active_terms(settings: Mapping[str, Mapping[str, Any]]) -> tuple[ActiveTerm, ...]:
  """Checks all terms, and returns those with a weight other than zero.

  Args:
    settings: `config.objective` as nested dicts: for each term `weight`, `schedule` and its options.

  Raises:
    ValueError: an unknown term or option, an invalid number, or only weights of 0.
  """
  unknown = sorted(name for name, fields in settings.items() if name not in TERMS and "loss" not in fields)
  if unknown:
    raise ValueError(
      f"config.objective names unknown terms {unknown}: choose from {sorted(TERMS)}, or make one with config.term"
      f"{did_you_mean(unknown[0], TERMS)}"
    )
  terms = [_checked(name, fields) for name, fields in settings.items()]
  active = tuple(term for term in terms if term.weight)
  if not active:
    raise ValueError(f"config.objective gives every term weight 0: set at least one of {sorted(settings)}")
  return active


def _checked(name: str, fields: Mapping[str, Any]) -> ActiveTerm:
  where = f"config.objective.{name}"
  if "loss" in fields:
    if name in TERMS:
      raise ValueError(f"{where}.loss: this term already exists; choose a name that is not in {sorted(TERMS)}")
    term = Term(_own_loss(where, fields["loss"]), *(tuple(fields[field]) for field in _OWN[1:]))
    fields = {field: value for field, value in fields.items() if field not in _OWN}
  else:
    term = TERMS[name]
  options = {field: value for field, value in fields.items() if field not in ("weight", "schedule")}
  weight, schedule = float(fields.get("weight", 0.0)), fields.get("schedule", ())
  if not math.isfinite(weight):
    raise ValueError(f"{where}.weight={weight}: expected a finite number")
  _check_schedule(where, schedule, weight)
  known = option_names(term.loss)
  if known is not None and (unknown := sorted(set(options) - set(known))):
    raise ValueError(f"{where}.{unknown[0]}: term {name!r} has the options {known}")
  temperature, smoothing = options.get("temperature", 1.0), options.get("label_smoothing", 0.0)
  if not 0 < temperature < math.inf:
    raise ValueError(f"{where}.temperature={temperature}: expected more than 0")
  if not 0 <= smoothing <= 1:
    raise ValueError(f"{where}.label_smoothing={smoothing}: expected 0 to 1")
  return ActiveTerm(name, term, weight, tuple(schedule), options)


def _check_schedule(where: str, points: Sequence[Any], weight: float) -> None:
  if points and not weight:
    raise ValueError(f"{where}.schedule={points} has no effect, since {where}.weight is 0")
  if not all(isinstance(point, Sequence) and len(point) == 2 for point in points):
    raise ValueError(f"{where}.schedule={points}: expected (step, factor) pairs, such as ((0, 0.0), (2500, 1.0))")
  if not all(math.isfinite(factor) for _, factor in points):
    raise ValueError(f"{where}.schedule={points}: factors must be finite")
  if [step for step, _ in points] != sorted({step for step, _ in points}):
    raise ValueError(f"{where}.schedule={points}: steps must be ascending")


def option_names(loss: Loss) -> list[str] | None:
  """The options of a loss; None if it takes any."""
  parameters = inspect.signature(loss).parameters.values()
  if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
    return None
  return [parameter.name for parameter in parameters if parameter.name not in ("outputs", "batch", "method")]


def compares_pairs(loss: Loss) -> bool:
  """Whether a loss compares all pairs of a batch, and so has an argument `method`."""
  return "method" in inspect.signature(loss).parameters


def _own_loss(where: str, loss: Loss | str) -> Loss:
  """The function of a user's own term; one that raises for a saved config, which has only its name."""
  if callable(loss):
    return loss

  def missing(outputs: Any, batch: Any, **options: Any) -> Any:
    raise ValueError(f"{where}.loss={loss!r} is only the name of a function: pass the config file that defines it")

  return missing
