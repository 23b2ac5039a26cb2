"""The one door where a config becomes objects: nothing below reads a config."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict
import optax

from declip_jax import objectives
from declip_jax.config import steps_of
from declip_jax.data.images import INTERPOLATIONS, EvalView
from declip_jax.data.make_views import MakeViews, Masking, Rendering
from declip_jax.data.recipes import Recipe, get_recipe, trimmed
from declip_jax.data.sources import open_source
from declip_jax.data.text.tokenizer import Tokenizer, make_tokenizer
from declip_jax.evals import EVALUATORS, check_options
from declip_jax.evals.encoders import EncoderFactory, Encoders, make_encode_functions
from declip_jax.evals.features import SourceFeatures
from declip_jax.models.model import Model, make_model
from declip_jax.models.paths import is_below
from declip_jax.objectives import diagnostics
from declip_jax.objectives.blockwise import PLAIN, Form
from declip_jax.objectives.momentum import momentum_at
from declip_jax.sharding import gather, make_mesh, replicated
from declip_jax.training import augment as augmentation
from declip_jax.training import optim, schedules
from declip_jax.training.gradient import Metrics, make_gradient
from declip_jax.training.state import State
from declip_jax.training.step import train_step
from declip_jax.types import Batch, BatchShapes
from declip_jax.weights.initial import InitFrom

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
)


class Built(NamedTuple):
  """What a config describes, without data, parameters or devices' memory."""

  model: Model
  optimizer: optax.GradientTransformation
  tokenizer: Tokenizer
  make_views: MakeViews
  mesh: Mesh

  def batch_shape(self, batch_size: int) -> BatchShapes:
    """Shapes and dtypes of a global batch."""
    shapes = self.make_views.batch_shapes(batch_size).items()
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes}

  @property
  def recipe(self) -> Recipe:
    """The data recipe, with the config's overrides."""
    return self.make_views.recipe


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Built:
  """Builds the parts of a run from its config, over all devices of all processes or over those given.

  Raises:
    ValueError: a name or a number that does not fit; the message says which and what would.
  """
  _check_numbers(config)
  tokenizer = make_tokenizer(config.model.text.tokenizer, config.model.text.context_length)
  recipe = get_recipe(config.data.recipe, {name: config.data[name] for name in _OVERRIDES})
  if config.data.neighbour_texts is not None:
    recipe = _with_neighbour_texts(recipe, config.data.neighbour_texts)
  objectives.check_views(recipe.views, config.objective, config.data.recipe)
  recipe = trimmed(recipe, objectives.used_views(recipe.views, config.objective))
  needed = tokenizer.vocab_size if "masked" in recipe.text_views else tokenizer.plain_size
  if config.model.text.vocab_size < needed:
    raise ValueError(
      f"config.model.text.vocab_size={config.model.text.vocab_size} is too small: recipe {config.data.recipe!r} "
      f"makes ids up to {needed - 1}"
    )
  if config.model.text.eot != tokenizer.eot:
    raise ValueError(
      f"config.model.text.eot={config.model.text.eot}: config.model.text.tokenizer={config.model.text.tokenizer!r} "
      f"ends texts with {tokenizer.eot}"
    )
  if config.model.image.get("patch") and config.data.image_size % config.model.image.patch:
    raise ValueError(
      f"config.data.image_size={config.data.image_size} is no multiple of config.model.image.patch="
      f"{config.model.image.patch}"
    )
  if config.model.image.kind == "resnet" and config.data.image_size % 32:
    raise ValueError(f"config.data.image_size={config.data.image_size} is no multiple of 32, as a ResNet needs")
  if config.data.ssl_train:
    _check_ssl_sources(config, recipe)
  if config.model.text.buckets and config.objective.filip.weight and config.objective.filip.top_k:
    raise ValueError(
      f"config.model.text.buckets={config.model.text.buckets} cut off padding, which config.objective.filip.top_k="
      f"{config.objective.filip.top_k} compares: set one of the two to () or 0"
    )
  heads = objectives.heads_for(config.objective)
  optimizer = read_settings(optim.OptimizerSettings, config.optimizer, "optimizer")
  _check_unread(config.optimizer, "optimizer", optim.OptimizerSettings, schedules.ScheduleSettings)
  locked = any(is_below("towers/image", prefix) for prefix in config.optimizer.frozen)
  model = make_model(config.model, views=recipe.views, heads=heads, lock_image=locked)
  grid = config.data.image_size // model.towers.image.stride
  if recipe.views.masked_image is not None and not 0 < round(config.data.patch_share * grid**2) < grid**2:
    raise ValueError(
      f"config.data.patch_share={config.data.patch_share} hides none or all of the {grid} x {grid} patches that "
      f"config.data.image_size={config.data.image_size} has with this config.model.image: choose a larger image"
    )
  rendering = Rendering(config.data.image_size, config.data.interpolation, config.data.engine, config.data.augment_on)
  masking = Masking(
    config.data.mask_probability,
    config.data.mask_slots,
    config.data.mask_whole_words,
    patch_grid=grid,
    patch_share=config.data.patch_share,
  )
  make_views = MakeViews(recipe, tokenizer, rendering, masking, config.data.caption_weights)
  return Built(model, optim.make_optimizer(optimizer), tokenizer, make_views, make_mesh(**config.mesh, devices=devices))


