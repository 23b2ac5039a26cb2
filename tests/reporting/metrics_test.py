"""Tests of `declip_jax.reporting.metrics`: the file survives crashes, the line fits the screen, the speed is honest."""

import contextlib
import io
import json
import math
import os
import pty
import struct
import termios

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from declip_jax.reporting.metrics import MetricWriter, Progress, read_metrics, summary_table


def write_rows(workdir, steps, resume_step=0):
  with MetricWriter(workdir, resume_step=resume_step) as writer:
    for step in steps:
      writer.write(step, {"loss": step / 10, "loss/clip": 1.0})


def steps_in(workdir):
  return [row["step"] for row in read_metrics(workdir)]


def test_round_trip_is_exact_and_strict_json(tmp_path):
  values = {"loss": np.float32(0.1), "a": np.array([3]), "nan": math.nan, "up": math.inf, "down": -math.inf}
  with MetricWriter(tmp_path / "new" / "run", resume_step=0) as writer:
    writer.write(np.int64(7), values)
  [line] = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()

  def refuse(word):
    raise AssertionError(f"{word} is not JSON")

  written = json.loads(line, parse_constant=refuse)
  assert (written["nan"], written["up"], written["down"]) == ("NaN", "Infinity", "-Infinity")
  [row] = read_metrics(tmp_path / "new" / "run")
  assert row["step"] == 7
  assert row["time"] > 1e9
  assert {name: row[name] for name in values if name != "nan"} == {
    "loss": float(np.float32(0.1)),
    "a": 3.0,
    "up": math.inf,
    "down": -math.inf,
  }
  assert math.isnan(row["nan"])


def test_a_line_is_on_disk_before_write_returns(tmp_path):
  with MetricWriter(tmp_path, resume_step=0) as writer:
    for step in (1, 2):
      writer.write(step, {"loss": 1.0})
      assert steps_in(tmp_path)[-1] == step


def test_resuming_drops_the_steps_that_did_not_happen(tmp_path):
  write_rows(tmp_path, [10, 20, 30, 40])
  before = (tmp_path / "metrics.jsonl").read_text().splitlines()[:2]
  write_rows(tmp_path, [30, 50], resume_step=20)
  assert steps_in(tmp_path) == [10, 20, 30, 50]
  assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:2] == before
  assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_crash_while_resuming_leaves_the_old_file(tmp_path, monkeypatch):
  write_rows(tmp_path, [10, 20])

  def crash(*_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "replace", crash)
  with pytest.raises(OSError, match="disk full"):
    MetricWriter(tmp_path, resume_step=10)
  assert steps_in(tmp_path) == [10, 20]


def test_a_file_torn_anywhere_loses_its_last_line_only(tmp_path):
  write_rows(tmp_path, [10, 20])
  path = tmp_path / "metrics.jsonl"
  whole = path.read_bytes()
  first = whole.index(b"\n")
  for size in range(len(whole)):
    path.write_bytes(whole[:size])
    assert steps_in(tmp_path) == ([10] if size > first else []), size
  write_rows(tmp_path, [20], resume_step=10)
  assert steps_in(tmp_path) == [10, 20]


