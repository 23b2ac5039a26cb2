"""Every method: the same losses, metrics, parameters and state on one device, on eight, and in two processes."""

import functools
import os
from pathlib import Path
import subprocess
import sys

import cpu_devices
import numpy as np
import pytest
import steps

from declip_jax import sharding
from declip_jax.methods import METHODS

# Also banks and batch norms of parts of the batch; and a tower with batch norms, and its momentum copy.
VARIANTS = [*METHODS, "defilip_repo", "slip_mocov3 resnet"]
one_device = functools.cache(functools.partial(steps.take_steps, data=1, fsdp=1))


@pytest.mark.parametrize("method", VARIANTS)
def test_eight_devices_equal_one(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
  expected = one_device(method)
  monkeypatch.setattr(sharding, "MIN_SIZE", 256)  # so that the small arrays of this test are split at all
  steps.compare(method, steps.take_steps(method, 2, 4), expected)


def test_the_log_scales_stay_in_their_window_even_where_they_are_frozen() -> None:
  optimizer = {"logit_scale_range": (3.0, 6.0), "frozen": ("heads/logit_scale",)}
  within, free = steps.take_steps("filip", 1, 1, optimizer=optimizer), one_device("filip")
  for name in ("logit_scale", "dense_logit_scale"):
    assert free[f"params/heads/{name}"] < 2.7
    assert within[f"params/heads/{name}"] == 3
  below = steps.take_steps("filip", 1, 1, optimizer={"logit_scale_range": (0.0, 2.0)})
  assert max(below["params/heads/logit_scale"], below["params/heads/dense_logit_scale"]) == 2


@pytest.mark.slow
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
    steps.compare(method, found, one_device(method))
