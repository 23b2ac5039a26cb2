"""What the commands share: a run's parts built from its config, its working directory, several processes, errors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import fcntl
from importlib import metadata
import json
import os
from pathlib import Path
import re
import socket
import subprocess
import sys
import time
import traceback
from typing import Any, NamedTuple

from absl import app, flags, logging
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import optax

from declip_jax import objectives, optim
from declip_jax.checkpoint import agree
from declip_jax.config import steps_of
from declip_jax.data.images import INTERPOLATIONS
from declip_jax.data.recipes import MakeViews, Recipe, get_recipe, trimmed
from declip_jax.data.tokenizer import Tokenizer, make_tokenizer
from declip_jax.models.model import Model, make_model
from declip_jax.optim import below
from declip_jax.sharding import make_mesh
from declip_jax.types import Batch

USER_ERRORS = (ValueError, FloatingPointError, OSError, ModuleNotFoundError)
# Of these what a path explains; any other OSError is a disk, a mount or a network, and may be gone the next time.
_PATH_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
_IO_EXIT_CODE = 74
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
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


class Parts(NamedTuple):
  """What a config describes, without data, parameters or devices' memory."""

  model: Model
  optimizer: optax.GradientTransformation
  tokenizer: Tokenizer
  make_views: MakeViews
  mesh: Mesh

  def batch_shape(self, batch_size: int) -> Batch:
    """Shapes and dtypes of a global batch."""
    shapes = self.make_views.batch_shapes(batch_size).items()
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes}

  @property
  def recipe(self) -> Recipe:
    """The data recipe, with the config's overrides."""
    return self.make_views.recipe


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Parts:
  """Builds the parts of a run from its config, over all devices of all processes or over those given.

  Raises:
    ValueError: a name or a number that does not fit; the message says which and what would.
  """
  _check_numbers(config)
  tokenizer = make_tokenizer(config.model.text.tokenizer, config.model.text.context_length)
  recipe = get_recipe(config.data.recipe, {name: config.data[name] for name in _OVERRIDES})
  if config.data.neighbour_texts is not None:
    recipe = _with_neighbour_texts(recipe, config.data.neighbour_texts)
  objectives.check_views(recipe.views, config.weights, config.data.recipe)
  recipe = trimmed(recipe, objectives.used_views(recipe.views, config.weights))
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
  if config.model.text.buckets and config.weights.filip and config.terms.filip.top_k:
    raise ValueError(
      f"config.model.text.buckets={config.model.text.buckets} cut off padding, which config.terms.filip.top_k="
      f"{config.terms.filip.top_k} compares: set one of the two to () or 0"
    )
  heads = objectives.heads_for(config.weights)
  locked = any(below("towers/image", prefix) for prefix in config.optimizer.frozen)
  model = make_model(config.model, views=recipe.views, heads=heads, lock_image=locked)
  grid = config.data.image_size // model.towers.image.stride
  if recipe.views.masked_image is not None and not 0 < round(config.data.patch_share * grid**2) < grid**2:
    raise ValueError(
      f"config.data.patch_share={config.data.patch_share} hides none or all of the {grid} x {grid} patches that "
      f"config.data.image_size={config.data.image_size} has with this config.model.image: choose a larger image"
    )
  make_views = MakeViews(
    recipe,
    tokenizer,
    config.data.image_size,
    config.data.interpolation,
    config.data.mask_probability,
    config.data.mask_slots,
    config.data.mask_whole_words,
    config.data.caption_weights,
    patch_grid=grid,
    patch_share=config.data.patch_share,
    engine=config.data.engine,
    augment_on=config.data.augment_on,
  )
  return Parts(
    model, make_optimizer(config.optimizer), tokenizer, make_views, make_mesh(**config.mesh, devices=devices)
  )


