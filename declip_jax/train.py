"""Pretrains CLIP, SLIP, DeCLIP and related models: python -m declip_jax.train --config=demo --workdir=runs/demo

Run the same command again and the run resumes exactly, bit for bit. Ctrl-C, SIGTERM and SIGHUP save a checkpoint
first. The exit code is 0 after SIGTERM and SIGHUP (see --stopped_exit_code; with several processes also after Ctrl-C),
130 after Ctrl-C, 2 for a mistake in flags, config or data or if memory runs out, 70 if the run has hung, and 74 if a
disk, a mount or the network failed.
Any field of the config can be set: --config.batch_size=256 --config.objective.nns.weight=0
python -m declip_jax lists all commands.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
from functools import partial
import json
import os
from pathlib import Path
import signal
import sys
from typing import Any, NoReturn

from absl import flags
import jax
from ml_collections import ConfigDict, config_flags
import numpy as np

from declip_jax import build
from declip_jax.changes import changes_from_default
from declip_jax.command_line import define_config
from declip_jax.data import pipeline
from declip_jax.data.readers import reader_counts
from declip_jax.data.sources import Source
from declip_jax.extras import import_package
from declip_jax.first_state import first_state, read_weights
from declip_jax.planning import devices
from declip_jax.prepare import Part, Prepared, StepFn, planned, prepare, with_choices, with_classes, with_specs
from declip_jax.reporting import pictures
from declip_jax.reporting.curves import Described, plot_curves
from declip_jax.reporting.metrics import MetricWriter, read_metrics, summary_table
from declip_jax.reporting.opening import closing_lines, draw_views, opening_lines
from declip_jax.reporting.progress import TrainingProgress, listening, message
from declip_jax.reporting.run_page import RunPage, Uses, next_commands, write_page
from declip_jax.reporting.symptoms import Symptoms
from declip_jax.reporting.trackers import TrackedRun, open_trackers
from declip_jax.reporting.trackers.base import run_id
from declip_jax.runtime import bad_samples
from declip_jax.runtime.bad_samples import BadSamples
from declip_jax.runtime.checkpoint import Checkpoints, DoesNotFitError
from declip_jax.runtime.clock import Clock
from declip_jax.runtime.command import launch
from declip_jax.runtime.compile_cache import compile_cache
from declip_jax.runtime.compiling import interruptible, slow_compile_lines
from declip_jax.runtime.memory import explained
from declip_jax.runtime.rollback import Rollbacks
from declip_jax.runtime.services import Cadence, Services
from declip_jax.runtime.signals import Stopped, StopRequest, stop_signals
from declip_jax.runtime.trace import Trace, parse_steps
from declip_jax.runtime.watchdog import Watchdog
from declip_jax.runtime.workdir import OtherRunError, about_other_run, local_path, lock, read_starts, record
from declip_jax.sharding import batch_sharding, to_global
from declip_jax.stages import flops_until, repeatable_from
from declip_jax.training import trimming
from declip_jax.training.state import State, evaluated_weights
from declip_jax.types import Batch, text_length

_NEEDS_LESS_MEMORY = (
  "lower config.batch_size, raise config.micro_batches, set config.model.remat=full, raise config.mesh.fsdp on several "
  "devices, or lower config.evaluate_batch_size for evaluations; python -m declip_jax.plan computes what a config needs"
)
# A batch on the devices, the input position after it, and how many samples were skipped for it, by kind.
Batches = Iterator[tuple[Batch, dict[str, Any], np.ndarray]]


def train(
  config: ConfigDict,
  workdir: str | os.PathLike[str],
  sources: Sequence[Source] | None = None,
  profile: tuple[int, int] | None = None,
  steps: int | None = None,
) -> dict[str, float]:
  """Trains a config to its end, from the newest checkpoint in `workdir` if there is one.

  Args:
    config: a config, see `config.default`. Paths of data become specs, see `prepare.with_specs`. Fields that it leaves
      open are chosen, see `planning.choose`; a run that resumes keeps its values.
    workdir: directory for checkpoints, metrics and pictures.
    sources: sources to train on instead of `config.data.train`, such as `from_huggingface` of a data set.
    profile: first and last step to trace into `workdir/profile`.
    steps: length of a try: the config is shortened to this many steps, see `choose.shortened`. None trains it all.

  Returns:
    The final metrics.

  Raises:
    ValueError: the config contradicts itself, its data or the devices, or `workdir` is in use by another run, before
      anything is compiled; or, later, too many samples cannot be read.
    Stopped: Ctrl-C, SIGTERM or SIGHUP; a checkpoint was saved.
    OutOfMemory: memory ran out; the message names the fields that help.
    FloatingPointError: too many consecutive steps were skipped, and the run cannot roll back, or not any more.
    OSError: the last checkpoint cannot be written.
    ModuleNotFoundError: the extra `train` is not installed.
  """
  import_package("grain")  # before a run without it is prepared in vain
  workdir = local_path(workdir)
  with contextlib.ExitStack() as stack, explained(_NEEDS_LESS_MEMORY):
    watchdog = stack.enter_context(Watchdog(workdir, config.safety.hang_timeout))
    stack.enter_context(listening(watchdog.beat))
    config, sources = with_classes(with_specs(config), sources, watchdog)
    config, sources, chosen = with_choices(config, sources, steps, workdir, watchdog)
    run = prepare(config, workdir, sources, watchdog)
    workdir.mkdir(parents=True, exist_ok=True)
    messages = [stack.enter_context(lock(workdir)), *run.deaths.recover(), *run.evaluation_deaths.recover()]
    for source in run.sources:
      watchdog.beat(f"reading a sample of {source.name}")
      pipeline.check_readable(source, config.data.max_pixels, run.deaths, config.data.max_seconds)
    checkpoints = stack.enter_context(contextlib.closing(_open_checkpoints(config, run.parts[-1].steps, workdir)))
    rollbacks = Rollbacks(workdir, config.safety.max_rollbacks)
    start, state, position, notes = _restore_or_create(config, run, workdir, checkpoints, rollbacks, watchdog)
    run, resized = planned(config, run, checkpoints, start)
    services = _open_services(config, run, workdir, start, checkpoints, rollbacks, profile, watchdog, stack)
    _open(config, run, services, start, [*messages, *notes], [*chosen, *run.notes, resized])
    services.evaluate_if_missed(start, state, config.evaluate_first)
    _train_stages(run, services, start, state, position)
  return _finish(config, run, max(start, run.total_steps), workdir, services.latest, is_try=steps is not None)


def _train_stages(run: Prepared, services: Services, step: int, state: State, position: dict[str, Any] | None) -> None:
  """Trains from a step to the last one. Each stage reads its own batches, from where the stage before it ended."""
  unsaved = None
  while step < run.total_steps:
    part = run.after(step)
    services = dataclasses.replace(services, **_of_stage(run, part, step))
    if len(run.parts) > 1:
      services.progress.enter_stage(part.stage.name, part.stage.last, part.stage.config.batch_size)
      services.progress.message(f"step {step:,}: compiling the train step of stage {part.stage.name}")
    with contextlib.closing(_open_batches(run, part, position)) as batches:
      step, state, position = loop(part.step_fn, batches, state, step, services, unsaved)
    unsaved = position


def loop(
  step_fn: StepFn,
  batches: Batches,
  state: State,
  start: int,
  services: Services,
  position: dict[str, Any] | None = None,
) -> tuple[int, State, dict[str, Any] | None]:
  """Trains from the step `start` to the last one of its stage, or until a rollback to a step of another stage.

  Args:
    step_fn: maps a state, which it may delete, and a batch to the next state and metrics.
    batches: batches, each with the input position after it.
    state: state after `start` steps.
    start: number of steps done.
    services: everything else.
    position: input position after `start` steps; None if they are saved.

  Returns:
    The number of steps done, their state, and the input position after the last batch.

  Raises:
    Stopped, FloatingPointError, OSError, ValueError: see `train`.
  """
  step, previous = start, {}
  while services.cadence.has(step):
    step += 1
    if (read := services.read(step, batches)) is None:
      _stop(step - 1, services.stop.signum, state, position, services)
    before, (batch, position, bad) = position, read
    services.begin(step, state, text_length(batch))
    with services.clock.spending("step"), jax.profiler.StepTraceAnnotation("train", step_num=step):
      with services.clock.compiling():
        stepped = services.call(step_fn, state, batch)
      if stepped is None:
        _stop(step - 1, services.stop.signum, state, before, services)
      state, metrics = stepped
      # One step may be in flight: waiting for the previous one keeps the device busy and the measured times correct.
      jax.block_until_ready(previous)
    services.end(step, state, metrics)

    if services.diverged(previous):
      step, state = services.roll_back(step - 1, previous, state, position)
      previous = {}
      continue

    services.bad_samples.update(step, bad)
    services.clock.update(step)
    services.show(*((step - 1, previous) if previous else (step, metrics)))
    if step == services.cadence.total:
      services.show(step, metrics)
    if services.cadence.logs(step):
      services.log(step, metrics)
    previous = metrics

    save = services.save_is_due(step)
    stop = services.stop.check()
    evaluate = services.cadence.evaluates(step) and not stop
    if save or evaluate or stop:
      if stop:
        services.announce_stop(step, stop)
      services.save(step, state, position)
      if evaluate:  # after the save: an evaluation may take long, and the run may be stopped meanwhile
        services.evaluate(step, state)
        stop = services.stop.signum
      services.curves(step)
      if stop or (services.cadence.is_last and step == services.cadence.total):
        services.finish_save(step, state, position)
    if stop:
      raise Stopped(step, stop)
  return step, state, position


def _stop(step: int, signum: int, state: State, position: dict[str, Any] | None, services: Services) -> NoReturn:
  """Saves and stops a run that has done `step` steps; `position` is None if they are saved or if there are none."""
  if position is not None:
    services.announce_stop(step, signum)
    services.save(step, state, position)
    services.curves(step)
    services.finish_save(step, state, position)
  raise Stopped(step, signum)


def _open_batches(
  run: Prepared, part: Part, position: dict[str, Any] | None
) -> pipeline.Prefetch | trimming.TrimmedBatches:
  """Starts to read this host's share of the batches of a stage ahead, from a position of the input."""
  config = part.stage.config
  workers, threads = reader_counts(config.data.workers, config.data.threads)
  stream = pipeline.TrainStream(
    part.samples,
    config.batch_size,
    host=jax.process_index(),
    hosts=jax.process_count(),
    workers=workers,
    threads=threads,
    state=position,
    seconds=config.data.max_seconds,
    deaths=run.deaths,
  )
  sharding, lengths = batch_sharding(part.built.mesh), part.built.text_lengths
  if len(lengths) < 2:
    return pipeline.Prefetch(stream, partial(to_global, sharding=sharding))
  measure = partial(trimming.measure, eot=part.built.tokenizer.eot, sharding=sharding)
  return trimming.TrimmedBatches(pipeline.Prefetch(stream, measure), lengths, sharding)