def _check_numbers(config: ConfigDict) -> None:
  """Refuses numbers that cannot be; those of the recipe are checked with it."""
  data = config.data
  checks = {
    "seed": (config.seed >= 0, config.seed, "0 or more"),
    "momentum_tower.decay": (0 <= config.momentum_tower.decay <= 1, config.momentum_tower.decay, "0 to 1"),
    "data.image_size": (data.image_size > 0, data.image_size, "1 or more"),
    "data.interpolation": (data.interpolation in INTERPOLATIONS, data.interpolation, f"one of {list(INTERPOLATIONS)}"),
    "data.workers": (data.workers is None or data.workers >= 0, data.workers, "0 or more, or None"),
    "data.threads": (data.threads is None or data.threads >= 1, data.threads, "1 or more, or None"),
    "data.max_bad": (0 <= data.max_bad <= 1, data.max_bad, "a share, 0 to 1"),
    "data.mask_probability": (0 <= data.mask_probability <= 1, data.mask_probability, "0 to 1"),
    "data.caption_weights": (
      all(weight >= 0 for weight in data.caption_weights) and (not data.caption_weights or any(data.caption_weights)),
      data.caption_weights,
      "weights of 0 or more, one of them more",
    ),
    "data.templates": (
      all(_names_class(template) for template in data.templates),
      data.templates,
      "texts with {} once, for the name of the class",
    ),
  }
  _refuse(checks)


def _refuse(checks: Mapping[str, tuple[Any, Any, str]]) -> None:
  for field, (good, value, legal) in checks.items():
    if not good:
      raise ValueError(f"config.{field}={value!r}: {legal}")


def _names_class(template: str) -> bool:
  return template.count("{}") == 1 and not set(template.replace("{}", "")) & {"{", "}"}


def _with_neighbour_texts(recipe: Recipe, kinds: tuple[str, ...]) -> Recipe:
  """The recipe with other text views, by their kinds, for nearest-neighbour supervision."""
  contrasted = {recipe.text_views[view]: view for view in recipe.views.contrastive_text}
  if not kinds or not set(kinds) <= set(contrasted):
    raise ValueError(f"config.data.neighbour_texts={kinds}: choose one or more of {list(contrasted)}")
  views = recipe.views._replace(neighbour_text=tuple(contrasted[kind] for kind in kinds))
  return dataclasses.replace(recipe, views=views)


def _check_ssl_sources(config: ConfigDict, recipe: Recipe) -> None:
  """Refuses images of other sources for views that the recipe does not make, or that meet a caption."""
  views, where = recipe.views, f"config.data.ssl_train={config.data.ssl_train}: recipe {config.data.recipe!r}"
  if not views.ssl_image:
    raise ValueError(f"{where} makes no view for self-supervision on images, or no term with a weight looks at it")
  if set(views.ssl_image) & set(views.contrastive_image):
    raise ValueError(f"{where} also contrasts these views with captions, which would not fit: use slip")


Settings = TypeVar("Settings")


def read_settings(kind: type[Settings], subtree: ConfigDict, name: str, /, **given: Any) -> Settings:
  """A dataclass of settings whose fields have the names of a config's fields.

  Args:
    kind: the dataclass.
    subtree: the config's fields; those that `kind` does not have are ignored.
    name: of the subtree, for errors.
    given: values that replace or complete those of the subtree.

  Raises:
    ValueError: a field that the config does not have, or a value that `kind` rejects.
  """
  fields = [field.name for field in dataclasses.fields(kind)]
  if missing := [field for field in fields if field not in given and field not in subtree]:
    raise ValueError(f"config.{name} has no fields {missing}, which {kind.__name__} needs: it has {sorted(subtree)}")
  return kind(**{field: given.get(field, subtree.get(field)) for field in fields})


def _check_unread(subtree: ConfigDict, name: str, *kinds: type) -> None:
  """Rejects fields of a config that none of the dataclasses has, and that would have no effect."""
  known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
  if unread := sorted(set(subtree) - known):
    raise ValueError(f"config.{name} has fields {unread} without effect: known are {sorted(known & set(subtree))}")


