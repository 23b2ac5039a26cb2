"""The stages of a run, `config.stages`: the config of each, and the steps from which and up to which it is trained.

The last stage is the config itself. A stage before it has smaller images, fewer of their patches or shorter texts, so
that most steps cost less (FLIP, Li et al. 2023; CLIPA, Li et al. 2023). All stages train the same state, whose shapes
are those of the last one; see `models.positions.fit_positions`.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import re
from typing import Any

from ml_collections import ConfigDict

from declip_jax import config as config_lib
from declip_jax.batch_sizes import BatchSizes
from declip_jax.config import examples_of, steps_of, without_shares
from declip_jax.spelling import counted, did_you_mean

LAST = "last"  # name of the last stage, which is not in `config.stages`
# Fields of a stage, and the fields of the config that they replace.
_REPLACED = {
  "image_size": "data.image_size",
  "patch_dropout": "model.patch_dropout",
  "context_length": "model.text.context_length",
  "batch_size": "batch_size",
  "micro_batches": "micro_batches",
  "learning_rate": "optimizer.learning_rate",
  "warmup": "optimizer.warmup",
  "evaluate_every": "evaluate_every",
}


def lengths_of_stages(config: ConfigDict) -> list[ConfigDict]:
  """The length of the whole run, and those of its stages before the last, as durations."""
  return [config.duration, *(stage.duration for stage in config.stages.values())]


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of a run; a run without `config.stages` has one, its last.

  Attributes:
    name: key of `config.stages`, or `LAST`.
    config: config of a run that would consist of this stage.
    first: number of steps of the run before the stage.
    last: number of steps of the run at its end.
    batch_sizes: batch sizes of the whole run, as far as they are known.
    total_steps: number of steps of the whole run.
  """

  name: str
  config: ConfigDict
  first: int
  last: int
  batch_sizes: BatchSizes
  total_steps: int

  @property
  def sizes_so_far(self) -> BatchSizes:
    """Batch sizes of the run up to the end of the stage."""
    return self.batch_sizes.between(0, self.last)

  @property
  def own_sizes(self) -> BatchSizes:
    """Batch sizes of the stage, counted from its first step."""
    return self.batch_sizes.between(self.first, self.last)


def stage_configs(config: ConfigDict) -> dict[str, ConfigDict]:
  """The config of each stage, as of a run that consists of it, by name, in order: the last one is `LAST`.

  Raises:
    ValueError: a stage has an unknown field, no duration, or longer texts than the model.
  """
  if not config.stages:
    return {LAST: config}
  configs = {name: _stage_config(config, name, fields) for name, fields in sorted(config.stages.items())}
  configs[LAST] = config.copy_and_resolve_references()
  for of_stage in configs.values():
    of_stage.stages = ConfigDict()
  return configs


def _stage_config(config: ConfigDict, name: str, fields: Any) -> ConfigDict:
  field, known = f"config.stages.{name}", config_lib.stage()
  if name == LAST:
    raise ValueError(f"{field}: the last stage of a run is the config itself: choose another name")
  if not isinstance(fields, ConfigDict):
    raise ValueError(f"{field}={fields!r}: expected a stage, such as config.stage(image_size=112)")
  if unknown := sorted(set(fields) - set(known)):
    hint = did_you_mean(unknown[0], known)
    raise ValueError(f"{field} has no field {unknown[0]!r}: it has {sorted(known)}{hint}")
  of_stage = config.copy_and_resolve_references()
  of_stage.duration = fields.get("duration", known.duration)
  if not any(of_stage.duration.values()):
    raise ValueError(f"{field}.duration is empty: set one of its fields steps, epochs, examples, share")
  for own, replaced in _REPLACED.items():
    if _is_given(fields.get(own)):
      of_stage.update_from_flattened_dict({replaced: fields[own]})
  length, longest = of_stage.model.text.context_length, config.model.text.context_length
  if length > longest:
    raise ValueError(f"{field}.context_length={length}: expected at most config.model.text.context_length={longest}")
  return of_stage


@contextlib.contextmanager
def naming(stage: str, config: ConfigDict) -> Iterator[None]:
  """Makes the message of a ValueError about the config of a stage name the fields of the stage.

  Fields that the stage takes from the config of the run keep their names, after that of the stage.

  Args:
    stage: name of the stage.
    config: the run's config.
  """
  try:
    yield
  except ValueError as error:
    if stage == LAST:
      raise
    text, fields = str(error), config.stages[stage]
    for own, replaced in _REPLACED.items():
      if _is_given(fields.get(own)):
        text = re.sub(rf"\bconfig\.{re.escape(replaced)}\b", f"config.stages.{stage}.{own}", text)
    named = text if text.startswith(f"config.stages.{stage}.") else f"config.stages.{stage}: {text}"
    raise ValueError(named) from error


def _is_given(value: Any) -> bool:
  """Whether a stage has a value of its own for a field: one that is not None, or a duration that is not empty."""
  return value is not None and (not isinstance(value, ConfigDict) or any(value.values()))


def plan_stages(
  config: ConfigDict, epoch_examples: int, batch_sizes: BatchSizes | None = None, start: int = 0
) -> list[Stage]:
  """The stages of a run that starts, or resumes after `start` steps.

  Args:
    config: config, with its stages.
    epoch_examples: number of examples in an epoch.
    batch_sizes: batch sizes of the first `start` steps.
    start: number of steps done, with whatever stages and batch sizes the run had then.

  Raises:
    ValueError: see `stage_configs`; a duration has two units; or the stages leave no step for the last one.
  """
  config = without_shares(config)
  sizes, first, planned = batch_sizes or BatchSizes(()), 0, []
  for name, of_stage in stage_configs(config).items():
    field = "duration" if name == LAST else f"stages.{name}.duration"
    steps_of(of_stage.duration, name=field, batch_size=of_stage.batch_size, epoch_examples=epoch_examples)
    own = sizes.resumed(max(first, start), of_stage.batch_size)
    begin = 0 if name == LAST else first  # the duration of the config is that of the whole run
    examples = own.examples(begin) + examples_of(of_stage.duration, epoch_examples)
    last = begin + of_stage.duration.steps if of_stage.duration.steps else own.step(examples)
    sizes = own if last > start or not sizes.changes else sizes
    planned.append((name, of_stage, first, last))
    first = last
  *before, (_, _, first, total) = planned
  if not total:
    raise ValueError("config.duration is empty: set one of its fields steps, epochs, examples")
  if before and total <= first:
    raise ValueError(
      f"config.stages takes the first {counted(first, 'step')}, but the run has {total:,}: lengthen "
      "config.duration, which is that of the whole run, or shorten the stages"
    )
  return [Stage(*fields, sizes, total) for fields in planned]


def repeatable_from(stages: Sequence[Stage]) -> int:
  """The number of steps from which on all steps have the batch sizes of the config.

  Steps before it cannot be repeated as they were: the run was restarted with another batch size since.
  """
  found = 0
  for stage in stages:
    first = stage.first
    for size, count in stage.own_sizes.counts(stage.last - stage.first):
      first += count
      found = first if size != stage.config.batch_size else found
  return found


def flops_until(stages: Sequence[Stage], step: int, step_flops: Callable[[Stage, int], float]) -> float:
  """FLOPs of the first `step` steps; the last stage has no end.

  Args:
    stages: all stages, in order.
    step: number of steps.
    step_flops: function from a stage and a batch size to the FLOPs of a step.
  """
  return sum(
    count * step_flops(stage, size)
    for stage in stages
    for size, count in stage.own_sizes.counts((step if stage is stages[-1] else min(step, stage.last)) - stage.first)
  )