def _open_checkpoints(config: ConfigDict, steps: build.Steps, workdir: Path) -> Checkpoints:
  checkpoints = Checkpoints(
    workdir,
    keep_last=config.checkpoint.keep_last,
    keep_best=config.checkpoint.keep_best,
    best_metric=config.checkpoint.best_metric,
    keep_every=steps.keep_every,
    minutes=config.safety.checkpoint_minutes,
  )
  checkpoints.tidy()
  return checkpoints


def _restore_or_create(
  config: ConfigDict,
  run: Prepared,
  workdir: Path,
  checkpoints: Checkpoints,
  rollbacks: Rollbacks,
  watchdog: Watchdog,
) -> tuple[int, State, dict[str, Any] | None, list[str]]:
  """Returns the step to start from, its state, its position in the input, and messages."""
  watchdog.beat("restoring the newest checkpoint")
  try:
    restored = checkpoints.restore_newest(run.abstract)
  except DoesNotFitError as error:
    raise OtherRunError(about_other_run(workdir, config.to_json_best_effort()) or str(error)) from error
  if restored:
    notes, path = restored.messages, config.init_from.path
    if path:
      notes = [*notes, f"config.init_from.path={path!r} is not read: the run resumes from its own checkpoint"]
    return restored.step, restored.state, rollbacks.position(restored.step, restored.data), notes
  rollbacks.forget()
  watchdog.exempt("compiling the initial state")
  with slow_compile_lines("the initial state"):
    weights = run.initial or read_weights(config)
    state, messages = interruptible(lambda: first_state(config, run.built, run.abstract, weights))
  return 0, state, None, messages


