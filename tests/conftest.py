"""Eight CPU devices, so that sharding is tested everywhere; full-precision products; slow tests in order of value."""

import fcntl
import json
import os
from pathlib import Path
import time
from typing import TYPE_CHECKING

import contracts
from cpu_devices import xla_flags
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # make test-device sets it to ""
# The workers of pytest-xdist inherit the flags, which are a part of the key under which programs are cached.
if os.environ["JAX_PLATFORMS"] == "cpu" and xla_flags(8) not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}".strip()

# Programs of any size are kept, since the tests compile thousands of small ones. The cache outlives a checkout.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/declip_jax/compiled_tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax

if TYPE_CHECKING:
  from tiny import FinishedRun

jax.config.update("jax_default_matmul_precision", "highest")

# Annotations are checked, implicit broadcasting and warnings are errors; CONTRACTS=0 turns this off, see `contracts`.
if contracts.WANTED:
  jax.config.update("jax_numpy_rank_promotion", "raise")
  contracts.check_calls()

TESTS, START = Path(__file__).parent, time.monotonic()
# The slow tests run in this order, files or FILE::TEST, and others last: CI stops when its time is up.
SLOW_FIRST = (
  "train_test.py::test_a_killed_run_resumes_bit_exact",
  "methods_test.py::test_eight_devices_with_two_micro_batches_and_split_parameters_equal_one",
  "evaluate_command_test.py::test_tasks_of_a_data_file_are_evaluated_once",
  "evaluate_command_test.py::test_devices_do_not_change_results",
  "train_test.py::test_training_learns",
  "old_runs_test.py",
  "train_test.py",
  "training/gradient_test.py",
  "methods_test.py",
  "runtime/checkpoint_test.py",
  "extensions_test.py",
  "wheel_test.py",
  "configs_test.py",
  "faults_test.py",
  "objectives/contrast_methods_test.py",
  "colabs_test.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
  text = "skip the tests that have not begun this many seconds after the start"
  parser.addoption("--stop-after", type=float, default=None, metavar="SECONDS", help=text)
  text = "files that the tests of mutated models read, together"
  parser.addoption("--mutations", type=int, default=600, metavar="COUNT", help=text)
  parser.addoption("--extended", action="store_true", help="add the toys of toy_extension.py to the package")


def pytest_configure(config: pytest.Config) -> None:
  for line in contracts.WARNINGS if contracts.WANTED else ():
    config.addinivalue_line("filterwarnings", line)
  if config.getoption("extended"):
    import toy_extension

    toy_extension.install()


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
  """Moves the slow tests after the fast ones, in order of their value."""

  def rank(item: pytest.Function) -> int:
    if item.get_closest_marker("slow") is None:
      return -1
    file = item.path.relative_to(TESTS).as_posix()
    names = (f"{file}::{item.originalname}", file)
    return min([SLOW_FIRST.index(name) for name in names if name in SLOW_FIRST], default=len(SLOW_FIRST))

  items.sort(key=rank)


def pytest_runtest_setup(item: pytest.Item) -> None:
  limit = item.config.getoption("stop_after")
  if limit is not None and time.monotonic() - START > limit:
    pytest.skip(f"--stop-after={limit:g}: out of time")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> "FinishedRun":
  """A finished run of a tiny DeCLIP on one device; one for all tests in all processes of pytest-xdist."""
  from tiny import FinishedRun, tiny_config, train_tiny_declip

  from declip_jax import build, sharding

  folder = tmp_path_factory.getbasetemp()
  folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
  workdir, metrics = folder / "finished", folder / "finished.json"
  with (folder / "finished.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not metrics.exists():  # for several devices, orbax compiles a program for each array that it saves
      patch.setattr(build, "make_mesh", lambda **_: sharding.make_mesh(1, 1, jax.devices()[:1]))
      metrics.write_text(json.dumps(train_tiny_declip(workdir).final))
  return FinishedRun(workdir, tiny_config("declip"), json.loads(metrics.read_text()))
