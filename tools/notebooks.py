"""Writes what several files repeat: python tools/notebooks.py

Notebooks of colabs/ have cells in common: the badge, which opens the notebook in Colab, and the installation. The
address of the repository is `declip_jax.ADDRESS`. Links of a notebook to files of the repository start with it, since
relative ones lead nowhere on Colab; this command changes them, and the address in CITATION.cff, too.
"""

import json
from pathlib import Path
import re
from typing import Any

ROOT = Path(__file__).parents[1]
COLABS = ROOT / "colabs"
# In the order in which a reader meets them.
NAMES = ("demo", "own_captions", "finetune_pairs", "methods", "data_efficiency", "evaluate", "released_weights")
NAMES += ("plan_pod",)
_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
_CITATION = ROOT / "CITATION.cff"
_ADDRESS = r"https://github\.com/[\w.-]+/declip_jax"
_INSTALL_TEXT = """\
## Install

On Colab, the next cell installs the package and what it needs for the chosen runtime, in a minute or two. If Colab \
asks to restart the session, do so, and run the cell again. Where the package is installed, as in a checkout after \
`make demo`, the cell installs nothing.
"""
_INSTALL = """\
import importlib.util
import os
from pathlib import Path
import subprocess
import sys
import warnings

REPOSITORY = "ADDRESS"

if importlib.util.find_spec("declip_jax") is None:
  extras = ["train"]
  if Path("/dev/nvidia0").exists():
    extras.append("gpu")
  if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists():
    extras.append("tpu")
  extras = ",".join(extras)
  package = f"..[{extras}]" if Path("../setup.py").exists() else f"declip_jax[{extras}] @ git+{REPOSITORY}"
  subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)
  importlib.invalidate_caches()
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `!python` is this Python
warnings.filterwarnings("ignore", message="os.fork")  # of JAX, at each `!`
"""


def repository() -> str:
  """The address of the repository."""
  return re.search(r'^ADDRESS = "(\S+)"', (ROOT / "declip_jax/__init__.py").read_text(), re.MULTILINE)[1]


def shared_cells(name: str) -> dict[str, str]:
  """The text of each cell that all notebooks have in common, by its id; the badge has the name of the notebook."""
  path = repository().removeprefix("https://github.com")
  link = f"https://colab.research.google.com/github{path}/blob/main/colabs/{name}.ipynb"
  return {
    "badge": f"[![Open in Colab]({_BADGE})]({link})",
    "install-text": _INSTALL_TEXT.rstrip(),
    "install": _INSTALL.replace("ADDRESS", repository()).rstrip(),
  }


def with_address(text: str) -> str:
  """The text, in which each address of the repository is the present one."""
  return re.sub(_ADDRESS, repository(), text)


def completed(notebook: dict[str, Any], name: str) -> dict[str, Any]:
  """A notebook with the present text of the shared cells, and the present address of the repository."""
  shared = shared_cells(name)
  cells = [
    {**cell, "source": shared.get(cell["id"], with_address("".join(cell["source"]))).splitlines(keepends=True)}
    for cell in notebook["cells"]
  ]
  return {**notebook, "cells": cells}


def main() -> None:
  """Runs the command."""
  _CITATION.write_text(with_address(_CITATION.read_text()))
  for name in NAMES:
    path = COLABS / f"{name}.ipynb"
    notebook = completed(json.loads(path.read_text()), name)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  main()
