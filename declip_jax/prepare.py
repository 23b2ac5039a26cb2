"""A run before anything is allocated, compiled or written: its stages, its data and what can be checked in advance."""

from collections.abc import Callable, Sequence
import functools
import operator
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
import numpy as np

from declip_jax import build
from declip_jax.data import pipeline
from declip_jax.data.deaths import Deaths
from declip_jax.data.guess import guess, guess_test, read_as
from declip_jax.data.make_views import MakeViews
from declip_jax.data.mixture import Mixture
from declip_jax.data.sources import Source, open_source
from declip_jax.evals import SPLITS
from declip_jax.evals.encoders import EncoderFactory, Encoders
from declip_jax.extras import grain
from declip_jax.first_state import read_weights
from declip_jax.models.paths import trainable
from declip_jax.planning import choose, flops
from declip_jax.planning.architecture import FOR_CPUS
from declip_jax.reporting.trackers import OpenTracker
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.runtime.hosts import check_sizes
from declip_jax.runtime.watchdog import Watchdog
from declip_jax.runtime.workdir import read_config
from declip_jax.sharding import check_batch
from declip_jax.spelling import counted
from declip_jax.stages import LAST, Stage, naming, plan_stages, repeatable_from, stage_configs
from declip_jax.training.state import State, abstract_state
from declip_jax.training.step import Metrics
from declip_jax.types import Batch
from declip_jax.weights.read import Weights

_LARGE_FOR_CPU = 64  # pixels
_DEFAULT_DATA = ":data/"  # in a spec: a folder in which the configs of published results expect their data
StepFn = Callable[[State, Batch], tuple[State, Metrics]]


class Part(NamedTuple):
  """A stage of a run, and what it is trained with; a run without `config.stages` has one.

  Attributes:
    stage: its config and its steps.
    built: its objects.
    samples: training samples, in their order.
    shown: the same samples with their origins, for a picture.
    steps: its durations in steps.
    step_fn: its train step, which is compiled when it is first called.
  """

  stage: Stage
  built: build.Built
  samples: "grain.MapDataset"
  shown: "grain.MapDataset"
  steps: build.Steps
  step_fn: StepFn


class Prepared(NamedTuple):
  """A run before anything is allocated, compiled or written."""

  parts: list[Part]
  epoch_examples: int
  sources: list[Source]
  deaths: Deaths
  evaluation_deaths: Deaths
  abstract: State
  encoders: EncoderFactory
  evaluate: Callable[[Encoders, int], dict[str, float]]
  initial: Weights | None
  trackers: dict[str, OpenTracker]
  notes: list[str]
  step_flops: Callable[..., float]  # of a stage, a batch size and, optionally, a length of trimmed texts

  @property
  def built(self) -> build.Built:
    """The objects of the last stage, whose images and texts are those of the model."""
    return self.parts[-1].built

  @property
  def stages(self) -> list[Stage]:
    """The stages themselves."""
    return [part.stage for part in self.parts]

  @property
  def total_steps(self) -> int:
    """Number of steps of the whole run."""
    return self.parts[-1].stage.last

  def after(self, step: int) -> Part:
    """The stage of the step after the first `step` steps; the last one if there is none."""
    return next((part for part in self.parts if step < part.stage.last), self.parts[-1])

  def until(self, step: int) -> Part:
    """The stage of the last of the first `step` steps; the first one for 0."""
    return next((part for part in self.parts if step <= part.stage.last), self.parts[-1])


def prepare(config: ConfigDict, workdir: Path, sources: Sequence[Source] | None, watchdog: Watchdog) -> Prepared:
  """Builds a run and checks everything that can be checked in advance.

  Raises:
    ValueError, FileNotFoundError: see `train`.
  """
  watchdog.beat("finding the devices")
  builts = _build_stages(config)  # and checks what is possible before anything is traced
  built = builts[LAST]
  mixture, ssl_mixture = _open_mixtures(config, built, sources, watchdog)
  opened = [*mixture.sources, *(ssl_mixture.sources if ssl_mixture else ())]
  epoch_examples = sum(map(len, mixture.sources))
  stages = plan_stages(config, epoch_examples)
  watchdog.beat("the comparison of the data that all processes have opened")
  check_sizes([(source.name, len(source)) for source in opened])
  build.check_evals(config.evals, built.objective)
  build.check_best_metric(config)
  for stage in stages:
    with naming(stage.name, config):
      shape = builts[stage.name].batch_shape(stage.config.batch_size)
      build.check_objective(stage.config, builts[stage.name], shape)
  batch_shape = built.batch_shape(config.batch_size)
  averaged = config.optimizer.ema > 0
  abstract = abstract_state(batch_shape, built.mesh, model=built.model, optimizer=built.optimizer, averaged=averaged)
  deaths = Deaths(workdir, jax.process_index())
  evaluation_deaths = Deaths(workdir, jax.process_index(), "evaluating")

  def samples(make_views: MakeViews) -> "grain.MapDataset":
    return pipeline.training_samples(mixture, make_views, config.seed, ssl_mixture, config.data.max_pixels, deaths)

  parts = [
    (stage, built, samples(built.make_views), samples(built.make_views.with_origin))
    for stage, built in ((stage, builts[stage.name]) for stage in stages)
  ]

  @functools.cache
  def step_flops(name: str, size: int, text_length: int) -> float:
    return flops.step_flops(builts[name], size, text_length)

  return Prepared(
    parts=[_part(config, *part, epoch_examples, abstract) for part in parts],
    epoch_examples=epoch_examples,
    sources=opened,
    deaths=deaths,
    evaluation_deaths=evaluation_deaths,
    abstract=abstract,
    encoders=build.make_encoders(config, built, evaluation_deaths),
    evaluate=build.make_evaluators(config.evals, workdir, config.model.heads.classnames, config.evaluate_cache_gib),
    initial=None if has_checkpoints(workdir) else read_weights(config),
    trackers=build.make_trackers(config.trackers),
    notes=[
      *_notes([mixture, ssl_mixture], max(stage.config.batch_size for stage in stages), config.optimizer.ema),
      *_about_adapters(built, abstract),
    ],
    step_flops=lambda stage, size, text_length=0: step_flops(stage.name, size, text_length),
  )


