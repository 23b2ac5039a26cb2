"""The target of a rollback; tests/loop_test.py rolls back."""

from pathlib import Path

from record_files import damages

from declip_jax.runtime.rollback import Rollbacks


def test_the_target_is_before_the_skipped_steps_or_else_the_oldest(tmp_path: Path) -> None:
  rollbacks = Rollbacks(tmp_path)
  assert rollbacks.target([2, 4, 6, 8], 5) == 4
  assert rollbacks.target([2, 4, 6, 8], 6) == 6
  assert rollbacks.target([6, 8], 5) == 6  # skipped steps do not change parameters
  assert rollbacks.target([], 5) is None
  rollbacks.record(3, 8, 4, {"next_index": 128})
  assert Rollbacks(tmp_path).target([2, 4], 5) == 2  # from 4 it diverged again


def test_a_rollback_determines_the_position_until_the_next_checkpoint(tmp_path: Path) -> None:
  rollbacks = Rollbacks(tmp_path)
  assert rollbacks.position(4, {"next_index": 64}) == {"next_index": 64}
  rollbacks.record(3, 8, 4, {"next_index": 128})
  rollbacks = Rollbacks(tmp_path)
  assert rollbacks.position(4, {"next_index": 64}) == {"next_index": 128}
  assert rollbacks.position(6, {"next_index": 160}) == {"next_index": 160}
  assert rollbacks.position(4, {"next_index": 160}) == {"next_index": 160}  # saved again after the rollback


def test_a_torn_last_line_does_not_count(tmp_path: Path) -> None:
  Rollbacks(tmp_path).record(3, 8, 4, {"next_index": 128})
  with (tmp_path / "rollbacks.jsonl").open("a") as file:
    file.write('{"time": 1')
  assert len(Rollbacks(tmp_path)) == 1


def test_a_line_that_is_cut_off_or_garbled_anywhere_stops_nothing(tmp_path: Path) -> None:
  for at in (8, 9):
    Rollbacks(tmp_path).record(3, at, 4, {"next_index": 128})
  path = tmp_path / "rollbacks.jsonl"
  for damaged in damages(path.read_bytes()):
    path.write_bytes(damaged)
    rollbacks = Rollbacks(tmp_path)
    assert len(rollbacks) in (1, 2)
    assert rollbacks.target([2, 4], 5) in (2, 4)
    assert rollbacks.position(4, {"next_index": 64})["next_index"] >= 64


def test_a_run_that_begins_anew_forgets_the_rollbacks_of_another_one(tmp_path: Path) -> None:
  Rollbacks(tmp_path).record(3, 8, 4, {"next_index": 128})
  rollbacks = Rollbacks(tmp_path)
  rollbacks.forget()
  assert len(rollbacks) == len(Rollbacks(tmp_path)) == 0
