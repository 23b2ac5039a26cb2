"""Every method: the same losses, metrics, parameters and state on one device, on eight, in two processes, trimmed."""

import os
from pathlib import Path
import subprocess
import sys

import cpu_devices
import numpy as np
import pytest
import steps

from declip_jax import sharding
from declip_jax.methods import METHODS, SUPERVISED

# Also banks and batch norms in groups; and a tower with batch norms, and its momentum copy.
VARIANTS = [*METHODS, *SUPERVISED, "defilip_repo", "slip_mocov3 resnet", "everything siglip"]


@pytest.mark.slow
def test_eight_devices_with_two_micro_batches_and_split_parameters_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
  """All at once, as compiling a program for each would take long; slow tests have the cases one by one."""
  expected = steps.one_device("everything")
  monkeypatch.setattr(sharding, "MIN_SIZE", 256)  # so that the small arrays of this test are split at all
  steps.compare("everything", steps.take_steps("everything", 2, 4, micro_batches=2), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["everything", *VARIANTS])
def test_eight_devices_equal_one(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
  expected = steps.one_device(method)
  monkeypatch.setattr(sharding, "MIN_SIZE", 256)
  steps.compare(method, steps.take_steps(method, 2, 4), expected)


def test_everything_is_every_term() -> None:
  """Tests of "everything" on meshes and in micro-batches thus cover every term."""
  result = steps.one_device("everything")
  for term, field in steps.step_config("everything").objective.items():
    assert field.weight == 0 or result[f"share/{term}/0"] > 0
  assert len([name for name in result if name.startswith("share/") and name.endswith("/0")]) >= 11


def test_the_log_scales_stay_in_the_range_of_the_config() -> None:
  result = steps.one_device("everything")
  low, _ = steps.step_config("everything").optimizer.logit_scale_range
  for name in ("logit_scale", "dense_logit_scale"):
    assert steps.first_state("everything").params["heads"][name] < low
    assert low <= result[f"params/heads/{name}"] < low + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("method", ["everything", *VARIANTS])
def test_trimmed_texts_change_nothing(method: str) -> None:
  trimmed = {"model": {"text": {"buckets": (8, steps.LONGEST)}}}
  config = steps.step_config(method)
  config.update(trimmed)
  lengths = steps.build_steps(config).text_lengths
  if len(lengths) < 2:  # no texts, or padding counts
    assert method in {"simclr", "finetune", "filip_repo", "defilip_repo", "everything siglip"}, lengths
    pytest.skip("nothing is trimmed")
  assert lengths == (8, steps.LONGEST, 16)
  micro_batches = {"micro_batches": 2} if method == "everything" else {}
  steps.compare(method, steps.take_steps(method, 1, 1, **trimmed, **micro_batches), steps.one_device(method))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_equal_one(tmp_path: Path) -> None:
  flags = cpu_devices.xla_flags(1)
  command = [sys.executable, steps.__file__, str(tmp_path / "result.npz"), str(20000 + os.getpid() % 20000)]
  processes = [
    subprocess.Popen([*command, str(index), *VARIANTS], env=os.environ | {"XLA_FLAGS": flags}) for index in range(2)
  ]
  assert [process.wait(timeout=1800) for process in processes] == [0, 0]
  with np.load(tmp_path / "result.npz") as file:
    results = {name: file[name] for name in file.files}
  for method in VARIANTS:
    found = {name.split(":", 1)[1]: value for name, value in results.items() if name.startswith(f"{method}:")}
    steps.compare(method, found, steps.one_device(method))
