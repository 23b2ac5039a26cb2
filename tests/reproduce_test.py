"""docs/reproduce.md: its tables are those of benchmarks/reproduce.py, and its commands and links exist."""

from pathlib import Path
import re
from types import ModuleType

import pytest

from declip_jax import config_files

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reproduce.md").read_text()


@pytest.fixture
def reproduce(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  import reproduce

  return reproduce


def table(columns: tuple[str, ...]) -> list[list[str]]:
  """The rows of the table of the page whose first columns are these."""
  lines = PAGE.splitlines()
  start = next(index for index, line in enumerate(lines) if line.startswith("| " + " | ".join(columns)))
  rows = []
  for line in lines[start + 2 :]:
    if not line.startswith("| "):
      break
    rows.append([cell.strip() for cell in line.strip("|").split("|")])
  return rows


def number(cell: str) -> float:
  return float(cell.replace(",", "").split()[0])


def test_the_table_of_runs_is_that_of_the_configs(reproduce: ModuleType) -> None:
  rows = table(reproduce.COLUMNS)
  assert [row[:7] for row in rows] == [list(reproduce.row(name).cells) for name in reproduce.CONFIGS]
  for *cells, step, v5e, h200 in rows:
    for machine, found in zip(reproduce.MACHINES.values(), (v5e, h200), strict=True):
      expected = reproduce.hours(number(cells[4]), 1e15 * number(step), *machine)
      assert number(found) == pytest.approx(expected, rel=3e-3, abs=0.06), cells[0]


def test_the_table_of_plans_follows_from_its_own_columns(reproduce: ModuleType) -> None:
  runs = {row[0]: row for row in table(reproduce.COLUMNS)}
  rows = table(reproduce.PLAN)
  assert len(rows) == 3
  for config, memory, step, least, least_hours, hours, rate in rows:
    assert step == runs[config][7]
    assert number(memory) < number(memory.split(" of ")[1])
    steps = number(runs[config][4])
    assert number(least_hours) == pytest.approx(steps * number(least) / 3.6e6, rel=0.01)
    assert number(hours) == pytest.approx(reproduce.hours(steps, 1e15 * number(step), "TPU v5e", 16), rel=2e-3, abs=0.1)
    assert number(rate) == pytest.approx(steps / number(hours) / 3600, rel=0.01)


def test_the_configs_and_files_of_the_page_exist() -> None:
  commands = re.findall(r"--config=(\S+)", PAGE)
  assert [config_files.load(name).batch_size for name in commands] == [4096, 4096]
  assert {*re.findall(r"`((?:slip|declip_paper|declip_yfcc15m)/\w+)", PAGE)} <= {*config_files.names()}
  for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE):
    assert (ROOT / "docs" / path).exists(), path
  for script in re.findall(r"python (benchmarks/\w+\.py)", PAGE):
    assert (ROOT / script).is_file(), script


def test_every_source_of_the_page_is_defined_and_used() -> None:
  defined = re.findall(r"^\[([^\]]+)\]: https://\S+$", PAGE, re.MULTILINE)
  assert len(defined) == len({*defined})
  assert {*defined} == {*re.findall(r"\]\[([^\]]+)\]", PAGE)}


@pytest.mark.slow
def test_the_flops_of_the_table_are_those_of_the_step(reproduce: ModuleType) -> None:
  for row in table(reproduce.COLUMNS):
    assert row[7] == reproduce.petaflops(reproduce.step_flops(row[0].strip("`"))), row[0]