def _check_numbers(config: ConfigDict) -> None:
  """Refuses numbers that cannot be; those of the recipe are checked with it."""
  data = config.data
  checks = {
    "seed": (config.seed >= 0, config.seed, "0 or more"),
    "momentum": (0 <= config.momentum <= 1, config.momentum, "0 to 1"),
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


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """The optimiser of `config.optimizer`.

  Raises:
    ValueError: a field that cannot be.
  """
  scale = config.logit_scale_range
  ordered = not scale or (len(scale) == 2 and scale[0] <= scale[1])
  _refuse({"optimizer.logit_scale_range": (ordered, scale, "two numbers, ascending, or ()")})
  return optim.make(
    config.name,
    b1=config.b1,
    b2=config.b2,
    epsilon=config.epsilon,
    momentum=config.momentum,
    nesterov=config.nesterov,
    trust_coefficient=config.trust_coefficient,
    weight_decay=config.weight_decay,
    decayed=config.decayed,
    sgd_side=config.sgd_side,
    sgd_weight_decay=config.sgd_weight_decay,
    gradient_clip=config.gradient_clip,
    multipliers=config.multipliers,
    layer_decay=config.layer_decay,
    frozen=config.frozen,
  )


def local_path(workdir: str | os.PathLike[str]) -> Path:
  """The path of a working directory.

  Raises:
    ValueError: it is an address such as gs://...; metrics are appended to, which object stores cannot do.
  """
  if "://" in os.fspath(workdir):
    raise ValueError(f"workdir {os.fspath(workdir)!r} is an address: mount it (gcsfuse, NFS) and give the path")
  return Path(workdir)


class Steps(NamedTuple):
  """All durations of a config in steps; 0 is never."""

  total: int
  warmup: int
  evaluate: int
  checkpoint: int
  keep_every: int
  cooldown: int


def plan_steps(config: ConfigDict, epoch_examples: int) -> Steps:
  """Converts the durations of a config, once.

  Raises:
    ValueError: the training has no length, or a duration has two; or a number of how it is kept safe cannot be.
  """
  _check_safety(config)
  lengths = {
    "duration": config.duration,
    "optimizer.warmup": config.optimizer.warmup,
    "evaluate_every": config.evaluate_every,
    "checkpoint.every": config.checkpoint.every,
    "checkpoint.keep_every": config.checkpoint.keep_every,
    "optimizer.cooldown": config.optimizer.cooldown,
  }
  steps = [
    steps_of(length, name=name, batch_size=config.batch_size, epoch_examples=epoch_examples)
    for name, length in lengths.items()
  ]
  if not steps[0]:
    raise ValueError("config.duration is empty: set one of its fields steps, epochs, examples")
  return Steps(*steps)


def _check_safety(config: ConfigDict) -> None:
  checkpoint, divergence = config.checkpoint, config.divergence
  checks = {
    "checkpoint.minutes": (checkpoint.minutes >= 0, checkpoint.minutes, "0 or more"),
    "checkpoint.keep_last": (checkpoint.keep_last >= 1, checkpoint.keep_last, "1 or more"),
    "checkpoint.keep_best": (checkpoint.keep_best >= 0, checkpoint.keep_best, "0 or more"),
    "max_skipped_in_a_row": (config.max_skipped_in_a_row >= 1, config.max_skipped_in_a_row, "1 or more"),
    "divergence.spike": (divergence.spike == 0 or divergence.spike > 1, divergence.spike, "0, or more than 1"),
    "divergence.rollbacks": (divergence.rollbacks >= 0, divergence.rollbacks, "0 or more"),
    "hang_timeout": (config.hang_timeout >= 0, config.hang_timeout, "0 or more"),
  }
  _refuse(checks)


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[str]:
  """Keeps a second run out of a working directory, by a lock on its `run.lock` that the system frees with the process.

  Process 0 holds it for all. Yields what should be said: a file system that knows no locks keeps nobody out.

  Raises:
    ValueError: another run has it, the same on every host; names host, process and time.
  """
  path, refused, note = workdir / "run.lock", "", ""
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      try:
        file = stack.enter_context(path.open("a+"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}")
        file.flush()
      except BlockingIOError:
        file.seek(0)
        refused = f"{workdir} is in use by another run: {file.read()}"
      except PermissionError as error:
        refused = f"{workdir} cannot be written to: {error}"
      except OSError as error:
        note = f"{path}: {error}; nothing keeps a second run out of this directory"
    if refused := agree(refused):
      raise ValueError(refused)
    yield note


def use_compile_cache(folder: Path) -> None:
  """Keeps what is compiled in a folder, so that a run that starts again is soon at work.

  `JAX_COMPILATION_CACHE_DIR` names another one.
  """
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))


def record(config: ConfigDict, mesh: Mesh, workdir: Path, samples: Mapping[str, int]) -> list[str]:
  """Writes `config.json` into a working directory, and adds a line to `starts.jsonl`.

  The line has time, command, versions, mesh, devices, git revision and `samples`, the size of each source.

  Returns:
    The fields and sizes in which an earlier run in this directory differed, as text.
  """
  config_file, text = workdir / "config.json", config.to_json_best_effort(indent=2, sort_keys=True)
  before = json.loads(config_file.read_text()) if config_file.exists() else json.loads(text)
  config_file.write_text(text + "\n")
  about = {
    "time": round(time.time(), 3),
    "command": sys.argv,
    "python": sys.version.split()[0],
    "versions": {name: metadata.version(name) for name in _PACKAGES},
    "git": _git_revision(),
    "mesh": dict(mesh.shape),
    "processes": jax.process_count(),
    "device": mesh.devices.flat[0].device_kind,
    "samples": dict(samples),
  }
  starts = workdir / "starts.jsonl"
  lines = starts.read_text().splitlines() if starts.exists() else []
  earlier = json.loads(lines[-1]).get("samples", {}) if lines else {}
  with starts.open("a") as file:
    file.write(json.dumps(about) + "\n")
  changed = [
    f"{name} had {earlier[name]:,} samples and has {count:,}: from here on they come in another order"
    for name, count in samples.items()
    if earlier.get(name, count) != count
  ]
  return _differences(before, json.loads(text)) + changed


