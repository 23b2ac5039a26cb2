"""Pretrains CLIP, SLIP, DeCLIP and the like: python -m declip_jax.train --config configs/demo.py --workdir runs/demo

Started again with the same working directory, a run goes on where it was. Ctrl-C and SIGTERM save a checkpoint first;
the exit code is 0 after SIGTERM (--stopped_exit_code; with several processes after Ctrl-C, too), 130 after Ctrl-C,
2 for what the user can mend, 70 if a step has hung, and 74 if a disk, a mount or a network failed.
Any field of the config can be set: --config.batch_size=256 --config.objective.nns.weight=0
See declip_jax/config.py for all fields and their meaning, and configs/ for what there is to start from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
from functools import partial
import math
import os
from pathlib import Path
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from absl import flags
import grain
import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
import numpy as np

from declip_jax import build
from declip_jax.build import (
  check_evals,
  check_objective,
  make_augment,
  make_encoders,
  make_evaluators,
  make_step,
)
from declip_jax.command_line import define_config
from declip_jax.data import pipeline
from declip_jax.data.mixture import Mixture
from declip_jax.data.sources import BAD, Source, open_source
from declip_jax.planning import devices, flops
from declip_jax.reporting import pictures
from declip_jax.reporting.metrics import MetricWriter, Progress, read_metrics, summary_table
from declip_jax.runtime.checkpoint import Checkpoints, Restored, agree
from declip_jax.runtime.command import launch
from declip_jax.runtime.rollback import Rollbacks
from declip_jax.runtime.trace import Trace, parse_steps
from declip_jax.runtime.watchdog import Watchdog
from declip_jax.runtime.workdir import local_path, lock, record, use_compile_cache
from declip_jax.sharding import batch_sharding, check_batch, layout_table, to_global
from declip_jax.training.state import State, abstract_state, create_state
from declip_jax.training.step import Metrics
from declip_jax.types import Batch
from declip_jax.weights.initial import initialise, read_initial

_PATIENCE = 300.0  # seconds for which the last checkpoint is tried to be written


class Stopped(Exception):
  """Training was asked to stop by `signal`, and saved a checkpoint at `step`."""

  def __init__(self, step: int, signum: int):
    super().__init__(f"stopped at step {step} by {signal.Signals(signum).name}; start again to go on")
    self.step, self.signum = step, signum


def train(
  config: ConfigDict,
  workdir: str | os.PathLike[str],
  sources: Sequence[Source] | None = None,
  profile: tuple[int, int] | None = None,
) -> dict[str, float]:
  """Trains a config to its end and returns the final metrics; goes on from the newest checkpoint in `workdir`.

  Args:
    config: of the run.
    workdir: for checkpoints, metrics and pictures.
    sources: to train on in place of those that `config.data.train` names, such as `from_huggingface` of a data set.
    profile: first and last step to trace into `workdir/profile`.

  Raises:
    ValueError: the config does not fit itself, its data or the devices, or another run has the directory, before
      anything is compiled; or, later, too many examples cannot be read.
    Stopped: Ctrl-C or SIGTERM; a checkpoint was saved.
    FloatingPointError: too many steps in a row were skipped, and there is nowhere to go back to, or no more often.
    OSError: the last checkpoint cannot be written.
  """
  workdir = local_path(workdir)
  built = build.build(config)
  mesh = built.mesh
  check_batch(config.batch_size, mesh, "batch_size")

  # Input: every host sees the same rows and takes its part.
  mixture, ssl_mixture = _open_mixtures(config, built, sources)
  rows = pipeline.training_samples(mixture, built.make_views, config.seed, ssl_mixture)
  workers, threads = pipeline.reader_counts(config.data.workers, config.data.threads)
  batch_shape = built.batch_shape(config.batch_size)
  steps = build.to_steps(config, sum(map(len, mixture.sources)))
  opened = [*mixture.sources, *(ssl_mixture.sources if ssl_mixture else ())]
  _check_hosts(opened)

  # State: shapes and layout first, arrays last.
  check_evals(config.evals, built.objective)
  check_objective(config, built, batch_shape)
  abstract = abstract_state(batch_shape, mesh, model=built.model, optimizer=built.optimizer)
  step_fn = make_step(config, built, steps, abstract)
  encoders = make_encoders(config, built)
  evaluate = make_evaluators(config.evals, workdir)
  best = config.checkpoint.best_metric
  if best and not any(best.startswith(f"eval/{name}/") for name in config.evals):
    raise ValueError(
      f"config.checkpoint.best_metric={best!r} names no evaluation: eval/NAME/..., NAME of {[*config.evals]}"
    )
  main = jax.process_index() == 0
  resuming = any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))
  init_from = build.make_init_from(config)
  given = None if resuming else read_initial(init_from, config.model)  # errors come before anything is written
  workdir.mkdir(parents=True, exist_ok=True)

  with contextlib.ExitStack() as stack:
    notes = [stack.enter_context(lock(workdir))]
    checkpoints = Checkpoints(
      workdir,
      keep_last=config.checkpoint.keep_last,
      keep_best=config.checkpoint.keep_best,
      best_metric=best,
      keep_every=steps.keep_every,
      minutes=config.safety.checkpoint_minutes,
    )
    stack.callback(checkpoints.close)
    checkpoints.tidy()
    rollbacks = Rollbacks(workdir)
    restored = checkpoints.restore_newest(abstract)
    if restored:
      start, state, position, damaged = restored
      position = rollbacks.position(start, position)
      notes += damaged
    else:
      start, position, model = 0, None, {"model": built.model, "optimizer": built.optimizer}
      state = create_state(config.seed, batch_shape, abstract, **model)
      if given is None:
        given = read_initial(init_from, config.model)
      if given is not None:
        state, origin = initialise(state, given, init_from.groups, built.model)
        notes += origin

    stop = stack.enter_context(_stop_signals())
    writer = stack.enter_context(MetricWriter(workdir, resume_step=start, enabled=main))
    progress = stack.enter_context(_make_progress(config, built, steps, start))
    if main:
      changes = record(config, mesh, workdir, {source.name: len(source) for source in opened})
      for line in [*_opening(config, built, opened, steps, start, abstract, changes), *filter(None, notes)]:
        progress.message(line)
      with pictures.optional(workdir / "views.png"):
        _draw_views(rows, built, make_augment(config, built), workdir)
    stream = pipeline.TrainStream(
      rows,
      config.batch_size,
      host=jax.process_index(),
      hosts=jax.process_count(),
      workers=workers,
      threads=threads,
      state=position,
    )
    batches = pipeline.Prefetch(stream, partial(to_global, sharding=batch_sharding(mesh)))
    stack.callback(batches.close)
    trace = stack.enter_context(Trace(workdir / "profile", profile))
    if line := trace.out_of_reach(start, steps.total):
      progress.message(line)
    watchdog = stack.enter_context(Watchdog(workdir, config.safety.hang_timeout))
    beat = partial(watchdog.beat, "the evaluation")
    watch = _Watch(config, mesh.size, start)
    row: dict[str, float] = {}
    results: dict[str, float] = {}

    def score(step: int, state: State) -> dict[str, float]:
      with progress.pause(), watch.spending("evaluation"):
        results = evaluate(encoders.bind(state.params, state.collections).with_callback(beat))
      checkpoints.score(step, results)
      writer.write(step, {"examples": step * config.batch_size, **results})
      for line in _scores(step, results):
        progress.message(line)
      return results

    if start >= steps.total or (start and steps.evaluate and start % steps.evaluate == 0):
      told = main and any(
        name.startswith("eval/") for row in read_metrics(workdir) for name in row if row["step"] == start
      )
      if agree("" if told or not main else "it was stopped right before"):
        results = score(start, state)
      elif start >= steps.total:
        results = evaluate(encoders.bind(state.params, state.collections).with_callback(beat))

    step = turn = start
    while step < steps.total:
      step, turn = step + 1, turn + 1  # they differ once the run went back
      if watch.has_compiled:
        watchdog.beat(f"step {step}")
      with watch.spending("data"):
        batch, position, passed_over = next(batches)
      trace.begin(step, state)
      with watch.spending("step"), jax.profiler.StepTraceAnnotation("train", step_num=step):
        with watch.compiling():
          state, metrics = step_fn(state, batch)
        # One step may be in flight: waiting for the one before keeps the device busy and the clock honest.
        jax.block_until_ready(watch.previous)
      for line in filter(None, (watch.compiled(metrics), trace.end(step, state))):
        progress.message(line)
      if (skipped := watch.skipped()) >= config.safety.max_skipped_steps:
        turn -= 1  # preemption was not asked for
        for leaf in jax.tree.leaves(state):  # there may be no room for two
          leaf.delete()
        went_back = _go_back(step - 1, skipped, config, checkpoints, rollbacks, abstract, position)
        step, state, position, damaged = went_back
        for restarted in (writer, progress, watch):
          restarted.go_back(step)
        for line in damaged:
          progress.message(line)
        continue
      watch.count(step, passed_over)
      progress.update(step, watch.previous or metrics, watch.shares["data"])
      watch.previous = metrics
      last, overdue = step == steps.total, False
      if (config.log_every and step % config.log_every == 0) or last:
        row, overdue = watch.row(metrics, progress, checkpoints, rollbacks)
        writer.write(step, row)
        watch.check_passed_over(row, step)

      stopping = stop.signum or (signal.SIGTERM if checkpoints.preempted(turn) else 0)
      evaluating = not stopping and (last or (steps.evaluate and step % steps.evaluate == 0))
      if evaluating or stopping or last or overdue or (steps.checkpoint and step % steps.checkpoint == 0):
        watchdog.beat(f"the checkpoint of step {step}")
        save = partial(checkpoints.save, step, state, data=position, config=config.to_dict())
        with progress.pause(), watch.spending("save"):
          save()
        if evaluating:  # behind the save: an evaluation may take long, and somebody may end the run meanwhile
          results = score(step, state)
          stopping = stop.signum
        with progress.pause(), watch.spending("save"):
          if main:
            with pictures.optional(workdir / "curves.png"):
              pictures.plot_curves(read_metrics(workdir), workdir / "curves.png")
          if stopping or last:
            checkpoints.finish(step, save, _PATIENCE)
      if stopping:
        raise Stopped(step, stopping)

  names = ("examples", "temperature", "dense_temperature", "images_per_second", "utilisation", "skipped_total")
  shown = {name: value for name, value in row.items() if name.startswith("loss") or name in names}
  final = {"step": max(start, steps.total), **shown, **results}
  if main:
    print(summary_table({"run": str(workdir), **final}))
  return final


def _go_back(
  at: int,
  skipped: int,
  config: ConfigDict,
  checkpoints: Checkpoints,
  rollbacks: Rollbacks,
  abstract: State,
  position: dict[str, Any],
) -> Restored:
  """The state before the run diverged, the input behind the data at which it did, and what to say.

  Newer checkpoints are set aside: their steps come again.

  Raises:
    FloatingPointError: there is no such state, or the run went back often enough; the same on every host.
  """
  checkpoints.wait()
  target = rollbacks.target(checkpoints.steps(), at - skipped)
  why = f"step {at}: loss, gradient or rate was not finite, or the gradient spiked, for {skipped} steps in a row"
  if target is None or len(rollbacks) >= config.safety.max_rollbacks:
    done = f"went back {len(rollbacks)} of config.safety.max_rollbacks={config.safety.max_rollbacks} times"
    raise FloatingPointError(
      f"{why} (config.safety.max_skipped_steps={config.safety.max_skipped_steps}); "
      f"{done if target is not None else 'there is no checkpoint from before'}: lower config.optimizer.learning_rate, "
      "look at the data, or let larger gradients pass by config.safety.spike_factor and config.optimizer.gradient_clip"
    )
  said = [checkpoints.set_aside(step, "the run diverged", "diverged") for step in checkpoints.steps() if step > target]
  restored = checkpoints.restore_newest(abstract)
  rollbacks.record(skipped, at, restored.step, position)
  line = (
    f"{why}: back to the checkpoint of step {restored.step:,}, and on with the data from example "
    f"{position['next_index']:,} on (time {len(rollbacks)} of {config.safety.max_rollbacks})"
  )
  return restored._replace(data=position, passed_over=[line, *said, *restored.passed_over])


def _open_mixtures(
  config: ConfigDict, built: build.Built, sources: Sequence[Source] | None
) -> tuple[Mixture, Mixture | None]:
  """The sources to train on, and those of other images for self-supervision, if there are any."""
  data = config.data
  needs_caption = bool(built.recipe.text_views)
  sources = tuple(map(open_source, data.train) if sources is None else sources)
  mixture = Mixture(sources, data.mixture, needs_caption, data.templates)
  mixture.check_captions()
  if not data.ssl_train:
    return mixture, None
  return mixture, Mixture(tuple(map(open_source, data.ssl_train)), data.ssl_mixture, False, (), "ssl_mixture")


def _check_hosts(sources: Sequence[Source]) -> None:
  """Refuses to train where the hosts see other data: each would go through them in an order of its own.

  Raises:
    ValueError: the same on every host; names the source, and how many samples each host sees.
  """
  sizes = np.array([len(source) for source in sources], np.int64)
  for source, seen in zip(
    sources, multihost_utils.process_allgather(sizes, tiled=False).reshape(-1, len(sizes)).T, strict=True
  ):
    if len(set(seen.tolist())) > 1:
      counts = ", ".join(f"host {host}: {count:,}" for host, count in enumerate(seen))
      raise ValueError(f"{source.name}: the hosts see different numbers of samples ({counts})")


class _Watch:
  """What the loop observes of itself: what takes the time, examples passed over, the step before."""

  def __init__(self, config: ConfigDict, devices: int, start: int):
    self._config, self._devices = config, devices
    self._compile_seconds: float | None = None
    self.has_compiled = False
    self.go_back(start)

  def go_back(self, step: int) -> None:
    """Forgets what came behind a step: the run goes on from there."""
    self.previous: Metrics = {}
    self._step = step
    self._new_line()

  def _new_line(self) -> None:
    self._began, self._logged = time.perf_counter(), self._step
    self._seconds = dict.fromkeys(("data", "step", "save", "evaluation"), 0.0)
    self._passed_over = np.zeros(len(BAD), np.int32)

  @contextlib.contextmanager
  def spending(self, what: str) -> Iterator[None]:
    """Counts the time inside as spent on data, step, save or evaluation."""
    before = time.perf_counter()
    try:
      yield
    finally:
      self._seconds[what] += time.perf_counter() - before

  @property
  def shares(self) -> dict[str, float]:
    """Of the time since the last line of metrics.jsonl, what went where."""
    total = max(time.perf_counter() - self._began, 1e-9)
    return {what: seconds / total for what, seconds in self._seconds.items()}

  @contextlib.contextmanager
  def compiling(self) -> Iterator[None]:
    """Around the call of a step: the first one compiles it, and returns before it has run."""
    before = time.perf_counter()
    yield
    if self._compile_seconds is None:
      self._compile_seconds = time.perf_counter() - before

  def compiled(self, metrics: Metrics) -> str:
    """What to say after the first step, once: how long it compiled, and how much memory it takes."""
    if self.has_compiled:
      return ""
    self.has_compiled = True
    with self.spending("step"):
      jax.block_until_ready(metrics)
    memory = _peak_memory()
    held = f"; {memory:.1f} GiB of memory on a device" if memory else ""
    return f"compiled in {self._compile_seconds:.0f} s{held}"

  def count(self, step: int, passed_over: np.ndarray) -> None:
    """One step is dispatched."""
    self._step = step
    self._passed_over += passed_over

  def row(
    self, metrics: Metrics, progress: Progress, checkpoints: Checkpoints, rollbacks: Rollbacks
  ) -> tuple[dict[str, float], bool]:
    """The line of metrics.jsonl for this step, and whether a host's clock asks for a checkpoint.

    The hosts meet here anyway: this is where they agree on what their clocks say.
    """
    mine = np.append(self._passed_over, np.int32(checkpoints.due()))
    everyones = np.reshape(multihost_utils.process_allgather(mine), (-1, len(mine)))
    *bad, due = everyones.sum(axis=0)
    used = self._config.batch_size * (self._step - self._logged)
    with self.spending("step"):
      values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    values |= {"examples": self._step * self._config.batch_size, "bad_share": float(sum(bad) / (sum(bad) + used))}
    values |= {f"bad/{kind.replace(' ', '_')}": int(count) for kind, count in zip(BAD, bad, strict=True) if count}
    values |= {f"time/{what}": share for what, share in self.shares.items()}
    speed = progress.images_per_second
    if math.isfinite(speed):  # there is none yet at the first step
      values |= {"images_per_second": speed, "images_per_second_per_device": speed / self._devices}
      values |= {"utilisation": progress.utilisation} if progress.utilisation else {}
    counts = {"checkpoint_failed": checkpoints.failed, "rollbacks": len(rollbacks)}
    values |= {name: count for name, count in counts.items() if count}
    values |= {"compile_seconds": self._compile_seconds, "device_memory_gib": _peak_memory()}
    self._new_line()
    return {name: value for name, value in values.items() if value is not None}, bool(due)

  def skipped(self) -> int:
    """How many steps in a row were skipped, to the one before; the same on every host."""
    return int(self.previous.get("skipped_in_a_row", 0))

  def check_passed_over(self, row: Mapping[str, float], step: int) -> None:
    """Stops a run that can use too little of its data; the same on every host."""
    if row["bad_share"] > self._config.data.max_bad:
      kinds = ", ".join(f"{int(row[name])} {name[4:].replace('_', ' ')}" for name in row if name.startswith("bad/"))
      raise ValueError(
        f"step {step}: {row['bad_share']:.1%} of the latest examples cannot be used ({kinds}), more than "
        f"config.data.max_bad={self._config.data.max_bad:.1%}; the warnings above name them"
      )


def _peak_memory() -> float | None:
  """GiB, the most that one of this host's devices ever held; None where the backend does not tell, as on a CPU."""
  held = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
  return max(held) / 2**30 if None not in held else None


