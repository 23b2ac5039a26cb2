"""Trackers receive what a run records, cannot end or delay it, and keep its identity.

The libraries are real and offline; `make test-trackers` installs them.
"""

from collections.abc import Callable
import contextlib
import json
import logging
from pathlib import Path
import sqlite3
import sys
import threading
import time
from typing import Any

from fake_training import FakeTraining
import numpy as np
from PIL import Image
import pytest
from record_files import read_events, scalars, wandb_records
from runs import Killed, killed_before_line

from declip_jax import build, config
from declip_jax.extras import is_installed
from declip_jax.reporting.metrics import MetricWriter
from declip_jax.reporting.trackers import TrackedRun, Tracker, open_trackers
from declip_jax.reporting.trackers.background import Background
from declip_jax.reporting.trackers.base import run_id
from declip_jax.reporting.trackers.libraries import TRACKERS
from declip_jax.reporting.trackers.tensorboard import TENSORBOARD

CONFIG = {"seed": 1, "data": {"train": ["a.csv"], "templates": []}}


def picture(path: Path, level: int = 7) -> Path:
  Image.fromarray(np.full((4, 6, 3), level, np.uint8)).save(path)
  return path


class Recorder(Tracker):
  """Keeps its calls."""

  def __init__(self) -> None:
    self.calls: list[tuple[Any, ...]] = []

  def log(self, step: int, values: Any) -> None:
    self.calls.append(("log", step, dict(values)))

  def picture(self, step: int, name: str, path: Path) -> None:
    self.calls.append(("picture", step, name, path.name))

  def text(self, step: int, name: str, text: str) -> None:
    self.calls.append(("text", step, name, text))

  def roll_back(self, step: int) -> None:
    self.calls.append(("roll_back", step))

  def close(self, finished: bool) -> None:
    self.calls.append(("close", finished))


def test_a_run_keeps_its_identity_and_a_new_one_has_another(tmp_path: Path) -> None:
  first = run_id(tmp_path, 0)
  assert len(first) == 32
  assert run_id(tmp_path, 5) == first
  assert run_id(tmp_path, 0) != first
  (tmp_path / "run_id.txt").write_text("\n")
  assert len(run_id(tmp_path, 5)) == 32


def test_the_writer_gives_trackers_everything_and_each_picture_once(tmp_path: Path) -> None:
  picture(tmp_path / "old.png")
  tracker = Recorder()
  with contextlib.suppress(Killed), MetricWriter(tmp_path, resume_step=2, trackers=[tracker]) as writer:
    writer.write(3, {"loss": np.float32(0.5)})
    writer.pictures(3)
    picture(tmp_path / "curves.png")
    writer.pictures(4)
    writer.pictures(5)
    writer.text(5, "views", "| raw |")
    writer.roll_back(2)
    raise Killed
  assert tracker.calls == [
    ("log", 3, {"loss": 0.5}),
    ("picture", 4, "curves", "curves.png"),
    ("text", 5, "views", "| raw |"),
    ("roll_back", 2),
    ("close", False),
  ]


def test_tensorboard_has_scalars_pictures_texts_and_config_and_hides_steps_that_did_not_happen(tmp_path: Path) -> None:
  trackers = open_trackers({}, TrackedRun("1" * 32, tmp_path, CONFIG, 20))
  with MetricWriter(tmp_path, resume_step=20, trackers=trackers) as writer:
    for step in (30, 40):
      writer.write(step, {"loss": step / 10, "loss/clip": 1.0})
    encoded = picture(tmp_path / "views.png").read_bytes()
    writer.pictures(40)
    (tmp_path / "odd.png").write_text("no picture")
    writer.pictures(40)
    writer.text(40, "views", "| raw |")
    writer.roll_back(30)
  events = read_events(tmp_path / TENSORBOARD)
  numbers = [event for event in events if any(value.HasField("simple_value") for value in event.summary.value)]
  assert scalars(numbers) == [(30, "loss", 3.0), (30, "loss/clip", 1.0), (40, "loss", 4.0), (40, "loss/clip", 1.0)]
  assert [event.step for event in events if event.HasField("session_log")] == [21, 31]
  values = [(event.step, value) for event in events for value in event.summary.value]
  ((step, shown),) = [(step, value) for step, value in values if value.HasField("image")]
  assert (step, shown.tag, shown.image.width, shown.image.height) == (40, "views", 6, 4)
  assert shown.image.encoded_image_string == encoded
  texts = {value.tag: (step, value.tensor.string_val[0].decode()) for step, value in values if value.HasField("tensor")}
  assert texts["views/text_summary"] == (40, "| raw |")
  step, text = texts["config/text_summary"]
  assert (step, json.loads(text)) == (20, CONFIG)


class Broken(Tracker):
  def log(self, step: int, values: Any) -> None:
    raise ConnectionError(f"step {step}")


