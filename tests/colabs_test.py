"""`colabs/`: the notebooks are stored without outputs, and the demo runs from its first cell to its last."""

import json
from pathlib import Path
from typing import Any

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


def test_the_code_of_the_demo_compiles() -> None:
  for cell in read_cells(COLABS / "demo.ipynb"):
    if cell["cell_type"] == "code":
      compile("".join(cell["source"]), f"demo.ipynb cell {cell['id']}", "exec")


@pytest.mark.slow
def test_the_demo_runs_from_the_first_cell_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("DECLIP_DEMO_STEPS", "2")
  monkeypatch.setenv("DECLIP_DEMO_BATCH", "8")
  names: dict[str, Any] = {}
  for cell in read_cells(COLABS / "demo.ipynb"):
    if cell["cell_type"] == "code":
      exec(compile("".join(cell["source"]), f"demo.ipynb cell {cell['id']}", "exec"), names)
  for picture in ("views", "curves", "retrieval", "similarity"):
    assert (tmp_path / "runs" / "declip" / f"{picture}.png").read_bytes().startswith(PNG)
  assert names["results"]["step"] == names["clip"].step == 2
  assert names["similarity"].shape == (300, 30)
  assert abs(names["similarity"]).max() <= 1 + 1e-5
  assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # nothing was downloaded
