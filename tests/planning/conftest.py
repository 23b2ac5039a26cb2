"""One compiled step, and the report on it, for all tests of planning."""

import jax
from ml_collections import ConfigDict
import pytest
from tiny import tiny_config

from declip_jax import sharding
from declip_jax.planning import compile as compilation
from declip_jax.planning import devices
from declip_jax.planning.report import Report, make_report

# Made-up figures of a CPU, so that its report has times.
CHIP = devices.Device(1e12, 2**30, 1e11, 2, 5e9, None, 4)


@pytest.fixture(scope="session")
def config() -> ConfigDict:
  """CLIP on two fsdp devices."""
  config = tiny_config("clip")
  config.mesh.fsdp = 2
  return config


@pytest.fixture(scope="session")
def step(config: ConfigDict) -> compilation.CompiledStep:
  """Its compiled step, in which small arrays are sharded too."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "MIN_SIZE", 256)
    return compilation.compile_step(config, jax.devices()[:2])


@pytest.fixture(scope="session")
def report(config: ConfigDict, step: compilation.CompiledStep) -> Report:
  """The report on it, for two devices with the figures of `CHIP`."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(compilation, "compile_step", lambda *_: step)
    patch.setitem(devices.DEVICES, "cpu", CHIP)
    return make_report(config, jax.devices()[:2], search=False)
