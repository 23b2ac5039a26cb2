"""Evaluators: each is a generator of (metric, value) over the features of a source.

A new evaluator is a module with such a function, and an entry in `EVALUATORS`. It receives the source with its
features and the path of a picture that it may draw (None for none); its keyword-only arguments are the options of its
entry in `config.evals`, and their defaults are the defaults of the config.
"""

from collections.abc import Callable, Iterator, Mapping
import inspect
from typing import Any, NamedTuple

from declip_jax.evals.retrieval import retrieval
from declip_jax.evals.zero_shot import zero_shot


class Evaluator(NamedTuple):
  """A kind of evaluation.

  Attributes:
    function: yields its metrics.
    needs_text: whether it compares images with texts, so that training has to compare them too.
  """

  function: Callable[..., Iterator[tuple[str, float]]]
  needs_text: bool = True


# The `kind` of an entry of `config.evals` -> the evaluator.
EVALUATORS = {"zero_shot": Evaluator(zero_shot), "retrieval": Evaluator(retrieval)}


def check_options(kind: str, options: Mapping[str, Any], field: str) -> None:
  """Rejects an entry of `config.evals` that no evaluator can run.

  Args:
    kind: kind of the entry.
    options: all fields of the entry but `kind` and `data`.
    field: path of the entry in the config, for errors.

  Raises:
    ValueError: the kind or an option does not exist, or an option without a default is missing.
  """
  if kind not in EVALUATORS:
    raise ValueError(f"{field}.kind={kind!r}: choose one of {sorted(EVALUATORS)}")
  arguments = inspect.signature(EVALUATORS[kind].function).parameters.values()
  known = {argument.name: argument.default for argument in arguments if argument.kind is argument.KEYWORD_ONLY}
  if unknown := sorted(set(options) - set(known)):
    raise ValueError(f"{field} has fields {unknown}, which {kind!r} does not have; it has {sorted(known)}")
  if missing := sorted(name for name in known if known[name] is inspect.Parameter.empty and name not in options):
    raise ValueError(f"{field} has no fields {missing}, which {kind!r} needs")
