"""The only module that turns a config into objects: no lower module reads a config."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from functools import partial
import inspect
import math
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict
import optax

from declip_jax.batch_sizes import BatchSizes
from declip_jax.config import TEMPLATES, examples_of, steps_of
from declip_jax.data.deaths import Deaths
from declip_jax.data.images import EvalView
from declip_jax.data.make_views import MakeViews, Masking, Rendering
from declip_jax.data.pipeline import Reading
from declip_jax.data.recipes import Recipe, get_recipe, trimmed
from declip_jax.data.sources import Source, open_source, share_samples
from declip_jax.data.text.tokenizer import Tokenizer, make_tokenizer
from declip_jax.evals import EVALUATORS, SPLITS, catalogue, check_metric, check_options, suites
from declip_jax.evals.catalogue import TrainingSize, training_size
from declip_jax.evals.classes import align
from declip_jax.evals.classify import columns
from declip_jax.evals.encoders import EncoderFactory, Encoders, make_encode_functions
from declip_jax.evals.features import DecodedImages
from declip_jax.evals.jobs import DataSource, Job, run_jobs
from declip_jax.extras import install_command, is_installed
from declip_jax.methods import name_of
from declip_jax.models.heads import diagnostic_kinds
from declip_jax.models.lora import Lora, frozen_paths
from declip_jax.models.model import Model, make_model
from declip_jax.models.paths import is_below
from declip_jax.objectives import TERMS, Objective, diagnostics, make_objective
from declip_jax.objectives.blockwise import PLAIN, Method
from declip_jax.objectives.momentum import momentum_at
from declip_jax.ranges import check_values
from declip_jax.reporting.chance import chance_losses
from declip_jax.reporting.curves import Described
from declip_jax.reporting.progress import message
from declip_jax.reporting.symptoms import Facts
from declip_jax.reporting.trackers import OpenTracker
from declip_jax.reporting.trackers.libraries import TRACKERS
from declip_jax.sharding import gather, make_mesh, replicated, traced_over
from declip_jax.spelling import counted, did_you_mean
from declip_jax.stages import Stage, plan_stages
from declip_jax.training import augment as augmentation
from declip_jax.training import drop_path, mixing, optim, patch_dropout, schedules
from declip_jax.training.gradient import Metrics, make_gradient
from declip_jax.training.state import State
from declip_jax.training.step import train_step
from declip_jax.types import Batch, BatchShapes
from declip_jax.weights.initial import InitFrom

_EVALS = "config.evals."  # before the name of an entry, in messages
_ALL = "all"  # as a suite: every data set of a data file
_OVERRIDES = (
  "weak_scale",
  "strong_scale",
  "jitter",
  "jitter_probability",
  "grayscale_probability",
  "blur_probability",
  "blur_radius",
  "solarize_probability",
  "flip_probability",
  "text_operations",
  "rand_magnitude",
  "erase_probability",
  "mixup",
  "cutmix",
  "squash",
)


class Built(NamedTuple):
  """The objects that a config describes, without data and parameters.

  Attributes:
    model: pure functions of parameters.
    objective: the weighted terms, which split their comparisons of all pairs over `mesh`.
    optimizer: optimiser whose updates have no learning rate yet.
    tokenizer: tokenizer of the captions.
    make_views: function from an example to the views of the data recipe that the objective uses.
    mesh: mesh of all devices.
    num_kept_patches: number of patches of an image that enter the image tower in training; None if all do.
    frozen: paths of the parameters that are not trained, see `models.paths.trainable`.
    text_lengths: lengths that a batch of texts can have in training, ascending, the last of which is the context
      length; empty without texts.
  """

  model: Model
  objective: Objective
  optimizer: optax.GradientTransformation
  tokenizer: Tokenizer
  make_views: MakeViews
  mesh: Mesh
  num_kept_patches: int | None
  frozen: tuple[str, ...]
  text_lengths: tuple[int, ...]

  def batch_shape(self, batch_size: int) -> BatchShapes:
    """Shapes and dtypes of a global batch whose texts are not trimmed."""
    shapes = self.make_views.batch_shapes(batch_size).items()
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes}

  def training_shape(self, batch: BatchShapes) -> BatchShapes:
    """A batch as the towers encode it in training: with `kept_patches`, if there is patch dropout."""
    if self.num_kept_patches is None:
      return batch
    kept = jax.ShapeDtypeStruct((*batch["image"].shape[:2], self.num_kept_patches), jnp.int32)
    return {**batch, "kept_patches": kept}

  @property
  def recipe(self) -> Recipe:
    """The data recipe, with the config's overrides."""
    return self.make_views.recipe


