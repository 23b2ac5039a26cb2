"""Runs that are killed, stopped or frozen at random moments lose nothing. All of these tests take minutes."""

import os
from pathlib import Path
import signal
import subprocess
import time

from checkpoint_files import arrays, flip
import numpy as np
import pytest
from runs import assert_equal, command, environment, final_state, losses_on_disk, wait_for_step
from tiny import tiny_config

from declip_jax.reporting.metrics import read_metrics
from declip_jax.runtime.checkpoint import Checkpoints

pytestmark = pytest.mark.slow
STEPS, KILLS = 200, 20
WAIT = 600.0  # seconds, for a machine that is busy with other things


def start(workdir: Path, *flags: str, cache: Path) -> subprocess.Popen:
  """Starts a run in a process group of its own; `cache` has its compiled programs."""
  settings = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  return subprocess.Popen(
    command("clip,bare", workdir, *flags),
    env=environment() | settings,
    start_new_session=True,
    stderr=subprocess.PIPE,
    text=True,
  )


def pair(workdir: Path, port: int, *flags: str, cache: Path) -> list[subprocess.Popen]:
  """Starts two processes of one run."""
  joined = [f"--coordinator=localhost:{port}", "--processes=2", *flags]
  return [start(workdir, *joined, f"--process={index}", cache=cache) for index in range(2)]


def end(processes: list[subprocess.Popen]) -> None:
  for process in processes:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def port() -> int:
  return 20000 + (os.getpid() * 7 + int(time.time())) % 20000


def unfinished(workdir: Path) -> bool:
  """Whether a checkpoint is being written."""
  return any((workdir / "checkpoints").glob("*tmp*"))


