"""What a report compares, and how it writes scores and differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from declip_jax.evals import catalogue, comparison
from declip_jax.evals.comparison import Cell, Difference, Items, Method, Scored, Task
from declip_jax.evals.intervals import Interval

TITLES = {
  "zero_shot": "Zero-shot classification",
  "retrieval": "Retrieval",
  "composition": "Composition",
  "linear_probe": "Linear probe",
  "sgd_probe": "Linear probe by gradient descent",
  "few_shot": "Few shots",
  "knn": "Nearest neighbours",
  "nearest_mean": "Nearest class mean",
  "classify": "Classifier of the model",
}
METRICS = {
  "top1": "top-1 accuracy",
  "top5": "top-5 accuracy",
  "mean_per_class": "mean accuracy per class",
  "mean_recall": "mean of all recalls",
  "mean_r1": "mean recall at 1",
  "mean_average_precision": "mean average precision",
  "mean_average_precision_11": "11-point mean average precision",
  "roc_auc": "ROC AUC",
  "mean_top1_top5": "mean of top-1 and top-5 accuracy",
  "jaccard": "Jaccard index, 10 to 12 images",
  "jaccard_5_6": "Jaccard index, 5 or 6 images",
  "jaccard_all": "Jaccard index, all",
}
PROMPTS = {
  "openai": "OpenAI's prompts",
  "openai7": "SLIP's seven prompts",
  "clip_benchmark": "CLIP_benchmark's prompts",
  "bare": "names of classes as prompts",
}
MANY = 8  # methods of which a table has columns, and charts have lines
_RETRIEVAL = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))


class Published(NamedTuple):
  """A published score.

  Attributes:
    model: name of the published model; the name of its config where this package has one.
    source: publication.
    protocol: how it was measured, in words.
    kind: evaluator that measures the same.
    key: key of the data set in the catalogue.
    prompts: name of the prompt set, an empty text where there are none.
    value: the score, a fraction.
  """

  model: str
  source: str
  protocol: str
  kind: str
  key: str
  prompts: str
  value: float


@dataclass(frozen=True)
class Report:
  """What a report compares.

  Attributes:
    methods: methods, in the order of columns.
    baseline: the method with which the others are compared, None for none.
    shifts: for the key of a data set, the keys of the same task under a distribution shift.
    standard: models with standard training, whose line gives the expected accuracy under `shifts`.
    overlaps: working directories of `declip_jax.overlap`.
    interpolated: methods whose weights are interpolated with others, which are curves instead of columns.
    published: published scores.
  """

  methods: Sequence[Method]
  baseline: Method | None = None
  shifts: Mapping[str, Sequence[str]] = field(default_factory=dict)
  standard: Sequence[Method] = ()
  overlaps: Sequence[Path] = ()
  interpolated: Sequence[Method] = ()
  published: Sequence[Published] = ()

  @cached_property
  def tasks(self) -> list[Task]:
    """All tasks with a result."""
    return comparison.tasks(self.methods)

  @cached_property
  def kinds(self) -> list[str]:
    """The evaluators of `tasks`."""
    return list(dict.fromkeys(task.kind for task in self.tasks))

  @property
  def labels(self) -> list[str]:
    """Names of the methods."""
    return [method.label for method in self.methods]

  @property
  def others(self) -> list[Method]:
    """The methods that are compared with the baseline."""
    return [method for method in self.methods if method is not self.baseline]

  @cached_property
  def detailed(self) -> list[Method]:
    """The methods whose curves and examples are shown: of many, those with the most training of their kind."""
    if len(self.methods) <= MANY:
      return list(self.methods)
    largest: dict[Any, Method] = {}
    for method in self.methods:
      facts = method.first[0].training
      key = facts.get("method", method.label), facts.get("recipe")
      if key not in largest or _size(largest[key]) < _size(method):
        largest[key] = method
    return [*largest.values()][:MANY]

  @property
  def scored(self) -> list[Scored]:
    """All results, by method, run and task."""
    return [run[task] for method in self.methods for run in method.runs for task in sorted(run)]

  def of_kind(self, kind: str) -> list[Task]:
    """The tasks of an evaluator."""
    return [task for task in self.tasks if task.kind == kind]

  def some(self, task: Task) -> Scored:
    """Any result of a task."""
    return next(scored for method in self.methods for scored in method.of(task))

  def metrics(self, task: Task) -> list[str]:
    """The metrics of a task that a table shows, the headline first."""
    some = self.some(task)
    if task.kind == "retrieval":
      return list(dict.fromkeys([some.headline, *(name for name in _RETRIEVAL if name in some.metrics)]))
    if task.kind == "few_shot":
      return sorted((name for name in some.metrics if name.startswith("shots_")), key=lambda name: int(name[6:]))
    return [some.headline]

  def difference(self, method: Method, other: Method, task: Task, metric: str) -> Difference | None:
    """Compares two methods by a metric, see `comparison.difference`; each pair is resampled once."""
    key = (method.label, other.label, task, metric)
    if key not in self._known:
      found = comparison.difference(method.of(task), other.of(task), metric)
      self._known[key] = found
      self._known[other.label, method.label, task, metric] = found and _opposite(found)
    return self._known[key]

  def differences(self, task: Task, metric: str) -> dict[str, Difference]:
    """The difference of each method from the baseline, by label; methods without a result are left out."""
    if self.baseline is None:
      return {}
    found = {method.label: self.difference(method, self.baseline, task, metric) for method in self.others}
    return {label: own for label, own in found.items() if own is not None}

  def marks(self, kind: str) -> dict[tuple[Task, str, str], str]:
    """Stars of the differences of an evaluator's table: one if the interval excludes 0, two if Holm's test agrees."""
    found = {
      (task, metric, label): own
      for task in self.of_kind(kind)
      for metric in self.metrics(task)
      for label, own in self.differences(task, metric).items()
    }
    p = comparison.adjusted(found)
    return {name: "**"[: 1 + (p[name] < 0.05)] for name, own in found.items() if own.is_significant}

  def protocols(self, kind: str) -> dict[str, dict[str, Task]]:
    """For each data set its tasks of an evaluator by their prompt set, that of the data set's own protocol first.

    An evaluator that compares no texts has the prompt set "". See `prompt_set` for results that are left out.
    """
    found: dict[str, dict[str, Task]] = {}
    for task in sorted(self.of_kind(kind), key=lambda task: bool(task.variant)):
      if (prompts := prompt_set(task, self.some(task))) is not None:
        found.setdefault(task.dataset, {}).setdefault(prompts, task)
    return found

  def items(self, kind: str) -> list[tuple[Task, str]]:
    """Tasks of an evaluator that all methods have, one for each data set, with their headline metrics.

    Of several prompt sets, the first one of `protocols` is chosen. Only data sets with the largest training size are
    there, so that no mean mixes, for instance, 8 images per class with 16.
    """
    chosen = {
      next((task for task in own.values() if all(method.of(task) for method in self.methods)), None)
      for own in self.protocols(kind).values()
    }
    sizes = {task: self.training_size(task) for task in self.of_kind(kind) if task in chosen}
    most = max((size for size in sizes.values() if size is not None), default=None)
    return [(task, self.some(task).headline) for task, size in sizes.items() if size == most]

  def training_size(self, task: Task) -> catalogue.TrainingSize | None:
    """With how many images per class, or neighbours, a task was evaluated; None for other evaluators."""
    some = self.some(task)
    return catalogue.training_size(task.kind, some.headline, some.details)

  @cached_property
  def _known(self) -> dict[tuple[str, str, Task, str], Difference | None]:
    return {}


def prompt_set(task: Task, scored: Scored) -> str | None:
  """The prompt set of a result, "" where no texts are compared.

  It is None for a result with options of its own, or by another metric than that of its data set, which is told by the
  variant: without these, it is empty or names the prompt set.
  """
  prompts = str(scored.about.get("prompts", ""))
  return prompts if task.variant in ("", prompts, Path(prompts).stem) else None


def by_key(method: Method, kind: str, prompts: str = "") -> dict[str, Cell]:
  """The headline score of an evaluator on each data set of the catalogue; see `tasks_by_key`."""
  found = tasks_by_key(method, kind, prompts).items()
  return {key: score for key, (task, metric) in found if (score := comparison.cell(method.of(task), metric))}


def tasks_by_key(method: Method, kind: str, prompts: str = "") -> dict[str, tuple[Task, str]]:
  """The tasks of an evaluator on data sets of the catalogue, with their headline metrics.

  Args:
    method: the method.
    kind: the evaluator.
    prompts: a prompt set; "" for that of each data set's own protocol.
  """
  found = {}
  for task in dict.fromkeys(task for run in method.runs for task in run):
    scored = method.of(task)[0]
    chosen = prompt_set(task, scored) == prompts if prompts else not task.variant
    if task.kind == kind and chosen and scored.key:
      found[scored.key] = task, scored.headline
  return found


def other_prompts(methods: Sequence[Method], kind: str) -> list[str]:
  """The prompt sets, in alphabetical order, that any result has in place of that of its data set's own protocol."""
  found = {
    prompt_set(task, scored)
    for method in methods
    for run in method.runs
    for task, scored in run.items()
    if task.kind == kind and task.variant
  }
  return sorted(found - {None, ""})


