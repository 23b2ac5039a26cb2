"""Training as a whole: the same losses on any mesh, exact resumption, bad configs, and the files of a run.

The tests of the loop that need no model are in tests/loop_test.py.
"""

from collections.abc import Callable, Mapping
import contextlib
from functools import partial
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
from types import SimpleNamespace
from typing import Any

from checkpoint_files import arrays, flip
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
from record_files import read_events
from runs import (
  assert_equal,
  command,
  environment,
  final_state,
  killed_before_line,
  losses_on_disk,
  train_in_two_processes,
  wait_for_step,
  zero_biases_without_effect,
)
from tiny import FinishedRun, tiny_config

from declip_jax import build, prepare, sharding, train
from declip_jax import config as config_lib
from declip_jax.clip import load
from declip_jax.data import pipeline
from declip_jax.data.mixture import Mixture
from declip_jax.data.recipes import RECIPES
from declip_jax.data.sources import open_source
from declip_jax.evaluate import _config_of_run, evaluate
from declip_jax.planning import choose
from declip_jax.reporting.metrics import read_metrics
from declip_jax.runtime import workdir as workdir_lib
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.runtime.rollback import Rollbacks
from declip_jax.training import trimming
from declip_jax.training.state import State


def banks(state: State) -> Any:
  """The neighbour bank, if there is one. (Batch statistics depend on the biases above.)"""
  return state.collections["heads"].get("bank", {})


def use_mesh(monkeypatch: pytest.MonkeyPatch, data: int, fsdp: int) -> None:
  devices = jax.devices()[: data * fsdp]
  monkeypatch.setattr(build, "make_mesh", lambda **_: sharding.make_mesh(data, fsdp, devices))


FOUR_STEPS = {"duration.steps": 4, "model.heads.bank_size": 16, "checkpoint.every.steps": 0}  # bank: full after a step


def four_steps(method: str) -> ConfigDict:
  config = tiny_config(method)
  config.update_from_flattened_dict(FOUR_STEPS)
  return config


def assert_same_run(workdir: Path, method: str, one: tuple[list[dict[str, float]], State, dict[str, Any]]) -> None:
  """Losses, evaluations if there are any, parameters, bank and input position are those of one device."""
  lines, state, position = one
  for line, expected in zip(read_metrics(workdir), lines, strict=False):
    for name in line.keys() & {name for name in expected if name.startswith(("loss", "eval/"))}:
      np.testing.assert_allclose(line[name], expected[name], rtol=0, atol=1e-5, err_msg=f"{name} at {line['step']}")
  ours, ours_position = final_state(workdir, four_steps(method), 4)
  assert_equal(zero_biases_without_effect(ours.params), zero_biases_without_effect(state.params), atol=1e-5)
  assert_equal(banks(ours), banks(state), atol=1e-5)
  assert ours_position == position


