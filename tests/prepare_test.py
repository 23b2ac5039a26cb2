"""Tests of what a run reads before it starts."""

from pathlib import Path

import pytest

from declip_jax import config
from declip_jax.prepare import with_specs


def test_paths_of_data_become_specs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
  pairs = tmp_path / "pairs.csv"
  pairs.write_text("image,caption\na.jpg,a cat\n")
  for split in ("train", "test"):
    (tmp_path / "shards" / split).mkdir(parents=True)
    (tmp_path / "shards" / split / "0.tar").touch()
  c = config.default()
  c.data.train = (str(pairs), "scenes:train")
  c.evals.mine = config.retrieval(str(tmp_path / "shards"))
  c.evals.other = config.zero_shot("scenes:test")
  c.evals.gone = config.retrieval("nowhere/at/all")
  found = with_specs(c)
  assert found.data.train == (f"table:{pairs}", "scenes:train")
  assert found.evals.mine.data == f"webdataset:{tmp_path}/shards/test/*.tar"
  assert (found.evals.other.data, found.evals.gone.data) == ("scenes:test", "nowhere/at/all")
  assert c.evals.mine.data == str(tmp_path / "shards")
  printed = capsys.readouterr().err
  assert f"config.evals.mine.data {tmp_path / 'shards'} is read as {found.evals.mine.data}" in printed
  assert printed.count("is read as") == 2


def test_a_path_at_which_nothing_is_recognised_is_rejected_with_its_field(tmp_path: Path) -> None:
  (tmp_path / "notes.md").write_text("nothing")
  c = config.default()
  c.evals.mine = config.retrieval(str(tmp_path))
  with pytest.raises(ValueError, match=r"^config\.evals\.mine\.data: "):
    with_specs(c)
