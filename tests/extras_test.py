"""Tests of the core without extras: what works without their packages, and how errors name what is missing."""

import ast
from importlib import metadata
from pathlib import Path
import re
import sys
from typing import Any

from greys import grey_encoders
import numpy as np
from packaging.requirements import Requirement
from PIL import Image
import pytest
from structure_test import MODULES
from tiny import tiny_config

from declip_jax import extras
from declip_jax.data.images import EvalView
from declip_jax.data.pipeline import EvaluationBatches
from declip_jax.data.readers import evaluation_reader_counts
from declip_jax.data.sources import open_source
from declip_jax.evals.comparison import read_methods
from declip_jax.evals.evaluation import Evaluation, ModelFacts
from declip_jax.evals.jobs import DataSource, Job
from declip_jax.evals.report.compared import Report
from declip_jax.extras import EXTRAS
from declip_jax.report import write_report
from declip_jax.train import train

ROOT = Path(__file__).parents[1]
# Distributions that install a package under another name, or that only their own dependencies name.
OTHER_NAMES = {"libtpu": "jax", "mlflow": "mlflow-skinny"}
# Modules that import packages of extras by themselves, where an error already names the extra.
OWN_WAYS = {("declip_jax.reporting.trackers.libraries", name) for name in ("wandb", "mlflow", "trackio")}
OWN_WAYS |= {("declip_jax.data.storage.remote", "aiohttp")}


def called(tree: ast.AST, name: str) -> ast.Call:
  return next(
    node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == name
  )


def normal(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> dict[str, set[str]]:
  """The distributions that each extra of setup.py requires, and under "" those of the core."""
  arguments = {item.arg: item.value for item in called(ast.parse((ROOT / "setup.py").read_text()), "setup").keywords}
  found = {"": ast.literal_eval(arguments["install_requires"]), **ast.literal_eval(arguments["extras_require"])}
  return {extra: {normal(Requirement(text).name) for text in texts} for extra, texts in found.items()}


def imported(module: str) -> set[str]:
  """The packages that a module of ours imports, anywhere in it."""
  names = set()
  for node in ast.walk(MODULES[module]):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names.add(node.module)
  return {name.partition(".")[0] for name in names} - {"declip_jax"} - set(sys.stdlib_module_names)


def test_the_core_requires_all_that_modules_import_and_nothing_of_the_extras() -> None:
  required = requirements()
  assert {OTHER_NAMES.get(package, normal(package)) for package in EXTRAS} & required[""] == {"jax"}
  for package, extra in EXTRAS.items():
    assert OTHER_NAMES.get(package, normal(package)) in required[extra], package
  assert {"declip-jax"} <= required["dev"]
  distributions = metadata.packages_distributions()
  for module in set(MODULES) - {"declip_jax.extras"}:
    for package in imported(module):
      if package in EXTRAS:
        assert (module, package) in OWN_WAYS
      else:
        assert required[""] & {normal(name) for name in distributions[package]}, (module, package)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> None:
  """No package of an extra can be imported."""
  for name in [*sys.modules]:
    if name.partition(".")[0] in EXTRAS:
      monkeypatch.setitem(sys.modules, name, None)
  for package in EXTRAS:
    monkeypatch.setitem(sys.modules, package, None)


def pictures(folder: Path) -> None:
  for number in range(6):
    (folder / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
    grey = np.full((20, 20, 3), 40 * number, np.uint8)
    Image.fromarray(grey).save(folder / f"class{number % 2}" / f"{number}.png")


@pytest.mark.usefixtures("core")
def test_folders_and_tables_are_read_evaluated_and_reported(tmp_path: Path) -> None:
  pictures(tmp_path / "photos")
  (tmp_path / "pairs.csv").write_text("image,caption\nphotos/class0/2.png,two\nphotos/class1/5.png,five\n")
  greys = {}
  for spec in (f"folder:{tmp_path}/photos", f"table:{tmp_path}/pairs.csv"):
    source = open_source(spec)
    (batch,) = EvaluationBatches(source, range(len(source)), 8, 1, EvalView(16))
    greys[spec] = batch["image"][batch["readable"], 8, 8, 0].tolist()
  assert [*greys.values()] == [[0, 80, 160, 40, 120, 200], [80, 200]]
  assert evaluation_reader_counts(10**6, 4, 2, 16)[0] == 0
  photos = DataSource(open_source(f"folder:{tmp_path}/photos"))
  facts = ModelFacts("grey", "step-8", {"path": "runs/grey", "origin": "us", "step": 8, "hash": "h"}, {}, "float32")
  evaluation = Evaluation(facts, grey_encoders(4), tmp_path / "results", None, run_folder=tmp_path / "run")
  found = evaluation.run([Job("photos", "own/photos", "nearest_mean", {"test": photos, "train": photos})])
  assert found["photos"].ours["metrics"]["top1"] == 0.5  # of unit norm, a grey is like any other
  (method,) = read_methods([tmp_path / "results"])
  write_report(Report([method]), tmp_path / "report", latex=False)
  assert "50.0" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
  ("spec", "package"),
  [
    ("table:{}/t.parquet", "pyarrow"),
    ("arrayrecord:{}/t.array_record", "array_record"),
    ("tfds:cifar10:train", "tensorflow_datasets"),
    ("huggingface:{}", "datasets"),
  ],
)
@pytest.mark.usefixtures("core")
def test_a_source_says_which_extra_reads_it_and_where_the_spec_is(spec: str, package: str, tmp_path: Path) -> None:
  (tmp_path / "t.parquet").write_bytes(b"PAR1" + bytes(60))
  (tmp_path / "t.array_record").write_bytes(bytes(2**16))
  command = re.escape(extras.install_command(EXTRAS[package]))
  with pytest.raises(ModuleNotFoundError, match=f"^config.data.train: {package} is not installed: {command}$"):
    open_source(spec.format(tmp_path), "config.data.train")


@pytest.mark.usefixtures("core")
def test_training_says_at_once_that_its_extra_is_missing(tmp_path: Path) -> None:
  with pytest.raises(ModuleNotFoundError, match=f"grain .*{re.escape(extras.install_command('train'))}$"):
    train(tiny_config("clip", train=("folder:/missing",)), tmp_path / "run")
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
  ("files", "folder", "expected"),
  [
    (["setup.py"], "a checkout", "pip install -e '{}/a checkout[train]'"),
    (["setup.py"], "checkout", "pip install -e '{}/checkout[train]'"),
    ([], "site-packages", "pip install 'declip_jax[train]'"),
  ],
)
def test_the_command_depends_on_how_the_package_was_installed(
  files: list[str], folder: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  (tmp_path / folder).mkdir()
  for name in files:
    (tmp_path / folder / name).touch()
  monkeypatch.setattr(extras, "__file__", str(tmp_path / folder / "declip_jax" / "extras.py"))
  assert extras.install_command("train") == expected.format(tmp_path)


def test_a_package_that_a_package_lacks_is_not_taken_for_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
  with pytest.raises(ModuleNotFoundError, match="array_record is not installed: "):
    extras.import_package("array_record.python.array_record_module")

  def broken(name: str) -> Any:
    raise ModuleNotFoundError("No module named 'etils'", name="etils")

  monkeypatch.setattr("importlib.import_module", broken)
  with pytest.raises(ModuleNotFoundError, match="^No module named 'etils'$"):
    extras.import_package("grain")