def _build_stages(config: ConfigDict) -> dict[str, build.Built]:
  """Builds the objects of each stage, by its name.

  Raises:
    ValueError: a stage contradicts itself, or its batches do not divide into the devices.
  """
  builts = {}
  for name, of_stage in stage_configs(config).items():
    with naming(name, config):
      builts[name] = built = build.build(of_stage)
      check_batch(of_stage.batch_size, built.mesh, "config.batch_size")
      build.check_division(of_stage, built.mesh.size)
  return builts


def _part(
  config: ConfigDict,
  stage: Stage,
  built: build.Built,
  samples: "grain.MapDataset",
  shown: "grain.MapDataset",
  epoch_examples: int,
  abstract: State,
) -> Part:
  with naming(stage.name, config):
    steps = build.stage_steps(stage, epoch_examples)
    return Part(stage, built, samples, shown, steps, build.make_step(stage.config, built, steps, abstract))


def _notes(mixtures: Sequence[Mixture | None], batch_size: int, ema: float = 0.0) -> list[str]:
  notes = [note for mixture in mixtures if mixture for note in mixture.repeats(batch_size)]
  if ema:
    notes.append(f"evaluations read the moving average of the weights (config.optimizer.ema={ema:g})")
  return notes


def _about_adapters(built: build.Built, abstract: State) -> list[str]:
  """How many parameters are trained, if there are adapters."""
  if not built.model.lora:
    return []
  sizes = [leaf.size for leaf in jax.tree.leaves(abstract.params)]
  shares = [float(np.mean(part)) for part in jax.tree.leaves(trainable(abstract.params, built.frozen))]
  trained = round(sum(map(operator.mul, sizes, shares)))
  return [f"{trained:,} of {sum(sizes):,} parameters are trained (config.lora.rank={built.model.lora.rank})"]


def has_checkpoints(workdir: Path) -> bool:
  return any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))


def with_specs(config: ConfigDict) -> ConfigDict:
  """Replaces paths in `config.data.train`, `config.data.ssl_train` and `config.evals` by the specs of their data.

  They are printed, and saved with the run. A path that does not exist stays, unless its suffix determines its kind.

  Raises:
    ValueError: nothing was recognised at a path.
  """
  config = config.copy_and_resolve_references()
  for field in ("train", "ssl_train"):
    config.data[field] = tuple(_spec(path, f"config.data.{field}", guess) for path in config.data[field])
  for name, fields in config.evals.items():
    if isinstance(fields, ConfigDict) and not fields.get("suite"):
      for split, function in {"data": guess_test, **dict.fromkeys(SPLITS, guess)}.items():
        if isinstance(path := fields.get(split), str) and path:
          fields[split] = _spec(path, f"config.evals.{name}.{split}", function)
  return config


def _spec(path: str, field: str, function: Callable[[str], str]) -> str:
  try:
    return read_as(path, field, function)
  except FileNotFoundError:
    return path


def with_classes(
  config: ConfigDict, sources: Sequence[Source] | None, watchdog: Watchdog
) -> tuple[ConfigDict, Sequence[Source] | None]:
  """Sets the classes of a classifier, if the config leaves them to the data; the sources are then open.

  Raises:
    ValueError: neither the config nor the first source has the number of classes.
  """
  if "classifier" not in build.heads_of(config) or config.model.heads.classnames:
    return config, sources
  sources = _open_sources(config, "train", watchdog) if sources is None else sources
  names, config = tuple(sources[0].classnames), config.copy_and_resolve_references()
  heads = config.model.heads
  heads.classnames, heads.num_classes = names, heads.num_classes or len(names)
  if not heads.num_classes:
    raise ValueError(
      f"{sources[0].name} has no class names: fine-tuning needs labelled images, such as a folder with a folder per "
      "class; for numbered labels without names, set config.model.heads.num_classes"
    )
  return config, sources


