"""The legal values of the options of evaluators: one table, which is read before anything of an evaluation."""

from collections.abc import Callable, Collection, Mapping, Sequence
import math
from typing import Any, NamedTuple

from declip_jax.evals.few_shot import METHODS, STRENGTH
from declip_jax.evals.prompts import check_templates
from declip_jax.evals.sgd_probe import RECIPES

FEATURES = ("pooled", "joint")


class _Range(NamedTuple):
  """Whether a value is legal, and the legal values in words."""

  is_legal: Callable[[Any], bool]
  legal: str


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  return (isinstance(value, float) or _is_whole(value)) and math.isfinite(value)


def _at_least(least: int, what: str) -> _Range:
  return _Range(lambda value: _is_whole(value) and value >= least, f"{what}, at least {least}")


def _number(is_legal: Callable[[float], bool], legal: str) -> _Range:
  return _Range(lambda value: _is_number(value) and is_legal(value), legal)


def _several(of: _Range) -> _Range:
  """One or more values, none of them twice."""

  def is_legal(values: Any) -> bool:
    return isinstance(values, (tuple, list)) and all(map(of.is_legal, values)) and 0 < len(set(values)) == len(values)

  return _Range(is_legal, f"one or more different values, each {of.legal}")


def _one_of(names: Collection[str]) -> _Range:
  return _Range(lambda value: isinstance(value, str) and value in names, f"one of {', '.join(map(repr, names))}")


_ABOVE_0 = _number(lambda value: value > 0, "a finite number, more than 0")
_WHOLE = "a whole number"
_RANGES = {
  "equal_texts": _Range(lambda value: isinstance(value, bool), "True or False"),
  "prefix": _Range(lambda value: isinstance(value, str), "a text, such as 'a photo of '"),
  "folds": _at_least(1, "a number of parts"),
  "features": _one_of(FEATURES),
  "rates": _several(_ABOVE_0),
  "epochs": _at_least(1, _WHOLE),
  "batch_size": _at_least(1, _WHOLE),
  "optimizer": _one_of(RECIPES),
  "shots": _several(_at_least(1, _WHOLE)),
  "seeds": _several(_at_least(0, _WHOLE)),
  "method": _one_of(METHODS),
  "strength": _number(lambda value: value >= 0, "a finite number above 0, or 0 to choose it"),
  "neighbours": _several(_at_least(1, _WHOLE)),
  "headline": _at_least(1, _WHOLE),
  "temperature": _ABOVE_0,
}


def check_values(options: Mapping[str, Any], field: str) -> None:
  """Rejects options with which no evaluator can run, whatever the data; those of extensions are not known here.

  Args:
    options: options of one evaluator, also those with their default.
    field: what messages put before the name of an option, such as "config.evals.probe".

  Raises:
    ValueError: the message names the option, its value and the legal ones.
  """
  for name, value in options.items():
    if name == "templates":
      check_templates(value, f"{field}.templates")
    if name in _RANGES and not _RANGES[name].is_legal(value):
      raise ValueError(f"{field}.{name}={value!r}: expected {_RANGES[name].legal}")
  _check_together(options, field)


def _check_together(options: Mapping[str, Any], field: str) -> None:
  """Rejects options of one evaluator that contradict each other.

  Raises:
    ValueError: the message names both.
  """
  if options.get("method") == "ridge" and (strength := options.get("strength", STRENGTH)) != STRENGTH:
    raise ValueError(f"{field}.strength={strength} has an effect only with {field}.method=logistic, not with ridge")
  headline, neighbours = options.get("headline"), options.get("neighbours", ())
  if neighbours and headline not in neighbours:
    raise ValueError(f"{field}.headline={headline}: expected one of {_listed(neighbours)}, the values of neighbours")


def _listed(values: Sequence[Any]) -> str:
  return ",".join(map(str, values))
