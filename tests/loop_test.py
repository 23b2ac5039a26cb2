"""The training loop with a step that adds a number: its order and its handling of failures. Nothing is compiled."""

from collections.abc import Callable
import json
import os
from pathlib import Path
import signal
import threading
import time
from typing import Any

from fake_training import BATCH_SIZE, FakeTraining, add_batch, lines, restore, saved_steps
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import killed_before_line

from declip_jax.batch_sizes import BatchSizes
from declip_jax.data.sources import BAD
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.runtime.rollback import Rollbacks
from declip_jax.runtime.services import Cadence
from declip_jax.runtime.signals import Stopped
from declip_jax.runtime.watchdog import Watchdog
from declip_jax.training.state import State


def losses(workdir: Path) -> list[float]:
  return [line["loss"] for line in lines(workdir)]


def at(number: int, action: Callable[[], Any]) -> Callable[[int], None]:
  """Calls `action` before the batch with this number is used."""

  def on_batch(current: int) -> None:
    if current == number:
      action()

  return on_batch


def interrupt() -> None:
  raise KeyboardInterrupt


def terminate() -> None:
  os.kill(os.getpid(), signal.SIGTERM)


def run_until_line(training: FakeTraining, step: int, workdir: Path, time: int = 1) -> None:
  """Runs a training that is killed before it writes its line about a step for the `time`-th time."""
  with killed_before_line(step, time):
    training.run(workdir)


def test_a_run_logs_saves_and_counts_each_step_once(tmp_path: Path) -> None:
  services = FakeTraining().run(tmp_path)
  found = list(lines(tmp_path))
  assert [line["step"] for line in found] == list(range(1, 9))
  assert [line["examples"] for line in found] == [BATCH_SIZE * step for step in range(1, 9)]
  np.testing.assert_allclose([line["loss"] for line in found], np.cumsum(1 + np.arange(8) / 7), rtol=1e-6)
  assert saved_steps(tmp_path) == [6, 8]
  assert restore(tmp_path, 8)[1] == {"next_index": 8 * BATCH_SIZE}
  assert services.latest["loss"] == found[-1]["loss"]
  assert ["images_per_second" in line for line in found] == [False, False, *[True] * 6]  # the first step compiles
  for line in found:
    assert 0 < sum(line[f"time/{activity}"] for activity in ("data", "step", "save", "evaluation")) <= 1


@pytest.mark.parametrize(
  ("cadence", "logged", "saved"),
  [
    (Cadence(total=8), [8], [8]),
    (Cadence(total=8, log=3), [3, 6, 8], [8]),
    (Cadence(total=8, log=8, checkpoint=5), [8], [5, 8]),
    (Cadence(total=8, log=8, evaluate=3), [8], [3, 6, 8]),  # an evaluation saves first
  ],
)
def test_the_cadence_decides_what_is_logged_and_saved(
  cadence: Cadence, logged: list[int], saved: list[int], tmp_path: Path
) -> None:
  FakeTraining(cadence, keep={"keep_last": 9}).run(tmp_path)
  assert [int(line["step"]) for line in lines(tmp_path)] == logged
  assert saved_steps(tmp_path) == saved


def test_a_killed_run_resumes_bit_exact(tmp_path: Path) -> None:
  FakeTraining().run(tmp_path / "whole")
  for step in (3, 6, 7):
    run_until_line(FakeTraining(), step, tmp_path / "killed")
  FakeTraining().run(tmp_path / "killed")
  assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
  assert restore(tmp_path / "killed", 8) == restore(tmp_path / "whole", 8)


def test_a_run_with_another_batch_size_counts_the_examples_that_it_has_seen(tmp_path: Path) -> None:
  FakeTraining(Cadence(total=4, log=1, checkpoint=2), keep={"keep_last": 9}).run(tmp_path)
  FakeTraining(Cadence(total=6, log=1, checkpoint=2), keep={"keep_last": 9}, batch_size=32).run(tmp_path)
  services = FakeTraining(Cadence(total=8, log=1, checkpoint=2), keep={"keep_last": 9}, batch_size=8).run(tmp_path)
  assert [line["examples"] for line in lines(tmp_path)] == [16, 32, 48, 64, 96, 128, 136, 144]
  assert restore(tmp_path, 8)[1] == {"next_index": 144}
  assert services.checkpoints.batch_sizes(6) == BatchSizes(((0, 16), (4, 32)))
  assert services.checkpoints.batch_sizes(8) == BatchSizes(((0, 16), (4, 32), (6, 8)))
  # From a checkpoint of an earlier part, the later ones do not count.
  for step in (6, 8):
    (tmp_path / "checkpoints" / str(step)).rename(tmp_path / f"{step}")
  FakeTraining(Cadence(total=5, log=1), batch_size=16).run(tmp_path)
  assert [line["examples"] for line in lines(tmp_path)] == [16, 32, 48, 64, 80]


