"""`colabs/`: the notebooks are stored without outputs, and run from their first cell to their last."""

from collections.abc import Iterator
import json
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
from PIL import Image
import pytest

COLABS = Path(__file__).parents[1] / "colabs"
PNG = b"\x89PNG\r\n\x1a\n"


def read_cells(path: Path) -> list[dict[str, Any]]:
  return json.loads(path.read_text())["cells"]


def test_notebooks_are_valid_and_stored_without_outputs() -> None:
  for path in sorted(COLABS.glob("*.ipynb")):
    notebook = json.loads(path.read_text())
    cells = notebook["cells"]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
      assert cell["cell_type"] in ("markdown", "code")
      assert cell["source"]
      if cell["cell_type"] == "code":
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


def code_of(name: str) -> Iterator[CodeType]:
  """The compiled code cells of a notebook."""
  for cell in read_cells(COLABS / name):
    if cell["cell_type"] == "code":
      yield compile("".join(cell["source"]), f"{name} cell {cell['id']}", "exec")


@pytest.mark.parametrize("name", sorted(path.name for path in COLABS.glob("*.ipynb")))
def test_the_code_compiles(name: str) -> None:
  assert len([*code_of(name)]) > 3


@pytest.mark.slow
def test_the_demo_runs_from_the_first_cell_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("DECLIP_DEMO_STEPS", "2")
  monkeypatch.setenv("DECLIP_DEMO_BATCH", "8")
  names: dict[str, Any] = {}
  for code in code_of("demo.ipynb"):
    exec(code, names)
  for picture in ("views", "curves", "retrieval", "similarity"):
    assert (tmp_path / "runs" / "declip" / f"{picture}.png").read_bytes().startswith(PNG)
  assert names["results"]["step"] == names["clip"].step == 2
  assert names["similarity"].shape == (300, 30)
  assert abs(names["similarity"]).max() <= 1 + 1e-5
  assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # nothing was downloaded


@pytest.mark.slow
def test_data_efficiency_makes_its_data_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  datasets = pytest.importorskip("datasets")
  rng = np.random.default_rng(0)
  products = [
    {
      "articleType": ("Shoes", "Hats", "Rare")[index % 2 if index else 2],
      "productDisplayName": f"Title {index}" if index else None,
      "image": Image.fromarray(rng.integers(0, 256, (24, 18, 3), np.uint8)),
    }
    for index in range(200)
  ]
  monkeypatch.setattr(datasets, "load_dataset", lambda name, split: products)
  (tmp_path / "colabs").mkdir()
  monkeypatch.chdir(tmp_path / "colabs")
  (tmp_path / "docs").symlink_to(COLABS.parent / "docs")
  for name, value in (("DATA", tmp_path / "data"), ("STEPS", 2), ("BATCH", 8)):
    monkeypatch.setenv(f"DECLIP_{name}", str(value))
  names: dict[str, Any] = {}
  for code in code_of("data_efficiency.ipynb"):
    exec(code, names)
  assert (tmp_path / "data" / "classnames.txt").read_text() == "Hats\nShoes"
  assert [*names["scores"]] == [("clip", 100), ("clip", 10), ("declip", 10)]
  assert all(0 <= found[metric] <= 1 for found in names["scores"].values() for metric in names["METRICS"].values())
  assert (Path("runs") / "data_efficiency.png").read_bytes().startswith(PNG)