def single_metrics(items: Items) -> str:
  """The name of the metric of some tasks, "score" if they have several."""
  names = {metric for _, metric in items}
  return metric_name(names.pop()) if len(names) == 1 else "score"


def metric_name(metric: str) -> str:
  """The name of a metric in words."""
  if metric.startswith("shots_"):
    count = metric.removeprefix("shots_")
    return f"{count} image{'s' if count != '1' else ''} per class"
  way, _, k = metric.rpartition("_r")
  if way in ("image_to_text", "text_to_image"):
    return f"{way.replace('_', ' ')}, recall at {k}"
  return METRICS.get(metric, metric.replace("_", " "))


def prompts_name(prompts: str) -> str:
  """The name of a prompt set in words."""
  return PROMPTS.get(prompts, f"prompts `{prompts}`")


def title(kind: str) -> str:
  """The name of an evaluator in words."""
  return TITLES.get(kind, kind.replace("_", " ").capitalize())


def percent(found: Cell | None) -> str:
  """A score with its interval, in percent."""
  return "" if found is None else f"{100 * found.value:.1f}{brackets(found.interval)}"


def brackets(ends: Interval | None, sign: str = "") -> str:
  """An interval in percent or points, after a space; nothing for None."""
  return "" if ends is None else f" [{100 * ends[0]:{sign}.1f}, {100 * ends[1]:{sign}.1f}]"


def points(found: Difference | None, mark: str = "") -> str:
  """A difference in points, with stars and its interval."""
  if found is None:
    return ""
  stars = "\\*" * len(mark)
  return f"{100 * found.value:+.1f}{stars}{brackets(found.interval, '+')}"


def share(value: float | None) -> str:
  """A fraction in percent."""
  return "" if value is None else f"{100 * value:.1f}"


def _size(method: Method) -> tuple[float, ...]:
  facts = method.first[0].training
  return tuple(facts.get(name, 0) for name in ("unique_pairs", "pairs_seen", "flops"))


def _opposite(found: Difference) -> Difference:
  ends = found.interval and Interval(-found.interval.upper, -found.interval.lower)
  return found._replace(value=-found.value, interval=ends)
