"""The built wheel: its contents, and its commands in an empty folder without the checkout."""

from importlib import metadata
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import declip_jax
from declip_jax import config_files
from declip_jax.__main__ import COMMANDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("declip_jax", "configs", "setup.py", "pyproject.toml", "LICENSE")
TINY = (
  "duration.steps=2",
  "optimizer.warmup.steps=1",
  "batch_size=8",
  "evals.heldout.data=scenes:heldout/40/24",
  "evals.retrieval.data=scenes:test/20/24",
)


def run(command: list[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
  env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  return subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Builds the wheel from a copy, so that no file of an earlier build gets into it."""
  source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
  for name in BUILT_FROM:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(ROOT / name, source / name)
  # pyproject.toml requires setuptools 77; with an older one pip builds in an environment of its own, from the network.
  old = int(metadata.version("setuptools").split(".")[0]) < 77
  command = [sys.executable, "-m", "pip", "wheel", "--no-deps", *([] if old else ["--no-build-isolation"])]
  built = run([*command, "-w", output, source], source)
  assert built.returncode == 0, built.stderr
  (path,) = output.glob("*.whl")
  return path


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Installs the wheel next to the packages of this environment; returns the folder of its commands."""
  venv = tmp_path_factory.mktemp("venv")
  assert run([sys.executable, "-m", "venv", "--without-pip", venv], venv).returncode == 0
  (packages,) = venv.glob("lib/python*/site-packages")
  (packages / "environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
  python = venv / "bin/python"
  installed = run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel], venv)
  assert installed.returncode == 0, installed.stderr
  found = run([python, "-c", "import declip_jax; print(declip_jax.__file__)"], venv)
  assert Path(found.stdout.strip()).is_relative_to(packages), found
  return venv / "bin"


def test_the_wheel_has_code_configs_and_data(wheel: Path) -> None:
  names = zipfile.ZipFile(wheel).namelist()
  assert wheel.name.startswith(f"declip_jax-{declip_jax.__version__}-")
  expected = {f"declip_jax/configs/{name}.py" for name in config_files.names()}
  expected |= {f"declip_jax/{path.relative_to(ROOT / 'declip_jax')}" for path in (ROOT / "declip_jax").rglob("*.py")}
  data = ("py.typed", "data/text/synonyms.txt.gz", "image_search/page.html", "weights/merges.txt.gz")
  expected |= {f"declip_jax/{name}" for name in data}
  sets = [ROOT / "declip_jax/evals/suites.json", *(ROOT / "declip_jax/evals/data_sets").iterdir()]
  expected |= {f"declip_jax/{path.relative_to(ROOT / 'declip_jax')}" for path in sets}
  assert expected <= set(names)
  assert {name.split("/")[0] for name in names} == {"declip_jax", f"declip_jax-{declip_jax.__version__}.dist-info"}


def test_the_demo_trains_from_an_empty_folder(scripts: Path, tmp_path: Path) -> None:
  fields = [f"--config.{field}" for field in TINY]
  done = run([scripts / "declip-train", "--config=demo:method=clip", "--workdir=run", *fields], tmp_path)
  assert done.returncode == 0, done.stderr
  last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
  assert last["step"] == 2
  assert "eval/heldout/top1" in last


def test_a_published_result_is_found_from_an_empty_folder(scripts: Path, tmp_path: Path) -> None:
  done = run([scripts / "declip-train", "--config=slip/slip_base_25ep", "--print_config"], tmp_path)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)["duration"]["epochs"] == 25
  done = run([scripts / "declip-train", "--config=slip/slip_base_25ep", "--workdir=run"], tmp_path)
  assert (done.returncode, done.stdout) == (2, "")
  assert "data/yfcc15m/*.tar" in done.stderr  # its own default
  assert done.stderr.count("\n") == 1
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_installed_and_shows_an_example(name: str, scripts: Path, tmp_path: Path) -> None:
  done = run([scripts / f"declip-{name}", "--help"], tmp_path)
  assert done.returncode == 0, done.stderr
  assert f"python -m {COMMANDS[name][0]}" in done.stdout
  assert "--helpfull" in done.stdout
  assert len(done.stdout.splitlines()) < 100  # without the flags of libraries


def test_the_package_lists_commands_and_configs(scripts: Path, tmp_path: Path) -> None:
  done = run([scripts / "python", "-m", "declip_jax"], tmp_path)
  assert done.returncode == 0, done.stderr
  assert {*config_files.names(), *(f"declip-{name}" for name in COMMANDS)} <= set(done.stdout.split())
