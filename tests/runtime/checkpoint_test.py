"""Checkpoints: retention, damage, failed saves, and restoring onto another layout."""

import contextlib
import errno
import itertools
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import threading
from types import SimpleNamespace

from checkpoint_files import arrays, flip
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest
from tiers import slow_except

import declip_jax
from declip_jax.batch_sizes import BatchSizes
from declip_jax.data.storage import outputs
from declip_jax.models import bank
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.runtime.retention import KeepFirstOfEach
from declip_jax.runtime.seal import is_sealed, read_seals, write_seal
from declip_jax.sharding import make_mesh
from declip_jax.training.state import State, start_average


def make_state(value: float, mesh: jax.sharding.Mesh) -> State:
  split = NamedSharding(mesh, PartitionSpec("fsdp"))
  whole = NamedSharding(mesh, PartitionSpec())
  zero = jax.device_put(jnp.int32(0), whole)
  return State(
    step=jax.device_put(jnp.int32(value), whole),
    params={"kernel": jax.device_put(value + jnp.arange(16.0).reshape(8, 2), split)},
    opt_state={"moment": jax.device_put(-value + jnp.arange(8.0), split)},
    collections={"bank": jax.device_put(bank.random(jax.random.key(int(value)), 2, 4, 2), whole)},
    skipped={"total": zero, "in_a_row": zero},
  )


def save_steps(folder: Path, scores: dict[int, float | None], **keep: object) -> list[int]:
  mesh = make_mesh(2, 4)
  checkpoints = Checkpoints(folder, **keep)
  for step, score in scores.items():
    checkpoints.save(step, make_state(step, mesh), data={"next_index": step}, config={})
    if score is not None:
      checkpoints.score(step, {"top1": score})
  checkpoints.wait()
  kept = checkpoints.steps()
  checkpoints.close()
  return kept


@pytest.mark.parametrize(
  ("scores", "kept"),
  [
    pytest.param({1: 0.9, 2: 0.1, 3: 0.2, 4: 0.3}, [1, 3, 4], marks=pytest.mark.slow),
    ({1: 0.1, 2: 0.9, 3: 0.2, 4: None}, [2, 3, 4]),  # the newest is kept, although it has no score
    pytest.param({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}, [3, 4], marks=pytest.mark.slow),
  ],
)
def test_newest_and_best_are_kept(scores: dict, kept: list[int], tmp_path: Path) -> None:
  assert save_steps(tmp_path, scores, keep_last=2, keep_best=1, best_metric="top1") == kept


def test_without_a_metric_only_the_newest_are_kept(tmp_path: Path) -> None:
  assert save_steps(tmp_path, {1: 0.9, 2: 0.1, 3: 0.2}, keep_last=2) == [2, 3]


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (1, 1)])
def test_restores_onto_another_mesh(shape: tuple[int, int], tmp_path: Path) -> None:
  save_steps(tmp_path, {7: None}, keep_last=1)
  mesh = make_mesh(*shape, jax.devices()[: shape[0] * shape[1]])
  like = make_state(0, mesh)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
  checkpoints = Checkpoints(tmp_path)
  state, position = checkpoints.restore(checkpoints.latest(), abstract)
  assert position == {"next_index": 7}
  assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, like)
  jax.tree.map(np.testing.assert_array_equal, state, make_state(7, mesh))
  params, collections = checkpoints.restore_model(7, abstract.params, abstract.collections)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((params, collections)))
  jax.tree.map(np.testing.assert_array_equal, (params, collections), (state.params, state.collections))
  checkpoints.close()


