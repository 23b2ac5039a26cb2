"""Evaluators: each is a function from the features of a data set to scores.

A new evaluator is a module with such a function, and an entry in `EVALUATORS`. The function receives an
`EvaluationData` and the path of a picture that it may draw (None for no picture), and returns `Scores`. Its
keyword-only arguments are the options of its entry in `config.evals`; the config has the same defaults. `options` has
their legal values, and `check` rejects sources with which it could not run, before anything is trained.
"""

from collections.abc import Callable, Mapping, Sequence
import inspect
from types import MappingProxyType
from typing import Any, NamedTuple

from declip_jax.evals import classify, composition, probes, retrieval, zero_shot
from declip_jax.evals.feature_cache import json_hash
from declip_jax.evals.options import check_values
from declip_jax.evals.results import Scores, slug
from declip_jax.spelling import did_you_mean


class Evaluator(NamedTuple):
  """A kind of evaluation.

  Attributes:
    function: returns the scores of an `EvaluationData`.
    needs_text: whether it compares images with texts, so that training has to compare them too.
    needs_train: whether it needs the split `train`; without it, `train` and `val` are not accepted.
    needs_classifier: whether it needs the classifier of a fine-tuned model.
    metrics: names of all its metrics; () if they are not known in advance.
    of: the tasks of data sets that it evaluates, of `catalogue.TASKS`; () if it evaluates none of the catalogue.
    task: CLIP_benchmark's name of it, the key in `EVALUATORS` by default.
    names: CLIP_benchmark's names of its metrics.
    check: called as `check(source, field, **options)`, with the path of the entry in the config; raises ValueError if
      the evaluation could not run.
  """

  function: Callable[..., Scores]
  needs_text: bool = True
  needs_train: bool = False
  needs_classifier: bool = False
  metrics: tuple[str, ...] = ()
  of: tuple[str, ...] = ()
  task: str = ""
  names: Mapping[str, str] = MappingProxyType({})
  check: Callable[..., None] = lambda source, field, **options: None


# Fields of an entry of `config.evals` besides the options of its evaluator.
SPLITS = ("train", "val")
_COMMON = ("kind", "data", "suite", "every", *SPLITS)

# Of options, by the type of their default: how they are read, and what they are called.
_PARSERS = {int: int, float: float, str: str, bool: {"True": True, "False": False}.__getitem__}
_TYPES = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
_LONGEST = 60  # signs of a variant

# CLIP_benchmark's names of metrics.
_CLASSIFICATION = {
  "top1": "acc1",
  "top5": "acc5",
  "mean_per_class": "mean_per_class_recall",
  "mean_average_precision": "mean_average_precision",
}
_RETRIEVAL = {
  f"{way}_r{k}": f"{theirs}_retrieval_recall@{k}"
  for way, theirs in (("text_to_image", "image"), ("image_to_text", "text"))
  for k in (1, 5, 10)
}
_COMPOSITION = {"accuracy": "acc", "group_score": "acc", "image_score": "image_acc", "text_score": "text_acc"}
# DataComp's, since CLIP_benchmark does not have WinoGAViL.
_COMPOSITION |= {
  "jaccard": "jaccard_score_10-12",
  "jaccard_5_6": "jaccard_score_5-6",
  "jaccard_all": "avg_jaccard_score",
}

_PROBE = Evaluator(probes.linear_probe, needs_text=False, needs_train=True, check=probes.check, of=("classification",))

# The `kind` of an entry of `config.evals` -> the evaluator.
EVALUATORS = {
  "zero_shot": Evaluator(
    zero_shot.zero_shot,
    metrics=zero_shot.METRICS,
    check=zero_shot.check,
    of=("classification", "multilabel"),
    task="zeroshot_classification",
    names=_CLASSIFICATION,
  ),
  "retrieval": Evaluator(
    retrieval.retrieval,
    metrics=retrieval.METRICS,
    check=retrieval.check,
    of=("retrieval",),
    task="zeroshot_retrieval",
    names=_RETRIEVAL,
  ),
  "composition": Evaluator(
    composition.composition,
    metrics=composition.METRICS,
    check=composition.check,
    of=("composition",),
    task="image_caption_selection",
    names=_COMPOSITION,
  ),
  "linear_probe": _PROBE._replace(
    function=probes.linear_probe,
    of=("classification", "multilabel"),
    names={own: f"lp_{name}" for own, name in _CLASSIFICATION.items()},
  ),
  "sgd_probe": _PROBE._replace(function=probes.sgd_probe),
  "few_shot": _PROBE._replace(function=probes.few_shot),
  "knn": _PROBE._replace(function=probes.knn),
  "nearest_mean": _PROBE._replace(function=probes.nearest_mean),
  "classify": Evaluator(
    classify.classify,
    needs_text=False,
    needs_classifier=True,
    metrics=classify.METRICS,
    of=("classification",),
    names=_CLASSIFICATION,
  ),
}


