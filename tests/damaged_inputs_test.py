"""docs/damaged_inputs.md names a test for each of its rows."""

from pathlib import Path
import re

REPOSITORY = Path(__file__).parents[1]


def test_the_tests_that_the_page_names_exist() -> None:
  text = (REPOSITORY / "docs" / "damaged_inputs.md").read_text()
  rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| input")]
  named = re.findall(r"`(tests/\S+\.py)::(\w+)`", text)
  assert len(named) >= len(rows) - 1  # one row says why there is none
  missing = [name for file, name in named if f"def {name}(" not in (REPOSITORY / file).read_text()]
  assert missing == []
