"""The calls of the training loop besides the step: each concern of a run is one method of `Services`."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from pathlib import Path
import signal
from typing import Any, TypeVar

import jax

from declip_jax.batch_sizes import BatchSizes
from declip_jax.reporting.metrics import MetricWriter, read_metrics
from declip_jax.reporting.opening import score_lines
from declip_jax.reporting.progress import TrainingProgress
from declip_jax.reporting.symptoms import Symptoms
from declip_jax.runtime.bad_samples import BadSamples
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.runtime.clock import Clock
from declip_jax.runtime.compiling import hidden_alarms, slow_compile_lines, unless_unwanted
from declip_jax.runtime.hosts import any_host
from declip_jax.runtime.rollback import Rollbacks
from declip_jax.runtime.signals import StopRequest
from declip_jax.runtime.trace import Trace
from declip_jax.runtime.watchdog import Watchdog
from declip_jax.spelling import counted
from declip_jax.training.state import State

T = TypeVar("T")
Metrics = dict[str, jax.Array]
_PATIENCE = 300.0  # seconds for which the last checkpoint is retried
_DUE_EVERY = 50  # steps after which the clock is asked whether a checkpoint is due, if no line was logged meanwhile


@dataclasses.dataclass(frozen=True)
class Cadence:
  """The steps at which a stage of a run logs, evaluates and saves; its last step does all three.

  Attributes:
    total: number of steps of the run at the end of the stage, which is the end of the run if it has no other stages.
    log, evaluate, checkpoint: steps from one of each to the next; 0 means only at the last step.
    evaluate_phase, checkpoint_phase: remainder of the steps that are due, divided by the steps between them.
    first: number of steps of the run before the stage.
    is_last: whether the run ends with the stage.
  """

  total: int
  log: int = 0
  evaluate: int = 0
  checkpoint: int = 0
  evaluate_phase: int = 0
  checkpoint_phase: int = 0
  first: int = 0
  is_last: bool = True

  def has(self, step: int) -> bool:
    """Whether the step after the first `step` steps is one of the stage."""
    return self.first <= step < self.total

  def logs(self, step: int) -> bool:
    return self._is_due(step, self.log)

  def evaluates(self, step: int) -> bool:
    return self._is_due(step, self.evaluate, self.evaluate_phase)

  def evaluation(self, step: int) -> int:
    """The number of the evaluation at a step; 0 for the last step of a stage and the first state: all of them."""
    return 0 if not step or step >= self.total else (step - self.evaluate_phase) // self.evaluate

  def saves(self, step: int) -> bool:
    return self._is_due(step, self.checkpoint, self.checkpoint_phase)

  def _is_due(self, step: int, every: int, phase: int = 0) -> bool:
    return step >= self.total or (every > 0 and step % every == phase)


@dataclasses.dataclass(frozen=True)
class Services:
  """The services of one run.

  Attributes:
    workdir: working directory.
    cadence: when to log, evaluate and save.
    batch_sizes: global batch size, now and earlier in the run.
    repeatable_from: number of steps from which on steps can be repeated with the batch sizes of the config.
    config: config that is saved with each checkpoint.
    abstract: shapes and shardings of the state.
    max_skipped_steps: number of consecutive skipped steps at which the run rolls back.
    evaluate_state: evaluates a state, as the evaluation with this number; returns its metrics, named "eval/...".
    draw_curves: draws the curves of the metrics so far.
    stage: number of the stage in the run, from 1; 0 if the run has only one.
    training_flops: function from a number of steps to the FLOPs of the model in all of them; None if it is not known.
    latest: latest metrics, filled by `log` and `evaluate`.
    Their classes describe the other attributes.
  """

  workdir: Path
  cadence: Cadence
  batch_sizes: BatchSizes
  config: Mapping[str, Any]
  abstract: State
  max_skipped_steps: int
  repeatable_from: int
  checkpoints: Checkpoints
  rollbacks: Rollbacks
  stop: StopRequest
  writer: MetricWriter
  progress: TrainingProgress
  trace: Trace
  watchdog: Watchdog
  clock: Clock
  bad_samples: BadSamples
  symptoms: Symptoms
  evaluate_state: Callable[[State, int], dict[str, float]] = lambda state, number: {}
  draw_curves: Callable[[], None] = lambda: None
  stage: int = 0
  training_flops: Callable[[int], float] | None = None
  latest: dict[str, float] = dataclasses.field(default_factory=dict)

  def read(self, step: int, batches: Iterator[T]) -> T | None:
    """Returns the batch of a step, None if the run is asked to stop while it waits for the batch."""
    self.watchdog.beat(f"reading the batch of step {step}")
    with self.clock.spending("data"):
      return self.stop.wait_for(lambda: next(batches))

  def begin(self, step: int, state: State, text_length: int = 0) -> None:
    """Prepares for a step that is about to be dispatched, on texts of a length that decides its program."""
    self.clock.begin(text_length)
    if self.clock.has_compiled:
      self.watchdog.beat(f"step {step}")
    else:
      self.watchdog.exempt(f"compiling and step {step}")
      if self.clock.programs:
        self.progress.message(f"step {step:,}: compiling the train step for texts of up to {text_length} tokens")
    self.trace.begin(step, state)

  def call(self, step_fn: Callable[[State, T], tuple[State, Metrics]], state: State, batch: T) -> Any:
    """Returns what a step returns, None if the run is asked to stop while it compiles: the step has not run then."""

    def step() -> tuple[State, Metrics]:
      with jax.transfer_guard("disallow"):  # a hidden host transfer is an error
        return step_fn(state, batch)

    if self.clock.has_compiled:
      return step()
    with slow_compile_lines("the train step"):
      return unless_unwanted(step, lambda: bool(self.stop.signum))

  def end(self, step: int, state: State, metrics: Metrics) -> None:
    """Reports what is known after a step is dispatched: how long a program took to compile, and where the trace is."""
    if not self.clock.has_compiled:
      with self.clock.spending("step"):
        jax.block_until_ready(metrics)
      self.progress.message(self.clock.first_step_done())
    if message := self.trace.end(step, state):
      self.progress.message(message)

  def diverged(self, metrics: Metrics) -> bool:
    """Whether too many consecutive steps were skipped, by the metrics of a finished step; the same on every host."""
    return _skipped(metrics) >= self.max_skipped_steps

  def roll_back(self, at: int, metrics: Metrics, state: State, position: dict[str, Any]) -> tuple[int, State]:
    """Restores the checkpoint before the run diverged, and returns its step and state.

    Args:
      at: last step that was skipped.
      metrics: metrics of that step.
      state: current state, which is deleted first: there may be no memory for two.
      position: input position after the offending batches.

    Raises:
      FloatingPointError: see `Rollbacks.roll_back`; or the checkpoint is older than the current batch size.
    """
    for leaf in jax.tree.leaves(state):
      leaf.delete()
    restored = self.rollbacks.roll_back(at, _skipped(metrics), position, self.checkpoints, self.abstract)
    if restored.step < self.repeatable_from:
      raise FloatingPointError(
        f"{restored.messages[0]}; this checkpoint was saved before config.batch_size changed: run the same command "
        "again to continue from it"
      )
    for service in (self.writer, self.clock, self.bad_samples, self.symptoms):
      service.roll_back(restored.step)
    for message in restored.messages:
      self.progress.message(message)
    return restored.step, restored.state

  def show(self, step: int, metrics: Metrics) -> None:
    """Shows the metrics of a step in the progress line."""
    self.progress.update(
      step,
      metrics,
      images_per_second=self.clock.images_per_second,
      utilisation=self.clock.utilisation,
      wait=self.clock.wait,
    )

  def log(self, step: int, metrics: Metrics) -> None:
    """Writes a line of metrics.jsonl.

    Raises:
      ValueError: too many samples cannot be used.
    """
    bad = self.bad_samples.values()
    with self.clock.spending("step"):
      values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    counts = {"checkpoint_failed": self.checkpoints.failed, "rollbacks": len(self.rollbacks)}
    values |= {**self._seen(step), **bad, **self.clock.values()}
    values |= {name: count for name, count in counts.items() if count}
    symptoms, messages = self.symptoms.check(step, values)
    for message in messages:
      self.progress.message(message)
    self.writer.write(step, values | symptoms)
    self.latest.update(values)
    self.bad_samples.check()

  def save_is_due(self, step: int) -> bool:
    """Whether a checkpoint is due, by the step or by the clock of any host; the same on every host."""
    every = self.cadence.log if 0 < self.cadence.log < _DUE_EVERY else _DUE_EVERY
    by_clock = step % every == 0 and any_host(self.checkpoints.due())
    return by_clock or self.cadence.saves(step)

  def save(self, step: int, state: State, position: dict[str, Any]) -> None:
    """Starts to save a checkpoint."""
    self.watchdog.beat(f"checkpoint {step}")
    with self.clock.spending("step"):
      jax.block_until_ready(state)  # the save would wait for the step in flight, too, and the speed leaves out saves
    with self.clock.spending("save"):
      self._save(step, state, position)

  def announce_stop(self, step: int, signum: int) -> None:
    """Announces that a checkpoint is saved before the run stops, and which steps Ctrl-C would lose meanwhile."""
    newest = self.checkpoints.latest() or 0
    since = f"checkpoint {newest}" if newest else "the start"
    self.progress.message(
      f"{signal.Signals(signum).name}: saving checkpoint {step}; Ctrl-C now would lose "
      f"{counted(step - newest, 'step')}, back to {since}"
    )

  def finish_save(self, step: int, state: State, position: dict[str, Any]) -> None:
    """Waits until the checkpoint of a step is written, and retries if that fails.

    Raises:
      OSError: it cannot be written.
    """
    with self.clock.spending("save"):
      self.checkpoints.finish(step, lambda: self._save(step, state, position), _PATIENCE)

  def evaluate(self, step: int, state: State) -> None:
    """Evaluates a state, and records its metrics with its checkpoint and in metrics.jsonl."""
    with self.clock.spending("evaluation"), hidden_alarms():
      results = self.evaluate_state(state, self.cadence.evaluation(step))
      self.writer.pictures(step)
    self.checkpoints.score(step, results)
    if results:
      self.writer.write(step, {**self._seen(step), **results})
    self.latest.update(results)
    for line in score_lines(step, results):
      self.progress.message(line)

  def evaluate_if_missed(self, start: int, state: State, evaluate_first: bool = False) -> None:
    """Repeats the evaluation of the checkpoint that a run resumes from, if the earlier run was stopped before it.

    A finished run is evaluated in any case, since its metrics are returned; a new one if `evaluate_first`.
    """
    if not (self.cadence.evaluates(start) if start else evaluate_first):
      return
    written = jax.process_index() == 0 and any(
      name.startswith("eval/") for line in read_metrics(self.workdir) for name in line if line["step"] == start
    )
    if not any_host(written):
      self.evaluate(start, state)
    elif self.cadence.is_last and start >= self.cadence.total:
      self.latest.update(self.evaluate_state(state, 0))

  def curves(self, step: int) -> None:
    """Draws the curves of the metrics up to a step."""
    with self.clock.spending("save"):
      self.draw_curves()
      self.writer.pictures(step)

  def _seen(self, step: int) -> dict[str, float]:
    """What a line of metrics.jsonl says about the training up to a step."""
    stage = {"stage": self.stage} if self.stage else {}
    flops = {"training_flops": self.training_flops(step)} if self.training_flops else {}
    return {"examples": self.batch_sizes.examples(step), **stage, **flops}

  def _save(self, step: int, state: State, position: dict[str, Any]) -> None:
    self.checkpoints.save(step, state, data=position, config=self.config, batch_sizes=self.batch_sizes)


def _skipped(metrics: Metrics) -> int:
  return int(metrics.get("skipped_in_a_row", 0))
