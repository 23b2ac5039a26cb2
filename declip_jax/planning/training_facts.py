"""What a run was trained with up to a step: method, pairs, FLOPs and seed, by which scores of runs are compared."""

from collections.abc import Mapping
import contextlib
import json
from pathlib import Path
from typing import Any

from absl import logging
import jax
from ml_collections import ConfigDict

from declip_jax import config as config_lib
from declip_jax import config_files
from declip_jax.batch_sizes import BatchSizes
from declip_jax.build import build
from declip_jax.data.storage.indexes import cache_folder
from declip_jax.evals.feature_cache import json_hash
from declip_jax.methods import name_of
from declip_jax.planning import flops
from declip_jax.runtime import records
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.runtime.workdir import read_starts
from declip_jax.stages import flops_until, plan_stages

_VERSION = 2  # of how FLOPs are counted
# Fields of `config.data` that do not change what views are like.
_INPUT = (
  "train", "ssl_train", "mixture", "ssl_mixture", "threads", "workers", "engine", "max_bad", "max_pixels", "max_seconds"
)  # fmt: skip
_ENDLESS = 10**12  # samples of an epoch, where only steps that were done matter
_OF_STAGES = ("image_size", "patch_dropout", "context_length")  # fields of a stage that change what it sees


def training_facts(run: Path, step: int) -> dict[str, Any]:
  """Facts on the training of a checkpoint, for its results.

  Args:
    run: working directory.
    step: step of a checkpoint.

  Returns:
    `method`: its name in `methods`, or the names of its terms.
    `recipe`: hash of its terms, their weights and options, and of how its views are made, which tells variants of a
      method apart.
    `config`: name of the config of this package that it was started with, if it was.
    `seed`.
    `data`: for each source of training pairs, its number of samples.
    `pairs_seen`: examples in all batches until the step.
    `unique_pairs`: samples of all sources, or `pairs_seen` where those are fewer.
    `epochs`: `pairs_seen` divided by the number of samples.
    `flops`: those of the model in all train steps until then, see `flops.step_flops`.
    `init_from`: path of the weights that it started from, if it did not start from random ones: their training does
      not count in any of these numbers.
    What is not known is left out, with a warning.
  """
  with contextlib.closing(Checkpoints(run)) as checkpoints:
    config = config_lib.from_json(json.dumps(checkpoints.config(step)))
    sizes = checkpoints.batch_sizes(step) or BatchSizes.constant(config.batch_size)
  seen, starts = sizes.examples(step), read_starts(run)
  samples = starts[-1].samples if starts else {}
  facts: dict[str, Any] = {
    "method": name_of(config.data.recipe, _active(config)),
    "recipe": json_hash(_recipe(config))[:8],
    "seed": config.seed,
    "pairs_seen": seen,
  }
  if starts:
    facts |= _data(config, samples, seen)
    if name := _config_name(starts[0].command):
      facts["config"] = name
  if config.init_from.path:
    facts["init_from"] = config.init_from.path
  try:
    facts["flops"] = _flops(config, sizes, step, samples)
  except (ValueError, TypeError, LookupError, AttributeError) as error:  # such as a user's own term
    logging.warning("%s: its training FLOPs are not known: %s", run, error)
  return facts


def _data(config: ConfigDict, samples: Mapping[str, int], seen: int) -> dict[str, Any]:
  known = {name: samples[name] for name in dict.fromkeys(config.data.train) if name in samples}
  total = sum(known.values())
  if not total or len(known) < len({*config.data.train}):
    return {}
  return {"data": known, "unique_pairs": min(total, seen), "epochs": round(seen / total, 4)}


def _config_name(command: list[str]) -> str:
  """The config of this package in a command, such as "slip/slip_base_25ep"; an empty text if it has another one."""
  given = ""
  for argument, following in zip(command, [*command[1:], ""], strict=False):
    name, equals, value = argument.lstrip("-").partition("=")
    if name == "config" and argument.startswith("-"):
      given = value if equals else following
  name = given.partition(":")[0].removeprefix("./").removeprefix("configs/").removesuffix(".py")
  return name if name in config_files.names() else ""


def _views(fields: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.data` that determine the views, whatever the data."""
  return {name: value for name, value in fields["data"].items() if name not in _INPUT}


def _recipe(config: ConfigDict) -> list[Any]:
  """What determines what a run learns from, whatever the data, and by which objective.

  Fields with their default value are left out, so that a field that a later version adds does not change the recipe. A
  default that changes what is learned must therefore never change: it needs another field or name.
  """
  fields, defaults = (json.loads(one.to_json_best_effort()) for one in (config, config_lib.default()))
  terms = {name: _differing(fields["objective"][name], defaults["objective"].get(name, {})) for name in _active(config)}
  of_stages = [{field: entry.get(field) for field in _OF_STAGES} for _, entry in sorted(fields["stages"].items())]
  return [_differing(_views(fields), defaults["data"]), terms, *([of_stages] if of_stages else [])]


def _active(config: ConfigDict) -> list[str]:
  """The names of the terms that a run has."""
  return [name for name, term in config.objective.items() if term.weight or term.schedule]


def _differing(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
  """The fields whose value is not the default one."""
  return {name: value for name, value in fields.items() if name not in defaults or value != defaults[name]}


def _flops(config: ConfigDict, sizes: BatchSizes, step: int, samples: Mapping[str, int]) -> float:
  """FLOPs of all steps until `step`; `samples` of the sources are needed for a config with stages.

  Raises:
    LookupError: the number of samples of a source is not known.
  """
  epoch_examples = _ENDLESS
  if config.stages:
    if unknown := [name for name in config.data.train if name not in samples]:
      raise LookupError(f"the number of samples of {unknown[0]}, by which stages end, is not recorded")
    epoch_examples = sum(samples[name] for name in config.data.train)
  stages = plan_stages(config, epoch_examples, sizes, step)
  return flops_until(stages, step, lambda stage, size: _step_flops(stage.config, size))


def _step_flops(config: ConfigDict, batch_size: int) -> float:
  """FLOPs of a step, which are counted once for all runs of a model: tracing it takes seconds."""
  fields = json.loads(config.to_json_best_effort())
  about = [fields["model"], fields["objective"], fields["optimizer"]["frozen"], fields["lora"], _views(fields)]
  path = cache_folder() / "flops" / f"{json_hash([_VERSION, jax.__version__, batch_size, about])}.json"
  with contextlib.suppress(OSError, ValueError, TypeError):
    return float(json.loads(path.read_text()))
  here = config_lib.changeable(config)
  here.mesh.data, here.mesh.fsdp = -1, 1  # FLOPs do not depend on the devices
  found = flops.step_flops(build(here), batch_size)
  with contextlib.suppress(OSError):
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write(path, json.dumps(found).encode())
  return found