def _of_stage(run: Prepared, part: Part, step: int) -> dict[str, Any]:
  """The fields of `Services` that depend on the stage, which the run enters after `step` steps."""
  stage, steps, mesh = part.stage, part.steps, part.built.mesh
  size, number = stage.config.batch_size, run.parts.index(part) + 1
  device = devices.find(mesh.devices.flat[0].device_kind)

  def peak(text_length: int) -> float:
    return device.flops * mesh.size * size / run.step_flops(stage, size, text_length)

  # Tracing takes seconds, and FLOPs are proportional to examples if there is one stage.
  counts_flops = device or len(run.parts) > 1
  return {
    "cadence": Cadence(
      steps.total,
      stage.config.log_every,
      steps.evaluate,
      steps.checkpoint,
      evaluate_phase=steps.evaluate_phase,
      checkpoint_phase=steps.checkpoint_phase,
      first=stage.first,
      is_last=stage is run.stages[-1],
    ),
    "batch_sizes": stage.sizes_so_far,
    "repeatable_from": repeatable_from(run.stages),
    "clock": Clock(step, size, devices=mesh.size, peak=peak if device else None),
    "bad_samples": BadSamples(step, size, stage.config.data.max_bad),
    "symptoms": Symptoms(build.make_facts(stage.config, steps)),
    "stage": number if len(run.parts) > 1 else 0,
    "training_flops": (lambda step: flops_until(run.stages, step, run.step_flops)) if counts_flops else None,
  }


