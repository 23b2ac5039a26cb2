from pathlib import Path

import pytest

from declip_jax.data.storage import rows

ROWS = [(0, -1, b"a/\xff.jpg", None, ["ein Hund", "狗"], 2**40), (1, 7, None, bytes(1000), [], -1, [1, 0, -1], [0])]
ABOUT = {"files": ["é.csv"], "labels": [10**30]}


def write(path: Path) -> bytes:
  assert rows.write(path, ROWS, lambda: ABOUT) == 2
  return path.read_bytes()


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
  found = rows.Rows(memoryview(write(tmp_path / "a.rows")))
  assert (len(found), [tuple(found[index]) for index in range(2)], found.about) == (2, ROWS, ABOUT)


def test_metadata_may_depend_on_the_rows(tmp_path: Path) -> None:
  seen = []
  assert rows.write(tmp_path / "a.rows", (seen.append(number) or [number] for number in range(3)), lambda: {"n": seen})
  assert rows.Rows(memoryview((tmp_path / "a.rows").read_bytes())).about == {"n": [0, 1, 2]}
  assert rows.write(tmp_path / "none.rows", (), dict) == 0
  assert len(rows.Rows(memoryview((tmp_path / "none.rows").read_bytes()))) == 0


def test_contents_that_are_cut_off_are_rejected(tmp_path: Path) -> None:
  whole = write(tmp_path / "a.rows")
  for length in (0, 15, 16, len(whole) // 2, len(whole) - 1):
    with pytest.raises(ValueError, match="cut off|JSON|decode|Expecting"):
      rows.Rows(memoryview(whole[:length]))
