"""Evaluators: each is a generator of (metric, value) over the features of a source.

A new evaluator is a module with such a function, and an entry in `EVALUATORS`. The function receives the source with
its features, and the path of a picture that it may draw (None for no picture). Its keyword-only arguments are the
options of its entry in `config.evals`; the config has the same defaults. `check` rejects options and sources with
which it could not run, before anything is trained.
"""

from collections.abc import Callable, Iterator, Mapping
import inspect
from typing import Any, NamedTuple

from declip_jax.evals import retrieval, zero_shot
from declip_jax.spelling import did_you_mean


class Evaluator(NamedTuple):
  """A kind of evaluation.

  Attributes:
    function: yields its metrics.
    needs_text: whether it compares images with texts, so that training has to compare them too.
    metrics: names of all its metrics; () if they are not known in advance.
    check: called as `check(source, field, **options)`, with the path of the entry in the config; raises ValueError if
      the evaluation could not run.
  """

  function: Callable[..., Iterator[tuple[str, float]]]
  needs_text: bool = True
  metrics: tuple[str, ...] = ()
  check: Callable[..., None] = lambda source, field, **options: None


# The `kind` of an entry of `config.evals` -> the evaluator.
EVALUATORS = {
  "zero_shot": Evaluator(zero_shot.zero_shot, metrics=zero_shot.METRICS, check=zero_shot.check),
  "retrieval": Evaluator(retrieval.retrieval, metrics=retrieval.METRICS, check=retrieval.check),
}


def check_options(options: Mapping[str, Any], field: str) -> None:
  """Rejects an entry of `config.evals` that no evaluator can run.

  Args:
    options: all fields of the entry.
    field: path of the entry in the config, for errors.

  Raises:
    ValueError: `kind`, `data` or an option without a default is missing, or the kind or an option is unknown.
  """
  kinds = f"choose one of {sorted(EVALUATORS)}"
  if "kind" not in options:
    raise ValueError(f"{field} has no field kind: {kinds}")
  kind = options["kind"]
  if kind not in EVALUATORS:
    raise ValueError(f"{field}.kind={kind!r}: {kinds}{did_you_mean(str(kind), EVALUATORS)}")
  if not options.get("data") or not isinstance(options["data"], str):
    raise ValueError(f"{field}.data={options.get('data')!r}: expected a source, such as 'webdataset:/data/test-*.tar'")
  arguments = inspect.signature(EVALUATORS[kind].function).parameters.values()
  known = {argument.name: argument.default for argument in arguments if argument.kind is argument.KEYWORD_ONLY}
  if unknown := sorted(set(options) - {"kind", "data"} - set(known)):
    hint = did_you_mean(unknown[0], known)
    raise ValueError(f"{field} has fields {unknown}, which {kind!r} does not have; it has {sorted(known)}{hint}")
  if missing := sorted(name for name in known if known[name] is inspect.Parameter.empty and name not in options):
    raise ValueError(f"{field} has no fields {missing}, which {kind!r} needs")


def check_metric(metric: str, kinds: Mapping[str, str], field: str) -> None:
  """Rejects a metric that none of the evaluations has.

  Args:
    metric: name of a metric, such as "eval/heldout/top1".
    kinds: name of each evaluation and its kind.
    field: path of the metric in the config, for errors.

  Raises:
    ValueError: the message names the metrics that exist.
  """
  head, _, rest = metric.partition("/")
  name, _, last = rest.partition("/")
  if head != "eval" or name not in kinds or not last:
    raise ValueError(
      f"{field}={metric!r} is not a metric of an evaluation: expected eval/NAME/METRIC, with NAME one of {[*kinds]}"
    )
  legal = EVALUATORS[kinds[name]].metrics
  if legal and last not in legal:
    hint = did_you_mean(last, legal)
    raise ValueError(f"{field}={metric!r}: config.evals.{name} has the metrics {', '.join(legal)}{hint}")
