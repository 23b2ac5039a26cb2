"""Tests of `python -m declip_jax.evaluate` on a run: suites, results that are there already, checkpoints, processes."""

from collections.abc import Callable
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from runs import environment
from tiny import FinishedRun

from declip_jax import clip as clip_lib
from declip_jax.evals import data_files, results, suites
from declip_jax.evals.feature_cache import BLOCK
from declip_jax.evaluate import evaluate
from declip_jax.planning import training_facts
from declip_jax.sharding import make_mesh

SETS = """
own/scenes = scenes:heldout/40/24 | scenes:heldout/400/24
own/others = scenes:heldout/30/20
"""
TASKS = ["zero_shot", "knn", "nearest_mean"]


def make_jobs(tasks: list[str] = TASKS) -> list:
  jobs, remarks = suites.make_jobs(data_files.parse_data(SETS, "sets.txt"), tasks=tasks)
  assert remarks == [
    f"own/others: {task} needs a split to train on: add | TRAIN to its line in the data file" for task in tasks[1:]
  ]
  return jobs


@pytest.fixture(autouse=True)
def flops(monkeypatch: pytest.MonkeyPatch) -> None:
  """Tracing a train step takes seconds, and `planning/flops_test.py` does it."""
  monkeypatch.setattr(training_facts, "_step_flops", lambda config, size: 10.0 * size)


