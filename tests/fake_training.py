"""A training run without a model: the step adds the batch to a scalar. Everything around the step is real."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from declip_jax.batch_sizes import BatchSizes
from declip_jax.data.sources import BAD
from declip_jax.reporting.metrics import MetricWriter
from declip_jax.reporting.progress import TrainingProgress
from declip_jax.reporting.symptoms import Facts, Symptoms
from declip_jax.runtime.bad_samples import BadSamples
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.runtime.clock import Clock
from declip_jax.runtime.rollback import Rollbacks
from declip_jax.runtime.services import Cadence, Services
from declip_jax.runtime.signals import StopRequest, stop_signals
from declip_jax.runtime.trace import Trace
from declip_jax.runtime.watchdog import Watchdog
from declip_jax.train import Batches, StepFn, loop
from declip_jax.training.state import State

BATCH_SIZE = 16


@dataclasses.dataclass(frozen=True)
class FakeTraining:
  """A training run of 8 steps that logs each step and saves every second one.

  Attributes:
    cadence: when to log, evaluate and save.
    poisoned: numbers of the batches that are not finite, so that the step skips them.
    bad: bad samples that are skipped for each batch, by kind.
    evaluate: evaluates a state, as the evaluation with this number.
    on_batch: called with the number of each batch while the run waits for it.
    on_step: called with the number of each batch when its step begins.
    step_fn: the step.
    keep: arguments of `Checkpoints`.
    batch_size: number of examples in a batch.
    text_lengths: length of the texts of each batch; empty for batches without texts.
    is_saved: whether the state that it starts from is saved.
    evaluate_first: whether the first state is evaluated.
  """

  cadence: Cadence = dataclasses.field(default_factory=lambda: Cadence(total=8, log=1, checkpoint=2))
  max_skipped_steps: int = 20
  max_rollbacks: int = 3
  poisoned: tuple[int, ...] = ()
  bad: tuple[int, ...] = (0,) * len(BAD)
  max_bad: float = 0.5
  evaluate: Callable[[State, int], dict[str, float]] = lambda state, number: {}
  on_batch: Callable[[int], None] = lambda number: None
  on_step: Callable[[int], None] = lambda number: None
  step_fn: StepFn | None = None
  keep: dict[str, Any] = dataclasses.field(default_factory=lambda: {"keep_last": 2})
  hang_timeout: float = 0.0
  profile: tuple[int, int] | None = None
  batch_size: int = BATCH_SIZE
  text_lengths: tuple[int, ...] = ()
  is_saved: bool = True
  evaluate_first: bool = False

  def run(self, workdir: Path) -> Services:
    """Trains in a working directory as `train` does, from its newest checkpoint; returns the services."""
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
      checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, **self.keep)))
      rollbacks = Rollbacks(workdir, self.max_rollbacks)
      start, state, position = 0, make_state(), {"next_index": 0}
      sizes = BatchSizes.constant(self.batch_size)
      if restored := checkpoints.restore_newest(abstract()):
        start, state = restored.step, restored.state
        position = rollbacks.position(start, restored.data)
        sizes = (checkpoints.batch_sizes(start) or sizes).resumed(start, self.batch_size)
      stop = StopRequest(checkpoints.preempted, start)
      stack.enter_context(stop_signals(stop))
      services = Services(
        workdir=workdir,
        cadence=self.cadence,
        batch_sizes=sizes,
        repeatable_from=sizes.since,
        config={},
        abstract=abstract(),
        max_skipped_steps=self.max_skipped_steps,
        checkpoints=checkpoints,
        rollbacks=rollbacks,
        stop=stop,
        writer=stack.enter_context(MetricWriter(workdir, resume_step=start)),
        progress=stack.enter_context(TrainingProgress(self.cadence.total, self.batch_size)),
        trace=stack.enter_context(Trace(workdir / "profile", self.profile)),
        watchdog=stack.enter_context(Watchdog(workdir, self.hang_timeout)),
        clock=Clock(start, self.batch_size),
        bad_samples=BadSamples(start, self.batch_size, self.max_bad),
        symptoms=Symptoms(Facts(self.batch_size, warmup=0, total=self.cadence.total)),
        evaluate_state=self.evaluate,
      )
      services.evaluate_if_missed(start, state, self.evaluate_first)
      number = itertools.count(position["next_index"] // BATCH_SIZE)

      def step_fn(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        self.on_step(next(number))
        return (self.step_fn or add_batch)(state, batch)

      batches = self.batches(position["next_index"])
      loop(step_fn, batches, state, start, services, None if self.is_saved else position)
    return services

  def batches(self, next_index: int) -> Batches:
    """Yields batches from a position of the input."""
    number = next_index // self.batch_size
    while True:
      self.on_batch(number)
      value = np.float32(np.nan if number in self.poisoned else 1 + number / 7)
      batch = {"x": jax.device_put(value)}
      if self.text_lengths:
        batch["text"] = jax.device_put(np.zeros((1, 1, self.text_lengths[number]), np.int32))
      number += 1
      yield batch, {"next_index": number * self.batch_size}, np.array(self.bad, np.int32)


@jax.jit
def add_batch(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
  """Adds the batch to the parameter and keeps it in `opt_state`, unless it is not finite."""
  good = jnp.isfinite(batch["x"])
  in_a_row = jnp.where(good, 0, state.skipped["in_a_row"] + 1)
  new = State(
    step=state.step + 1,
    params={"x": jnp.where(good, state.params["x"] + batch["x"], state.params["x"])},
    opt_state={"x": jnp.where(good, batch["x"], state.opt_state["x"])},
    collections=state.collections,
    skipped={"total": state.skipped["total"] + ~good, "in_a_row": in_a_row},
  )
  return new, {"loss": new.params["x"], "skipped_in_a_row": in_a_row, "skipped_total": new.skipped["total"]}


def make_state() -> State:
  """The state before the first step."""
  zero, count = (jax.device_put(kind(0)) for kind in (np.float32, np.int32))
  skipped = {"total": count, "in_a_row": count}
  return State(step=count, params={"x": zero}, opt_state={"x": zero}, collections={"x": zero}, skipped=skipped)


def abstract() -> State:
  """Shapes and shardings of the state."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state())


def restore(workdir: Path, step: int) -> tuple[list[float], dict[str, Any]]:
  """The numbers of a saved state, and its input position."""
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    state, position = checkpoints.restore(step, abstract())
  return [float(leaf) for leaf in jax.tree.leaves(state)], position


def saved_steps(workdir: Path) -> list[int]:
  with contextlib.closing(Checkpoints(workdir)) as checkpoints:
    return checkpoints.steps()


def lines(workdir: Path, name: str = "loss") -> Iterator[dict[str, float]]:
  """The lines of metrics.jsonl that have a metric."""
  from declip_jax.reporting.metrics import read_metrics

  return (line for line in read_metrics(workdir) if name in line)