class Steps(NamedTuple):
  """All durations of a config in steps, 0 for never, and the learning rate schedule, which has durations of its own."""

  total: int
  evaluate: int
  checkpoint: int
  keep_every: int
  schedule: schedules.ScheduleSettings


def to_steps(config: ConfigDict, epoch_examples: int) -> Steps:
  """Converts the durations of a config, once.

  Raises:
    ValueError: the training has no length, or a duration has two; or a number of how it is kept safe cannot be.
  """
  _check_safety(config)
  lengths = {
    "duration": config.duration,
    "evaluate_every": config.evaluate_every,
    "checkpoint.every": config.checkpoint.every,
    "checkpoint.keep_every": config.checkpoint.keep_every,
  }
  convert = partial(steps_of, batch_size=config.batch_size, epoch_examples=epoch_examples)
  steps = [convert(length, name=name) for name, length in lengths.items()]
  if not steps[0]:
    raise ValueError("config.duration is empty: set one of its fields steps, epochs, examples")
  settings = {field: value for field, value in config.optimizer.items() if isinstance(value, ConfigDict)}
  durations = {field: convert(value, name=f"optimizer.{field}") for field, value in settings.items()}
  schedule = read_settings(schedules.ScheduleSettings, config.optimizer, "optimizer", total_steps=steps[0], **durations)
  return Steps(*steps, schedule)


def _check_safety(config: ConfigDict) -> None:
  checkpoint, safety = config.checkpoint, config.safety
  checks = {
    "checkpoint.keep_last": (checkpoint.keep_last >= 1, checkpoint.keep_last, "1 or more"),
    "checkpoint.keep_best": (checkpoint.keep_best >= 0, checkpoint.keep_best, "0 or more"),
    "safety.max_skipped_steps": (safety.max_skipped_steps >= 1, safety.max_skipped_steps, "1 or more"),
    "safety.spike_factor": (
      safety.spike_factor == 0 or safety.spike_factor > 1,
      safety.spike_factor,
      "0, or more than 1",
    ),
    "safety.max_rollbacks": (safety.max_rollbacks >= 0, safety.max_rollbacks, "0 or more"),
    "safety.hang_timeout": (safety.hang_timeout >= 0, safety.hang_timeout, "0 or more"),
    "safety.checkpoint_minutes": (safety.checkpoint_minutes >= 0, safety.checkpoint_minutes, "0 or more"),
  }
  _refuse(checks)


def make_step(
  config: ConfigDict, built: Built, steps: Steps, abstract: State
) -> Callable[[State, Batch], tuple[State, Metrics]]:
  """`train_step` compiled for the mesh; the state that goes in is donated to the one that comes out.

  Raises:
    ValueError: a name that does not exist, or a batch that cannot be divided as the config says.
  """
  _check_parts(config, built.mesh.size)
  every, last = config.log_every or steps.total, steps.total
  step = partial(
    train_step,
    model=built.model,
    optimizer=built.optimizer,
    schedule=schedules.make_schedule(steps.schedule),
    gradient_fn=make_gradient(
      config.micro_batching,
      config.micro_batches,
      model=built.model,
      objective=make_objective(config, built.mesh),
      frozen=config.optimizer.frozen,
      gather=partial(gather, mesh=built.mesh, dtype=jnp.dtype(config.model.dtype)),
    ),
    momentum_decay=lambda step: momentum_at(step, last, config.momentum_tower.decay),
    is_diagnosed=lambda step: ((step + 1) % every == 0) | (step + 1 == last),
    augment=make_augment(config, built),
    diagnose=partial(diagnostics.measure, pooled=not objectives.compares_tokens(config.objective)),
    logit_scale_range=config.optimizer.logit_scale_range,
    spike_factor=config.safety.spike_factor,
  )
  layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return jax.jit(step, donate_argnums=0, out_shardings=(layout, replicated(built.mesh)))


def _check_parts(config: ConfigDict, devices: int) -> None:
  """Refuses a batch that does not divide into the parts that a config asks for."""
  count = config.micro_batches
  if count > 1 and config.batch_size % (count * devices):
    raise ValueError(
      f"config.micro_batches={count}: config.batch_size={config.batch_size} does not divide into so many parts for "
      f"each of {devices} devices"
    )
  compared = config.batch_size // (max(count, 1) if config.micro_batching == "plain" else 1)  # at once
  for name in ("norm_groups", "bank_groups"):
    groups = config.model.heads[name]
    if config.micro_batching == "plain" and count > 1 and compared % groups:
      raise ValueError(
        f"config.micro_batches={count}: config.model.heads.{name}={groups} does not divide a part of {compared}"
      )
  form, block = config.contrast.method, config.contrast.block
  candidates = compared // devices if form == "ring" else compared  # a ring sees those of one device at a time
  if block > 0 and form != "plain" and candidates % block:
    raise ValueError(
      f"config.contrast.block={block} does not divide the {candidates} candidates that config.contrast.method={form!r} "
      f"compares on {devices} devices at a time"
    )