def _open_services(
  config: ConfigDict,
  run: Prepared,
  workdir: Path,
  start: int,
  checkpoints: Checkpoints,
  rollbacks: Rollbacks,
  profile: tuple[int, int] | None,
  watchdog: Watchdog,
  stack: contextlib.ExitStack,
) -> Services:
  """Opens what the loop calls; `stack` closes it."""
  main, mesh, part = jax.process_index() == 0, run.built.mesh, run.until(start)
  stop = StopRequest(checkpoints.preempted, start)
  stack.enter_context(stop_signals(stop))

  def evaluate(state: State, number: int) -> dict[str, float]:
    params, collections = evaluated_weights(state)
    encoders = run.encoders.bind(run.built.model.merged(params), collections)
    return run.evaluate(encoders.with_callback(partial(watchdog.beat, "the evaluation")), number)

  as_json = json.loads(config.to_json_best_effort())  # of a user's own functions, only the names
  trackers = open_trackers(run.trackers, TrackedRun(run_id(workdir, start), workdir, as_json, start)) if main else []
  return Services(
    **_of_stage(run, part, start),
    workdir=workdir,
    config=as_json,
    abstract=run.abstract,
    max_skipped_steps=config.safety.max_skipped_steps,
    checkpoints=checkpoints,
    rollbacks=rollbacks,
    stop=stop,
    writer=stack.enter_context(MetricWriter(workdir, resume_step=start, trackers=trackers, enabled=main)),
    progress=stack.enter_context(TrainingProgress(run.total_steps, config.batch_size, devices=mesh.size, enabled=main)),
    trace=stack.enter_context(Trace(workdir / "profile", profile)),
    watchdog=watchdog,
    evaluate_state=evaluate,
    draw_curves=partial(_draw_curves, config, run, workdir) if main else lambda: None,
  )


def _draw_curves(config: ConfigDict, run: Prepared, workdir: Path) -> None:
  """Draws the curves of the metrics so far, and writes the page of the run."""
  with pictures.optional(workdir / "curves.png"):
    plot_curves(read_metrics(workdir), _described(config, run), workdir / "curves.png")
  with pictures.optional(workdir / "index.html"):
    write_page(workdir, _make_page(config, run), read_metrics(workdir))


def _described(config: ConfigDict, run: Prepared) -> Described:
  captioned = run.sources[: len(run.sources) - len(config.data.ssl_train)]
  return build.describe_run(config, run.built, run.stages, captioned)


def _uses_of(config: ConfigDict, run: Prepared) -> Uses:
  objective = run.built.objective
  is_searchable = objective.compares_embeddings and not objective.compares_tokens
  images = [*(entry.data for entry in config.evals.values() if not entry.get("suite")), *config.data.train, "IMAGES"]
  return Uses(bool(config.evals), "open_clip" if is_searchable else "orbax", images[0] if is_searchable else "")


def _make_page(config: ConfigDict, run: Prepared) -> RunPage:
  changes = changes_from_default(config)
  return RunPage(
    title=_described(config, run).title,
    total=run.total_steps,
    command=sys.argv,
    uses=_uses_of(config, run),
    standard=f"{changes.method} with {changes.architecture}",
    changes=changes.lines,
    config=json.dumps(json.loads(config.to_json_best_effort()), indent=2, sort_keys=True),
  )