def heads_of(config: ConfigDict) -> tuple[str, ...]:
  """The heads that the terms of a config need, by name.

  Raises:
    ValueError: an unknown term or option, or an invalid number.
  """
  return make_objective(config.objective.to_dict()).heads


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Built:
  """Builds the objects that a config describes, over all devices of all processes or over the given ones.

  Raises:
    ValueError: an unknown name or an invalid number; the message names it and the legal ones.
  """
  check_values(config)
  mesh = make_mesh(**config.mesh, devices=devices)
  contrast = Method(config.contrast.method, mesh, config.contrast.block)
  objective = make_objective(config.objective.to_dict(), contrast)
  recipe = _make_recipe(config, objective)
  tokenizer = make_tokenizer(config.model.text.tokenizer, config.model.text.context_length)
  _check_texts(config, recipe, tokenizer)
  _check_drops(config, recipe)
  _check_images(config)
  _check_unread(config.optimizer, "optimizer", optim.OptimizerSettings, schedules.ScheduleSettings)
  lora = _make_lora(config, objective)
  locked = any(is_below("towers/image", prefix) for prefix in config.optimizer.frozen)
  locked |= lora is not None and not lora.trains_image
  model = make_model(config.model.to_dict(), views=recipe.views, heads=objective.heads, lock_image=locked, lora=lora)
  grid, rate = config.data.image_size // model.towers.image.stride, config.model.patch_dropout
  make_views = _make_views(config, recipe, tokenizer, grid)
  num_kept = patch_dropout.num_kept(grid**2, rate) if rate else None
  lengths = _text_lengths(config, model) if recipe.text_views and model.towers.text is not None else ()
  frozen = config.optimizer.frozen
  built = Built(model, objective, optax.identity(), tokenizer, make_views, mesh, num_kept, frozen, lengths)
  if lora:
    params, _ = jax.eval_shape(model.init, jax.random.key(0), built.batch_shape(config.batch_size))
    built = built._replace(frozen=(*built.frozen, *frozen_paths(params, lora)))
  optimizer = read_settings(optim.OptimizerSettings, config.optimizer, "optimizer", frozen=built.frozen)
  return built._replace(optimizer=optim.make_optimizer(optimizer))


def _make_lora(config: ConfigDict, objective: Objective) -> Lora | None:
  """The adapters of a config, None if it has none."""
  if not config.lora.rank:
    return None
  if "momentum" in objective.heads:
    raise ValueError(
      f"config.lora.rank={config.lora.rank}: a momentum tower, as of {[*objective.weights]}, would be a copy without "
      "adapters: choose 0, or terms without a momentum tower"
    )
  if config.optimizer.name == "lars":
    raise ValueError(
      f"config.lora.rank={config.lora.rank}: config.optimizer.name='lars' scales updates by the norm of a parameter, "
      "so that adapters, which begin with zeros, would never change: choose another optimizer"
    )
  return read_settings(Lora, config.lora, "lora")


def _text_lengths(config: ConfigDict, model: Model) -> tuple[int, ...]:
  """`Built.text_lengths` of a config with texts: only the context length if the tower or a loss sees padding."""
  text, filip = config.model.text, config.objective.filip
  sees_padding = not model.towers.text.ignores_padding or ("filip" in model.heads.members and filip.top_k)
  shorter = () if sees_padding else (length for length in text.buckets if length < text.context_length)
  return (*shorter, text.context_length)


def _make_recipe(config: ConfigDict, objective: Objective) -> Recipe:
  """The data recipe with the config's overrides and only the views that the objective uses."""
  recipe = get_recipe(config.data.recipe, {name: config.data[name] for name in _OVERRIDES})
  if config.data.neighbour_texts is not None:
    recipe = _with_neighbour_texts(recipe, config.data.neighbour_texts)
  objective.check_views(recipe.views, config.data.recipe)
  recipe = trimmed(recipe, objective.used_views(recipe.views))
  if config.data.ssl_train:
    _check_ssl_sources(config, recipe)
  return recipe


def unread_augmentation(config: ConfigDict) -> list[str]:
  """The fields of augmentation that a config sets and no view of its recipe reads, such as "data.flip_probability"."""
  read = get_recipe(config.data.recipe, {}).read
  return [f"data.{name}" for name in _OVERRIDES if config.data[name] is not None and name not in read]


def _make_views(config: ConfigDict, recipe: Recipe, tokenizer: Tokenizer, grid: int) -> MakeViews:
  data = config.data
  if recipe.views.masked_image is not None and not 0 < round(data.patch_share * grid**2) < grid**2:
    raise ValueError(
      f"config.data.patch_share={data.patch_share} hides none or all of the {grid} x {grid} patches that "
      f"config.data.image_size={data.image_size} has with this config.model.image: choose a larger image"
    )
  if data.augment_on == "device" and "randaugment" in recipe.image_views:
    raise ValueError(
      f"config.data.augment_on='device': recipe {data.recipe!r} has RandAugment, which runs on the host: choose 'host'"
    )
  rendering = Rendering(data.image_size, data.interpolation, data.engine, data.augment_on, data.max_pixels)
  masking = Masking(
    data.mask_probability,
    data.mask_slots,
    data.mask_whole_words,
    patch_grid=grid,
    patch_share=data.patch_share,
  )
  return MakeViews(recipe, tokenizer, rendering, masking, data.caption_weights, config.model.heads.num_classes)


def _check_texts(config: ConfigDict, recipe: Recipe, tokenizer: Tokenizer) -> None:
  """Rejects a text tower that does not fit the tokenizer, the recipe or the objective."""
  text = config.model.text
  needed = tokenizer.vocab_size if "masked" in recipe.text_views else tokenizer.plain_size
  if text.vocab_size < needed:
    raise ValueError(
      f"config.model.text.vocab_size={text.vocab_size} is too small: recipe {config.data.recipe!r} needs ids up to "
      f"{needed - 1}"
    )
  if text.eot != tokenizer.eot:
    raise ValueError(
      f"config.model.text.eot={text.eot}: config.model.text.tokenizer={text.tokenizer!r} ends texts with "
      f"{tokenizer.eot}"
    )