def defaults(kind: str) -> dict[str, Any]:
  """The options of an evaluator, and their defaults, `inspect.Parameter.empty` for none."""
  arguments = inspect.signature(EVALUATORS[kind].function).parameters.values()
  return {argument.name: argument.default for argument in arguments if argument.kind is argument.KEYWORD_ONLY}


def variant_of(kind: str, options: Mapping[str, Any]) -> str:
  """A short text, for names of files, on the options that differ from the defaults; empty if none does."""
  known = defaults(kind)
  given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}  # from JSON
  parts = [f"{name}={_listed(value)}" for name, value in sorted(given.items()) if value != known.get(name)]
  text = ",".join(parts)
  return text if text == slug(text) and len(text) <= _LONGEST else f"options-{json_hash(text)[:8]}"


def parse_option(kind: str, name: str, text: str, place: str) -> dict[str, Any]:
  """An option of an evaluator as a command line gives it, such as "1,5,10"; {} if it is the default.

  Args:
    kind: a key of `EVALUATORS`.
    name: name of the option.
    text: its value; a number, True or False, a text, or, for an option with several values, these with commas.
    place: start of error messages.

  Raises:
    ValueError: the option does not exist, or its value does not have the type of the default.
  """
  known = defaults(kind)
  if name not in known:
    legal = ", ".join(known) or "none"
    raise ValueError(f"{place}: {kind!r} has no option {name!r}; its options are: {legal}{did_you_mean(name, known)}")
  default, several = known[name], isinstance(known[name], Sequence) and not isinstance(known[name], str)
  example = default[0] if several else default
  try:
    parts = text.split(",") if several else [text]
    values = tuple(_PARSERS[type(example)](part) for part in parts)
  except (ValueError, KeyError):
    raise ValueError(f"{place}: expected {_TYPES[type(example)]}, as the default {_listed(default)}") from None
  value = values if several else values[0]
  return {} if value == default else {name: value}


def _listed(value: Any) -> str:
  return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def check_options(options: Mapping[str, Any], field: str) -> None:
  """Rejects an entry of `config.evals` that no evaluator can run.

  Args:
    options: all fields of the entry.
    field: path of the entry in the config, for errors.

  Raises:
    ValueError: `kind`, `data` or an option without a default is missing, the kind or an option is unknown, or the
      value of an option is illegal.
  """
  kinds = f"choose one of {sorted(EVALUATORS)}"
  if "kind" not in options:
    raise ValueError(f"{field} has no field kind: {kinds}")
  kind = options["kind"]
  if kind not in EVALUATORS:
    raise ValueError(f"{field}.kind={kind!r}: {kinds}{did_you_mean(str(kind), EVALUATORS)}")
  if not options.get("data") or not isinstance(options["data"], str):
    example = f"--{field}.data=pairs.csv or --{field}.data='webdataset:/data/test-*.tar'"
    raise ValueError(f"{field}.data={options.get('data')!r}: expected a path or a source, such as {example}")
  _check_splits(EVALUATORS[kind], options, field)
  every = options.get("every", 1)
  if type(every) is not int or every < 1:
    raise ValueError(f"{field}.every={every!r}: expected a number of evaluations, at least 1")
  known = defaults(kind)
  if unknown := sorted(set(options) - set(_COMMON) - set(known)):
    hint = did_you_mean(unknown[0], known)
    raise ValueError(f"{field} has fields {unknown}, which {kind!r} does not have; it has {sorted(known)}{hint}")
  if missing := sorted(name for name in known if known[name] is inspect.Parameter.empty and name not in options):
    raise ValueError(f"{field} has no fields {missing}, which {kind!r} needs")
  check_values({name: options.get(name, default) for name, default in known.items()}, field)


def _check_splits(evaluator: Evaluator, options: Mapping[str, Any], field: str) -> None:
  """Rejects an evaluation without the splits that it needs, or with some that it does not read."""
  given = [split for split in SPLITS if options.get(split)]
  if options.get("suite"):
    if given:
      raise ValueError(
        f"{field}.{given[0]}={options[given[0]]!r}: the splits of suite={options['suite']!r} are in data"
      )
    return
  if evaluator.needs_train and "train" not in given:
    raise ValueError(f"{field}.train={options.get('train', '')!r}: {options['kind']!r} needs a source to train on")
  if given and not evaluator.needs_train:
    raise ValueError(f"{field}.{given[0]}={options[given[0]]!r}: {options['kind']!r} reads only data")


def check_metric(metric: str, kinds: Mapping[str, str], field: str) -> None:
  """Rejects a metric that none of the evaluations has.

  Args:
    metric: name of a metric, such as "eval/heldout/top1".
    kinds: name of each evaluation and its kind, "" if its metrics are those of data sets.
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
  legal = EVALUATORS[kinds[name]].metrics if kinds[name] else ()
  if legal and last not in legal:
    hint = did_you_mean(last, legal)
    raise ValueError(f"{field}={metric!r}: config.evals.{name} has the metrics {', '.join(legal)}{hint}")