def test_a_rollback_to_before_a_change_of_the_batch_size_is_reported(tmp_path: Path) -> None:
  changed = {"max_skipped_steps": 2, "poisoned": tuple(range(2, 20)), "keep": {"keep_last": 9}, "batch_size": 32}
  FakeTraining(Cadence(total=4, checkpoint=2), keep={"keep_last": 9}).run(tmp_path)
  with pytest.raises(FloatingPointError, match=r"rolled back to checkpoint 2.*saved before config.batch_size changed"):
    FakeTraining(Cadence(total=9), **changed).run(tmp_path)
  assert saved_steps(tmp_path) == [2]


def test_a_hidden_transfer_is_an_error(tmp_path: Path) -> None:
  def add_host_array(state: State, batch: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    state, metrics = add_batch(state, batch)
    return state, metrics | {"loss": metrics["loss"] + jnp.asarray(np.ones(3))[0]}

  with pytest.raises(Exception, match=r"Disallowed host-to-device transfer"):
    FakeTraining(step_fn=add_host_array).run(tmp_path)


def test_rolls_back_and_skips_the_offending_batches(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
  training = FakeTraining(
    Cadence(total=10, log=1, checkpoint=2), max_skipped_steps=2, poisoned=(4, 5), keep={"keep_last": 3}
  )
  training.run(tmp_path / "diverged")
  messages = capsys.readouterr().err
  assert "step 6: 2 consecutive steps were skipped" in messages
  assert "rolled back to checkpoint 4, data continues at sample 112 (rollback 1 of 3)" in messages
  assert "checkpoint 6 was skipped: the run diverged" in messages
  found = list(lines(tmp_path / "diverged"))
  assert [line["step"] for line in found] == list(range(1, 11))
  assert [line.get("rollbacks", 0) for line in found] == [0] * 4 + [1] * 6
  final = restore(tmp_path / "diverged", 10)
  assert final[1] == {"next_index": (10 + 3) * BATCH_SIZE}  # two bad batches, and the one that was in flight
  assert found[-1]["skipped_total"] == 0
  used = [number for number in range(13) if number not in (4, 5, 6)]
  np.testing.assert_allclose(found[-1]["loss"], sum(1 + number / 7 for number in used), rtol=1e-6)
  # A run that is killed between the rollback and the next checkpoint ends the same way,
  run_until_line(training, 6, tmp_path / "killed", time=2)
  training.run(tmp_path / "killed")
  # and so does a run that never read the bad data.
  run_until_line(training, 5, tmp_path / "informed")
  Rollbacks(tmp_path / "informed").record(2, 6, 4, {"next_index": 112})
  training.run(tmp_path / "informed")
  for name in ("killed", "informed"):
    assert losses(tmp_path / name) == losses(tmp_path / "diverged")
    assert restore(tmp_path / name, 10) == final


def test_a_run_that_diverges_again_rolls_back_further_and_stops_at_last(tmp_path: Path) -> None:
  training = FakeTraining(
    Cadence(total=10, log=1, checkpoint=2),
    max_skipped_steps=2,
    max_rollbacks=2,
    poisoned=tuple(range(4, 20)),
    keep={"keep_last": 3},
  )
  with pytest.raises(FloatingPointError, match=r"rolled back 2 times \(config.safety.max_rollbacks=2\)"):
    training.run(tmp_path)
  made = [json.loads(line) for line in (tmp_path / "rollbacks.jsonl").read_text().splitlines()]
  assert [(line["to"], line["at"]) for line in made] == [(4, 6), (2, 6)]
  assert {path.name for path in (tmp_path / "checkpoints").glob("*.diverged*")} >= {"6.diverged", "4.diverged"}


def test_too_many_skipped_steps_stop_a_run_without_checkpoints(tmp_path: Path) -> None:
  training = FakeTraining(Cadence(total=8), max_skipped_steps=3, poisoned=tuple(range(8)))
  with pytest.raises(FloatingPointError, match=r"step 3: 3 consecutive steps.*no earlier checkpoint"):
    training.run(tmp_path)


def test_training_survives_saves_that_fail(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  reasons = ["No space left on device"] * 3
  monkeypatch.setattr(Checkpoints, "_write_error", lambda self: reasons.pop() if reasons else "")
  FakeTraining().run(tmp_path)
  assert [line.get("checkpoint_failed", 0) for line in lines(tmp_path)] == [0, 0, 1, 1, 2, 2, 3, 3]
  assert saved_steps(tmp_path) == [8]
  assert "checkpoint 4 was not written: OSError: No space left on device" in caplog.text
  # Only the last checkpoint of the run is required.
  monkeypatch.setattr(Checkpoints, "_write_error", lambda self: "No space left on device")
  FakeTraining(Cadence(total=2, checkpoint=2, is_last=False)).run(tmp_path / "stage")
  assert saved_steps(tmp_path / "stage") == []
  monkeypatch.setattr("declip_jax.runtime.services._PATIENCE", 1.5)
  with pytest.raises(OSError, match=r"checkpoint 8 could not be written to .*No space left.*newest checkpoint is none"):
    FakeTraining().run(tmp_path / "never")


@pytest.mark.parametrize(("log", "every", "saved"), [(3, 5, [3, 6, 8]), (0, 2, [2, 4, 6, 8]), (7, 2, [2, 4, 6, 8])])
def test_the_clock_saves_with_few_and_without_log_lines(
  log: int, every: int, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr("declip_jax.runtime.services._DUE_EVERY", every)
  FakeTraining(Cadence(total=8, log=log), keep={"keep_last": 9, "minutes": 1e-9}).run(tmp_path)
  assert saved_steps(tmp_path) == saved


@pytest.mark.parametrize("action", [interrupt, terminate])
def test_an_interrupted_evaluation_loses_no_step_and_is_repeated(action: Callable[[], None], tmp_path: Path) -> None:
  def evaluate(state: State, number: int) -> dict[str, float]:
    del state, number
    action()
    return {"eval/heldout/top1": 0.5}

  cadence = Cadence(total=8, log=1, evaluate=4)
  with pytest.raises(Stopped if action is terminate else KeyboardInterrupt):
    FakeTraining(cadence, evaluate=evaluate).run(tmp_path)
  assert saved_steps(tmp_path) == [4]
  evaluated = []

  def finish(state: State, number: int) -> dict[str, float]:
    assert number == (0 if state.step == 8 else 1)
    evaluated.append(int(state.step))
    return {"eval/heldout/top1": float(state.step) / 10}

  services = FakeTraining(cadence, evaluate=finish).run(tmp_path)
  assert [line["step"] for line in lines(tmp_path, "eval/heldout/top1")] == [4, 8]
  assert evaluated == ([8] if action is terminate else [4, 8])
  assert services.latest["eval/heldout/top1"] == 0.8
  # A finished run is evaluated again for its result, but not recorded again.
  assert FakeTraining(cadence, evaluate=finish).run(tmp_path).latest["eval/heldout/top1"] == 0.8
  assert [line["step"] for line in lines(tmp_path, "eval/heldout/top1")] == [4, 8]


@pytest.mark.parametrize("every", [0, 2])
def test_the_first_state_is_evaluated_in_full_by_each_start_from_it(every: int, tmp_path: Path) -> None:
  numbers: list[int] = []

  def evaluate(state: State, number: int) -> dict[str, float]:
    numbers.append(number)
    return {"eval/x": float(state.params["x"])}

  training = FakeTraining(Cadence(total=4, log=1, evaluate=every), evaluate=evaluate, evaluate_first=True)
  run_until_line(training, 1, tmp_path)
  training.run(tmp_path)
  evaluated = [(line["step"], line["eval/x"]) for line in lines(tmp_path, "eval/x")]
  assert [step for step, _ in evaluated] == ([0, 2, 4] if every else [0, 4])
  assert evaluated[0] == (0, 0)
  assert numbers == ([0, 0, 1, 0] if every else [0, 0, 0])


def test_the_scores_of_evaluations_decide_which_checkpoint_is_best(tmp_path: Path) -> None:
  keep = {"keep_last": 1, "keep_best": 1, "best_metric": "eval/a/top1"}
  scores = {2: 0.1, 4: 0.9, 6: 0.3, 8: 0.2}
  training = FakeTraining(
    Cadence(total=8, evaluate=2), evaluate=lambda state, number: {"eval/a/top1": scores[int(state.step)]}, keep=keep
  )
  training.run(tmp_path)
  assert saved_steps(tmp_path) == [4, 8]


@pytest.mark.parametrize(("event", "step"), [("on_step", 5), ("on_batch", 4)])
def test_sigterm_saves_and_the_run_resumes_exactly(
  event: str, step: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  FakeTraining(Cadence(total=8, log=1)).run(tmp_path / "whole")
  with pytest.raises(Stopped, match=rf"step {step} by SIGTERM") as stopped:
    FakeTraining(Cadence(total=8, log=1), **{event: at(4, terminate)}).run(tmp_path / "stopped")
  assert (stopped.value.step, stopped.value.signum) == (step, signal.SIGTERM)
  announced = f"saving checkpoint {step}; Ctrl-C now would lose {step} steps, back to the start"
  assert announced in capsys.readouterr().err
  assert saved_steps(tmp_path / "stopped") == [step]
  FakeTraining(Cadence(total=8, log=1)).run(tmp_path / "stopped")
  assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
  assert restore(tmp_path / "stopped", 8) == restore(tmp_path / "whole", 8)


@pytest.mark.parametrize(("is_saved", "saved"), [(True, []), (False, [0])])  # False: after a stage that was not saved
def test_sigterm_ends_a_run_that_waits_for_its_first_batch(is_saved: bool, saved: list[int], tmp_path: Path) -> None:
  def hang() -> None:
    threading.Timer(0.05, terminate).start()
    time.sleep(60)

  began = time.monotonic()
  with pytest.raises(Stopped, match=r"step 0"):
    FakeTraining(on_batch=at(0, hang), is_saved=is_saved).run(tmp_path)
  assert time.monotonic() - began < 30
  assert saved_steps(tmp_path) == saved


@pytest.mark.parametrize(("is_saved", "saved"), [(True, []), (False, [0])])
def test_sigterm_while_the_step_compiles_ends_the_run_before_the_step(
  is_saved: bool, saved: list[int], tmp_path: Path
) -> None:
  @jax.jit
  def step(state: State, batch: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    terminate()
    jax.debug.callback(ran.append, batch["x"])
    return add_batch(state, batch)

  ran: list[Any] = []
  with pytest.raises(Stopped, match=r"step 0 by SIGTERM"):
    FakeTraining(step_fn=step, is_saved=is_saved).run(tmp_path)
  jax.effects_barrier()
  assert (ran, saved_steps(tmp_path)) == ([], saved)


def test_the_time_for_a_batch_is_limited_and_that_for_compiling_is_not(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  beats: list[tuple[str, bool]] = []

  class Recorder(Watchdog):
    def beat(self, activity: str) -> None:
      beats.append((activity, True))

    def exempt(self, activity: str) -> None:
      beats.append((activity, False))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("fake_training.Watchdog", Recorder)
    FakeTraining(Cadence(total=5), text_lengths=(16, 16, 32, 16, 32)).run(tmp_path)
  assert [beat for beat in beats if not beat[0].startswith("reading")] == [
    *[("compiling and step 1", False), ("step 2", True), ("compiling and step 3", False)],
    *[("step 4", True), ("step 5", True), ("checkpoint 5", True)],
  ]
  assert [beat for beat in beats if beat[0].startswith("reading")] == [
    (f"reading the batch of step {step}", True) for step in range(1, 6)
  ]
  printed = capsys.readouterr().err
  assert printed.count("compiling the train step") == 1
  assert "step 3: compiling the train step for texts of up to 32 tokens" in printed


def test_a_stop_skips_the_evaluation_that_is_due(tmp_path: Path) -> None:
  training = FakeTraining(
    Cadence(total=8, evaluate=4), evaluate=lambda state, number: {"eval/a/top1": 0.0}, on_step=at(3, terminate)
  )
  with pytest.raises(Stopped, match=r"step 4"):
    training.run(tmp_path)
  assert not list(lines(tmp_path, "eval/a/top1"))
  assert saved_steps(tmp_path) == [4]


def test_preemption_checks_use_increasing_steps_even_after_a_rollback(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  numbers = []
  monkeypatch.setattr(Checkpoints, "preempted", lambda self, number: numbers.append(number))
  cadence = Cadence(total=8, log=1, checkpoint=2)
  FakeTraining(cadence, max_skipped_steps=2, poisoned=(4, 5), keep={"keep_last": 3}).run(tmp_path)
  assert numbers == list(range(1, 11))  # the steps 5 and 6 were taken twice


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
  bad = (16, *[0] * (len(BAD) - 1))
  services = FakeTraining(bad=bad).run(tmp_path / "few")
  kind = BAD[0].replace(" ", "_")
  assert services.latest["bad_share"] == 0.5
  assert services.latest[f"bad/{kind}"] == 16
  with pytest.raises(ValueError, match=rf"step 1: 50.0% .*\(16 {BAD[0]}\).*config.data.max_bad=40.0%"):
    FakeTraining(bad=bad, max_bad=0.4).run(tmp_path / "many")


def test_an_input_error_ends_the_run_and_keeps_its_checkpoints(tmp_path: Path) -> None:
  def fail() -> None:
    raise ChildProcessError("a worker died")

  with pytest.raises(ChildProcessError, match="a worker died"):
    FakeTraining(on_batch=at(5, fail)).run(tmp_path)
  assert saved_steps(tmp_path) == [2, 4]