@pytest.mark.parametrize("broken", ['{"step": 1', "[1]", '{"step": "x"}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path, broken):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + broken + '\n{"step": 3}\n')
  with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*found"):
    read_metrics(tmp_path)


def test_only_an_enabled_writer_touches_the_disk(tmp_path):
  with MetricWriter(tmp_path / "run", resume_step=0, enabled=False) as writer:
    writer.write(1, {"loss": 1.0})
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(FileNotFoundError):
    read_metrics(tmp_path / "run")


@pytest.mark.parametrize("values", [{"loss": np.ones(2)}, {"loss": []}, {"step": 1.0}, {"time": 1.0}])
def test_what_is_not_one_number_is_refused_by_name(tmp_path, values):
  with MetricWriter(tmp_path, resume_step=0) as writer:
    with pytest.raises(ValueError, match=next(iter(values))):
      writer.write(1, values)
    writer.close()  # closing twice is fine
  assert read_metrics(tmp_path) == []


def test_a_bucket_is_refused_rather_than_made_a_directory():
  with pytest.raises(ValueError, match="gs://bucket/run"):
    MetricWriter("gs://bucket/run", resume_step=0)


class FullDisk(io.RawIOBase):
  """Takes a few bytes at a time, or none."""

  def __init__(self, path):
    self.path, self.full = path, False

  def write(self, data):
    if self.full:
      raise OSError(28, "No space left on device")
    with self.path.open("ab") as file:
      return file.write(bytes(data[:7]))


def test_on_a_full_disk_lines_wait_for_space(tmp_path, caplog):
  disk = FullDisk(tmp_path / "metrics.jsonl")
  with MetricWriter(tmp_path, resume_step=0) as writer:
    writer._lines._file = disk
    writer.write(1, {"loss": 1.0})
    disk.full = True
    for step in (2, 3):
      writer.write(step, {"loss": 1.0})
    assert steps_in(tmp_path) == [1]
    disk.full = False
    writer.write(4, {"loss": 1.0})
    assert steps_in(tmp_path) == [1, 2, 3, 4]
  assert caplog.text.count("metrics.jsonl cannot be written, for now: [Errno 28] No space left on device") == 1


def read_events(directory):
  [path] = directory.iterdir()
  data, events, position = path.read_bytes(), [], 0
  while position < len(data):  # a record: length, its checksum, the event, its checksum
    (length,) = struct.unpack_from("<Q", data, position)
    events.append(Event.FromString(data[position + 12 : position + 12 + length]))
    position += length + 16
  return events


def test_tensorboard_holds_the_scalars_and_hides_the_steps_that_did_not_happen(tmp_path):
  write_rows(tmp_path, [30, 40], resume_step=20)
  events = read_events(tmp_path / "tensorboard")
  scalars = [(e.step, v.tag, round(v.simple_value, 3)) for e in events for v in e.summary.value]
  assert scalars == [(30, "loss", 3.0), (30, "loss/clip", 1.0), (40, "loss", 4.0), (40, "loss/clip", 1.0)]
  assert [e.step for e in events if e.HasField("session_log")] == [21]


class Screen(io.StringIO):
  def isatty(self):
    return True

  def states(self):
    """What the line showed, one string per redraw."""
    return self.getvalue().split("\r\x1b[K")


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


METRICS = {"loss": 3.14159, "loss/clip": 4.5, "loss/simsiam": np.float32(-0.75), "lr": 1e-3, "temperature": 0.07}


def run(progress, clock, steps, seconds, metrics=METRICS):
  for step in steps:
    clock.now += seconds
    progress.update(step, metrics, 0.25)


def test_the_line_tells_everything():
  clock, log = Clock(), io.StringIO()
  progress = Progress(10_000, 2000, 512, stream=log, clock=clock)
  run(progress, clock, [2010, 2020], 20.0)
  assert log.getvalue().splitlines()[1] == (
    "step 2,020/10,000 20.2%  loss 3.142  4h 26m left  256 images/s  wait 25%  clip 4.500  simsiam -0.750"
    "  lr 1.00e-03  temperature 0.0700"
  )


def test_the_line_tells_each_device_and_the_share_of_the_peak():
  clock, log = Clock(), io.StringIO()
  progress = Progress(10_000, 2000, 512, devices=8, peak=640.0, stream=log, clock=clock)
  assert progress.utilisation is None
  run(progress, clock, [2010, 2020], 20.0)
  assert "  256 images/s (32 a device)  40.0% of peak  wait 25%" in log.getvalue()
  assert progress.utilisation == pytest.approx(0.4)


def test_after_going_back_the_speed_is_that_of_the_steps():
  clock = Clock()
  progress = Progress(1000, 0, 64, enabled=False, clock=clock)
  run(progress, clock, range(1, 50), 0.5)
  progress.go_back(20)
  clock.now += 30
  run(progress, clock, range(21, 60), 0.5)
  assert progress.images_per_second == pytest.approx(128)


def test_going_back_drops_lines_as_resuming_does(tmp_path):
  with MetricWriter(tmp_path, resume_step=0) as writer:
    for step in (1, 2, 3):
      writer.write(step, {"loss": step})
    writer.go_back(1)
    writer.write(2, {"loss": 20})
  assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1), (2, 20)]
  with MetricWriter(tmp_path / "other", resume_step=0, enabled=False) as writer:
    writer.go_back(1)
  assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("steps", "left"), [(11, "0m 10s"), (200, "3m 19s"), (8001, "2h 13m"), (864_001, "10d 0h")])
def test_time_left(steps, left):
  clock, log = Clock(), io.StringIO()
  run(Progress(steps + 1, 0, 1, stream=log, clock=clock, min_interval=0), clock, [1, 2], 1.0)
  assert f"  {left} left  " in log.getvalue()