class Hanging(Tracker):
  """Hangs in its first call, for longer than the test takes."""

  def log(self, step: int, values: Any) -> None:
    time.sleep(5)


class Exiting(Tracker):
  def log(self, step: int, values: Any) -> None:
    sys.exit(f"step {step}")


def refuse() -> Tracker:
  raise PermissionError("no key")


@pytest.mark.parametrize(
  ("opens", "words"), [(Broken, "step 1"), (Exiting, "step 1"), (Hanging, "0.2 s"), (refuse, "no key")]
)
def test_a_tracker_that_fails_or_hangs_gives_one_warning_and_no_delay(
  opens: Callable[[], Tracker], words: str, caplog: pytest.LogCaptureFixture
) -> None:
  begin = time.monotonic()
  tracker = Background("mine", opens, seconds=0.2)
  for step in range(1, 5):
    tracker.log(step, {})
  tracker.close(True)
  tracker.close(True)
  assert time.monotonic() - begin < 2
  (record,) = (record for record in caplog.records if "config.trackers.mine" in record.getMessage())
  assert words in record.getMessage()
  assert record.levelno == logging.WARNING


def test_calls_that_a_tracker_cannot_keep_up_with_are_dropped(
  caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr("declip_jax.reporting.trackers.background._WAITING", 3)
  begun, release, recorder = threading.Event(), threading.Event(), Recorder()

  class Slow(Recorder):
    def log(self, step: int, values: Any) -> None:
      begun.set()
      release.wait()
      recorder.log(step, values)

  tracker = Background("slow", Slow)
  tracker.log(1, {})
  begun.wait()
  begin = time.monotonic()
  for step in range(2, 9):
    tracker.log(step, {})
  assert time.monotonic() - begin < 1
  release.set()
  tracker.close(True)
  assert [call[1] for call in recorder.calls] == [1, 2, 3, 4]
  assert caplog.text.count("config.trackers.slow") == 1


def test_a_run_tells_trackers_about_rollbacks_repeated_steps_and_an_early_end(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  seen: list[Recorder] = []

  def with_tracker(init: Any, *args: Any, **kwargs: Any) -> None:
    seen.append(Recorder())
    init(*args, **kwargs, trackers=[seen[-1]])

  init = MetricWriter.__init__
  monkeypatch.setattr(MetricWriter, "__init__", lambda *args, **kwargs: with_tracker(init, *args, **kwargs))
  with killed_before_line(7):
    FakeTraining().run(tmp_path)
  FakeTraining(poisoned=(6,), max_skipped_steps=1).run(tmp_path)
  steps = [[call[1] for call in tracker.calls if call[0] == "log"] for tracker in seen]
  assert steps[0] == [1, 2, 3, 4, 5, 6]
  assert steps[1] == [7, 7, 8]
  assert seen[0].calls[-1] == ("close", False)
  assert ("roll_back", 6) in seen[1].calls
  assert seen[1].calls[-1] == ("close", True)


def test_config_names_trackers_and_missing_libraries_and_a_users_own_is_a_function(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  c = config.default()
  assert build.make_trackers(c.trackers) == {}

  def open_mine(run: TrackedRun) -> Tracker:
    return Recorder()

  c.trackers.mine = open_mine
  assert build.make_trackers(c.trackers) == {"mine": open_mine}
  saved = config.from_json(c.to_json_best_effort())
  with pytest.raises(ValueError, match="config.trackers.mine="):
    build.make_trackers(saved.trackers)
  old = json.loads(config.default().to_json_best_effort())
  del old["trackers"]
  assert set(config.from_json(json.dumps(old)).trackers) == set(TRACKERS)
  for name in TRACKERS:
    c = config.default()
    c.trackers[name] = "project"
    monkeypatch.setattr(build, "is_installed", lambda library: True)
    assert [*build.make_trackers(c.trackers)] == [name]
    monkeypatch.setattr(build, "is_installed", lambda library: False)
    with pytest.raises(ValueError, match=rf"config.trackers.{name}='project'.*pip install .*\[{name}\]"):
      build.make_trackers(c.trackers)
  (tmp_path / "folder_of_files").mkdir()
  monkeypatch.syspath_prepend(str(tmp_path))
  assert [is_installed(name) for name in ("numpy", "folder_of_files", "no_such_library")] == [True, False, False]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """A folder for the files of all libraries, none of which uses the network."""
  monkeypatch.chdir(tmp_path)
  settings = {"WANDB_MODE": "offline", "WANDB_CONFIG_DIR": "wandb_config", "WANDB_CACHE_DIR": "wandb_cache"}
  settings |= {"WANDB_DATA_DIR": "wandb_data", "WANDB__DISABLE_STATS": "true", "WANDB_ERROR_REPORTING": "false"}
  settings |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
  settings |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
  for name, value in settings.items():
    monkeypatch.setenv(name, value)
  return tmp_path


TEXT = "| raw |\n| --- |\n| a red circle |"


def track(name: str, folder: Path) -> str:
  """Gives a tracker a run that is killed after step 3 and resumes from step 2; returns its identity."""
  workdir = folder / "run"
  workdir.mkdir()
  for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
    run = TrackedRun(run_id(workdir, start), workdir, {**CONFIG, "seed": start}, start)
    tracker = Background(name, lambda run=run: TRACKERS[name](run, project="project"))
    with contextlib.suppress(Killed), MetricWriter(workdir, resume_step=start, trackers=[tracker]) as writer:
      if not start:
        picture(workdir / "views.png")
        writer.pictures(0)
        writer.text(0, "views", TEXT)
      for step in steps:
        writer.write(step, {"loss": step + start, "loss/clip": np.nan if step == 1 else 1.0})
      if not start:
        raise Killed
      writer.write(4, {"eval/own@1/top1": 0.5})
  return run.id


# Losses at the steps above; step 3 was logged before the kill and after it.
LOSSES = [(1, 1.0), (2, 2.0), (3, 3.0), (3, 5.0), (4, 6.0)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the library itself
def test_weights_and_biases_offline(offline: Path, caplog: pytest.LogCaptureFixture) -> None:
  pytest.importorskip("wandb")
  identity = track("wandb", offline)
  from wandb.proto import wandb_internal_pb2  # after `init`, as in a run

  first, second = sorted((offline / "run" / "wandb").glob("offline-run-*"))

  def records(folder: Path) -> list[Any]:
    """Those of a run up to its end, which a process of the library's own may write after `finish` has returned."""
    (file,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 10
    while True:
      found = [wandb_internal_pb2.Record.FromString(content) for content in wandb_records(file)]
      if any(record.HasField("exit") for record in found) or time.monotonic() > deadline:
        return found
      time.sleep(0.05)

  losses, seeds, exits, items = [], [], [], {}
  for folder in (first, second):
    for record in records(folder):
      if record.HasField("run"):
        assert (record.run.run_id, record.run.project, record.run.display_name) == (identity, "project", "run")
      seeds += [update.value_json for update in record.config.update if update.key == "seed"]
      exits += [record.exit.exit_code] if record.HasField("exit") else []
      values = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
      losses += [(values["step"], values["loss"])] if "loss" in values else []
      items |= values
      if record.HasField("metric"):
        assert (record.metric.glob_name, record.metric.step_metric) == ("*", "step")
  assert losses == LOSSES
  assert seeds == ["0", "2"]
  assert exits == [1, 0]
  assert items["eval/own@1/top1"] == 0.5
  files = first / "files"
  assert (files / items["views.path"]).read_bytes() == (offline / "run" / "views.png").read_bytes()
  assert "a red circle" in (files / items["views_text.path"]).read_text()
  assert "config.trackers" not in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the library itself
def test_mlflow_with_its_local_store(offline: Path, caplog: pytest.LogCaptureFixture) -> None:
  pytest.importorskip("mlflow")
  identity = track("mlflow", offline)
  from mlflow import MlflowClient

  client = MlflowClient()
  (run,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
  assert run.data.tags["declip_jax.run_id"] == identity
  assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
  assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")] == LOSSES
  assert np.isnan(client.get_metric_history(run.info.run_id, "loss/clip")[0].value)
  assert run.data.metrics["eval/own_1/top1"] == 0.5  # MLflow allows no "@"
  assert run.data.params == {"seed": "0", "data.train": "['a.csv']", "data.templates": "[]"}
  folder = Path(client.download_artifacts(run.info.run_id, ""))
  assert json.loads((folder / "config.json").read_text()) == {**CONFIG, "seed": 2}
  assert (folder / "views.md").read_text() == TEXT
  (image,) = (folder / "images").glob("views*.png")
  assert Image.open(image).size == (6, 4)
  assert "config.trackers" not in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the library itself
def test_trackio_with_its_local_store(offline: Path, caplog: pytest.LogCaptureFixture) -> None:
  pytest.importorskip("trackio")
  identity = track("trackio", offline)
  with contextlib.closing(sqlite3.connect(offline / "trackio" / "project.db")) as store:
    rows = store.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
    ((config_json,),) = store.execute("select config from configs").fetchall()
  assert {name for name, _, _, _ in rows} == {f"run-{identity[:8]}"}
  assert len({number for _, number, _, _ in rows}) == 1
  values = [(step, json.loads(metrics)) for _, _, step, metrics in rows]
  assert [(step, row["loss"]) for step, row in values if "loss" in row] == LOSSES
  assert values[-1] == (4, {"eval/own@1/top1": 0.5})
  assert values[1][1]["views_text"]["_value"] == TEXT
  assert (offline / "trackio" / "media" / values[0][1]["views"]["file_path"]).exists()
  assert json.loads(config_json).items() >= {**CONFIG, "seed": 2}.items()
  assert "config.trackers" not in caplog.text