@pytest.fixture(scope="module")
def run(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("evaluate") / "tiny"
  shutil.copytree(finished_run.workdir, folder)
  return folder


def on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(clip_lib, "make_mesh", lambda *_: make_mesh(1, 1, jax.devices()[:1]))


@pytest.mark.slow
def test_tasks_of_a_data_file_are_evaluated_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  first = evaluate(run, jobs=make_jobs(), output=tmp_path / "a", cache=tmp_path / "cache")
  names = {"own/scenes/zero_shot", "own/scenes/knn", "own/scenes/nearest_mean", "own/others/zero_shot"}
  assert {name.removeprefix("eval/").rpartition("/")[0] for name in first} - {""} == names
  training = results.read(next((tmp_path / "a").glob("*.json"))).ours["training"]
  assert training["method"] == "declip"
  assert training["flops"] == 10 * training["pairs_seen"] > 0
  assert evaluate(run, jobs=make_jobs(), output=tmp_path / "a", cache=tmp_path / "cache") == pytest.approx(first)
  assert len((tmp_path / "a" / results.LOG).read_text().splitlines()) == len(names)  # nothing was computed again
  on_one_device(monkeypatch)  # neither the number of devices, the batch size nor the cache matter
  evaluate(run, jobs=make_jobs(), output=tmp_path / "b", batch_size=24)
  assert_same_results(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_devices_do_not_change_results(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  evaluate(run, jobs=make_jobs(), output=tmp_path / "eight")
  on_one_device(monkeypatch)
  evaluate(run, jobs=make_jobs(), output=tmp_path / "one")
  assert_same_results(tmp_path / "eight", tmp_path / "one")


def assert_same_results(first: Path, second: Path) -> None:
  """Predictions are equal, and metrics to float64 rounding."""
  paths = sorted(first.glob("*.json"))
  assert [path.name for path in paths] == sorted(path.name for path in second.glob("*.json"))
  assert paths
  for path in paths:
    other = second / path.name
    ours, theirs = (results.read(found).ours["metrics"] for found in (path, other))
    assert ours == pytest.approx(theirs, abs=1e-9)
    with np.load(results.predictions_path(path)) as a, np.load(results.predictions_path(other)) as b:
      for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)


def command(*arguments: str) -> list[str]:
  return [sys.executable, "-m", "declip_jax.evaluate", *arguments]


@pytest.mark.slow
def test_two_processes_write_the_results_of_one(run: Path, tmp_path: Path) -> None:
  (tmp_path / "sets.txt").write_text(SETS)
  flags = ["--workdir", str(run), "--data", str(tmp_path / "sets.txt"), "--tasks", ",".join([*TASKS, "linear_probe"])]
  subprocess.run(
    command(*flags, "--output", str(tmp_path / "one"), "--cache", str(tmp_path / "cache1")),
    check=True,
    env=environment(),
  )
  port = 20000 + os.getpid() % 20000
  flags += ["--output", str(tmp_path / "two"), "--cache", str(tmp_path / "cache2")]
  processes = [
    subprocess.Popen(
      command(*flags, f"--coordinator=localhost:{port}", "--processes=2", f"--process={index}"), env=environment()
    )
    for index in range(2)
  ]
  assert [process.wait(timeout=300) for process in processes] == [0, 0]
  assert_same_results(tmp_path / "one", tmp_path / "two")
  assert len([*(tmp_path / "cache2").glob("*/host-*-of-00002.npy")]) == 6


def kill_once(is_there: Callable[[], bool], process: subprocess.Popen, seconds: float = 300) -> None:
  """Kills a process, which must still run, as soon as something is there."""
  deadline = time.monotonic() + seconds
  while not is_there():
    assert process.poll() is None, f"ended with {process.returncode} before it was killed"
    assert time.monotonic() < deadline
    time.sleep(0.002)
  process.kill()
  assert process.wait() == -signal.SIGKILL


def contents(folder: Path) -> dict[str, bytes]:
  """The files of a folder, without the log of times."""
  paths = (path for path in folder.rglob("*") if path.is_file() and path.name != results.LOG)
  return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_an_evaluation_that_is_killed_twice_ends_with_the_same_files(run: Path, tmp_path: Path) -> None:
  images = 2 * BLOCK + 100  # in three blocks
  (tmp_path / "sets.txt").write_text(f"{SETS}own/many = scenes:heldout/{images}/16\n")
  flags = ["--workdir", str(run), "--data", str(tmp_path / "sets.txt"), "--tasks", ",".join(TASKS)]

  def start(name: str) -> subprocess.Popen:
    folders = ["--output", str(tmp_path / name / "results"), "--cache", str(tmp_path / name / "cache")]
    return subprocess.Popen(command(*flags, *folders), env=environment())

  assert start("whole").wait(timeout=600) == 0
  killed = tmp_path / "killed"
  kill_once(lambda: bool([*killed.glob("results/*.json")]), start("killed"))
  assert len([*killed.glob("results/*.json")]) < 5
  kill_once(lambda: 0 < blocks(killed, images) < 3, start("killed"))
  assert 0 < blocks(killed, images) < 3
  assert start("killed").wait(timeout=600) == 0
  found, expected = contents(killed), contents(tmp_path / "whole")
  assert len([name for name in expected if name.endswith(".json")]) >= 5
  assert found.keys() == expected.keys()
  assert [name for name in expected if found[name] != expected[name]] == []


def blocks(folder: Path, samples: int) -> int:
  """The number of blocks of features in the cache, of the source with this number of samples."""
  entries = (path.parent for path in folder.glob("cache/*/about.json"))
  own = (entry for entry in entries if json.loads((entry / "about.json").read_text()).get("samples") == samples)
  return sum(len([*entry.glob("*.rows/*.npz")]) for entry in own)


@pytest.mark.slow
def test_the_command_lists_plans_and_names_what_is_wrong(run: Path, tmp_path: Path) -> None:
  def output(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr

  assert "slip26" in output("--list")
  assert "food101" in output("--list", "--suite=slip26")
  assert "pets" in output("--print_data=clip_benchmark", "--suite=slip26")
  (tmp_path / "sets.txt").write_text(SETS)
  plan = output("--workdir", str(run), "--data", str(tmp_path / "sets.txt"), "--dry_run", "--cache=off")
  assert "4 of 4 results to compute, 70 images to encode" in plan
  assert not (run / "results").exists()
  assert "--workdir is required" in output("--data", "x", code=2)
  assert "needs --data" in output("--workdir", str(run), "--suite=slip26", code=2)
  every = ["--every_checkpoint", "--zero_shot=scenes:heldout/20/24"]
  output("--workdir", str(run), *every, "--cache=off")
  names = sorted(path.name for path in (run / "results").glob("*.json"))
  assert [name.partition("_step-")[2] for name in names] == [
    f"{step}_tiny_en_zeroshot_classification.json" for step in (6, 8)
  ]
  assert all(name.startswith("scenes-heldout_20_24-") for name in names)