def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
  """Every second kill waits until a checkpoint is being written."""
  rng = np.random.default_rng(0)
  flags = [f"--config.duration.steps={STEPS}", "--config.checkpoint.every.steps=4"]
  whole = start(tmp_path / "whole", *flags, cache=tmp_path / "cache")
  _, errors = whole.communicate(timeout=WAIT)
  assert whole.returncode == 0, errors
  workdir, while_saving = tmp_path / "killed", 0
  for number in range(KILLS):
    run = start(workdir, *flags, cache=tmp_path / "cache")
    reached = max((row["step"] for row in read_metrics(workdir)), default=0) if number else 0
    goal = min(reached + int(rng.integers(1, 2 * (STEPS - 20) // KILLS - 1)), STEPS - 5)
    wait_for_step(workdir, goal, run, WAIT)
    time.sleep(float(rng.uniform(0, 0.05)))
    if number % 2:
      for _ in range(10_000):
        if unfinished(workdir) or run.poll() is not None:
          break
    while_saving += unfinished(workdir)
    assert run.poll() is None, f"ended before kill {number}: {run.communicate()[1]}"
    end([run])
    assert run.returncode == -signal.SIGKILL
  assert while_saving >= KILLS // 4
  last = start(workdir, *flags, cache=tmp_path / "cache")
  _, errors = last.communicate(timeout=WAIT)
  assert last.returncode == 0, errors
  assert "damaged" not in errors
  assert not unfinished(workdir)
  assert losses_on_disk(workdir) == losses_on_disk(tmp_path / "whole")
  states = [final_state(tmp_path / name, tiny_config("clip"), STEPS) for name in ("whole", "killed")]
  assert_equal(states[0][0], states[1][0])
  assert states[0][1] == states[1][1]


def test_a_data_set_that_cannot_be_evaluated_does_not_end_a_run_of_two_processes(tmp_path: Path) -> None:
  pairs = {"few": "heldout/8/24 | scenes:heldout/3/24", "more": "heldout/16/24 | scenes:heldout/64/24"}
  (tmp_path / "sets.txt").write_text("".join(f"own/{name} = scenes:{pair}\n" for name, pair in pairs.items()))
  fields = {"kind": "knn", "data": tmp_path / "sets.txt", "suite": "all"}
  flags = [f"--config.evals.near.{name}={value}" for name, value in fields.items()]
  steps = ["--config.duration.steps=4", "--config.evaluate_every.steps=2"]
  processes = pair(tmp_path / "run", port(), *flags, *steps, cache=tmp_path / "cache")
  try:
    errors = [process.communicate(timeout=WAIT)[1] for process in processes]
  finally:
    end(processes)
  assert [process.returncode for process in processes] == [0, 0], errors
  assert errors[0].count("without the metrics of config.evals.near/own/few: ") == 1
  assert "3 labelled rows; expected at least 10 neighbours" in errors[0]
  found = [{name for name in line if name.startswith("eval/")} for line in read_metrics(tmp_path / "run")]
  assert [names for names in found if names] == [{"eval/near/own/more"}] * 2


def test_sigterm_to_the_whole_group_saves_and_the_run_resumes_exactly(tmp_path: Path) -> None:
  flags = ["--config.duration.steps=60", "--config.checkpoint.every.steps=0", "--config.data.workers=2"]
  whole = start(tmp_path / "whole", *flags, cache=tmp_path / "cache")
  assert whole.wait(timeout=WAIT) == 0
  stopped = start(tmp_path / "stopped", *flags, cache=tmp_path / "cache")
  wait_for_step(tmp_path / "stopped", 7, stopped, WAIT)
  os.killpg(stopped.pid, signal.SIGTERM)
  _, errors = stopped.communicate(timeout=120)
  assert stopped.returncode == 0, errors
  assert "by SIGTERM" in errors
  (step,) = Checkpoints(tmp_path / "stopped").steps()
  assert step >= 7
  again = start(tmp_path / "stopped", *flags, cache=tmp_path / "cache")
  assert again.wait(timeout=WAIT) == 0
  states = [final_state(tmp_path / name, tiny_config("clip"), 60) for name in ("whole", "stopped")]
  assert_equal(states[0][0], states[1][0])
  assert losses_on_disk(tmp_path / "stopped") == losses_on_disk(tmp_path / "whole")


def test_a_run_without_its_display_continues_after_a_suspension_and_saves_at_sighup(tmp_path: Path) -> None:
  flags = ["--config.duration.steps=1000000", "--config.checkpoint.every.steps=0", "--config.safety.hang_timeout=20"]
  run = start(tmp_path, *flags, cache=tmp_path / "cache")
  try:
    wait_for_step(tmp_path, 3, run, WAIT)
    assert run.stderr is not None
    run.stderr.close()  # the reader of the log is gone
    run.stderr = None
    wait_for_step(tmp_path, max(row["step"] for row in read_metrics(tmp_path)) + 50, run, WAIT)
    run.send_signal(signal.SIGSTOP)
    time.sleep(30)  # more than the limit for a hang
    run.send_signal(signal.SIGCONT)
    wait_for_step(tmp_path, max(row["step"] for row in read_metrics(tmp_path)) + 50, run, WAIT)
    run.send_signal(signal.SIGHUP)
    assert run.wait(timeout=120) == 0
  finally:
    end([run])
  latest = Checkpoints(tmp_path).latest()
  assert latest == max(row["step"] for row in read_metrics(tmp_path)) > 100
  assert not list(tmp_path.glob("hang.*"))


def test_a_bit_flipped_in_the_newest_checkpoint_costs_the_steps_since_the_previous_one(tmp_path: Path) -> None:
  flags = ["--config.duration.steps=12"]
  first = start(tmp_path, *flags, cache=tmp_path / "cache")
  assert first.wait(timeout=WAIT) == 0
  losses = losses_on_disk(tmp_path)
  assert Checkpoints(tmp_path).steps() == [8, 12]
  flip(file := arrays(tmp_path / "checkpoints" / "12" / "training")[0])
  again = start(tmp_path, *flags, cache=tmp_path / "cache")
  _, errors = again.communicate(timeout=WAIT)
  assert again.returncode == 0, errors
  assert f"checkpoint 12 was skipped: {file} does not match its checksum" in errors
  assert "resuming from step 8" in errors
  assert losses_on_disk(tmp_path) == losses


@pytest.mark.parametrize(("signum", "victim"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_dead_or_frozen_peer_ends_all_within_the_bound(signum: int, victim: int, tmp_path: Path) -> None:
  flags = ["--config.duration.steps=1000000", "--heartbeat=10", "--config.safety.hang_timeout=60"]
  processes = pair(tmp_path, port(), *flags, cache=tmp_path / "cache")
  try:
    wait_for_step(tmp_path, 5, processes[1 - victim], WAIT)
    processes[victim].send_signal(signum)
    began = time.monotonic()
    _, errors = processes[1 - victim].communicate(timeout=90)
    assert processes[1 - victim].returncode not in (0, 2)
    print(f"signal {signum} to process {victim}: the other one ended after {time.monotonic() - began:.1f} s")
    assert "error" in errors.lower()
    if signum == signal.SIGSTOP:
      processes[victim].send_signal(signal.SIGCONT)
      processes[victim].communicate(timeout=90)
      assert processes[victim].returncode not in (0, 2)
  finally:
    end(processes)


def test_two_processes_stop_together_agree_on_the_damage_and_one_resumes_alone(tmp_path: Path) -> None:
  flags = ["--config.duration.steps=200", "--config.checkpoint.every.steps=10"]
  one = start(tmp_path / "one", *flags, cache=tmp_path / "cache")
  workdir, step, damaged = tmp_path / "two", 7, 0
  for damage in (True, False):
    processes = pair(workdir, port(), *flags, cache=tmp_path / "cache")
    try:
      wait_for_step(workdir, step + 5, processes[0], WAIT)
      processes[1].send_signal(signal.SIGTERM)  # one host is stopped, and all save
      output = [process.communicate(timeout=WAIT)[1] for process in processes]
      assert [process.returncode for process in processes] == [0, 0], output
    finally:
      end(processes)
    checkpoints = Checkpoints(workdir)
    before, step = checkpoints.steps()[-2:]
    assert checkpoints.check(step) == ("", True)
    assert {path.name for path in (workdir / "checkpoints" / str(step)).glob("checksums.*")} == {
      "checksums.0.json",
      "checksums.1.json",
    }
    if damage:
      damaged, whole = step, before
      flip(arrays(workdir / "checkpoints" / str(step) / "model" / "ocdbt.process_1")[0])
    else:
      assert f"checkpoint {damaged} was skipped: host " in output[0]
      assert f"resuming from step {whole}" in output[0]
  assert step < 200
  alone = start(workdir, *flags, cache=tmp_path / "cache")
  _, errors = alone.communicate(timeout=WAIT)
  assert alone.returncode == 0, errors
  assert one.wait(timeout=WAIT) == 0
  np.testing.assert_allclose(losses_on_disk(workdir), losses_on_disk(tmp_path / "one"), rtol=0, atol=1e-3)