def _check_images(config: ConfigDict) -> None:
  """Rejects images that do not divide into the image tower's patches, and resizing that the crop does not fit."""
  size, image, data = config.data.image_size, config.model.image, config.data
  if data.squash and data.evaluation_resize:
    raise ValueError(
      f"config.data.evaluation_resize={data.evaluation_resize} has no effect with config.data.squash=True, which cuts "
      "nothing off: set it to 0"
    )
  if 0 < data.evaluation_resize < size:
    raise ValueError(
      f"config.data.evaluation_resize={data.evaluation_resize}, from which evaluations cut, is less than "
      f"config.data.image_size={size}: set it to 0 for the size of the image, or to {size * 256 // 224}"
    )
  if image.get("pooling") == "map" and size >= image.patch:  # see `architectures.SIGLIP`
    return
  if image.get("patch") and size % image.patch:
    raise ValueError(f"config.data.image_size={size} is not a multiple of config.model.image.patch={image.patch}")
  if image.kind == "resnet" and size % 32:
    raise ValueError(f"config.data.image_size={size} is not a multiple of 32, as a ResNet requires")


def _check_drops(config: ConfigDict, recipe: Recipe) -> None:
  """Rejects drop path and patch dropout in a tower without them, and patch dropout of views with hidden patches."""
  model = config.model
  for name in ("drop_path", "patch_dropout"):
    if model[name] and model.image.kind != "vit":
      raise ValueError(
        f"config.model.{name}={model[name]} needs config.model.image.kind='vit', not {model.image.kind!r}"
      )
  if model.patch_dropout and recipe.views.masked_image is not None:
    raise ValueError(
      f"config.model.patch_dropout={model.patch_dropout}: recipe {config.data.recipe!r} hides patches for masked image "
      "modelling, which needs the tokens of all patches: choose 0.0, or a method without the term 'mim'"
    )


def _with_neighbour_texts(recipe: Recipe, kinds: tuple[str, ...]) -> Recipe:
  """The recipe with text views of these kinds for nearest-neighbour supervision."""
  contrasted = {recipe.text_views[view]: view for view in recipe.views.contrastive_text}
  if not kinds or not set(kinds) <= set(contrasted):
    raise ValueError(f"config.data.neighbour_texts={kinds}: choose one or more of {list(contrasted)}")
  views = recipe.views.replace(neighbour_text=tuple(contrasted[kind] for kind in kinds))
  return dataclasses.replace(recipe, views=views)


def _check_ssl_sources(config: ConfigDict, recipe: Recipe) -> None:
  """Rejects images of other sources for views that the recipe does not make, or that are compared with captions."""
  views, where = recipe.views, f"config.data.ssl_train={config.data.ssl_train}: recipe {config.data.recipe!r}"
  if not views.ssl_image:
    raise ValueError(f"{where} makes no view for self-supervision on images, or no term with a weight uses it")
  if set(views.ssl_image) & set(views.contrastive_image):
    raise ValueError(f"{where} also contrasts these views with captions, which other images lack: use 'slip'")


Settings = TypeVar("Settings")


def read_settings(kind: type[Settings], subtree: ConfigDict, name: str, /, **given: Any) -> Settings:
  """Makes a dataclass of settings whose fields have the names of a config's fields.

  Args:
    kind: the dataclass.
    subtree: the config's fields; those that `kind` does not have are ignored.
    name: name of the subtree, for errors.
    given: values that override those of the subtree or add to them.

  Raises:
    ValueError: a field that the config does not have, or a value that `kind` rejects.
  """
  fields = [field.name for field in dataclasses.fields(kind)]
  if missing := [field for field in fields if field not in given and field not in subtree]:
    raise ValueError(f"config.{name} has no fields {missing}, which {kind.__name__} needs: it has {sorted(subtree)}")
  return kind(**{field: given.get(field, subtree.get(field)) for field in fields})


def _check_unread(subtree: ConfigDict, name: str, *kinds: type) -> None:
  """Rejects fields of a config that none of the dataclasses has: they would have no effect."""
  known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
  if unread := sorted(set(subtree) - known):
    raise ValueError(f"config.{name} has fields {unread} without effect: known are {sorted(known & set(subtree))}")


class Steps(NamedTuple):
  """All durations of a stage of a run in steps, 0 for never; a run without `config.stages` is one stage.

  Attributes:
    first, total: number of steps of the run before the stage and at its end.
    evaluate, checkpoint, keep_every: steps between two evaluations and checkpoints.
    schedule: the learning rate schedule, which has durations of its own, from the start of the stage.
    evaluate_phase, checkpoint_phase: remainder of the steps that are due, divided by the steps between them.
    lead: what the schedule adds to the step. It follows the examples that the stage has seen, counted in batches of the
      current size.
    run_lead: what a schedule over the whole run adds to the step: it follows the examples that the run has seen.
    run_total: length of the run in batches of the current size.
  """

  first: int
  total: int
  evaluate: int
  checkpoint: int
  keep_every: int
  schedule: schedules.ScheduleSettings
  evaluate_phase: int
  checkpoint_phase: int
  lead: int
  run_lead: int
  run_total: int