def make_augment(config: ConfigDict, built: Built) -> Callable[[Batch, Array], Batch]:
  """What the host leaves to the step with `config.data.augment_on="device"`: colours, blur and flips of image views."""
  if config.data.augment_on == "host":
    return lambda batch, step: batch

  def augment(batch: Batch, step: Array) -> Batch:
    # Folded twice: folded by 0 and 1, the key of the seed would give the keys that parameters are drawn from.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1), step)
    index = jnp.arange(len(batch["image"]))
    return {**batch, "image": augmentation.augment(batch["image"], key, index, built.recipe.augmentations)}

  return augment


def make_encoders(config: ConfigDict, built: Built) -> EncoderFactory:
  """The encode functions of a run, for evaluations.

  Raises:
    ValueError: `config.evaluate_batch_size` does not divide into the devices.
  """
  view = EvalView(
    size=config.data.image_size,
    resize=config.data.evaluation_resize,
    interpolation=config.data.interpolation,
    mean=config.model.mean,
    std=config.model.std,
  )
  functions = make_encode_functions(built.model, built.mesh, tokens=objectives.compares_tokens(config.objective))
  return EncoderFactory(functions, built.tokenizer, view, config.evaluate_batch_size)


def check_evals(evals: ConfigDict, settings: objectives.Settings) -> None:
  """Rejects `config.evals` of a run whose terms never compare an image with a text.

  Raises:
    ValueError: names the evaluations and the terms.
  """
  across = [name for name, term in objectives.TERMS.items() if {"pair", "contrastive_text"} & {*term.views}]
  trained = objectives.active(settings)
  if len(evals) and not trained.keys() & set(across):
    raise ValueError(
      f"config.evals has {sorted(evals)}, which compare images with texts, but config.objective trains no such "
      f"comparison, only {trained}: leave config.evals empty or give one of {across} a weight"
    )


def make_evaluators(evals: ConfigDict, workdir: Path) -> Callable[[Encoders], dict[str, float]]:
  """Opens the sources of `config.evals` and returns a function of encoders to all metrics, `eval/NAME/METRIC`.

  A source that several evaluations name is encoded once. Pictures are written to `workdir`.

  Raises:
    ValueError: an unknown kind of evaluation, an option that it does not have, or a source that cannot be opened.
  """
  evaluations, sources = [], {}
  for name, fields in evals.items():
    options = fields.to_dict()
    kind, data = options.pop("kind"), options.pop("data")
    check_options(kind, options, f"config.evals.{name}")
    if data not in sources:
      sources[data] = open_source(data)
    evaluations.append((name, data, partial(EVALUATORS[kind], **options)))

  def evaluate(encoders: Encoders) -> dict[str, float]:
    features = {data: SourceFeatures(source, encoders) for data, source in sources.items()}
    results = {}
    for name, data, evaluation in evaluations:
      picture = workdir / f"{name}.png" if jax.process_index() == 0 else None
      results |= {f"eval/{name}/{metric}": value for metric, value in evaluation(features[data], picture)}
    return results

  return evaluate


def make_init_from(config: ConfigDict) -> InitFrom:
  """The weights that a run starts from."""
  return read_settings(InitFrom, config.init_from, "init_from")


def make_objective(config: ConfigDict, mesh: Mesh | None) -> objectives.Objective:
  """The weighted terms of a config, whose comparisons of all pairs are split over a mesh."""
  form = Form(config.contrast.method, mesh, config.contrast.block) if mesh is not None else PLAIN
  return objectives.make_objective(config.objective, form)


def check_objective(config: ConfigDict, model: Model, batch: BatchShapes) -> None:
  """Traces the forward pass without computing it, and refuses terms whose inputs the recipe does not give.

  Raises:
    ValueError: names term, field and recipe.
  """
  objective = make_objective(config, None)

  def forward(batch: Batch) -> Any:
    params, collections = model.init(jax.random.key(0), batch)
    outputs, _ = model.apply_heads(params, collections, model.encode(params, collections, batch)[0])
    objectives.check_inputs(outputs, config.objective, config.data.recipe)
    return objective(outputs, batch, jnp.zeros((), jnp.int32))

  jax.eval_shape(forward, batch)