def _make_progress(config: ConfigDict, built: build.Built, steps: build.Steps, start: int) -> Progress:
  """The progress line; with utilisation where the peak FLOPs of the devices are known."""
  device = devices.of(built.mesh.devices.flat[0].device_kind)
  peak = device and device.flops * built.mesh.size * config.batch_size / flops.step_flops(config, built)
  main = jax.process_index() == 0
  return Progress(steps.total, start, config.batch_size, enabled=main, devices=built.mesh.size, peak=peak)


class _StopRequest:
  signum = 0


@contextlib.contextmanager
def _stop_signals() -> Iterator[_StopRequest]:
  """Ctrl-C and SIGTERM only leave a note, which the loop finds after the step; a second Ctrl-C interrupts at once.

  With several processes JAX itself listens for SIGTERM and makes all of them stop at the same step, so Ctrl-C is turned
  into that. Outside the main thread, as in some notebooks, signals are left alone.
  """
  request = _StopRequest()

  def note(signum: int, frame: FrameType | None) -> None:
    del frame
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      request.signum = signum

  if threading.current_thread() is not threading.main_thread():
    yield request
    return
  wanted = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
  before = {signum: signal.signal(signum, note) for signum in wanted}
  try:
    yield request
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)


def _opening(
  config: ConfigDict,
  built: build.Built,
  sources: Sequence[Source],
  steps: build.Steps,
  start: int,
  abstract: State,
  changes: list[str],
) -> Iterator[str]:
  """What is said before the first step."""
  for source in sources:
    left_out = "".join(f", left out {count:,}: {reason}" for reason, count in source.skipped.items())
    yield f"{source.name}: {len(source):,} samples{left_out}"
  terms = " + ".join(f"{weight:g} {name}" for name, weight in built.objective.weights.items())
  count = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
  mesh = " x ".join(f"{axis}={size}" for axis, size in built.mesh.shape.items())
  yield f"objective {terms}; recipe {config.data.recipe}; {count:,} parameters"
  yield f"{steps.total:,} steps of {config.batch_size:,} on {mesh} ({built.mesh.devices.flat[0].device_kind})"
  if built.mesh.size > 1:
    yield from layout_table(abstract)
  groups = {"batch norms": config.model.heads.norm_groups, "neighbour banks": config.model.heads.bank_groups}
  parted = [f"{name} in {count} parts of {config.batch_size // count}" for name, count in groups.items() if count > 1]
  if parted:
    yield f"heads: {', '.join(parted)} pairs"
  if start:
    yield f"going on from step {start:,}" if start < steps.total else f"done: trained to step {start:,} before"
  yield from (f"changed since the last start: {line}" for line in changes)


