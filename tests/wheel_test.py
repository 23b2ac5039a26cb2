"""The built wheel: its contents, and its commands in an empty folder, without the checkout and with few packages."""

from collections.abc import Iterator
import email
from importlib import metadata
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import zipfile

from clips import make_clip
import jax
import numpy as np
from packaging.requirements import Requirement
from PIL import Image
import pytest

import declip_jax
from declip_jax import config_files
from declip_jax.__main__ import COMMANDS
from declip_jax.extras import EXTRAS
from declip_jax.weights.read import Weights, read
from declip_jax.weights.write import write

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("declip_jax", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
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


def required(wheel: Path, extra: str) -> Iterator[metadata.Distribution]:
  """Yields what the wheel requires with an extra, "" for none, and all that this requires, as it is installed here."""
  (about,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
  own = email.message_from_bytes(zipfile.ZipFile(wheel).read(about)).get_all("Requires-Dist")
  left, seen = [(Requirement(line), extra) for line in own], set()
  while left:
    requirement, extra = left.pop()
    if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
      continue
    for extra in ("", *requirement.extras):
      if (requirement.name, extra) not in seen:
        seen.add((requirement.name, extra))
        distribution = metadata.distribution(requirement.name)
        left += [(Requirement(line), extra) for line in distribution.requires or ()]
        yield distribution


def environment(wheel: Path, extra: str, venv: Path) -> Path:
  """Makes an environment with the wheel, an extra and nothing else; returns the folder of its commands.

  What the wheel requires is linked from this environment, so neither a network nor minutes are needed.
  """
  assert run([sys.executable, "-m", "venv", "--without-pip", venv], venv).returncode == 0
  (packages,) = venv.glob("lib/python*/site-packages")
  for distribution in required(wheel, extra):
    for file in distribution.files or ():
      if ".." not in file.parts and not (packages / file).exists():  # not the commands of others
        (packages / file).parent.mkdir(parents=True, exist_ok=True)
        (packages / file).symlink_to(distribution.locate_file(file))
  pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python"]
  for command in (["install", "--no-deps", wheel], ["check"]):
    done = run([*pip, *command], venv)
    assert done.returncode == 0, done.stdout + done.stderr
  found = run([venv / "bin/python", "-c", "import declip_jax; print(declip_jax.__file__)"], venv)
  assert Path(found.stdout.strip()).is_relative_to(packages), found
  return venv / "bin"


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The commands of an environment without extras."""
  return environment(wheel, "", tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The commands of an environment with what training needs."""
  return environment(wheel, "train", tmp_path_factory.mktemp("train"))


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


def succeed(command: list[str | Path], cwd: Path) -> str:
  done = run(command, cwd)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A folder with weights and a folder of two pictures."""
  root, tiny = tmp_path_factory.mktemp("files"), make_clip(0)
  write(Weights("tiny", tiny.fields, ("joint",), jax.device_get(tiny.params), {}, tiny.view), root / "w", "open_clip")
  for name, grey in (("dark", 40), ("bright", 200)):
    (root / "photos" / name).mkdir(parents=True)
    Image.fromarray(np.full((20, 30, 3), grey, np.uint8)).save(root / f"photos/{name}/0.png")
  return root


def test_a_core_without_extras_loads_and_encodes(core: Path, folder: Path) -> None:
  photos, texts = ["photos/dark/0.png", "photos/bright/0.png"], ["dark", "bright"]
  code = f"""
import importlib.util, declip_jax
assert not [name for name in {[*EXTRAS]} if importlib.util.find_spec(name)]
clip = declip_jax.load("w")
print((clip.encode_image({photos}) @ clip.encode_text({texts}).T).tolist())"""
  clip = declip_jax.load(folder / "w")
  expected = clip.encode_image([folder / photo for photo in photos]) @ clip.encode_text(texts).T
  found = json.loads(succeed([core / "python", "-c", code], folder))
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_core_without_extras_evaluates_and_reports(core: Path, folder: Path) -> None:
  (folder / "sets.txt").write_text("own/photos = folder:photos | folder:photos\n")
  flags = ("--weights=w", "--output=results", "--data=sets.txt", "--tasks=zero_shot,nearest_mean", "--cache=cache")
  succeed([core / "declip-evaluate", *flags], folder)
  found = [json.loads(path.read_text())["declip_jax"] for path in (folder / "results").glob("*.json")]
  assert {result["kind"]: result["metrics"]["images"] for result in found} == {"zero_shot": 2, "nearest_mean": 2}
  succeed([core / "declip-report", "results", "--output=report"], folder)
  assert "own/photos" in (folder / "report/report.md").read_text()


def test_a_core_without_extras_exports_and_inspects(core: Path, folder: Path) -> None:
  succeed([core / "declip-export", "--workdir=w", "--format=orbax", "--output=orbax"], folder)
  original, exported = read(folder / "w").params, read(folder / "orbax").params
  jax.tree.map(np.testing.assert_array_equal, exported, original)
  assert "2 names: bright, dark" in succeed([core / "declip-inspect", "photos"], folder)


def test_what_needs_an_extra_says_so_in_one_line(core: Path, tmp_path: Path) -> None:
  for command in (
    ("declip-train", "--config=demo", "--workdir=run"),
    ("declip-convert", "scenes:train/20/24", "output"),
    ("declip-inspect", "tfds:cifar10:train"),
  ):
    done = run([core / command[0], *command[1:]], tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(r"error: .*is not installed: pip install 'declip_jax\[train\]'\n", done.stderr), done.stderr
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_installed_and_shows_an_example(name: str, core: Path, tmp_path: Path) -> None:
  done = run([core / f"declip-{name}", "--help"], tmp_path)
  assert done.returncode == 0, done.stderr
  assert f"python -m {COMMANDS[name][0]}" in done.stdout
  assert "--helpfull" in done.stdout
  assert len(done.stdout.splitlines()) < 100  # without the flags of libraries


def test_the_package_lists_commands_and_configs(core: Path, tmp_path: Path) -> None:
  done = run([core / "python", "-m", "declip_jax"], tmp_path)
  assert done.returncode == 0, done.stderr
  assert {*config_files.names(), *(f"declip-{name}" for name in COMMANDS)} <= set(done.stdout.split())