def to_steps(config: ConfigDict, epoch_examples: int, batch_sizes: BatchSizes | None = None) -> Steps:
  """Converts the durations of a config, for its last stage.

  Args:
    config: the config.
    epoch_examples: number of examples in an epoch.
    batch_sizes: the batch sizes of the run so far, the last of which is the config's; by default it has no other one.

  Raises:
    ValueError: the run has no length, or a duration has two.
  """
  stages = plan_stages(config, epoch_examples, batch_sizes, batch_sizes.since if batch_sizes else 0)
  return stage_steps(stages[-1], epoch_examples)


def stage_steps(stage: Stage, epoch_examples: int) -> Steps:
  """Converts the durations of a stage.

  The learning rate is that of a run that consists of the stage; evaluations and checkpoints count from the start of the
  whole run. If the batch size has changed, durations in epochs and examples keep their number of examples.

  Args:
    stage: the stage.
    epoch_examples: number of examples in an epoch.

  Raises:
    ValueError: a duration has two units, or does not fit into the stage.
  """
  config, sizes, own, length = stage.config, stage.sizes_so_far, stage.own_sizes, stage.last - stage.first
  convert = partial(steps_of, batch_size=config.batch_size, epoch_examples=epoch_examples)
  cadences = {
    "evaluate_every": config.evaluate_every,
    "checkpoint.every": config.checkpoint.every,
    "checkpoint.keep_every": config.checkpoint.keep_every,
  }
  evaluate, checkpoint, keep_every = (convert(every, name=name) for name, every in cadences.items())
  settings = {field: value for field, value in config.optimizer.items() if isinstance(value, ConfigDict)}
  durations = {field: convert(value, name=f"optimizer.{field}") for field, value in settings.items()}

  def end(duration: ConfigDict) -> int:  # from the start of the stage
    return duration.steps or own.step(examples_of(duration, epoch_examples))

  def phase(duration: ConfigDict, every: int) -> int:
    examples = examples_of(duration, epoch_examples)
    if not examples:
      return 0
    return sizes.step(examples * (sizes.examples(sizes.since) // examples + 1)) % every

  cooldown, optimizer = durations["cooldown"], config.optimizer
  durations["warmup"] = own.batches(end(optimizer.warmup))
  if optimizer.cooldown.steps:
    durations["cooldown"] = own.batches(length) - own.batches(length - cooldown)
  schedule = read_settings(
    schedules.ScheduleSettings,
    optimizer,
    "optimizer",
    total_steps=own.batches(length),
    milestones=tuple((own.batches(step - 1) + 1, factor) for step, factor in optimizer.milestones),
    **durations,
  )
  examples_left = stage.batch_sizes.examples(stage.total_steps) - sizes.examples(stage.last)
  return Steps(
    first=stage.first,
    total=stage.last,
    evaluate=evaluate,
    checkpoint=checkpoint,
    keep_every=keep_every,
    schedule=schedule,
    evaluate_phase=phase(config.evaluate_every, evaluate),
    checkpoint_phase=phase(config.checkpoint.every, checkpoint),
    lead=own.batches(own.since) - own.since - stage.first,
    run_lead=sizes.batches(sizes.since) - sizes.since,
    run_total=sizes.batches(stage.last) + round(examples_left / sizes.size),
  )


def make_facts(config: ConfigDict, steps: Steps) -> Facts:
  """What the symptoms of a run depend on."""
  return Facts(
    batch_size=_compared_at_once(config),
    warmup=steps.schedule.warmup - steps.lead,
    total=steps.total,
    scales=tuple(map(math.exp, config.optimizer.logit_scale_range)),
    first=steps.first,
    log_every=config.log_every,
    is_fresh=not (steps.first or config.init_from.path),
  )


def describe_batch(built: Built, batch_size: int) -> str:
  """What a step reads, in words."""
  shapes = built.batch_shape(batch_size)
  size, grid = shapes["image"].shape[2], built.model.towers.image.stride
  kept = "" if built.num_kept_patches is None else f", {built.num_kept_patches} of {(size // grid) ** 2} patches"
  texts = f", texts of {shapes['text'].shape[-1]} tokens" if "text" in shapes else ""
  return f"{counted(batch_size, 'example')}, images of {size} x {size}{kept}{texts}"


def describe_run(config: ConfigDict, built: Built, stages: Sequence[Stage], sources: Sequence[Source]) -> Described:
  """The title of a run, its stages, and the losses and evaluations of which random answers have a known value.

  Args:
    config: the run.
    built: its objects.
    stages: its stages, in order.
    sources: data to train on, without those for self-supervision alone.
  """
  *before, last = stages
  kind = "pairs" if built.recipe.text_views else "images"
  names = [source.name for source in sources]
  data = ", ".join(names if len(names) < 4 else [*names[:2], f"{len(names) - 2} more"])
  method = name_of(config.data.recipe, built.objective.weights)
  drawn = f"{config.batch_size:,} {kind}, of {sum(map(len, sources)):,} in {data}"
  chance = {"mlm": math.log(config.model.text.vocab_size)}
  if config.model.heads.num_classes:
    chance["classify"] = math.log(config.model.heads.num_classes)
  if not last.batch_sizes.since:
    chance |= chance_losses(_compared_at_once(config))
  ends = {stage.name: stage.last for stage in before}
  title = f"{method}: {counted(last.total_steps, 'step')} of {drawn}"
  return Described(title, chance, plain_retrievals(config.evals), ends)


def describe_filling(config: ConfigDict, built: Built, start: int) -> str:
  """How long the loss of nearest neighbours is 0 while the neighbour bank fills; "" if it is not, or not any more.

  Args:
    config: the run, or its stage.
    built: its objects.
    start: number of steps done.
  """
  size, groups = config.model.heads.bank_size, config.model.heads.bank_groups
  if "nns" not in built.objective.weights or not config.objective.nns.warmup:
    return ""
  steps = -(-size // (len(built.recipe.views.neighbour_text) * config.batch_size // groups))
  if start >= steps:
    return ""
  return f"the loss nns is 0 for the first {counted(steps, 'step')}, until the neighbour bank has {size:,} texts"


def describe_seen(tested: Mapping[str, str], train: Sequence[str]) -> str:
  """The evaluations on samples that a run trains on, in words; "" if there are none.

  Args:
    tested: the spec of the data of each evaluation by its name.
    train: the specs of the training data.
  """
  seen = [name for name, test in tested.items() if any(share_samples(spec, test) for spec in train)]
  if not seen:
    return ""
  return f"{', '.join(seen)}: on training data, so scores do not show how well the model does on other data"


def plain_retrievals(evals: ConfigDict) -> tuple[str, ...]:
  """The names of the retrievals that search all images at once, whose chance is known.

  With `equal_texts`, it is that of texts that all differ, and a little higher if some are equal.
  """
  plain = {"kind": "retrieval", "suite": "", "folds": 1}
  return tuple(name for name, own in evals.items() if plain.items() <= own.to_dict().items())


def _compared_at_once(config: ConfigDict) -> int:
  """The number of pairs that the losses compare with each other."""
  return config.batch_size // (max(config.micro_batches, 1) if config.micro_batching == "plain" else 1)


def make_step(
  config: ConfigDict, built: Built, steps: Steps, abstract: State
) -> Callable[[State, Batch], tuple[State, Metrics]]:
  """`train_step` compiled for the mesh; its input state is donated to its output state.

  Raises:
    ValueError: an unknown name, or a batch that does not divide as the config requires.
  """
  check_division(config, built.mesh.size)
  every, last, lead = config.log_every or steps.total, steps.total, steps.lead
  rate = schedules.make_schedule(steps.schedule)
  step = partial(
    train_step,
    model=built.model,
    optimizer=built.optimizer,
    schedule=(lambda step: rate(step + lead)) if lead else rate,
    gradient_fn=make_gradient(
      config.micro_batching,
      config.micro_batches,
      model=built.model,
      objective=built.objective,
      frozen=built.frozen,
      gather=partial(gather, mesh=built.mesh, dtype=jnp.dtype(config.model.dtype)),
    ),
    momentum_decay=lambda step: momentum_at(step + steps.run_lead, steps.run_total, config.momentum_tower.decay),
    is_diagnosed=lambda step: ((step + 1) % every == 0) | (step + 1 == last),
    augment=make_augment(config, built),
    diagnose=partial(
      diagnostics.diagnose,
      kinds=diagnostic_kinds(built.objective.heads),
      has_pooled=not built.objective.compares_tokens,
    ),
    logit_scale_range=config.optimizer.logit_scale_range,
    spike_factor=config.safety.spike_factor,
    ema=config.optimizer.ema,
    first_step=steps.first,
  )
  layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return jax.jit(traced_over(built.mesh, step), donate_argnums=0, out_shardings=(layout, replicated(built.mesh)))


def check_division(config: ConfigDict, devices: int) -> None:
  """Rejects a batch that does not divide into micro-batches, groups or blocks on this many devices.

  Raises:
    ValueError: the message names the field and the size.
  """
  count = config.micro_batches
  if count > 1 and config.batch_size % (count * devices):
    raise ValueError(
      f"config.micro_batches={count}: config.batch_size={config.batch_size} does not divide into micro-batches on "
      f"{devices} devices"
    )
  compared = _compared_at_once(config)
  for name in ("norm_groups", "bank_groups"):
    groups = config.model.heads[name]
    if config.micro_batching == "plain" and count > 1 and compared % groups:
      raise ValueError(
        f"config.micro_batches={count}: config.model.heads.{name}={groups} does not divide a micro-batch of {compared}"
      )
  method, block = config.contrast.method, config.contrast.block
  candidates = compared // devices if method == "ring" else compared  # a ring sees those of one device at a time
  if block > 0 and method != "plain" and candidates % block:
    raise ValueError(
      f"config.contrast.block={block} does not divide the {candidates} candidates that config.contrast.method="
      f"{method!r} compares on {devices} devices at a time"
    )


def make_augment(config: ConfigDict, built: Built) -> Callable[[Batch, Array], Batch]:
  """Makes the random part of the step: augmentation with `data.augment_on="device"`, mixing, and what is dropped."""
  recipe, drop_rate = built.recipe, config.model.drop_path
  on_device = config.data.augment_on == "device"
  mixed = bool(recipe.views.numbers("classified_image")) and bool(recipe.mixup or recipe.cutmix)
  if not (on_device or mixed or drop_rate or built.num_kept_patches):
    return lambda batch, step: batch

  def augment(batch: Batch, step: Array) -> Batch:
    def key(use: int) -> Array:
      # Folded twice: folded by 0 and 1, the key of the seed would give the keys that parameters are drawn from.
      return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 2**31 - use), step)

    if on_device:
      index = jnp.arange(len(batch["image"]))
      batch = {**batch, "image": augmentation.augment(batch["image"], key(1), index, recipe.augmentations)}
    if mixed:
      batch = mixing.mix(batch, key(2), mixup=recipe.mixup, cutmix=recipe.cutmix)
    if drop_rate:
      shape, depth = batch["image"].shape[:2], config.model.image.depth
      scale = drop_path.draw_branch_scales(key(3), shape, rate=drop_rate, depth=depth)
      batch = {**batch, "branch_scale": scale}
    if built.num_kept_patches:
      shape, patches = batch["image"].shape[:2], (config.data.image_size // config.model.image.patch) ** 2
      kept = patch_dropout.draw_kept_patches(key(4), shape, patches=patches, kept=built.num_kept_patches)
      batch = {**batch, "kept_patches": kept}
    return batch

  return augment


def make_encoders(config: ConfigDict, built: Built, deaths: Deaths) -> EncoderFactory:
  """The encode functions of a run, for evaluations, in which samples that kill a process are remembered by `deaths`.

  Raises:
    ValueError: `config.evaluate_batch_size` does not divide into the devices.
  """
  view = EvalView(
    size=config.data.image_size,
    resize=config.data.evaluation_resize,
    interpolation=config.data.interpolation,
    mean=config.model.mean,
    std=config.model.std,
    squash=config.data.squash,
  )
  functions = make_encode_functions(built.model, built.mesh, tokens=built.objective.compares_tokens)
  data = config.data
  reading = Reading(data.workers, data.threads, data.max_pixels, data.max_seconds, deaths)
  names, size = config.model.heads.classnames, config.evaluate_batch_size
  return EncoderFactory(functions, built.tokenizer, view, size, reading, names)


def check_evals(evals: ConfigDict, objective: Objective) -> None:
  """Rejects evaluations that cannot run, among them those that need texts if no term compares them with images.

  Raises:
    ValueError: the message names the evaluations and the terms, or the option; see also `make_jobs`.
  """
  texts = evals_with_text(evals)
  if texts and not (objective.compares_embeddings or objective.compares_tokens):
    across = [name for name, term in TERMS.items() if term.compares_embeddings or term.compares_tokens]
    raise ValueError(
      f"config.evals has {texts}, which compare images with texts, but config.objective trains no such "
      f"comparison, only {objective.weights}: leave them out or give one of {across} a weight"
    )
  entries = {name: _evaluation(name, fields) for name, fields in evals.items()}
  joint = [name for name, entry in entries.items() if entry.options.get("features") == "joint"]
  if joint and "joint" not in objective.heads:
    raise ValueError(
      f"config.evals.{joint[0]}.features='joint': config.objective trains no joint space, only {objective.weights}: "
      "choose 'pooled'"
    )
  kinds = {name: entry.kind for name, entry in entries.items()}
  classified = [name for name, kind in kinds.items() if EVALUATORS[kind].needs_classifier]
  if classified and "classifier" not in objective.heads:
    raise ValueError(f"config.evals has {classified}, which need a classifier, but the term 'classify' has no weight")


def evals_with_text(evals: ConfigDict) -> list[str]:
  """Names of the evaluations that compare images with texts.

  Raises:
    ValueError: see `make_jobs`.
  """
  return sorted(name for name, fields in evals.items() if EVALUATORS[_evaluation(name, fields).kind].needs_text)


class _Evaluation(NamedTuple):
  """An entry of `config.evals`.

  Attributes:
    kind: a key of `EVALUATORS`.
    suite: name of a suite, or `_ALL`; then the only split is `test`, a data file. "" for an evaluation of one data set.
    splits: spec of the source of each split.
    options: options of the evaluator.
    every: number of evaluations of the run from one in which it takes part to the next.
  """

  kind: str
  suite: str
  splits: dict[str, str]
  options: dict[str, Any]
  every: int


def _evaluation(name: str, fields: ConfigDict, where: str = _EVALS) -> _Evaluation:
  """Reads an entry of `config.evals`, after a check; messages call it by `where` and its name."""
  field = f"{where}{name}"
  if not isinstance(fields, ConfigDict):
    raise ValueError(f"{field}={fields!r}: expected an evaluation, such as config.zero_shot('scenes:test')")
  if "/" in name:
    raise ValueError(f"{field}: the name of an evaluation cannot contain a slash")
  options = fields.to_dict()
  check_options(options, field)
  kind, suite, every = options.pop("kind"), options.pop("suite", ""), options.pop("every", 1)
  splits = {"test": options.pop("data")} | {split: options.pop(split, "") for split in SPLITS}
  return _Evaluation(kind, suite, {split: spec for split, spec in splits.items() if spec}, options, every)


def check_best_metric(config: ConfigDict) -> None:
  """Rejects a `config.checkpoint.best_metric` that no evaluation has.

  Raises:
    ValueError: the message names the metrics that exist.
  """
  if best := config.checkpoint.best_metric:
    kinds = {name: "" if fields.get("suite") else fields.kind for name, fields in config.evals.items()}
    check_metric(best, kinds, "config.checkpoint.best_metric")


def make_jobs(evals: ConfigDict, where: str = _EVALS) -> list[Job]:
  """Opens the sources of `config.evals`, each once. An entry with a suite is a job `NAME/KEY` for each data set.

  Args:
    evals: the entries.
    where: what messages put before the name of an entry, such as "--" for one that a flag of its name has made.

  Raises:
    OSError: a data file cannot be read.
    ValueError: an unknown kind of evaluation, an option that it does not have, or a source that cannot be opened or
      does not fit the evaluation.
  """
  evaluations = {name: _evaluation(name, fields, where) for name, fields in evals.items()}
  specs: dict[str, str] = {}  # and the first entry that has each
  for name, evaluation in evaluations.items():
    if not evaluation.suite:
      specs = {**dict.fromkeys(evaluation.splits.values(), f"{where}{name}"), **specs}
  sources = {spec: DataSource(open_source(spec, field)) for spec, field in specs.items()}
  of_suites = _jobs_of_suites(evaluations)
  jobs = []
  for name, (kind, suite, splits, options, _) in evaluations.items():
    if suite:
      jobs += of_suites[name]
      continue
    EVALUATORS[kind].check(sources[splits["test"]].source, f"{where}{name}", **options)
    jobs.append(Job(name, name, kind, _aligned(name, splits, sources), options))
  return jobs


def _aligned(name: str, splits: Mapping[str, str], sources: Mapping[str, DataSource]) -> dict[str, DataSource]:
  """The splits of an evaluation, by their specs, with the classes of the others matched by name with those of `test`.

  Raises:
    ValueError: a split has other classes; the message names the split, and the classes.
  """
  found = {split: sources[spec] for split, spec in splits.items()}
  names = tuple(found["test"].source.classnames)
  for split, source in found.items():
    if names != tuple(source.source.classnames):
      data = catalogue.data_set(f"{catalogue.OWN}{splits['test']}").with_classes(names)
      try:
        found[split] = DataSource(source.source, align(data, source.source.classnames, splits[split]))
      except ValueError as error:
        raise ValueError(f"config.evals.{name}.{split}: {error}") from error
  return found


def _jobs_of_suites(evaluations: Mapping[str, _Evaluation]) -> dict[str, list[Job]]:
  """The jobs of each evaluation of a suite, those of one data file and suite with the same sources.

  Raises:
    OSError, ValueError: see `make_jobs`.
  """
  together: dict[tuple[str, str], list[str]] = {}
  for name, evaluation in evaluations.items():
    if evaluation.suite:
      together.setdefault((evaluation.splits["test"], evaluation.suite), []).append(name)
  found: dict[str, list[Job]] = {}
  for (path, suite), names in together.items():
    kinds = list(dict.fromkeys(evaluations[name].kind for name in names))
    try:
      jobs, remarks = suites.read_jobs(path, () if suite == _ALL else (suite,), kinds)
    except ValueError as error:
      raise ValueError(f"config.evals.{names[0]}: {error}") from error
    for remark in remarks if jax.process_index() == 0 else ():
      message(f"config.evals.{names[0]}: {remark}")
    for name in names:
      found[name] = [_job_of_suite(name, job, evaluations[name]) for job in jobs if job.kind == evaluations[name].kind]
      if not found[name]:
        raise ValueError(f"config.evals.{name}: {path} has no data set of {suite} for {evaluations[name].kind!r}")
  return found


def _job_of_suite(name: str, job: Job, evaluation: _Evaluation) -> Job:
  """A job of a suite under the name of its entry in the config and with its options, after a check."""
  field, source, options = f"config.evals.{name}", job.splits["test"].source, evaluation.options
  if source.classnames or not job.data.get("classnames"):  # without names, those of the catalogue are used
    EVALUATORS[job.kind].check(source, field, **options)
  if options.get("templates", TEMPLATES) != TEMPLATES:
    raise ValueError(f"{field}.templates={options['templates']}: suite={evaluation.suite!r} has prompts of its own")
  name = f"{name}/{job.about['key']}"
  return dataclasses.replace(job, name=name, options=options, curve=name)


def make_evaluators(
  evals: ConfigDict, workdir: Path, classnames: Sequence[str] = (), cache_gib: float = 2.0
) -> Callable[[Encoders, int], dict[str, float]]:
  """Returns a function of encoders to the metrics of the evaluations of a run while it trains.

  They are all metrics of an evaluation, `eval/NAME/METRIC`; of each data set of a suite the headline metric,
  `eval/NAME/KEY`, and the means of the suite, such as `eval/NAME/mean`, if none of its data sets is missing. Few shots
  and nearest neighbours are averaged at equal numbers of images, see `Suite.averages`.

  The second argument of the function is the number of this evaluation of the run: an entry takes part if its `every`
  divides the number, all in number 0. Pictures are written to `workdir`. A data set that turns out to be unusable does
  not end the training: a message says so once, and its metrics are absent.

  Args:
    evals: `config.evals`.
    workdir: folder of pictures.
    classnames: names of the classes of the run's classifier, if there is one.
    cache_gib: GiB of decoded images of small sources that each host keeps for later evaluations.

  Raises:
    OSError: a data file cannot be read.
    ValueError: the classes of a source are not those of the classifier, see `classify.columns`; see also `make_jobs`.
  """
  jobs, read, reported = make_jobs(evals), DecodedImages(int(cache_gib * 2**30)), set()
  for job in (job for job in jobs if EVALUATORS[job.kind].needs_classifier):
    test, key = job.splits["test"], job.data.get("key", "")
    names = job.data.get("classnames") or test.source.classnames
    columns(test, names, classnames, key, f"config.evals.{job.name}")

  def is_due(job: Job, number: int) -> bool:
    return number % evals[_entry(job)].get("every", 1) == 0

  def picture(job: Job) -> Path | None:
    return workdir / f"{job.name}.png" if jax.process_index() == 0 and not job.curve else None

  def evaluate(encoders: Encoders, number: int) -> dict[str, float]:
    found: dict[str, float] = {}
    failed: dict[str, Exception] = {}
    sizes: dict[str, TrainingSize] = {}
    for job, scores in run_jobs([job for job in jobs if is_due(job, number)], encoders, picture, read=read):
      if isinstance(scores, Exception):
        failed[job.name] = scores
        continue
      found |= job.curves(scores)
      if (size := training_size(job.kind, scores.headline, scores.details)) is not None:
        sizes |= dict.fromkeys(job.curves(scores), size)
    _report_failed(failed, reported)
    return {**found, **_means(evals, found, sizes)}

  return evaluate


def _report_failed(failed: Mapping[str, Exception], reported: set[str]) -> None:
  """Says which evaluations have failed and why, each reason once; `reported` are those that have been."""
  errors = [f"{_EVALS}{name}: {error}" for name, error in failed.items()]
  new = [error for error in errors if error not in reported]
  reported.update(new)
  if new and jax.process_index() == 0:
    message(f"warning: training continues without the metrics of {'; '.join(new)}")


def _entry(job: Job) -> str:
  """Name of the entry of `config.evals` that a job is from."""
  return job.name.partition("/")[0]


def _means(
  evals: ConfigDict, found: Mapping[str, float], sizes: Mapping[str, TrainingSize] = MappingProxyType({})
) -> dict[str, float]:
  """The means of the suites in `config.evals`, of the metrics that were found, with their training sizes."""
  means = {}
  for name, fields in evals.items():
    if fields.get("suite", "") not in ("", _ALL):
      prefix = f"eval/{name}/"
      values = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
      own = {key.removeprefix(prefix): size for key, size in sizes.items() if key.startswith(prefix)}
      averages = catalogue.suite(fields.suite).averages(values, own)
      means |= {f"{prefix}{mean}": value for mean, value in averages.items()}
  return means


def make_init_from(config: ConfigDict) -> InitFrom:
  """The weights that a run starts from.

  Raises:
    ValueError: a classifier is to start from texts, but there is none that reads joint embeddings, or no weights.
  """
  init_from = read_settings(InitFrom, config.init_from, "init_from")
  reads_joint = "classifier" in heads_of(config) and config.model.heads.classify_joint
  if init_from.templates and not (reads_joint and init_from.path):
    raise ValueError(
      f"config.init_from.templates={init_from.templates}: a classifier starts from texts only with the term "
      "'classify', config.model.heads.classify_joint=True, and weights with a text tower in config.init_from.path"
    )
  return init_from


def make_trackers(trackers: ConfigDict) -> dict[str, OpenTracker]:
  """What opens each tracker of `config.trackers` that is not off, by its name there.

  Raises:
    ValueError: a name that is neither in `TRACKERS` nor that of a user's own tracker, or a library that is missing.
  """
  found: dict[str, OpenTracker] = {}
  for name, value in trackers.items():
    field = f"config.trackers.{name}={value!r}"
    if inspect.isfunction(value):
      found[name] = value
    elif name not in TRACKERS:
      raise ValueError(
        f"{field}: expected one of {sorted(TRACKERS)}{did_you_mean(name, TRACKERS)}; a tracker of your own is a "
        "function, in the config file that defines it"
      )
    elif value and not is_installed(name):
      raise ValueError(f"{field} needs {install_command(name)}")
    elif value:
      found[name] = partial(TRACKERS[name], project=value)
  return found


def check_objective(config: ConfigDict, built: Built, batch: BatchShapes) -> None:
  """Traces the forward pass without computing it, and rejects terms whose inputs the recipe does not make.

  Raises:
    ValueError: the message names the term, the entry of `Outputs` and the recipe.
  """
  model, objective = built.model, dataclasses.replace(built.objective, method=PLAIN)

  def forward(batch: Batch, training: Batch) -> Any:
    params, collections = model.init(jax.random.key(0), batch)
    outputs, _ = model.apply_heads(params, collections, model.encode(params, collections, training)[0])
    objective.check_inputs(outputs, config.data.recipe)
    return objective(outputs, batch, jnp.zeros((), jnp.int32))

  jax.eval_shape(forward, batch, built.training_shape(batch))