def launch(command: Callable[[Path], None]) -> None:
  """Runs a command of the command line: parses flags, joins the other processes, calls it with `--workdir`.

  What the user can mend is one line on the screen and exit code 2, with the traceback in a file beside the run; so is a
  disk, a mount or a network that fails, with exit code 74, since it may be back the next time. Defines the flags that
  all commands share; TPU pods and Slurm need only `--multihost`.
  """
  flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, pictures.", required=True)
  flags.DEFINE_bool("multihost", False, "One of several processes that JAX finds by itself (TPU pod, Slurm, GKE).")
  flags.DEFINE_string("coordinator", None, "host:port of process 0, where JAX cannot find it by itself.")
  flags.DEFINE_integer("processes", None, "With --coordinator: number of processes.", lower_bound=1)
  flags.DEFINE_integer("process", None, "With --coordinator: number of this process, from 0.", lower_bound=0)
  flags.DEFINE_integer("heartbeat", 60, "Seconds of silence after which a process counts as dead and all end.", 1)
  for name in ("workdir", "multihost", "coordinator", "processes", "process", "heartbeat"):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # so that --help shows it

  def main(_: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # orbax tells a lot at every save
    workdir = Path(flags.FLAGS.workdir)
    try:
      _join_processes()
      command(local_path(flags.FLAGS.workdir))
    except USER_ERRORS as error:
      return _report(error, workdir)
    return 0

  app.run(main, flags_parser=parse_flags)


def parse_flags(arguments: list[str]) -> list[str]:
  # A wrong flag or field, or a config file that refuses its argument, raises here, the last within a flag's error.
  try:
    rest = flags.FLAGS(arguments)
    if "config" in flags.FLAGS:
      flags.FLAGS.config.items()  # raises here, and not later, if the file could not be read
    return rest
  except (flags.Error, AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
    print(f"error: {_reason(error)}", file=sys.stderr)
    sys.exit(2)


def _reason(error: Exception) -> str:
  """What is wrong with a flag, without what absl and ml_collections wrap it in."""
  if isinstance(error, ModuleNotFoundError) and error.name == "configs":
    return "this config imports others of configs/: run the command in the folder that holds it"
  if no_file := re.search(r"\[Errno \d+\] (?:No such file or|Is a) directory: '(.+?)'", str(error)):
    return _no_config(Path(no_file[1]))
  missing = error.args[0] if isinstance(error, AttributeError) and error.args else error
  if isinstance(missing, KeyError) and str(missing.args[0]).startswith("'"):  # 'name', and below it what may be meant
    return "the config has no field " + ". ".join(str(missing.args[0]).split("\n"))
  lines = [line for line in str(error).replace("\\n", "\n").split("\n") if line.strip()]
  raised = [match[1] for line in lines if (match := re.match(r"\s*\w+Error: (.+)", line))]
  return "\n".join(line.replace("\\'", "'") for line in raised[-1:] or lines)


def _no_config(path: Path) -> str:
  folder = path if path.is_dir() else next(folder for folder in path.parents if folder.is_dir())
  configs = [file.name for file in folder.glob("*.py") if "\ndef get_config(" in file.read_text()]
  folders = [f"{inner.name}/" for inner in folder.iterdir() if (inner / "recipe.py").exists()]
  return f"--config={path} is no file; {folder} has {', '.join(sorted(configs + folders)) or 'no configs'}"


def _join_processes() -> None:
  if flags.FLAGS.coordinator:
    where = (flags.FLAGS.coordinator, flags.FLAGS.processes, flags.FLAGS.process)
    jax.distributed.initialize(*where, heartbeat_timeout_seconds=flags.FLAGS.heartbeat)
  elif flags.FLAGS.multihost:
    jax.distributed.initialize(heartbeat_timeout_seconds=flags.FLAGS.heartbeat)


def _report(error: Exception, workdir: Path) -> int:
  message = f"error: {error}"
  with contextlib.suppress(OSError):  # it may be the disk that is full
    if (workdir / "checkpoints").is_dir():  # a run, and no folder of somebody's weights
      (workdir / "error.txt").write_text(traceback.format_exc())
      message += f"\n(traceback in {workdir / 'error.txt'})"
  print(message, file=sys.stderr)
  return _IO_EXIT_CODE if isinstance(error, OSError) and not isinstance(error, _PATH_ERRORS) else 2


def _git_revision() -> str:
  command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return "unknown"


def _differences(before: Any, after: Any, name: str = "config") -> list[str]:
  if isinstance(before, dict) and isinstance(after, dict):
    # Fields that one version has and the other has not are no change of the user's; evaluations are.
    names = sorted({*before, *after} if name == "config.evals" else before.keys() & after.keys())
    return [line for key in names for line in _differences(before.get(key), after.get(key), f"{name}.{key}")]
  return [] if before == after else [f"{name}: {before!r} -> {after!r}"]
