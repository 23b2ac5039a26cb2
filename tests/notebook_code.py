"""The code of the notebooks in colabs/, without IPython: `!` runs a shell, and what a cell shows is collected."""

import ast
from collections.abc import Iterator, Mapping
import json
import os
from pathlib import Path
import re
import shlex
import subprocess
import sys
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from runs import environment

COLABS = Path(__file__).parents[1] / "colabs"
_SHELL = re.compile(r"^( *)!(.*(?:(?<=\\)\n.*)*)$", re.MULTILINE)
_PNG = b"\x89PNG\r\n\x1a\n"


class Cell(NamedTuple):
  """A cell that has code.

  Attributes:
    place: notebook and cell, for messages.
    text: its text.
    tree: its code, in which `shell(...)` stands for each line that starts with `!`.
  """

  place: str
  text: str
  tree: ast.Module


def read(name: str) -> dict[str, Any]:
  """A notebook as JSON."""
  return json.loads((COLABS / f"{name}.ipynb").read_text())


def code_cells(name: str) -> Iterator[Cell]:
  """The cells of a notebook that have code.

  Raises:
    SyntaxError: one of them cannot be parsed.
  """
  for cell in read(name)["cells"]:
    if cell["cell_type"] == "code":
      text, place = "".join(cell["source"]), f"{name}, cell {cell['id']}"
      yield Cell(place, text, ast.parse(_SHELL.sub(r'\1shell(f"""\2""")', text), place))


def commands(name: str) -> Iterator[list[str]]:
  """The words of each command of the package in the cells, with a path in the place of what is not a constant."""
  constants: dict[str, str] = {}
  lines: list[str] = []
  for cell in code_cells(name):
    for node in cell.tree.body:
      if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
        constants[node.targets[0].id] = str(node.value.value)
    lines += [line for _, line in _SHELL.findall(cell.text)]
  texts = ["".join(cell["source"]) for cell in read(name)["cells"] if cell["cell_type"] == "markdown"]
  lines += [line for text in texts for line in text.splitlines() if line.startswith("python -m declip_jax.")]
  for line in lines:
    filled = re.sub(r"\{(.*?)\}", lambda found: constants.get(found[1], "runs/any"), line.replace("\\\n", " "))
    words = shlex.split(filled.split(" && ")[0])
    assert words[:2] == ["python", "-m"], (name, line)
    yield words[2:]


def run(name: str, constants: Mapping[str, Any], patch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[Any]]:
  """Runs a notebook from its first cell to its last in the present folder.

  Args:
    name: name of the notebook.
    constants: other values of names that the notebook assigns once each.
    patch: undoes at the end of the test what the cells do to the environment.

  Returns:
    the names that the notebook defines, and what it shows: names of files of pictures, and texts of pages.
  """
  import matplotlib.pyplot as plt

  shown: list[Any] = []
  for module in _ipython(shown):
    patch.setitem(sys.modules, module.__name__, module)
  patch.setenv("PATH", os.environ["PATH"])
  patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
  plt.close("all")
  names: dict[str, Any] = {"shell": shell}
  used = []
  for cell in code_cells(name):
    for node in cell.tree.body:
      if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in constants:
        used.append(node.targets[0].id)
        node.value = ast.parse(repr(constants[used[-1]]), mode="eval").body
    exec(compile(ast.fix_missing_locations(cell.tree), cell.place, "exec"), names)
  assert sorted(used) == sorted(constants)
  return names, shown


def shell(command: str) -> None:
  """Runs a command on one device, and prints its output.

  Raises:
    AssertionError: it fails.
  """
  done = subprocess.run(command, shell=True, env=environment(), capture_output=True, text=True, check=False)
  print(done.stdout)
  assert done.returncode == 0, (command, done.stderr)


def _ipython(shown: list[Any]) -> tuple[ModuleType, ModuleType]:
  """Substitutes for IPython and IPython.display."""
  top, module = ModuleType("IPython"), ModuleType("IPython.display")

  def image(*, filename: str) -> str:
    assert Path(filename).read_bytes().startswith(_PNG), filename
    return filename

  def page(text: str) -> str:
    shown.append(text)
    return text

  top.get_ipython, top.version_info = lambda: None, (9, 0)  # for pyplot
  module.Image, module.HTML, module.display = image, page, shown.append
  return top, module
