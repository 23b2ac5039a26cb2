"""Any name of a directory: orbax and TensorStore give some characters a meaning of their own."""

import os
from pathlib import Path
import string

from fake_training import FakeTraining, restore, saved_steps
import pytest

from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.runtime.plain_paths import plain_path
from declip_jax.runtime.services import Cadence

PRINTABLE = "".join(sorted(set(string.printable) - {"/"}))
NAMES = {
  "all printable characters": f"{PRINTABLE}é日",
  "brackets": "lr[1e-3]",
  "a star": "sweep*",
  "a backslash at the end": "run\\",
  "not UTF-8": os.fsdecode(b"run\xff"),
}
FAST = ("all printable characters", "not UTF-8")


@pytest.mark.parametrize(
  "name",
  [pytest.param(NAMES[name], id=name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES],
)
def test_a_run_in_a_directory_of_any_name_resumes(name: str, tmp_path: Path) -> None:
  workdir = tmp_path / name / "below"
  FakeTraining(Cadence(total=4, checkpoint=2)).run(workdir)
  FakeTraining(Cadence(total=6, checkpoint=2)).run(workdir)
  assert saved_steps(workdir) == [4, 6]
  FakeTraining(Cadence(total=6, checkpoint=2)).run(tmp_path / "plain")
  assert restore(workdir, 6) == restore(tmp_path / "plain", 6)
  assert Checkpoints(workdir).check(6) == ("", True)
  assert [path.name for path in tmp_path.iterdir()] in ([name, "plain"], ["plain", name])  # nothing is elsewhere


def test_checkpoints_are_used_through_a_link_to_an_odd_name(tmp_path: Path) -> None:
  (elsewhere := tmp_path / "disk[1]").mkdir()
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "checkpoints").symlink_to(elsewhere)
  FakeTraining(Cadence(total=2)).run(tmp_path / "run")
  assert saved_steps(tmp_path / "run") == [2]
  assert (elsewhere / "2").is_dir()


def test_a_plain_path_is_used_unchanged(tmp_path: Path) -> None:
  assert plain_path(tmp_path) == tmp_path
  for name in ("a[b", "a]b", "a*", "a?", "a\\b"):
    link = plain_path(tmp_path / name)
    assert link != tmp_path / name
    assert link == plain_path(tmp_path / name)
    assert link.resolve() == tmp_path / name
  for address in ("/gs/bucket", "/s3", "/az/x/y", "/hf/x"):
    assert plain_path(Path(address)) != Path(address)
  for path in ("/gsx/bucket", "/data/gs/x"):
    assert plain_path(Path(path)) == Path(path)