def with_choices(
  config: ConfigDict, sources: Sequence[Source] | None, steps: int | None, workdir: Path, watchdog: Watchdog
) -> tuple[ConfigDict, Sequence[Source] | None, list[str]]:
  """Sets the fields that the config leaves open, and shortens it for a try; returns messages about both.

  Raises:
    ValueError: the run is resumed, but its config.json is missing or damaged; see also `choose`.
  """
  fields, notes = choose.open_fields(config), []
  if not fields and steps is None:
    return config, sources, []
  sources = _open_sources(config, "train", watchdog) if sources is None else sources
  pairs = max(1, sum(map(len, sources)))  # an empty source is rejected later
  if fields:
    saved, where = None, f"{counted(pairs, 'sample')} and {jax.device_count()} x {jax.devices()[0].device_kind}"
    if has_checkpoints(workdir) and not (saved := read_config(workdir)):
      raise ValueError(
        f"{workdir / 'config.json'} cannot be read, which has config.{', config.'.join(fields)}: set them"
      )
    watchdog.beat("choosing what the config leaves open")
    before, config = config.log_every, choose.choose(config, pairs, saved=saved)
    kept = [field for field in fields if saved and field != "duration"]  # that follows from the data alone
    if kept:
      notes.append(f"kept from the last start: {choose.describe(config, kept)}")
    chosen = [field for field in fields if field not in kept]
    if chosen := [*chosen, *["log_every"] * (config.log_every != before)]:
      notes.append(f"chosen for {where}: {choose.describe(config, chosen)}")
    if jax.default_backend() == "cpu" and config.data.image_size > _LARGE_FOR_CPU:
      notes.append(f"a CPU takes long to train this model: architecture={FOR_CPUS} is small enough for it")
  if steps is not None:
    config, remarks = choose.with_fitting_warmup(config, pairs)
    config, whole = choose.shortened(config, steps, pairs), build.to_steps(config, pairs).total
    notes += remarks
    notes.append(f"--steps={steps}: {counted(steps, 'step')} instead of {whole:,}")
  return config, sources, notes


def _open_sources(config: ConfigDict, field: str, watchdog: Watchdog) -> tuple[Source, ...]:
  """The sources in a field of `config.data`.

  Raises:
    FileNotFoundError, ValueError: there are none, or one cannot be opened.
  """
  if not config.data[field]:
    raise ValueError(
      f"config.data.{field} is empty: data= is missing, which names the training data, as in "
      "--config=NAME:data=pairs.csv, beside other arguments"
    )

  def opened(spec: str) -> Source:
    watchdog.beat(f"opening {spec}")
    try:
      return open_source(spec, f"config.data.{field}")
    except FileNotFoundError as error:
      if _DEFAULT_DATA not in spec:
        raise
      raise FileNotFoundError(f"{error}; data= says where the data are, as in --config=NAME:data=FOLDER") from error

  return tuple(map(opened, config.data[field]))


def _open_mixtures(
  config: ConfigDict, built: build.Built, sources: Sequence[Source] | None, watchdog: Watchdog
) -> tuple[Mixture, Mixture | None]:
  """Returns the mixture to train on, and that of the other images for self-supervision, None if there is none."""
  data = config.data
  needs_caption = bool(built.recipe.text_views)
  sources = _open_sources(config, "train", watchdog) if sources is None else tuple(sources)
  mixture = Mixture(sources, data.mixture, needs_caption, data.templates)
  mixture.check_captions()
  if built.recipe.views.numbers("classified_image"):
    mixture.check_classes(config.model.heads.num_classes, config.model.heads.classnames)
  if not data.ssl_train:
    return mixture, None
  return mixture, Mixture(_open_sources(config, "ssl_train", watchdog), data.ssl_mixture, False, (), "ssl_mixture")


def planned(config: ConfigDict, run: Prepared, checkpoints: Checkpoints, start: int) -> tuple[Prepared, str]:
  """Returns a run whose durations count the examples of earlier batches of another size, and a message about them."""
  if start:
    before = checkpoints.batch_sizes(start) or run.parts[-1].stage.batch_sizes
    stages = plan_stages(config, run.epoch_examples, before, start)
    parts = [
      _part(config, stage, part.built, part.samples, part.shown, run.epoch_examples, run.abstract)
      for stage, part in zip(stages, run.parts, strict=True)
    ]
    run = run._replace(parts=parts)
  all_sizes = run.parts[-1].stage.batch_sizes
  if all_sizes.since and not config.checkpoint.keep_every.steps:
    checkpoints.first.length = all_sizes.batches
  sizes = run.after(start).stage.batch_sizes.between(0, start + 1)
  if not repeatable_from(run.stages) or not sizes.since:
    return run, ""
  return run, (
    f"the batch size has been {sizes.size} since step {sizes.since:,}, and {sizes.changes[-2][1]} before: durations in "
    f"epochs and examples count the {sizes.examples(start):,} examples so far"
  )