def test_an_unfinished_checkpoint_is_not_seen(tmp_path: Path) -> None:
  save_steps(tmp_path, {3: None}, keep_last=1)
  (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.latest() == 3
  checkpoints.close()


@pytest.fixture
def small_disk(tmp_path: Path):
  """A directory on a disk of 400 KB."""
  (folder := tmp_path / "disk").mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder]
  if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("may not mount a small disk")
  yield folder
  subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_a_warning_and_the_next_save_succeeds(
  small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
  mesh = make_mesh(2, 4)
  checkpoints = Checkpoints(small_disk, keep_last=1)

  def save(step: int) -> None:
    checkpoints.save(step, make_state(step, mesh), data={}, config={})

  def wait_and_count() -> int:
    checkpoints.wait()
    return checkpoints.failed

  save(1)
  assert wait_and_count() == 0
  fill = small_disk / "fill"
  for step, left in ((2, 0), (3, 20_000)):  # if nothing can be written at all, and if writing fails in the background
    fill.write_bytes(b"")
    free = shutil.disk_usage(small_disk).free
    fill.write_bytes(bytes(free - left))
    save(step)
    assert wait_and_count() == step - 1
    assert checkpoints.steps() == [1]  # nothing is deleted in favour of an unwritten checkpoint
    assert not list((small_disk / "checkpoints").glob("*tmp*"))
    assert checkpoints.check(1) == ("", True)
    assert re.search(rf"checkpoint {step} was not written: .*No space left on device", caplog.text)
    assert not checkpoints.due()
  with pytest.raises(OSError, match=r"checkpoint 4 could not be written .*No space left.*newest checkpoint is 1"):
    checkpoints.finish(4, lambda: save(4), patience=1.5)
  fill.unlink()
  checkpoints.finish(4, lambda: save(4), patience=60)
  assert checkpoints.steps() == [4]
  checkpoints.close()


def test_a_failed_save_is_removed_though_its_other_arrays_are_still_being_written(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  checkpoints = Checkpoints(tmp_path, keep_last=1)
  folder = tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp"
  stop = threading.Event()

  def write() -> None:
    for number in itertools.count():
      with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
        (folder / f"{number}").touch()
      if stop.wait(0.01):
        return

  def fail(step: int, **options: object) -> None:
    threading.Timer(0.3, stop.set).start()
    writer.start()
    raise OSError("No space left on device")

  writer = threading.Thread(target=write)
  monkeypatch.setattr(checkpoints._manager, "save", fail)
  checkpoints.save(1, make_state(1, make_mesh(2, 4)), data={}, config={})
  assert checkpoints.failed == 1
  writer.join()
  assert not folder.exists()
  checkpoints.close()


def test_a_mount_that_vanishes_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
  mesh = make_mesh(2, 4)
  checkpoints = Checkpoints(tmp_path, keep_last=2)
  checkpoints.save(1, make_state(1, mesh), data={}, config={})
  checkpoints.wait()
  (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
  checkpoints.save(2, make_state(2, mesh), data={}, config={})
  checkpoints.wait()
  assert "checkpoint 2 was not written: OSError: [Errno 2] No such file or directory" in caplog.text
  (tmp_path / "elsewhere").rename(tmp_path / "checkpoints")
  checkpoints.save(3, make_state(3, mesh), data={}, config={})
  checkpoints.wait()
  assert (checkpoints.failed, checkpoints.steps()) == (1, [1, 3])
  checkpoints.close()


@pytest.mark.slow
def test_a_folder_that_was_deleted_is_made_again(tmp_path: Path) -> None:
  mesh = make_mesh(2, 4)
  checkpoints = Checkpoints(tmp_path, keep_last=2)

  def save(step: int) -> None:
    checkpoints.save(step, make_state(step, mesh), data={}, config={})

  save(1)
  checkpoints.wait()
  shutil.rmtree(tmp_path / "checkpoints")
  save(2)
  checkpoints.finish(2, lambda: save(2), patience=60)
  assert checkpoints.steps() == [2]
  save(3)
  checkpoints.finish(3, lambda: save(3), patience=60)
  assert checkpoints.steps() == [2, 3]
  shutil.rmtree(tmp_path / "checkpoints" / "2")  # by hand, before it is due
  save(4)
  checkpoints.finish(4, lambda: save(4), patience=60)
  assert (checkpoints.steps(), checkpoints.failed) == ([3, 4], 1)
  checkpoints.close()


def test_a_mount_that_returns_only_errors(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  mesh, broken = make_mesh(2, 4), []
  checkpoints = Checkpoints(tmp_path)

  def fail_while_broken(name: str) -> None:
    original = getattr(Path, name)

    def call(path: Path, *inputs: object, **options: object) -> object:
      if broken and "checkpoints" in path.parts:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
      return original(path, *inputs, **options)

    monkeypatch.setattr(Path, name, call)

  for name in ("write_bytes", "unlink", "glob"):
    fail_while_broken(name)
  broken.append(True)
  checkpoints.save(1, make_state(1, mesh), data={}, config={})
  assert "checkpoint 1 was not written: OSError: [Errno 107] Transport endpoint" in caplog.text
  broken.clear()
  checkpoints.save(2, make_state(2, mesh), data={}, config={})
  checkpoints.wait()
  assert (checkpoints.failed, checkpoints.steps()) == (1, [2])
  checkpoints.close()


def test_the_clock_asks_for_saves_and_for_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  now = 1000.0
  monkeypatch.setattr("declip_jax.runtime.checkpoint.time.monotonic", lambda: now)
  mesh = make_mesh(2, 4)
  checkpoints = Checkpoints(tmp_path, keep_last=9, minutes=10)

  def due_after(seconds: float) -> bool:
    nonlocal now
    now += seconds
    return checkpoints.due()

  def save(step: int) -> None:
    checkpoints.save(step, make_state(step, mesh), data={}, config={})
    checkpoints.wait()

  assert (due_after(599), due_after(2)) == (False, True)
  save(1)
  assert (due_after(599), due_after(2)) == (False, True)
  monkeypatch.setattr(Checkpoints, "_write_error", lambda self: "gone")
  for step, pause in ((2, 30), (3, 60), (4, 120)):
    save(step)
    assert (due_after(pause - 1), due_after(2)) == (False, True)
  monkeypatch.undo()
  monkeypatch.setattr("declip_jax.runtime.checkpoint.time.monotonic", lambda: now)
  save(5)
  assert (due_after(599), due_after(2)) == (False, True)
  assert checkpoints.steps() == [1, 5]
  checkpoints.close()


def abstract_like(state: State) -> State:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def restore_newest(folder: Path):
  checkpoints = Checkpoints(folder)
  found = checkpoints.restore_newest(abstract_like(make_state(0, make_mesh(2, 4))))
  checkpoints.close()
  return found


@pytest.mark.parametrize(
  ("scores", "kept"), [({1: 0.9, 2: 0.1}, [1, 3]), ({1: 0.1, 2: 0.9}, [2, 3]), ({1: None, 2: float("nan")}, [3])]
)
def test_the_best_is_known_after_a_restart(scores: dict, kept: list[int], tmp_path: Path) -> None:
  keep = {"keep_last": 1, "keep_best": 1, "best_metric": "top1"}
  save_steps(tmp_path, scores, **keep)
  assert save_steps(tmp_path, {3: 0.05}, **keep) == kept


@pytest.mark.slow
def test_the_first_checkpoint_of_each_interval_is_kept(tmp_path: Path) -> None:
  steps = dict.fromkeys((2, 4, 7, 9, 10, 19, 31, 33, 39))
  assert save_steps(tmp_path, steps, keep_last=1, keep_every=10) == [10, 31, 39]
  assert save_steps(tmp_path, {40: None, 41: None}, keep_last=1, keep_every=10) == [10, 31, 40, 41]


def test_the_intervals_hold_when_the_batch_size_changes() -> None:
  policy, found = KeepFirstOfEach(20), [SimpleNamespace(step=step) for step in (5, 10, 15, 20, 30, 40, 41, 60)]
  policy.length = BatchSizes(((0, 32), (20, 16))).batches
  kept = policy.should_preserve(found, context=None)
  assert [checkpoint.step for checkpoint, keep in zip(found, kept, strict=True) if keep] == [10, 20, 40, 60]


DAMAGE = {
  "a bit of the arrays": (lambda folder: flip(arrays(folder / "model")[0]), "does not match its checksum"),
  "a bit of the config": (lambda folder: flip(folder / "config" / "metadata"), "does not match its checksum"),
  "a bit of the seal": (lambda folder: flip(folder / "checksums.0.json"), ""),
  "cut off": (lambda folder: os.truncate(arrays(folder / "training")[0], 10), "has 10 bytes, not"),
  "a file gone": (lambda folder: (folder / "training" / "_METADATA").unlink(), "_METADATA is missing"),
  "an item gone": (lambda folder: shutil.rmtree(folder / "model"), "is missing"),
  "all files gone": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "cannot be read"),
  "unsealed and cut off": (
    lambda folder: [(folder / "checksums.0.json").unlink(), os.truncate(folder / "model" / "manifest.ocdbt", 20)],
    "cannot be read",
  ),
}


@pytest.mark.parametrize("damage", slow_except(("a bit of the arrays", "an item gone", "unsealed and cut off"), DAMAGE))
def test_a_damaged_checkpoint_is_skipped_and_renamed(damage: str, tmp_path: Path) -> None:
  save_steps(tmp_path, {3: None, 5: None}, keep_last=2)
  harm, message = DAMAGE[damage]
  harm(tmp_path / "checkpoints" / "5")
  found = restore_newest(tmp_path)
  assert (found.step, found.data) == (3, {"next_index": 3})
  jax.tree.map(np.testing.assert_array_equal, found.state, make_state(3, make_mesh(2, 4)))
  (line,) = found.messages
  assert line.startswith("checkpoint 5 was skipped: ")
  assert message in line
  assert (tmp_path / "checkpoints" / "5.damaged").is_dir()
  assert save_steps(tmp_path, {5: None}, keep_last=2) == [3, 5]  # the same step again
  assert restore_newest(tmp_path).step == 5


def test_nothing_is_renamed_and_no_run_starts_from_scratch_if_all_are_damaged(tmp_path: Path) -> None:
  save_steps(tmp_path, {3: None, 5: None}, keep_last=2)
  for step in (3, 5):
    flip(arrays(tmp_path / "checkpoints" / str(step) / "model")[0])
  with pytest.raises(ValueError, match=r"all checkpoints .* are damaged \(step 5: .*; step 3: .*checksum"):
    restore_newest(tmp_path)
  assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"3", "5"}


def test_a_state_of_another_model_is_not_treated_as_damage(tmp_path: Path) -> None:
  save_steps(tmp_path, {3: None, 5: None}, keep_last=2)
  state = make_state(0, make_mesh(2, 4))
  checkpoints = Checkpoints(tmp_path)
  wider = state.replace(opt_state={"moment": jnp.zeros(9)})
  with pytest.raises(ValueError, match=r"opt_state/moment is \(8,\) in the checkpoint and \(9,\) in the config; use"):
    checkpoints.restore_newest(abstract_like(wider))
  with pytest.raises(ValueError, match=r"5 does not fit the config: params/another is missing in .* and \(\) in"):
    checkpoints.restore_newest(abstract_like(state.replace(params={**state.params, "another": state.step})))
  assert checkpoints.steps() == [3, 5]
  checkpoints.close()


def test_an_undamaged_checkpoint_that_cannot_be_read_is_not_renamed(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  save_steps(tmp_path, {3: None, 5: None}, keep_last=2)
  restore = Checkpoints.restore

  def failing(self, step, abstract):
    if step == 5:
      raise OSError("the mount is gone")
    return restore(self, step, abstract)

  monkeypatch.setattr(Checkpoints, "restore", failing)
  with pytest.raises(OSError, match="the mount is gone"):
    restore_newest(tmp_path)
  monkeypatch.undo()
  assert restore_newest(tmp_path).step == 5


def test_a_checkpoint_has_the_version_and_an_older_one_without_it_is_restored(tmp_path: Path) -> None:
  save_steps(tmp_path, {3: None}, keep_last=1)
  path = tmp_path / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
  about = json.loads(path.read_text())
  assert about["custom_metadata"] == {"declip_jax": declip_jax.__version__}
  for seal in path.parent.glob("checksums.*"):
    seal.unlink()
  path.write_text(json.dumps({**about, "custom_metadata": {}}))
  found = restore_newest(tmp_path)
  assert (found.step, found.messages) == (3, [])


def test_checkpoints_without_seals_and_counters_are_restored(tmp_path: Path) -> None:
  save_steps(tmp_path, {3: None}, keep_last=1)
  for seal in (tmp_path / "checkpoints" / "3").glob("checksums.*"):
    seal.unlink()
  state = make_state(0, make_mesh(2, 4))
  state = state.replace(skipped={**state.skipped, "later": jnp.float32(0)})
  checkpoints = Checkpoints(tmp_path)
  found = checkpoints.restore_newest(abstract_like(state))
  checkpoints.close()
  assert {name: int(x) for name, x in found.state.skipped.items()} == {"total": 0, "in_a_row": 0, "later": 0}
  assert (found.step, found.messages) == (3, [])


def averaged(value: float) -> State:
  """A state of a model with batch norms whose average differs from its weights."""
  state = make_state(value, make_mesh(2, 4))
  halves = {"towers": {"batch_stats": {"mean": state.step * 1.0}}, "heads": {"bank": state.collections["bank"]}}
  state = start_average(state.replace(collections=halves))
  return state.replace(average=jax.tree.map(lambda x: x + 0.5, state.average))


def test_an_average_of_the_weights_is_restored_and_read_by_itself(tmp_path: Path) -> None:
  state, checkpoints = averaged(3), Checkpoints(tmp_path)
  checkpoints.save(3, state, data={}, config={})
  checkpoints.wait()
  found = checkpoints.restore_newest(abstract_like(averaged(0)))
  assert found.messages == []
  assert jax.tree.map(lambda x: x.sharding, found.state) == jax.tree.map(lambda x: x.sharding, state)
  jax.tree.map(np.testing.assert_array_equal, found.state, state)
  arguments = [abstract_like(tree) for tree in (state.params, state.collections)]
  raw, average = (checkpoints.restore_model(3, *arguments, average=wanted) for wanted in (False, True))
  jax.tree.map(np.testing.assert_array_equal, raw, (state.params, state.collections))
  statistics = {"towers": {"batch_stats": {"mean": np.float32(3.5)}}}
  expected = {"kernel": state.params["kernel"] + 0.5}, {**state.collections, **statistics}
  jax.tree.map(np.testing.assert_array_equal, average, expected)
  wider = averaged(0)
  wider = wider.replace(average={**wider.average, "params": {"kernel": jnp.zeros(9)}})
  with pytest.raises(ValueError, match=r"does not fit the config: params/kernel is \(8, 2\) in the checkpoint"):
    checkpoints.restore(3, abstract_like(wider))
  checkpoints.close()


def test_a_run_may_begin_and_give_up_an_average_of_the_weights(tmp_path: Path) -> None:
  state, checkpoints = averaged(3), Checkpoints(tmp_path, keep_last=2)
  checkpoints.save(3, state.replace(average={}), data={}, config={})
  checkpoints.wait()
  begun = checkpoints.restore_newest(abstract_like(state))
  expected = {"params": state.params, "batch_stats": {"towers": {"mean": 3.0}}}
  jax.tree.map(np.testing.assert_array_equal, begun.state.average, expected)
  assert ["checkpoint 3 has no average" in message for message in begun.messages] == [True]
  checkpoints.save(5, state, data={}, config={})
  checkpoints.wait()
  ended = checkpoints.restore_newest(abstract_like(state.replace(average={})))
  assert ended.state.average == {}
  assert ["checkpoint 5 is not continued" in message for message in ended.messages] == [True]
  checkpoints.close()


def test_a_checkpoint_that_a_killed_run_did_not_seal_is_sealed_once_it_is_restored(tmp_path: Path) -> None:
  save_steps(tmp_path, {3: None, 5: 0.5}, keep_last=2, keep_best=1, best_metric="top1")
  folder = tmp_path / "checkpoints" / "5"
  (folder / "checksums.0.json").unlink()
  assert restore_newest(tmp_path).step == 5
  assert is_sealed(folder)
  assert "scores.json" not in read_seals(folder)[0]  # a later evaluation writes it again
  flip(arrays(folder / "model")[0])
  found = restore_newest(tmp_path)
  assert found.step == 3
  assert "does not match its checksum" in found.messages[0]


def test_files_of_a_host_that_was_killed_before_it_sealed_them_are_sealed(tmp_path: Path) -> None:
  save_steps(tmp_path, {3: None}, keep_last=1)
  folder = tmp_path / "checkpoints" / "3"
  sums = json.loads((folder / "checksums.0.json").read_text())
  other = arrays(folder / "model")[0].relative_to(folder).as_posix()
  (folder / "checksums.0.json").write_text(json.dumps({name: entry for name, entry in sums.items() if name != other}))
  assert not is_sealed(folder)
  assert restore_newest(tmp_path).step == 3
  assert read_seals(folder)[0] == {name: tuple(entry) for name, entry in sums.items()}


def test_a_seal_leaves_out_the_seals_and_scores_that_other_hosts_are_writing(tmp_path: Path) -> None:
  """Their temporary files may be gone before this host reads them."""
  (tmp_path / "model").mkdir()
  for name in ("model/d", "_METADATA"):
    (tmp_path / name).write_bytes(b"content")
  with contextlib.ExitStack() as stack:
    for name in ("checksums.1.json", "scores.json"):
      stack.enter_context(outputs.temporary(tmp_path / name))
    write_seal(tmp_path)
    assert is_sealed(tmp_path)
  assert set(json.loads((tmp_path / "checksums.0.json").read_text())) == {"model/d", "_METADATA"}
