"""Tests of the package's structure: import layers, cycles, modules that may import JAX or configs, long functions."""

import ast
from collections.abc import Iterator
import graphlib
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).parents[1]

# The layer of each module, by its longest prefix. A module imports from its own layer or from a lower one.
LAYERS = {
  "declip_jax": 0,
  "declip_jax.types": 0,
  "declip_jax.views": 0,
  "declip_jax.unit_norm": 0,
  "declip_jax.architectures": 0,
  "declip_jax.batch_sizes": 0,
  "declip_jax.methods": 0,
  "declip_jax.spelling": 0,
  "declip_jax.extras": 0,
  "declip_jax.config": 0,
  "declip_jax.config_files": 0,
  "declip_jax.command_line": 0,
  "declip_jax.reporting.progress": 0,
  "declip_jax.models": 1,
  "declip_jax.objectives": 1,
  "declip_jax.data": 1,
  "declip_jax.sharding": 1,
  "declip_jax.training": 2,
  "declip_jax.weights": 2,
  "declip_jax.reporting": 2,
  "declip_jax.runtime": 2,
  "declip_jax.evals": 3,
  "declip_jax.ranges": 4,
  "declip_jax.stages": 4,
  "declip_jax.build": 4,
  "declip_jax.changes": 4,
  "declip_jax.planning": 5,
  "declip_jax.clip": 5,
  "declip_jax.first_state": 5,
  "declip_jax.mixtures": 5,
  "declip_jax.model_card": 5,
  "declip_jax.prepare": 5,
  "declip_jax.image_search": 5,
  "declip_jax.train": 6,
  "declip_jax.evaluate": 6,
  "declip_jax.report": 6,
  "declip_jax.export": 6,
  "declip_jax.new": 6,
  "declip_jax.plan": 6,
  "declip_jax.overlap": 6,
  "declip_jax.search": 6,
  "declip_jax.embed": 6,
  "declip_jax.data.convert": 6,
  "declip_jax.data.inspect": 6,
  "declip_jax.convert": 6,
  "declip_jax.inspect": 6,
  "declip_jax.__main__": 6,
}
FREE_OF_JAX = ("declip_jax.data", "declip_jax.reporting.progress", "declip_jax.command_line", "declip_jax.config_files")
READS_CONFIGS = 4  # this layer and those above may import ConfigDict, and so may these modules, which make configs:
MAKES_CONFIGS = ("declip_jax.config", "declip_jax.config_files", "declip_jax.command_line", "declip_jax.architectures")
LONGEST_FUNCTION = 80

# Known exceptions and their reasons.
UPWARD = {("declip_jax", "declip_jax.clip")}  # declip_jax.load, on demand
CONFIGS_BELOW: set[str] = set()
LONGER: set[tuple[str, str]] = set()


def _name(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
  _name(path): ast.parse(path.read_text())
  for path in sorted(ROOT.glob("declip_jax/**/*.py"))
  if "configs" not in path.relative_to(ROOT).parts
}