def test_speed_leaves_out_compilation_and_pauses():
  clock = Clock()
  progress = Progress(1000, 0, 64, enabled=False, clock=clock)
  with progress.pause():
    clock.now += 50  # an evaluation before the first step
  run(progress, clock, [1], 300.0)  # compiles
  assert math.isnan(progress.images_per_second)
  run(progress, clock, range(2, 50), 0.5)
  with contextlib.suppress(KeyboardInterrupt), progress.pause():
    clock.now += 1000
    raise KeyboardInterrupt
  run(progress, clock, range(50, 60), 0.5)
  assert progress.images_per_second == pytest.approx(128)


def test_speed_follows_a_change_within_minutes_and_not_at_once():
  clock = Clock()
  progress = Progress(1000, 0, 10, enabled=False, clock=clock)
  run(progress, clock, range(1, 100), 1.0)
  run(progress, clock, [101], 1.0)  # two steps in one second
  assert 10 < progress.images_per_second < 11
  run(progress, clock, range(103, 400, 2), 1.0)
  assert progress.images_per_second == pytest.approx(20, rel=0.01)


def test_a_log_file_gets_few_plain_lines_and_the_last_one():
  clock, log = Clock(), io.StringIO()
  with Progress(105, 0, 8, stream=log, clock=clock, min_interval=10) as progress:
    run(progress, clock, range(1, 106), 1.0)
    progress.message("saved")
  lines = log.getvalue().splitlines()
  assert [line.split("/")[0] for line in lines[:-1]] == [f"step {step}" for step in [*range(1, 102, 10), 105]]
  assert lines[-1] == "saved"
  assert "\r" not in log.getvalue()
  assert "\x1b" not in log.getvalue()


def test_a_message_stands_above_the_line(monkeypatch):
  monkeypatch.setenv("COLUMNS", "200")
  clock, screen = Clock(), Screen()
  with Progress(10, 0, 8, stream=screen, clock=clock) as progress:
    progress.message("before")
    run(progress, clock, [1], 1.0)
    progress.message("between")
  line = screen.states()[0].removeprefix("before\n")
  assert line.startswith("step 1/10 10.0%")
  assert screen.states() == ["before\n" + line, "between\n" + line + "\n"]


def test_a_screen_is_not_redrawn_faster_than_the_eye(monkeypatch):
  clock, screen = Clock(), Screen()
  run(Progress(10_000, 0, 8, stream=screen, clock=clock), clock, range(1, 1001), 0.001)
  assert 9 <= len(screen.states()) <= 11


@pytest.mark.parametrize("columns", [5, 30, 60, 80, 120])
def test_the_line_is_narrower_than_the_terminal(columns):
  clock = Clock()
  controller, terminal = pty.openpty()
  termios.tcsetwinsize(terminal, (24, columns))
  with open(terminal, "w") as stream, Progress(10_000, 0, 512, stream=stream, clock=clock) as progress:
    run(progress, clock, [1, 2, 3], 20.0)
  shown = b""
  with contextlib.suppress(OSError):  # which is how Linux ends a terminal
    while chunk := os.read(controller, 10_000):
      shown += chunk
  os.close(controller)
  lines = shown.decode().rstrip().split("\r\x1b[K")
  assert len(lines) == 3
  assert all(0 < len(line) < columns for line in lines)
  assert lines[-1] == "step 3/10,000 0.0%"[: columns - 1] or "  " in lines[-1]
  assert ("wait 25%" in lines[-1]) == (columns >= 80)


def test_a_disabled_line_prints_nothing():
  clock, log = Clock(), io.StringIO()
  with Progress(10, 0, 8, enabled=False, stream=log, clock=clock) as progress:
    run(progress, clock, range(1, 11), 20.0)
    progress.message("hidden")
  assert log.getvalue() == ""


def test_missing_and_broken_metrics_do_not_stop_the_line():
  clock, log = Clock(), io.StringIO()
  run(Progress(10, 0, 8, stream=log, clock=clock), clock, [1], 1.0, {"loss": math.nan, "eval/zero_shot/top1": 0.5})
  assert log.getvalue() == "step 1/10 10.0%  loss nan  wait 25%\n"


def test_summary_table_is_aligned():
  rows = {"model": "ViT-B/32", "steps": 100_000, "images per second": np.float32(5231.3), "top1": 0.3281234, "ok": True}
  assert summary_table(rows).splitlines() == [
    "model              ViT-B/32",
    "steps              100,000",
    "images per second  5,231",
    "top1               0.3281",
    "ok                 True",
  ]
  assert summary_table({}) == ""