@pytest.mark.slow
@pytest.mark.parametrize("method", ["declip", "filip"])  # methods_test.py tests the steps of all methods
def test_meshes_and_processes_agree_with_one_device(
  method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  with pytest.MonkeyPatch.context() as one_device:
    use_mesh(one_device, 1, 1)
    train.train(four_steps(method), tmp_path / "one")
  one = read_metrics(tmp_path / "one"), *final_state(tmp_path / "one", four_steps(method), 4)
  monkeypatch.setattr(sharding, "MIN_SIZE", 256)  # so that the small arrays of this test are split at all
  config = four_steps(method)
  config.evals = ConfigDict()
  for data, fsdp in [(2, 4)] + ([(8, 1)] if method == "declip" else []):
    use_mesh(monkeypatch, data, fsdp)
    workdir = tmp_path / f"{data}x{fsdp}"
    train.train(config, workdir)
    assert len(losses_on_disk(workdir)) == 4
    assert_same_run(workdir, method, one)
  train_in_two_processes(method, tmp_path / "two", *as_flags(FOUR_STEPS))
  lines = read_metrics(tmp_path / "two")
  assert sum("loss" in line for line in lines) == 4
  assert {"eval/heldout/top1", "eval/retrieval/text_to_image_r10"} <= lines[-1].keys()
  assert_same_run(tmp_path / "two", method, one)


# One program for all these runs: they share what is compiled. Each save draws curves, too, so they save rarely.
STEPS = 30
SHARED = {"duration.steps": STEPS, "data.train": ("scenes:train/16/24",), "optimizer.learning_rate": 3e-3}
RARELY = {"checkpoint.every.steps": 0}


def as_flags(fields: Mapping[str, object]) -> list[str]:
  """The flags that set fields of a config."""
  return [f"--config.{name}={value}" for name, value in fields.items()]


def train_on_one_device(config: ConfigDict, workdir: Path) -> None:
  """Trains in this process as one of the processes that `command` starts does."""
  with pytest.MonkeyPatch.context() as one_device:
    use_mesh(one_device, 1, 1)
    train.train(config, workdir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run that is not interrupted."""
  workdir = tmp_path_factory.mktemp("whole")
  train_on_one_device(bare(**SHARED, **RARELY), workdir)
  return workdir


@pytest.mark.slow
def test_training_learns(whole: Path) -> None:
  losses = losses_on_disk(whole)
  assert len(losses) == STEPS
  assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


@pytest.mark.slow
def test_two_processes_agree_with_one(whole: Path, tmp_path: Path) -> None:
  train_in_two_processes("clip,bare", tmp_path, *as_flags(SHARED | RARELY))
  losses = losses_on_disk(tmp_path)
  assert len(losses) == STEPS
  np.testing.assert_allclose(losses[:10], losses_on_disk(whole)[:10], rtol=0, atol=1e-5)


def kill(start: list[str], workdir: Path, steps: range) -> None:
  """Kills a run with SIGKILL at a random one of these steps."""
  victim = subprocess.Popen(start, env=environment(), start_new_session=True)
  wait_for_step(workdir, int(np.random.default_rng().choice(steps)), victim)
  os.killpg(victim.pid, signal.SIGKILL)
  assert victim.wait() == -signal.SIGKILL


def assert_same_end(workdir: Path, whole: Path, config: ConfigDict, steps: int) -> None:
  """Two runs have the same losses and, bit for bit, the same last state and position."""
  assert losses_on_disk(workdir) == losses_on_disk(whole)
  ours, expected = (final_state(folder, config, steps) for folder in (workdir, whole))
  assert_equal(ours[0], expected[0])
  assert ours[1] == expected[1] == {"next_index": steps * 16}


@pytest.mark.slow
def test_a_killed_run_resumes_bit_exact(whole: Path, tmp_path: Path) -> None:
  start = command("clip,bare", tmp_path, *as_flags(SHARED), "--config.checkpoint.every.steps=5")
  kill(start, tmp_path, range(11, 20))
  assert Checkpoints(tmp_path).steps()  # the save of step 10 waited for that of step 5
  train_on_one_device(bare(**SHARED, **RARELY), tmp_path)
  assert_same_end(tmp_path, whole, tiny_config("clip"), STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "workers", "augment_on"), [("declip", 0, "host"), ("slip_mocov3", 2, "device")])
def test_a_killed_run_of_other_methods_resumes_bit_exact(
  method: str, workers: int, augment_on: str, tmp_path: Path
) -> None:
  config, flags = f"{method},bare", ["--config.duration.steps=30", f"--config.data.augment_on={augment_on}"]

  def start(name: str, workers: int) -> list[str]:
    return command(config, tmp_path / name, *flags, f"--config.data.workers={workers}")

  subprocess.run(start("whole", workers), env=environment(), check=True)
  kill(start("killed", workers), tmp_path / "killed", range(3, 15))
  subprocess.run(start("killed", 2 - workers), env=environment(), check=True)  # the stream is the same
  assert_same_end(tmp_path / "killed", tmp_path / "whole", tiny_config(method), 30)


TRIMMED = {
  **{"duration.steps": 6, "checkpoint.every.steps": 2, "model.heads.bank_size": 16},
  **{"model.text.context_length": 24, "model.text.buckets": (16, 20)},
}


def trimmed(method: str, **fields: object) -> ConfigDict:
  """A method without evaluations whose batches need texts of several lengths."""
  config = tiny_config(method)
  config.evals = ConfigDict()
  config.update_from_flattened_dict(TRIMMED | fields)
  return config


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_trimmed_texts_equals_one_on_whole_texts_and_resumes_bit_exact(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config, lengths, choose_length = trimmed("declip"), [], trimming.trimmed_length
  monkeypatch.setattr(trimming, "trimmed_length", lambda *args: lengths.append(choose_length(*args)) or lengths[-1])
  train_on_one_device(trimmed("declip", **{"model.text.buckets": ()}), tmp_path / "whole")
  assert not lengths
  train_on_one_device(config, tmp_path / "trimmed")
  assert lengths[:6] == [16, 24, 16, 16, 16, 16]
  losses = losses_on_disk(tmp_path / "trimmed")
  np.testing.assert_allclose(losses, losses_on_disk(tmp_path / "whole"), rtol=0, atol=1e-4)
  with killed_before_line(5):
    train_on_one_device(config, tmp_path / "killed")
  train_on_one_device(config, tmp_path / "killed")
  assert_same_end(tmp_path / "killed", tmp_path / "trimmed", config, 6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_trim_their_texts_alike(tmp_path: Path) -> None:
  """In the second batch, only one of the two has a text of more than 16 tokens."""
  train_on_one_device(trimmed("clip"), tmp_path / "one")
  train_in_two_processes("clip,bare", tmp_path / "two", *as_flags(TRIMMED))
  np.testing.assert_allclose(losses_on_disk(tmp_path / "two"), losses_on_disk(tmp_path / "one"), rtol=0, atol=1e-5)


def stop(workdir: Path, signum: int, *flags: str) -> tuple[int, str]:
  """Sends a signal to a run that saves every step; returns its exit code and messages."""
  process = subprocess.Popen(
    command("clip,bare", workdir, *as_flags(SHARED), "--config.checkpoint.every.steps=1", *flags),
    env=environment(),
    stderr=subprocess.PIPE,
    text=True,
  )
  wait_for_step(workdir, 3, process)
  process.send_signal(signum)
  _, errors = process.communicate(timeout=120)
  return process.returncode, errors


@pytest.mark.slow
@pytest.mark.parametrize(
  ("signum", "code", "flags"),
  [(signal.SIGTERM, 0, ()), (signal.SIGTERM, 143, ("--stopped_exit_code=143",)), (signal.SIGINT, 130, ())],
)
def test_a_signal_saves_and_ends_the_run(signum: int, code: int, flags: tuple[str, ...], tmp_path: Path) -> None:
  returned, errors = stop(tmp_path, signum, *flags)
  assert returned == code
  assert "Traceback" not in errors
  step = Checkpoints(tmp_path).latest()
  assert 3 <= step < STEPS
  assert f"stopped at step {step}" in errors


@pytest.mark.parametrize(
  ("signum", "flag", "code"), [(signal.SIGTERM, 0, 0), (signal.SIGTERM, 143, 143), (signal.SIGINT, 143, 130)]
)
def test_the_exit_code_shows_how_a_run_was_stopped(
  signum: int, flag: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
  def stopped(*_: object, **__: object) -> None:
    raise train.Stopped(5, signum)

  monkeypatch.setattr(train, "train", stopped)
  monkeypatch.setattr(train, "compile_cache", lambda folder: contextlib.nullcontext())
  given = type(
    "Flags", (), {"FLAGS": type("Given", (), {"profile": "", "config": None, "steps": None, "stopped_exit_code": flag})}
  )
  monkeypatch.setattr(train, "flags", given)
  monkeypatch.setattr(train, "_report_unread_flags", lambda: None)
  with pytest.raises(SystemExit) as ended:
    train._command(tmp_path)
  assert ended.value.code == code
  assert "stopped at step 5" in capsys.readouterr().err


def test_run_leaves_its_record(finished_run: FinishedRun, tmp_path: Path) -> None:
  workdir, config, final = finished_run
  assert list((workdir / "profile").rglob("*.xplane.pb"))
  for line in read_metrics(workdir)[2:]:  # speeds are not known before
    if "loss" in line:
      shares = {activity: line[f"time/{activity}"] for activity in ("data", "step", "save", "evaluation")}
      assert 0 < sum(shares.values()) <= 1  # the other files are log lines and pictures
      assert shares["step"] > 0
      assert line["images_per_second_per_device"] == line["images_per_second"]
      assert line["compile_seconds"] > 0
      assert not {"utilisation", "device_memory_gib"} & line.keys()  # unknown for a CPU
  names = {path.name for path in workdir.iterdir()}
  assert names >= {"checkpoints", "config.json", "starts.jsonl", "metrics.jsonl", "tensorboard"}
  assert names >= {"views.png", "curves.png", "retrieval.png", "heldout.png"}
  page = (workdir / "index.html").read_text()
  assert all(f'src="{name}"' in page for name in names if name.endswith(".png"))
  assert "declip: 8 steps of 16 pairs, of 256 in scenes:train/256/24" in page
  assert "8 of 8 steps" in page
  assert f"python -m declip_jax.evaluate --workdir {workdir}\n" in page
  assert f"python -m declip_jax.export --workdir {workdir} --format open_clip --output export\n" in page
  assert f"python -m declip_jax.search --weights {workdir} --images scenes:" in page
  assert "config.batch_size: 4096 -&gt; 16" in page
  shown = [(event.step, one) for event in read_events(workdir / "tensorboard") for one in event.summary.value]
  pictures = {(step, one.tag) for step, one in shown if one.HasField("image")}
  assert pictures == {(0, "views"), (6, "curves"), (8, "curves"), (8, "heldout"), (8, "retrieval")}
  texts = {one.tag: one.tensor.string_val[0].decode() for _, one in shown if one.HasField("tensor")}
  assert json.loads(texts["config/text_summary"]) == json.loads((workdir / "config.json").read_text())
  header, _, *rows = texts["views/text_summary"].splitlines()
  assert header == f"| {' | '.join(RECIPES['declip'].text_views)} |"
  assert len(rows) == 4
  about = json.loads((workdir / "starts.jsonl").read_text().splitlines()[0])
  assert about["versions"]["jax"] == jax.__version__
  assert about["mesh"] == {"data": 1, "fsdp": 1}
  assert {"loss", "loss/clip", "loss/nns", "eval/heldout/top1", "eval/retrieval/text_to_image_r10"} <= set(final)


def test_a_picture_that_cannot_be_drawn_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def fail(*arguments: Any) -> None:
    raise ZeroDivisionError

  monkeypatch.setattr(build, "describe_run", fail)
  run = SimpleNamespace(sources=[], built=None, total_steps=8, stages=[])
  train._draw_curves(tiny_config("clip"), run, tmp_path)
  assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_finished_run_that_is_started_again_only_repeats_its_evaluation(
  finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  shutil.copytree(finished_run.workdir, tmp_path, dirs_exist_ok=True)
  before, record = read_metrics(tmp_path), (tmp_path / "config.json").read_bytes()
  other = finished_run.config.copy_and_resolve_references()
  other.optimizer.learning_rate, other.init_from.path = 1.0, "other.pt"
  again = train.train(other, tmp_path)
  messages = capsys.readouterr().err
  assert "config.init_from.path='other.pt' is not read: the run resumes from its own checkpoint" in messages
  assert "config.json is not replaced" in messages
  assert "objective" not in messages
  assert (tmp_path / "config.json").read_bytes() == record
  scores = {name: value for name, value in finished_run.final.items() if name.startswith("eval/")}
  assert {name: again[name] for name in scores} == scores
  assert again["step"] == 8
  assert read_metrics(tmp_path) == before


def test_a_run_that_lost_its_last_steps_repeats_them_bit_exact(
  finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Losses, evaluations, the last state, the bank and the position; slow tests kill processes at random moments."""
  use_mesh(monkeypatch, 1, 1)
  shutil.copytree(finished_run.workdir, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / "checkpoints" / "8")  # as if it had been killed before its end
  assert train.train(finished_run.config, tmp_path)["step"] == 8
  for ours, expected in zip(read_metrics(tmp_path), read_metrics(finished_run.workdir), strict=True):
    results = [name for name in expected if name in ("step", "learning_rate") or name.startswith(("loss", "eval/"))]
    assert {name: ours[name] for name in results} == {name: expected[name] for name in results}
  (ours, position), (expected, place) = (
    final_state(folder, finished_run.config, 8) for folder in (tmp_path, finished_run.workdir)
  )
  assert_equal(ours, expected)
  assert position == place == {"next_index": 8 * 16}


@pytest.mark.slow
def test_the_other_commands_read_a_run_back(finished_run: FinishedRun, tmp_path: Path) -> None:
  shutil.copytree(finished_run.workdir, tmp_path, dirs_exist_ok=True)
  scores = {name: value for name, value in finished_run.final.items() if name.startswith("eval/")}
  found = evaluate(tmp_path, batch_size=8)  # whatever the batch size
  assert {name: value for name, value in found.items() if name != "step"} == pytest.approx(scores)
  config = _config_of_run(tmp_path, 8)
  (tmp_path / "config.json").write_bytes(b"")  # by a full disk; the checkpoint has it, too
  assert _config_of_run(tmp_path, 8).to_dict() == config.to_dict()
  clip = load(tmp_path)
  images = [np.full((30, 20, 3), value, np.uint8) for value in (0, 128, 255)]
  assert clip.encode_image(images).shape == (3, 16)
  np.testing.assert_allclose(np.linalg.norm(clip.encode_text(["a red ring", ""]), axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_a_run_with_an_average_of_its_weights(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  """It resumes bit for bit and trains as without an average, which its evaluations and those of `evaluate` read."""
  use_mesh(monkeypatch, 1, 1)
  config = tiny_config("clip")
  config.duration.steps, config.optimizer.learning_rate = 6, 0.01
  config.checkpoint.every.steps = 3
  evals, config.evals = config.evals, ConfigDict()
  train.train(config, tmp_path / "without")
  config.evals.retrieval = evals.retrieval
  config.optimizer.ema = 0.9
  whole = train.train(config, tmp_path / "whole")
  assert "evaluations read the moving average of the weights (config.optimizer.ema=0.9)" in capsys.readouterr().err
  losses = [losses_on_disk(tmp_path / name) for name in ("whole", "without")]
  np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
  train_until(5, config, tmp_path / "killed")
  assert train.train(config, tmp_path / "killed").keys() == whole.keys()
  assert_same_end(tmp_path / "killed", tmp_path / "whole", config, 6)
  state, _ = final_state(tmp_path / "whole", config, 6)
  assert_equal(load(tmp_path / "whole").params, state.average["params"])
  scores = []
  for settings in (None, {"average": False}):
    found = evaluate(tmp_path / "whole", settings=settings)
    scores.append([found[name] for name in whole if name.startswith("eval/")])
  assert scores[0] == [value for name, value in whole.items() if name.startswith("eval/")] != scores[1]
  assert len([*(tmp_path / "whole" / "results").glob("*_step-6-average_*.json")]) == 1
  assert len([*(tmp_path / "whole" / "results").glob("*_step-6_*.json")]) == 1
  assert len([*(tmp_path / "whole" / "tensorboard" / "results").iterdir()]) == 1  # those of the average
  # A run that has no average begins one when it resumes.
  config.duration.steps, config.evals = 7, ConfigDict()
  train.train(config, tmp_path / "without")
  assert "checkpoint 6 has no average of the weights" in capsys.readouterr().err
  state, _ = final_state(tmp_path / "without", config, 7)
  assert any(
    np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (state.average["params"], state.params)), strict=True)
  )


def test_a_damaged_checkpoint_is_neither_loaded_nor_changed(finished_run: FinishedRun, tmp_path: Path) -> None:
  shutil.copytree(finished_run.workdir, tmp_path, dirs_exist_ok=True)
  flip(arrays(tmp_path / "checkpoints" / "8" / "model")[0])
  with pytest.warns(UserWarning, match=r"8.*6.*does not match its checksum"):
    assert load(tmp_path).step == 6
  with pytest.raises(ValueError, match=r"8.*does not match its checksum"):
    load(tmp_path, step=8)
  assert Checkpoints(tmp_path).steps() == [6, 8]


def slip_on_other_images() -> ConfigDict:
  """SLIP with self-supervision on images other than those with captions, as in its "decoupled" ablation."""
  config = tiny_config("slip")
  config.data.ssl_train, config.data.ssl_mixture = ("scenes:test/64/24",), (1.0,)
  return config


def test_self_supervision_on_other_images_does_not_change_the_pairs() -> None:
  config = slip_on_other_images()
  make_views = build.build(config).make_views
  pairs, others = (
    Mixture(tuple(map(open_source, specs)), needs_caption=needed)
    for specs, needed in ((config.data.train, True), (config.data.ssl_train, False))
  )
  coupled = pipeline.training_samples(pairs, make_views, 0)[5]
  decoupled = pipeline.training_samples(pairs, make_views, 0, others)[5]
  np.testing.assert_array_equal(coupled["image"][0], decoupled["image"][0])
  np.testing.assert_array_equal(coupled["text"], decoupled["text"])
  assert not np.array_equal(coupled["image"][1:], decoupled["image"][1:])


def test_sources_with_fewer_images_than_positions_in_a_batch_are_named_for_both_mixtures() -> None:
  pairs, others = (Mixture((open_source(f"scenes:test/{count}/24"),)) for count in (8, 4))
  pairs_note, others_note = prepare._notes([pairs, None, others], 16)
  assert pairs_note.startswith("scenes:test/8/24 has 8 samples for 16 positions")
  assert others_note.startswith("scenes:test/4/24 has 4 samples for 16 positions")


@pytest.mark.slow
def test_self_supervision_on_other_images_trains(tmp_path: Path) -> None:
  config = slip_on_other_images()
  config.duration.steps, config.evals = 2, ConfigDict()
  assert np.isfinite(train.train(config, tmp_path)["loss"])


def test_self_supervision_on_other_images_requires_separate_views() -> None:
  config = slip_on_other_images()
  config.objective.simclr.weight = 0.0
  with pytest.raises(ValueError, match=r"ssl_train=.*no view for self-supervision"):
    build.build(config)
  declip = tiny_config("declip")
  declip.data.ssl_train = ("scenes:test/64/24",)
  with pytest.raises(ValueError, match=r"ssl_train=.*also contrasts these views"):
    build.build(declip)


@pytest.mark.slow
def test_the_texts_that_search_the_bank_can_be_chosen() -> None:
  config = tiny_config("declip")
  for kinds, views in ((None, (0,)), (("augmented",), (1,)), (("augmented", "raw"), (1, 0))):
    config.data.neighbour_texts = kinds
    model = build.build(config).model
    assert model.views.neighbour_text == views
    batch = build.build(config).batch_shape(16)
    outputs = jax.eval_shape(lambda batch, model=model: forward(model, batch), batch)
    assert outputs.neighbour.shape == (len(views), 16, 16)


def forward(model, batch):
  params, collections = model.init(jax.random.key(0), batch)
  return model.apply_heads(params, collections, model.encode(params, collections, batch)[0])[0]


def test_a_method_without_texts_rejects_evaluations(tmp_path: Path) -> None:
  config = tiny_config("simclr")
  config.evals.heldout = config_lib.zero_shot("scenes:heldout/40/24")
  with pytest.raises(ValueError, match=r"config.evals has \['heldout'\], which compare images with texts"):
    train.train(config, tmp_path / "run")


def bare(**changes: object) -> ConfigDict:
  """CLIP without evaluations."""
  config = tiny_config("clip")
  config.evals = ConfigDict()
  config.update_from_flattened_dict(changes)
  return config


def test_a_directory_in_use_is_rejected_before_anything_is_written(tmp_path: Path) -> None:
  with workdir_lib.lock(tmp_path), pytest.raises(ValueError, match=r"in use by another run"):
    train.train(bare(), tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {"run.lock"}


def train_until(step: int, config: ConfigDict, workdir: Path, time: int = 1) -> None:
  """Trains until a run is about to write its line about a step for the `time`-th time."""
  with killed_before_line(step, time):
    train.train(config, workdir)


def poison(monkeypatch: pytest.MonkeyPatch, config: ConfigDict, batches: list[int]) -> None:
  """Makes the images of the batches with these numbers not finite."""
  mixture = Mixture(tuple(map(open_source, config.data.train)))
  samples = pipeline.training_samples(mixture, build.build(config).make_views, config.seed)
  size = config.batch_size
  images = [np.stack([samples[index]["image"] for index in range(b * size, (b + 1) * size)]) for b in batches]
  sums = jnp.array([image.sum() for image in images], jnp.uint32)

  def make_augment(*_: object) -> Callable[..., dict[str, jax.Array]]:
    def augment(batch: dict[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
      poisoned = jnp.isin(batch["image"].astype(jnp.uint32).sum(), sums)
      return {**batch, "image": jnp.where(poisoned, jnp.nan, batch["image"].astype(jnp.float32))}

    return augment

  monkeypatch.setattr("declip_jax.build.make_augment", make_augment)


@pytest.mark.slow
def test_a_run_that_diverges_rolls_back_and_skips_the_bad_data(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  use_mesh(monkeypatch, 1, 1)
  config = bare(**{"duration.steps": 10, "safety.max_skipped_steps": 2, "checkpoint.keep_last": 3})
  poison(monkeypatch, config, [4, 5])
  train.train(config, tmp_path / "diverged")
  assert "step 6: 2 consecutive steps were skipped" in (messages := capsys.readouterr().err)
  assert "rolled back to checkpoint 4, data continues at sample 112 (rollback 1 of 3)" in messages
  assert "checkpoint 6 was skipped: the run diverged" in messages
  lines = [line for line in read_metrics(tmp_path / "diverged") if "loss" in line]
  assert [line["step"] for line in lines] == list(range(1, 11))
  assert [line.get("rollbacks", 0) for line in lines] == [0] * 4 + [1] * 6
  final = final_state(tmp_path / "diverged", config, 10)
  assert final[1] == {"next_index": (10 + 3) * 16}  # two bad batches, and the one that was in flight
  assert int(final[0].skipped["total"]) == 0
  # A run that is killed after the rollback, before the next checkpoint, ends in the same state.
  train_until(6, config, tmp_path / "killed", time=2)
  train.train(config, tmp_path / "killed")
  # So does a run whose record of rollbacks makes it skip the bad data before it reads them.
  train_until(5, config, tmp_path / "informed")
  Rollbacks(tmp_path / "informed").record(2, 6, 4, {"next_index": 112})
  train.train(config, tmp_path / "informed")
  for name in ("killed", "informed"):
    assert losses_on_disk(tmp_path / name) == losses_on_disk(tmp_path / "diverged")
    other = final_state(tmp_path / name, config, 10)
    assert_equal(other[0], final[0])
    assert other[1] == final[1]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  use_mesh(monkeypatch, 1, 1)
  config = bare(**{"safety.max_skipped_steps": 3, "checkpoint.every.steps": 100})
  config.model.heads.logit_scale_init = 1000.0  # whose exponential is infinite
  with pytest.raises(FloatingPointError, match=r"3 consecutive steps.*no earlier checkpoint"):
    train.train(config, tmp_path)


@pytest.mark.slow
def test_a_run_resumes_with_the_same_losses_on_another_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(sharding, "MIN_SIZE", 256)
  config = bare()
  use_mesh(monkeypatch, 1, 1)
  train.train(config, tmp_path / "one")
  for mesh, step in (((2, 4), 3), ((4, 1), 6)):
    use_mesh(monkeypatch, *mesh)
    train_until(step, config, tmp_path / "fewer")
  use_mesh(monkeypatch, 1, 1)
  train.train(config, tmp_path / "fewer")
  fewer, one = (losses_on_disk(tmp_path / name) for name in ("fewer", "one"))
  np.testing.assert_allclose(fewer, one, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_run_of_two_epochs_sees_two_although_its_batch_doubles_after_one(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  use_mesh(monkeypatch, 1, 1)
  config = bare(**{"duration.steps": 0, "duration.epochs": 1.0, "checkpoint.every.steps": 0})
  config.data.train = ("scenes:train/96/24",)
  for name in ("views.png", "curves.png", "index.html"):  # of a run whose checkpoints are gone
    (tmp_path / name).write_bytes(b"old")
  Rollbacks(tmp_path).record(3, 8, 4, {"next_index": 128})
  train.train(config, tmp_path)
  assert not len(Rollbacks(tmp_path))
  assert all((tmp_path / name).read_bytes() != b"old" for name in ("views.png", "curves.png", "index.html"))
  config.duration.epochs, config.batch_size = 2.0, 32
  train.train(config, tmp_path)
  assert (
    "since step 6, and 16 before: durations in epochs and examples count the 96 examples" in capsys.readouterr().err
  )
  seen = [line["examples"] for line in read_metrics(tmp_path) if "loss" in line]
  assert seen == [*range(16, 97, 16), *range(128, 193, 32)]
  assert final_state(tmp_path, config, 9)[1] == {"next_index": 192}
  train.train(config, tmp_path)  # finished
  assert len(read_metrics(tmp_path)) == 9  # nothing was added


def open_config() -> ConfigDict:
  config = tiny_config("clip")
  config.batch_size, config.duration, config.model.dtype = 0, config_lib.duration(), "auto"
  config.optimizer.warmup = config_lib.duration(share=0.5)
  return config


def test_a_run_keeps_what_was_chosen_for_its_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  watchdog = SimpleNamespace(beat=lambda _: None)
  choices = partial(prepare.with_choices, open_config(), None, workdir=tmp_path, watchdog=watchdog)
  first, sources, messages = choices(steps=None)
  assert (first.batch_size, first.model.dtype, first.duration.epochs) == (32, "float32", 100)
  assert "chosen for 256 samples and 8 x cpu: model.dtype=float32, batch_size=32, " in messages[0]
  (tmp_path / "config.json").write_text(first.to_json_best_effort())
  monkeypatch.setattr(choose, "_LARGEST_BATCH_ON_CPU", 16)  # as on another machine
  assert choices(steps=None)[0].batch_size == 16  # there is no checkpoint to resume from
  (tmp_path / "checkpoints" / "8").mkdir(parents=True)
  again, _, messages = choices(steps=None)
  assert again.to_dict() == first.to_dict()
  assert "kept from the last start: model.dtype=float32, batch_size=32" in messages[0]
  assert "duration" in messages[1]  # it follows from the data
  short, _, messages = choices(steps=4)
  assert (short.batch_size, short.duration.steps, short.optimizer.warmup.steps) == (32, 4, 2)
  assert messages[2] == "--steps=4: 4 steps instead of 800"
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json.* config\.batch_size"):
    choices(steps=None)
  closed = tiny_config("clip")
  assert prepare.with_choices(closed, None, None, tmp_path, watchdog) == (closed, None, [])


@pytest.mark.slow
def test_a_try_ends_with_an_evaluation_and_resumes_with_the_values_of_its_first_start(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  config = open_config()
  train.train(config, tmp_path / "whole", steps=4)
  printed = capsys.readouterr().err
  assert "batch_size=32" in printed
  assert "--steps=4: 4 steps" in printed
  saved = config_lib.from_json((tmp_path / "whole" / "config.json").read_text())
  assert (saved.batch_size, saved.duration.steps) == (32, 4)
  lines = read_metrics(tmp_path / "whole")
  assert [line["step"] for line in lines if "eval/retrieval/mean_recall" in line] == [2, 4]
  assert [line["examples"] for line in lines if "loss" in line] == [32, 64, 96, 128]
  with killed_before_line(3):
    train.train(config, tmp_path / "killed", steps=4)
  monkeypatch.setattr(choose, "_LARGEST_BATCH_ON_CPU", 16)  # as on another machine
  train.train(config, tmp_path / "killed", steps=4)
  assert losses_on_disk(tmp_path / "killed") == losses_on_disk(tmp_path / "whole")
  assert_equal(*(final_state(tmp_path / name, saved, 4) for name in ("whole", "killed")))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch_size": 12}, r"batch_size=12: expected a positive multiple of the number of devices, 8"),
    (
      {"contrast.block": 3},
      r"contrast.block=3 does not divide the 16 candidates .*method='auto' compares on 8 devices",
    ),
    ({"contrast.block": 4, "contrast.method": "ring"}, r"contrast.block=4 does not divide the 2 candidates"),
    ({"contrast.block": 5, "contrast.method": "chunked"}, r"contrast.block=5 does not divide the 16 candidates"),
    ({"data.recipe": "blip"}, r"recipe='blip': choose one of \['clip', 'clip_color', "),
    ({"data.recipe": "clip"}, r"term 'mlm' .* needs Views.masked_text.*recipe 'clip' does not make"),
    ({"data.train": ("webdataset:/nowhere/train-*.tar",)}, r"/nowhere"),
    ({"data.train": ("webdataset:data/no_such/*.tar",)}, r"data= says where the data are"),
    ({"data.train": ()}, r"config.data.train is empty: data= is missing"),
    ({"data.train": ("parquet:/data",)}, r"parquet"),
    (
      {"objective.mlm.weight": 0.0, "data.recipe": "clip"},
      r"term 'mvs' .* needs Views.contrastive_text\[1\].*recipe 'clip'",
    ),
    (
      {"objective.nns": {"weight": 1.0, "symmetrical": True}},
      r"config.objective.nns.symmetrical: term 'nns' has the options",
    ),
    ({"data.neighbour_texts": ("raw", "masked")}, r"neighbour_texts=.*: choose one or more of \['raw', 'augmented'\]"),
    ({"optimizer.name": "adamax"}, r"config.optimizer.name='adamax': choose one of"),
    ({"optimizer.schedule": "linear"}, r"config.optimizer.schedule='linear': choose one of"),
    ({"optimizer.weight_decay": float("nan")}, r"config.optimizer.weight_decay=nan: expected a finite number"),
    ({"optimizer.multipliers": (("heads", float("inf")),)}, r"optimizer.multipliers\['heads'\]=inf"),
    ({"optimizer.decay_mask": "every"}, r"config.optimizer.decay_mask='every': choose one of"),
    ({"model.mlm_attention": "both"}, r"mlm_attention='both': choose one of"),
    ({"model.heads.norm_groups": 3}, r"norm_groups=3 .*does not divide the batch of 16"),
    ({"model.image.kind": "cnn"}, r"kind='cnn': choose one of"),
    ({"model.text.vocab_size": 49408}, r"vocab_size=49408 is too small"),
    ({"data.image_size": 20}, r"image_size=20 .*config.model.image.patch=8"),
    ({"mesh.data": 3}, r"does not fit 8 devices"),
    ({"duration.epochs": 2.0}, r"set one of steps, epochs, examples"),
    ({"optimizer.warmup.steps": 9}, r"warmup is 9 steps, longer than the run or the stage of 8 "),
    ({"model.heads.bank_groups": 3}, r"bank_groups=3 does not divide the batch of 16"),
    ({"model.heads.bank_neighbours": 33}, r"bank_neighbours=33 is more than its bank_size=32"),
    ({"objective.byol.schedule": ((0, 1.0),)}, r"config.objective.byol.schedule=.*config.objective.byol.weight is 0"),
    ({"objective.nns.schedule": ((9, 0.0), (5, 1.0))}, r"config.objective.nns.schedule=.*steps must be ascending"),
    (
      {"objective.nns.schedule": (0, 0.0)},
      r"config.objective.nns.schedule=\(0, 0.0\): expected \(step, factor\) pairs",
    ),
    ({"objective.nns.schedule": ((0, float("nan")),)}, r"config.objective.nns.schedule=.*factors must be finite"),
    ({"momentum_tower.decay": 1.5}, r"config.momentum_tower.decay=1.5: expected 0 to 1"),
    ({"objective.clip.weight": float("nan")}, r"config.objective.clip.weight=nan: expected a finite number"),
    ({"objective.simclr.temperature": 0.0}, r"config.objective.simclr.temperature=0.0: expected more than 0"),
    ({"objective.clip.label_smoothing": 2.0}, r"config.objective.clip.label_smoothing=2.0: expected 0 to 1"),
    ({"optimizer.learning_rate": float("nan")}, r"config.optimizer.learning_rate=nan: expected a finite number"),
    ({"optimizer.logit_scale_range": (6.0, 3.0)}, r"logit_scale_range=\(6.0, 3.0\): expected two ascending numbers"),
    ({"objective.mim.weight": 1.0}, r"term 'mim' .*needs Views.masked_image.*recipe 'declip'"),
    ({"model.heads.bank_size": 8}, r"bank_size=8: a step adds 16 texts, so raise bank_size"),
    ({"data.mixture": (0.5, 0.5)}, r"a positive weight for each of 1 source"),
    ({"data.augment_on": "gpu"}, r"augment_on='gpu': choose 'host' or 'device'"),
    ({"data.engine": "pillow"}, r"engine='pillow': choose one of \['exact', 'fast'\]"),
    ({"data.text_operations": ("translate",)}, r"text_operations=.*choose some of \['delete', 'insert'"),
    ({"model.text.tokenizer": "bert"}, r"tokenizer='bert': choose 'openai', 'huggingface:FILE'"),
    ({"data.weak_scale": (0.5, 3.0)}, r"weak_scale=\(0.5, 3.0\): .* 0 to 1"),
    ({"data.strong_scale": (0.5,)}, r"strong_scale=\(0.5,\): .*two"),
    ({"data.jitter": (0.4,)}, r"jitter=\(0.4,\): .*brightness, contrast, saturation"),
    ({"data.flip_probability": 2.0}, r"flip_probability=2.0: .*0 to 1"),
    ({"data.caption_weights": (-1, 2)}, r"config.data.caption_weights=\(-1, 2\): expected weights of 0 or more"),
    ({"data.templates": ("a photo",)}, r"config.data.templates: prompt template 'a photo' needs one {}"),
    ({"data.interpolation": "nearest"}, r"interpolation='nearest': expected one of \['bilinear', 'bicubic'\]"),
    ({"data.workers": -1}, r"config.data.workers=-1: expected 0 or more, or None"),
    ({"data.max_pixels": 0}, r"config.data.max_pixels=0: expected 1 to 178956970"),
    ({"data.max_bad": 5.0}, r"config.data.max_bad=5.0: expected .*0 to 1"),
    ({"data.image_size": 0}, r"config.data.image_size=0: expected 1 or more"),
    ({"log_every": -1}, r"config.log_every=-1: expected 0 or more"),
    ({"model.dtype": "fp16"}, r"config.model.dtype='fp16': expected one of .*'bfloat16'"),
    ({"seed": -1}, r"config.seed=-1: expected 0 or more"),
    ({"safety.spike_factor": 0.5}, r"config.safety.spike_factor=0.5: expected 0, or more than 1"),
    ({"safety.checkpoint_minutes": -1.0}, r"config.safety.checkpoint_minutes=-1.0: expected 0 or more"),
    ({"checkpoint.keep_every.steps": -1}, r"config.checkpoint.keep_every=.*: set one of"),
    ({"model.text.eot": 3}, r"eot=3: config.model.text.tokenizer='openai' ends texts with 49407"),
  ],
)
def test_a_bad_config_is_rejected_before_compiling(change: dict, message: str, tmp_path: Path) -> None:
  config = tiny_config("declip")
  config.update_from_flattened_dict(change)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run" / "checkpoints").exists()