def _imports(tree: ast.AST) -> Iterator[str]:
  """The modules that a module imports, and the names that it imports from modules of other packages."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "relative imports hide layers"
      for alias in node.names:
        name = f"{node.module}.{alias.name}"
        yield name if name in MODULES or not node.module.startswith("declip_jax") else node.module


IMPORTS = {module: set(_imports(tree)) for module, tree in MODULES.items()}


def _ours(module: str) -> set[str]:
  return {name for name in IMPORTS[module] if name in MODULES}


def _layer(module: str) -> int:
  """The layer by the longest prefix; the entry "declip_jax" is for that module alone."""
  names = module.split(".")
  prefixes = [".".join(names[:end]) for end in range(len(names), 1, -1)] if len(names) > 1 else [module]
  return next(LAYERS[prefix] for prefix in prefixes if prefix in LAYERS)


def _below(module: str, prefixes: tuple[str, ...]) -> bool:
  return any(f"{module}.".startswith(f"{prefix}.") for prefix in prefixes)


def test_every_module_has_a_layer_and_every_layer_a_module() -> None:
  missing = [module for module in MODULES if not any(_below(module, (prefix,)) for prefix in [*LAYERS][1:])]
  assert missing == ["declip_jax"]
  assert [prefix for prefix in LAYERS if not any(_below(module, (prefix,)) for module in MODULES)] == []
  unknown = {name for names in IMPORTS.values() for name in names if name.startswith("declip_jax.")} - set(MODULES)
  assert {name for name in unknown if not name.startswith("declip_jax.configs")} == set()


def test_imports_are_from_the_same_layer_or_a_lower_one() -> None:
  upward = {(module, name) for module in MODULES for name in _ours(module) if _layer(name) > _layer(module)}
  assert upward == UPWARD


def test_there_are_no_circular_imports() -> None:
  graph = {module: {name for name in _ours(module) if (module, name) not in UPWARD} for module in MODULES}
  assert len([*graphlib.TopologicalSorter(graph).static_order()]) == len(MODULES)  # or raises CycleError with the cycle


def test_only_build_and_modules_that_make_configs_read_configs() -> None:
  readers = {module for module, names in IMPORTS.items() if any(name.startswith("ml_collections") for name in names)}
  below = {module for module in readers if _layer(module) < READS_CONFIGS and module not in MAKES_CONFIGS}
  assert below == CONFIGS_BELOW


def _configs(module: str, tree: ast.AST, makers: set[str]) -> Iterator[int]:
  """Lines that call a function that returns a config and do not convert it to dicts at once, by `.to_dict()`."""
  plain = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "to_dict"}
  names = {}  # in this module -> in full
  for node in ast.walk(tree):
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      prefix = "" if isinstance(node, ast.Import) else f"{node.module}."
      names |= {alias.asname or alias.name: f"{prefix}{alias.name}" for alias in node.names}
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      first, _, rest = ast.unparse(node.func).partition(".")
      name = f"{names.get(first, first)}.{rest}".removesuffix(".")
      if name in makers and id(node) not in plain:
        yield node.lineno


MAKERS = {
  f"{module}.{node.name}"
  for module in MAKES_CONFIGS
  for node in MODULES[module].body
  if isinstance(node, ast.FunctionDef) and node.returns and "ConfigDict" in ast.unparse(node.returns)
}


def test_below_build_configs_become_dicts_at_once() -> None:
  assert {"declip_jax.config.from_json", "declip_jax.config.default", "declip_jax.architectures.vit"} <= MAKERS
  below = [module for module in MODULES if _layer(module) < READS_CONFIGS and module not in MAKES_CONFIGS]
  assert [(module, line) for module in below for line in _configs(module, MODULES[module], MAKERS)] == []


@pytest.mark.parametrize(
  ("source", "lines"),
  [
    ("from declip_jax import config\nx = config.default()", [2]),
    ("from declip_jax import config as c\nx = c.default().model.to_dict()", [2]),
    ("from declip_jax.config import default\nx = default()", [2]),
    ("import declip_jax.config\nx = declip_jax.config.default()", [2]),
    ("from declip_jax import config\nx = config.default().to_dict()", []),
  ],
)
def test_configs_that_stay_configs_are_found(source: str, lines: list[int]) -> None:
  assert list(_configs("any", ast.parse(source), MAKERS)) == lines


def test_data_and_progress_do_not_import_jax() -> None:
  modules = [module for module in MODULES if _below(module, FREE_OF_JAX)]
  assert "declip_jax.data.pipeline" in modules
  # grain imports JAX if it is installed; a module that is None here cannot be imported.
  absent = "import sys; sys.modules.update(dict.fromkeys(('jax', 'jaxlib', 'flax', 'optax', 'orbax')))"
  command = [sys.executable, "-c", f"{absent}; import {', '.join(modules)}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert not done.returncode, done.stderr


def test_no_function_is_longer_than_80_lines() -> None:
  long = {
    (module, node.name)
    for module, tree in MODULES.items()
    for node in ast.walk(tree)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= LONGEST_FUNCTION
  }
  assert long == LONGER


@pytest.mark.parametrize(
  ("source", "names"),
  [
    ("from declip_jax import build", {"declip_jax.build"}),
    ("from declip_jax.build import build", {"declip_jax.build"}),
    ("def f():\n  import declip_jax.train", {"declip_jax.train"}),
    ("from ml_collections import ConfigDict", {"ml_collections.ConfigDict"}),
  ],
)
def test_imports_are_found(source: str, names: set[str]) -> None:
  assert set(_imports(ast.parse(source))) == names
