"""Runs in separate processes, and their results."""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

from cpu_devices import xla_flags
import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from declip_jax import build
from declip_jax.reporting.metrics import MetricWriter, read_metrics
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.training.state import State, abstract_state

TESTS = Path(__file__).parent


def command(config: str, workdir: Path, *overrides: str) -> list[str]:
  """Arguments of a training with a config of tests/tiny.py, such as "clip" or, without evaluations, "clip,bare"."""
  paths = ["--config", f"{TESTS / 'tiny.py'}:{config}", "--workdir", str(workdir)]
  return [sys.executable, "-m", "declip_jax.train", *paths, *overrides]


def environment(devices: int = 1) -> dict[str, str]:
  """Environment of a training run on this many CPU devices."""
  settings = {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
  return os.environ | settings | {"XLA_FLAGS": xla_flags(devices)}


def train_in_two_processes(config: str, workdir: Path, *overrides: str) -> None:
  """Trains in two processes of one device each."""
  port = 20000 + os.getpid() % 20000
  processes = [
    subprocess.Popen(
      command(config, workdir, *overrides, f"--coordinator=localhost:{port}", "--processes=2", f"--process={index}"),
      env=environment(),
    )
    for index in range(2)
  ]
  assert [process.wait(timeout=180) for process in processes] == [0, 0]


def losses_on_disk(workdir: Path) -> list[float]:
  """The losses in metrics.jsonl."""
  return [line["loss"] for line in read_metrics(workdir) if "loss" in line]


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen, seconds: float = 120) -> None:
  """Waits until metrics.jsonl has that step."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if (workdir / "metrics.jsonl").exists() and any(line["step"] >= step for line in read_metrics(workdir)):
      return
    assert process.poll() is None, f"ended with {process.returncode} before step {step}"
    time.sleep(0.05)
  raise AssertionError(f"no step {step} within {seconds:.0f} s")


def final_state(workdir: Path, config: ConfigDict, step: int) -> tuple[State, dict[str, Any]]:
  """The state of a run on one device, and its input position."""
  built = build.build(config, jax.devices()[:1])
  options = {"model": built.model, "optimizer": built.optimizer, "averaged": config.optimizer.ema > 0}
  abstract = abstract_state(built.batch_shape(config.batch_size), built.mesh, **options)
  checkpoints = Checkpoints(workdir)
  state, position = checkpoints.restore(step, abstract)
  checkpoints.close()
  return jax.tree.map(np.asarray, state), position


def assert_equal(a: Any, b: Any, **tolerance: float) -> None:
  """Compares trees leaf by leaf, bit for bit unless a tolerance is given."""
  for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
    np.testing.assert_allclose(x, y, **({"rtol": 0, "atol": 0} | tolerance), err_msg=jax.tree_util.keystr(path))


def zero_biases_without_effect(params: Any) -> Any:
  """Sets to zero the biases on which the loss does not depend.

  These are the biases of attention keys, since softmax removes them, the biases of linear layers before a batch norm,
  and the bias of SimSiam's projection, since its prediction starts with a linear layer and a batch norm. Their exact
  gradient is zero, and Adam turns its rounding noise into steps of full size.
  """

  def clear(path: tuple[Any, ...], leaf: np.ndarray) -> np.ndarray:
    names = [entry.key for entry in path]
    if names[-2:] == ["qkv", "bias"]:
      query, _, value = np.split(leaf, 3, axis=-1)
      return np.concatenate([query, np.zeros_like(query), value], axis=-1)
    head = params["heads"].get(names[1], {})
    normed = names[-1] == "bias" and names[-2].replace("linear", "norm") in head
    without_effect = (normed and names[-2].startswith("linear")) or names == ["heads", "projector", "norm2", "bias"]
    return np.zeros_like(leaf) if without_effect else leaf

  return jax.tree.map_with_path(clear, params)


class Killed(BaseException):
  """Simulates a signal that ends the process."""


@contextlib.contextmanager
def killed_before_line(step: int, time: int = 1) -> Iterator[None]:
  """Ends the training inside, which must reach it, when it is about to log a step for the `time`-th time."""
  seen, write = [], MetricWriter.write

  def write_or_die(self: MetricWriter, at: int, values: dict[str, float]) -> None:
    seen.append(at)
    if seen.count(step) == time:
      raise Killed
    write(self, at, values)

  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(MetricWriter, "write", write_or_die)
    with pytest.raises(Killed):
      yield