def _open(
  config: ConfigDict, run: Prepared, services: Services, start: int, messages: Sequence[str], plans: Sequence[str]
) -> None:
  """Records the run in its working directory, and reports what it is about to do.

  Args:
    config, run, services: the run.
    start: number of steps done.
    messages: what happened so far.
    plans: what matters only if there are steps to train.
  """
  if message := services.trace.unreachable(start, run.total_steps):
    messages = [*messages, message]
  if jax.process_index():
    return
  workdir, mesh, finished = services.workdir, run.built.mesh, start >= run.total_steps
  sizes = {source.name: len(source) for source in run.sources}
  stamps = {source.name: source.stamp for source in run.sources}
  total, before = run.total_steps, read_starts(workdir)
  as_json = config.to_json_best_effort(indent=2, sort_keys=True)
  changes = record(as_json, mesh, workdir, sizes, stamps, total_steps=total, finished=finished)
  lines = opening_lines(
    sources=run.sources,
    weights=run.built.objective.weights,
    recipe=config.data.recipe,
    groups={"batch norms": config.model.heads.norm_groups, "neighbour banks": config.model.heads.bank_groups},
    batch_size=config.batch_size,
    start=start,
    total=total,
    total_before=before[-1].total_steps if before else 0,
    stages=[*map(_describe, run.parts)] if len(run.parts) > 1 else (),
    mesh=mesh,
    abstract=run.abstract,
    changes=changes,
  )
  if finished and changes:
    messages = [*messages, "config.json is not replaced"]
  if finished and config.evals:
    messages = [*messages, "its evaluations are repeated, for the scores below"]
  if not finished:
    tested = {f"config.evals.{name}": own.get("data") or "" for name, own in config.evals.items()}
    filling = build.describe_filling(run.after(start).stage.config, run.built, start)
    messages = [*messages, *plans, build.describe_seen(tested, config.data.train), filling]
    if len(run.parts) == 1:
      messages.append("compiling the train step (several minutes for a large model)")
  for line in [*lines, *filter(None, messages)]:
    services.progress.message(line)
  services.watchdog.beat("reading the first samples")
  if not start:  # those of an earlier run whose checkpoints are gone
    for name in ("views", "curves", *config.evals):
      (workdir / f"{name}.png").unlink(missing_ok=True)
    (workdir / "index.html").unlink(missing_ok=True)
  with pictures.optional(workdir / "views.png"):
    picture = workdir / "views.png"
    part = run.after(start)
    augment = build.make_augment(part.stage.config, part.built)
    captions = services.stop.wait_for(lambda: draw_views(part.shown, part.built.make_views, augment, picture))
    services.writer.pictures(start)
    if captions:
      services.writer.text(start, "views", captions)


def _describe(part: Part) -> str:
  stage, batch = part.stage, build.describe_batch(part.built, part.stage.config.batch_size)
  return f"stage {stage.name}: steps {stage.first + 1:,} to {stage.last:,} of {batch}"


def _finish(
  config: ConfigDict, run: Prepared, step: int, workdir: Path, latest: dict[str, float], is_try: bool
) -> dict[str, float]:
  """Prints and returns the final metrics of a run."""
  names = ("examples", "training_flops", "temperature", "dense_temperature", "images_per_second", "utilisation")
  names += ("skipped_total",)
  shown = {name: value for name, value in latest.items() if name.startswith(("loss", "eval/")) or name in names}
  final = {"step": step, **shown}
  if jax.process_index() == 0:
    bad = bad_samples.total(read_metrics(workdir)) if (workdir / "metrics.jsonl").exists() else {}
    skipped = {"samples skipped": bad_samples.describe(bad)} if bad else {}
    message(summary_table({"run": str(workdir), **final, **skipped}), stream=sys.stdout)
    plain, commands = build.plain_retrievals(config.evals), next_commands(workdir, _uses_of(config, run))
    for line in closing_lines(workdir, final, plain, commands, is_try):
      message(line)
  return final


def _command(workdir: Path) -> None:
  profile = parse_steps(flags.FLAGS.profile) if flags.FLAGS.profile else None
  _report_unread_flags()
  try:
    with compile_cache(workdir / "compiled"):
      train(flags.FLAGS.config, workdir, profile=profile, steps=flags.FLAGS.steps)
  except Stopped as stopped:
    message(str(stopped))
    sys.exit(130 if stopped.signum == signal.SIGINT else flags.FLAGS.stopped_exit_code)


def _report_unread_flags() -> None:
  """Names flags of augmentation that have no effect; a config that suits several recipes may set such fields."""
  config = flags.FLAGS.config
  given = config_flags.get_override_values(flags.FLAGS["config"])
  for field in build.unread_augmentation(config):
    if field in given:
      message(f"--config.{field} has no effect: no view of config.data.recipe={config.data.recipe} reads it")


def main() -> None:
  """Runs the command."""
  define_config()
  flags.DEFINE_integer(
    "stopped_exit_code",
    0,
    "Exit code after SIGTERM or SIGHUP; use 143 for a supervisor that treats 0 as finished.",
    lower_bound=0,
    upper_bound=255,
  )
  flags.DEFINE_integer(
    "steps",
    None,
    "Length of a try: warm-up, schedules and cadence are scaled, and it evaluates in the middle and at the end.",
    lower_bound=1,
  )
  flags.DEFINE_string("profile", "", "First and last step to trace, such as 100:110.")
  launch(_command, __doc__, required=("config",), is_training=True)


if __name__ == "__main__":
  main()
