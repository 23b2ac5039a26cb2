"""The data sets that papers evaluate on: names of classes, prompts, metrics and splits, as published.

`data_set("food101")` returns the entry of a data set, and `suite("slip26")` a list of data sets with the metrics and
prompts of a paper. The entries are the JSON files of `data_sets/`, one per data set, and `suites.json`; `data_sets` has
a note on their sources and licences. They have facts and prompts only: where the images are is said by a data file, see
`data_files`. The classes of a source are matched with those of an entry by their names, see `classes`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
import json
from pathlib import Path
from typing import Any, NamedTuple

from declip_jax.spelling import did_you_mean

TASKS = ("classification", "multilabel", "retrieval", "composition")
# Metrics of the entries, and their values if all answers are guessed; None where that depends on more than the number
# of classes.
METRICS = {
  "top1": lambda classes: 1 / classes,
  "mean_per_class": lambda classes: 1 / classes,
  "mean_top1_top5": lambda classes: 3 / classes,  # mean of top-1 and top-5
  "roc_auc": lambda classes: 0.5,  # of two classes
  "mean_average_precision_11": None,  # 11 recall levels, difficult objects left out
  "mean_average_precision": None,  # at each positive, difficult objects present
  "any_label": None,  # any label of the image is right
  "macro_f1": None,  # over the classes that occur
  "worst_group": lambda classes: 1 / classes,  # top-1 of the worst group of `DataSet.grouping`
  "worst_group_top5": lambda classes: 5 / classes,
  "mean_recall@1": None,  # of both directions
  # Expected Jaccard index of random answers to the 854 instances of WinoGAViL with 10 to 12 images. DataComp's 0.205 is
  # the expected share of right images among the answers.
  "jaccard": lambda classes: 0.142,
  "accuracy": lambda classes: 0.5,  # one of two captions
  "group_score": lambda classes: 1 / 6,  # text and image score at once
}
OWN = "own/"  # prefix of the keys of data sets that are not in the catalogue
BARE = ("{}",)
# Fields that a data set does not share with `classes_of`.
_OF_IMAGES = ("sizes", "sources", "border", "has_difficult", "note")
_FOLDER = Path(__file__).parent / "data_sets"
_SUITES = Path(__file__).parent / "suites.json"


def chance(metric: str, classes: int) -> float | None:
  """Value of a metric if all answers are guessed; None where that depends on more than the number of classes.

  Args:
    metric: one of `METRICS`; None is returned for any other.
    classes: number of classes, 0 if it is unknown.
  """
  guess = METRICS.get(metric)
  try:
    return guess(classes) if guess else None
  except ZeroDivisionError:
    return None


@dataclass(frozen=True)
class DataSet:
  """A data set of the catalogue, or one of the user's.

  Attributes:
    key: its name here, in data files and results.
    title: its name in tables.
    task: one of `TASKS`.
    metric: the metric that papers report, one of `METRICS`; None for data without a single score.
    classes: names of the classes, in the order in which labels, logits and per-class results are; () if the names are
      those of the source, see `with_classes`.
    templates: prompt templates, with `{}` for the name of a class, by the name of their set: "openai" (CLIP's, 80 for
      ImageNet), "openai7" (SLIP's for ImageNet), "clip_benchmark", "own".
    names: names that prompts use for each class, by the name of the prompt set; all of a class count equally. Without
      an entry it is the name of the class.
    synonyms: names that prompts use for each class where the prompt set has no `names`.
    folders: names of the classes in folders and TFDS, in the order of `classes`, such as WordNet ids; () if none.
    aliases: other names of classes in sources, to names of classes.
    orders: class of label 0, 1, ... in sources whose labels have no names, by kind of source; "*" for the others.
    parent: key of the data set that its classes are part of, such as "imagenet"; empty for none.
    parent_ids: the classes of `parent` that each class comprises.
    images: key of the data set whose images of these classes it has, and whose line in a data file serves it; empty if
      it has images of its own.
    others: names of classes that sources have and the data set leaves out.
    border: pixels at each side of its test images, in all sources, that do not belong to the picture and are cut off.
    has_difficult: whether some of its objects are difficult; those that the source marks do not count for their class.
    num_classes: expected number of classes where `classes` is (); 0 if unknown.
    grouping: the grouping of images for the metric worst_group.
    ignored_groups: groups that do not count for it.
    validation: "official" if there is a published validation split, else "carved", see `splits.carve`.
    validation_per_class: images of each class in a carved split, where it is not 20 %; 0 for that.
    sizes: published numbers of images, by split.
    sources: where each kind of source has it: its name and splits there for "clip_benchmark" and "datacomp", specs for
      "tfds", and for "folder" specs of files that may be in its folder; see `data_files.print_data`.
    note: what to know before results are compared; may be empty.
  """

  key: str
  title: str
  task: str
  metric: str | None
  classes: tuple[str, ...] = ()
  templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
  names: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
  synonyms: tuple[tuple[str, ...], ...] = ()
  folders: tuple[str, ...] = ()
  aliases: Mapping[str, str] = field(default_factory=dict)
  orders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
  parent: str = ""
  parent_ids: tuple[tuple[int, ...], ...] = ()
  images: str = ""
  others: tuple[str, ...] = ()
  border: int = 0
  has_difficult: bool = False
  num_classes: int = 0
  grouping: str = ""
  ignored_groups: tuple[int, ...] = ()
  validation: str = "carved"
  validation_per_class: int = 0
  sizes: Mapping[str, int] = field(default_factory=dict)
  sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
  note: str = ""

  @property
  def chance(self) -> float | None:
    """Value of the metric if all answers are guessed; None where it depends on more than the number of classes."""
    return chance(self.metric or "", len(self.classes) or self.num_classes or 2)

  @property
  def clip_benchmark(self) -> str:
    """The name in CLIP_benchmark's results; that of DataComp's task or its own key if CLIP_benchmark has no name."""
    return next((self.sources[kind][0] for kind in ("clip_benchmark", "datacomp") if kind in self.sources), self.key)

  @property
  def prompt_sets(self) -> tuple[str, ...]:
    """Names of the prompt sets, the default first."""
    return (*self.templates, "bare") if self.task in ("classification", "multilabel") else ()

  def prompts(self, name: str = "") -> tuple[tuple[str, ...], ...]:
    """Prompts of each class, all templates with each of its names, in the order of `classes`.

    Args:
      name: one of `prompt_sets`; by default, the first.

    Raises:
      ValueError: the data set has no prompt set of this name, or no classes yet.
    """
    name = name or self.prompt_sets[0]
    if name not in self.prompt_sets or not self.classes:
      missing = f"no prompt set {name!r}; it has {', '.join(self.prompt_sets)}" if self.classes else "no classes"
      raise ValueError(f"{self.key} has {missing}{did_you_mean(name, self.prompt_sets)}")
    names = self.names.get(name) or self.synonyms or tuple((one,) for one in self.classes)
    templates = self.templates.get(name, BARE)
    return tuple(tuple(template.replace("{}", one) for template in templates for one in same) for same in names)

  def with_classes(self, classes: Sequence[str], templates: Sequence[str] = (), *, several: bool = False) -> "DataSet":
    """The data set with the classes and templates of its source, for entries whose `classes` is ().

    One of the user's own becomes data for retrieval if its source has no classes.

    Args:
      classes: names of the source's classes.
      templates: the source's prompt templates, for the prompt set "own"; by default, none is added.
      several: whether its images have several labels.

    Raises:
      ValueError: the number of classes is not `num_classes`.
    """
    if self.num_classes and len(classes) != self.num_classes:
      raise ValueError(f"{self.key} has {self.num_classes} classes, but its source has {len(classes)}")
    own = {"own": tuple(templates)} if templates else {}
    found = replace(self, classes=tuple(classes), templates={**own, **self.templates, **own})
    if not self.key.startswith(OWN) or (classes and not several):
      return found
    if several:
      return replace(found, task="multilabel", metric="mean_average_precision_11")
    return found.for_retrieval()

  def for_retrieval(self) -> "DataSet":
    """The data set for retrieval, without its classes."""
    return replace(self, task="retrieval", metric="mean_recall@1", classes=(), templates={})


@dataclass(frozen=True)
class Suite:
  """Data sets that are reported together.

  Attributes:
    name: its name, such as "slip26".
    title: the paper and table that it is from.
    keys: its data sets, in the order of the table.
    metrics: metrics that differ from `DataSet.metric`, by key.
    prompts: name of the prompt set, by key; "*" for the others.
    means: keys of the data sets whose unweighted mean is reported, by the name of the mean.
    sources: sources that differ from `DataSet.sources`, by key and kind of source.
  """

  name: str
  title: str
  keys: tuple[str, ...]
  metrics: Mapping[str, str] = field(default_factory=dict)
  prompts: Mapping[str, str] = field(default_factory=dict)
  means: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
  sources: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)

  def metric(self, key: str) -> str | None:
    """The metric that the suite reports for a data set; None for data without a single score."""
    return self.metrics.get(key, data_set(key).metric)

  def prompt_set(self, key: str) -> str:
    """Name of the prompt set for a data set; its default if the suite does not say."""
    sets = data_set(key).prompt_sets
    name = self.prompts.get(key, self.prompts.get("*", ""))
    return name if name in sets else next(iter(sets), "")

  def missing(self, have: Collection[str]) -> list[str]:
    """Keys of the suite that `have` lacks, in order."""
    return [key for key in self.keys if key not in have]

  def averages(
    self, values: Mapping[str, float], sizes: Mapping[str, "TrainingSize"] | None = None
  ) -> dict[str, float]:
    """The means whose data sets all have a value; an incomplete mean is absent.

    If the values are of different training sizes, a mean is that of the data sets with the largest one, which its name
    then says, such as "mean_of_20_sets_with_16_shots"; it needs two of them.

    Args:
      values: values of `metric`, by key.
      sizes: how much the classifiers of the values were given to train on, by key; all alike by default.
    """
    found, sizes = {}, sizes or {}
    for name, keys in self.means.items():
      if not all(key in values for key in keys):
        continue
      most = max((sizes[key] for key in keys if key in sizes), default=None)
      used = [key for key in keys if sizes.get(key) == most]
      if len(used) == len(keys):
        found[name] = sum(values[key] for key in keys) / len(keys)
      elif len(used) > 1:
        found[f"{name}_of_{len(used)}_sets_with_{most}"] = sum(values[key] for key in used) / len(used)
    return found


class TrainingSize(NamedTuple):
  """How much a classifier that learns from few images is given: fewer where a training split has no more.

  Attributes:
    number: images of each class, or neighbours.
    unit: "shots" or "neighbours".
  """

  number: int
  unit: str

  def __str__(self) -> str:
    return f"{self.number}_{self.unit}"


def training_size(kind: str, headline: str, details: Mapping[str, Any]) -> TrainingSize | None:
  """The training size of a headline score of few shots or of nearest neighbours; None for other evaluators.

  Args:
    kind: the evaluator.
    headline: name of the headline metric.
    details: details of the scores.
  """
  if kind == "few_shot" and headline.startswith("shots_"):
    return TrainingSize(int(headline.removeprefix("shots_")), "shots")
  if kind == "knn" and "neighbours" in details:
    return TrainingSize(int(details["neighbours"]), "neighbours")
  return None


@cache
def data_set(key: str) -> DataSet:
  """Returns the entry of a data set; that of a key which starts with `OWN` has no classes yet.

  Raises:
    ValueError: there is none; the message names similar ones.
  """
  if key.startswith(OWN) and key != OWN:
    return DataSet(key, key.removeprefix(OWN), "classification", "top1", templates={"own": ("a photo of a {}.",)})
  if key not in keys():
    raise ValueError(f"unknown data set {key!r}; data sets of your own are called {OWN}NAME{did_you_mean(key, keys())}")
  return _entry(key, _read(key))


@cache
def keys() -> tuple[str, ...]:
  """Keys of all data sets, in alphabetical order."""
  return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def suite(name: str) -> Suite:
  """Returns a suite.

  Raises:
    ValueError: there is none; the message names all, and similar ones.
  """
  if name not in suites():
    raise ValueError(f"no suite {name!r}; there are {', '.join(suites())}{did_you_mean(name, suites())}")
  return suites()[name]


@cache
def suites() -> Mapping[str, Suite]:
  """All suites, by name."""
  return {name: _suite(name, about) for name, about in json.loads(_SUITES.read_text("utf-8")).items()}


def _suite(name: str, about: Mapping[str, Any]) -> Suite:
  means = {mean: tuple(members or about["keys"]) for mean, members in about["means"].items()}
  sources = {key: _tuples(kinds) for key, kinds in about.get("sources", {}).items()}
  rest = {name: about[name] for name in ("metrics", "prompts") if name in about}
  return Suite(name, about["title"], tuple(about["keys"]), means=means, sources=sources, **rest)


def _read(key: str) -> dict[str, Any]:
  """The JSON file of a data set; `classes_of` names the one that has its classes, and their prompts and aliases."""
  about = json.loads((_FOLDER / f"{key}.json").read_text("utf-8"))
  other = about.pop("classes_of", "")
  shared = _read(other) if other else {}
  return {**{name: value for name, value in shared.items() if name not in _OF_IMAGES}, **about}


def _entry(key: str, about: dict[str, Any]) -> DataSet:
  """The entry in a JSON file; `of` names the data set whose classes `ids` it has, all by default."""
  prompts, names, folders = (about.pop(name, {}) for name in ("prompts", "names", "folders"))
  prompts = {name: tuple(prompts[of] if isinstance(of, str) else of) for name, of in prompts.items()}
  listed, parent = about.pop("classes", []), about.pop("of", "")
  ids: tuple[tuple[int, ...], ...] = ()
  if parent:
    above = data_set(parent)
    ids = tuple((i,) if isinstance(i, int) else tuple(i) for i in about.pop("ids", range(len(above.classes))))
    prompts = {**above.templates, **prompts}
    listed = listed or [above.classes[first] for first, *_ in ids]
    folders = folders or [above.folders[first] for first, *_ in ids if above.folders]
  synonyms = tuple(_listed(listed))
  orders = {kind: _order(order, len(synonyms)) for kind, order in about.pop("orders", {}).items()}
  plain = {name: tuple(value) if isinstance(value, list) else value for name, value in about.items()}
  plain["sources"] = _tuples(plain.get("sources", {}))
  return DataSet(
    key=key,
    classes=tuple(same[0] for same in synonyms),
    templates=prompts,
    names={name: tuple(_listed(of)) for name, of in names.items()},
    synonyms=synonyms,
    folders=tuple(folders),
    orders=orders,
    parent=parent,
    parent_ids=ids,
    **plain,
  )


def _listed(names: Sequence[str | list[str]]) -> Iterator[tuple[str, ...]]:
  """Each class as a tuple of its names."""
  return ((name,) if isinstance(name, str) else tuple(name) for name in names)


def _order(order: str | list[int], classes: int) -> tuple[int, ...]:
  return tuple(range(classes)) if order == "same" else tuple(order)


def _tuples(lists: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
  return {name: tuple(values) for name, values in lists.items()}