def _draw_views(
  rows: grain.MapDataset, built: build.Built, augment: Callable[[Batch, jax.Array], Batch], workdir: Path
) -> None:
  """`views.png`: the first examples of the run as the model sees them."""
  path = workdir / "views.png"
  if path.exists():
    return
  shown = [rows[index] for index in range(6)]
  texts = [[built.tokenizer.decode(ids) for ids in row.get("text", ())] for row in shown]
  batch = jax.jit(augment)({"image": np.stack([row["image"] for row in shown])}, 0)
  pictures.plot_views(np.asarray(batch["image"]), texts, path, built.recipe.image_views, built.recipe.text_views)


def _scores(step: int, results: Mapping[str, float]) -> Iterator[str]:
  """One line for each evaluator."""
  for name in dict.fromkeys(key.split("/")[1] for key in results):
    prefix = f"eval/{name}/"
    scores = {key.removeprefix(prefix): value for key, value in results.items() if key.startswith(prefix)}
    shown = "  ".join(
      f"{key} {value:.1%}" if isinstance(value, float) else f"{key} {value:,}" for key, value in scores.items()
    )
    yield f"step {step:,}  {name}: {shown}"


def _command(workdir: Path) -> None:
  profile = parse_steps(flags.FLAGS.profile) if flags.FLAGS.profile else None
  use_compile_cache(workdir / "compiled")
  try:
    train(flags.FLAGS.config, workdir, profile=profile)
  except Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(flags.FLAGS.stopped_exit_code if stopped.signum == signal.SIGTERM else 128 + stopped.signum)


def main() -> None:
  """Runs the command."""
  define_config()
  flags.DEFINE_integer(
    "stopped_exit_code", 0, "After SIGTERM and a checkpoint; 143 for a supervisor that takes 0 for the end of the run."
  )
  flags.DEFINE_string("profile", "", "First and last step of which to write a trace, such as 100:110.")
  launch(_command, __doc__, required=("config",))


if __name__ == "__main__":
  main()
