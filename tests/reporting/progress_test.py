"""The progress display on terminals and in log files; time is simulated."""

from collections.abc import Callable, Iterable
import contextlib
import io
import math
import os
import pty
import re
import subprocess
import sys
import termios
from typing import Any, TextIO

from absl import logging
import numpy as np
import pytest

from declip_jax.reporting import progress


class Screen(io.StringIO):
  """A stream that claims to be a terminal."""

  def isatty(self) -> bool:
    return True

  def frames(self) -> list[str]:
    """The contents of the line, one string per redraw, without padding."""
    return [frame.rstrip() for frame in self.getvalue().split("\r") if frame.strip()]

  def shown(self) -> list[str]:
    """The final lines on the screen."""
    lines = []
    for written in self.getvalue().split("\n"):
      line = ""
      for frame in written.split("\r"):
        line = frame + line[len(frame) :]
      lines.append(line.rstrip())
    return lines


class Clock:
  def __init__(self) -> None:
    self.now = 100.0

  def __call__(self) -> float:
    return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
  clock = Clock()
  monkeypatch.setattr("tqdm.std.time", clock)
  return clock


def consume(clock: Clock, count: int, seconds: float, stream: io.StringIO, total: int | None) -> None:
  for _ in progress.track(iter(range(count)), "indexing a list", total, "samples", stream=stream):
    clock.now += seconds


def lost_pipe() -> TextIO:
  reader, writer = os.pipe()
  os.close(reader)
  return open(writer, "w")


def lost_terminal() -> TextIO:
  main, terminal = pty.openpty()
  os.set_blocking(terminal, False)
  stream = open(terminal, "w")  # noqa: SIM115
  assert progress.is_live(stream)
  os.close(main)
  return stream


def full_disk() -> TextIO:
  return open("/dev/full", "w")


def closed() -> TextIO:
  stream = open(os.devnull, "w")  # noqa: SIM115
  stream.close()
  return stream


@pytest.mark.parametrize(
  "lose",
  [lost_pipe, lost_terminal, full_disk, closed, lambda: None],
  ids=["pipe", "terminal", "disk", "closed", "none"],
)
def test_a_lost_display_loses_only_the_display(lose: Callable[[], TextIO], monkeypatch: pytest.MonkeyPatch) -> None:
  stream = lose()
  monkeypatch.setattr(sys, "stderr", stream)
  monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
  monkeypatch.setattr(progress, "_REDRAW_SECONDS", 0.0)
  monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
  assert list(progress.track(range(3), "indexing")) == [0, 1, 2]
  with progress.TrainingProgress(3, 16, min_interval=0.0) as line:
    for step in range(1, 4):
      line.update(step, {"loss": 1.0})
      line.message("a message")
  progress.message("another message")
  with contextlib.suppress(OSError):
    if stream is not None:
      stream.close()


def test_a_bar_notifies_listeners_only_when_it_advances() -> None:
  heard: list[str] = []
  with progress.listening(heard.append), progress.Bar("indexing", 9, stream=io.StringIO()) as bar:
    bar.set(4)
    bar.set(4)
    bar.update()
  with progress.Bar("later", stream=io.StringIO()) as bar:
    bar.update()
  assert heard == ["indexing", "indexing"]


def test_a_log_file_gets_a_plain_line_now_and_then_and_the_final_count(clock: Clock) -> None:
  consume(clock, 1234, 0.025, log := io.StringIO(), 1234)
  assert log.getvalue().splitlines() == [
    "indexing a list: 400/1,234 samples (32%), 40.00 samples/s, 00:20 left",
    "indexing a list: 800/1,234 samples (65%), 40.00 samples/s, 00:10 left",
    "indexing a list: 1,200/1,234 samples (97%), 40.00 samples/s, 00:00 left",
    "indexing a list: 1,234/1,234 samples (100%), 40.00 samples/s, 00:00 left",
  ]


def test_a_terminal_gets_one_line_that_is_redrawn(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("COLUMNS", "100")
  consume(clock, 32, 0.0625, screen := Screen(), 32)
  *frames, last = screen.frames()
  assert "\n" not in "".join(frames)
  assert len(frames) == 9  # one every 0.125 s after the first second
  assert all(len(frame) <= 100 for frame in frames)
  assert last.startswith("indexing a list: 100%|")
  assert last.endswith("| 32/32 samples [00:02<00:00, 16.00 samples/s]")
  assert screen.getvalue().endswith("\n")


@pytest.mark.parametrize("stream", [io.StringIO(), Screen()])
def test_work_shorter_than_a_second_shows_nothing(clock: Clock, stream: io.StringIO) -> None:
  consume(clock, 9, 0.1, stream, 9)
  assert stream.getvalue() == ""


def test_the_total_is_the_length_if_there_is_one(clock: Clock) -> None:
  log = io.StringIO()
  for _ in progress.track([1, 2, 3], "reading", unit="files", stream=log):
    clock.now += 20
  assert log.getvalue().splitlines()[0] == "reading: 1/3 files (33%), 0.05 files/s, 00:40 left"
  consume(clock, 1, 20, log := io.StringIO(), None)
  assert log.getvalue().splitlines()[0] == "indexing a list: 1 sample [00:20, 0.05 samples/s]"


def test_a_bar_is_set_to_a_count_that_others_report(clock: Clock) -> None:
  log = io.StringIO()
  with progress.Bar("converting", 1000, "samples", initial=100, stream=log) as bar:
    for count in (100, 300, 500):
      clock.now += 10
      bar.set(count)
    bar.update(500)
  bar.close()
  assert [line.split(" samples ")[0] for line in log.getvalue().splitlines()] == [
    *(f"converting: {count}/1,000" for count in (300, 500)),
    "converting: 1,000/1,000",
  ]


def test_the_clock_of_a_bar_can_be_stopped(clock: Clock) -> None:
  log = io.StringIO()
  with progress.Bar("encoding", 100, "images", stream=log) as bar:
    for _ in range(2):
      bar.pause()
      bar.pause()
      clock.now += 500  # of other work
      bar.resume()
      bar.resume()
      clock.now += 10
      bar.update(20)
    bar.pause()
    clock.now += 500
  assert [*dict.fromkeys(log.getvalue().splitlines())] == [
    "encoding: 20/100 images (20%), 2.00 images/s, 00:40 left",
    "encoding: 40/100 images (40%), 2.00 images/s, 00:30 left",
  ]


def test_the_bar_ends_if_the_loop_does_not(clock: Clock) -> None:
  screen = Screen()
  items = progress.track(range(10), "reading", stream=screen)
  for _ in range(4):
    next(items)
    clock.now += 1
  items.close()
  assert screen.frames()[-1].startswith("reading:  30%|")
  assert screen.getvalue().endswith("\n")


def test_messages_and_log_lines_appear_above_the_bars(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("COLUMNS", "80")
  monkeypatch.setattr(sys, "stderr", screen := Screen())
  handler = logging.get_absl_handler().python_handler
  monkeypatch.setattr(handler, "stream", screen)
  with progress.Bar("reading", 10, "files") as bar:
    clock.now += 2
    bar.update()
    progress.message("a message")
    handler.stream.write("a log line\n")
  progress.message("the end")
  assert handler.stream is screen
  message, log_line, bar, end, nothing = screen.shown()
  assert (message, log_line, end, nothing) == ("a message", "a log line", "the end", "")
  assert bar.startswith("reading:  10%|")


METRICS = {"loss": 3.14159, "loss/clip": 4.5, "loss/simsiam": np.float32(-0.75), "lr": 1e-3, "temperature": 0.07}


def train(
  training: progress.TrainingProgress, clock: Clock, steps: Iterable[int], seconds: float, **given: Any
) -> None:
  for step in steps:
    clock.now += seconds
    training.update(step, **({"metrics": METRICS, "wait": 0.25} | given))


def test_the_training_line_has_all_fields(clock: Clock) -> None:
  training = progress.TrainingProgress(10_000, 512, stream=(log := io.StringIO()), now=clock)
  train(training, clock, [2020], 20.0, images_per_second=256.0)
  assert log.getvalue().splitlines() == [
    "step 2,020/10,000 20.2%  mean loss 3.142  4h 26m left  256 images/s  wait 25%  2.0 s/step  0m 20s elapsed"
    "  clip 4.500  simsiam -0.750  lr 1.00e-03  temperature 0.0700"
  ]


def test_the_loss_is_an_average_and_the_speed_of_a_slow_run_has_digits(clock: Clock) -> None:
  training = progress.TrainingProgress(200, 8, stream=(log := io.StringIO()), now=clock)
  for step in range(1, 201):
    clock.now += 1.0
    training.update(step, {"loss": 2.0 + (-1) ** step}, images_per_second=0.4321)
  *_, line = log.getvalue().splitlines()
  assert abs(float(re.search(r"loss ([\d.]+)", line)[1]) - 2.0) < 0.05
  assert "  0.43 images/s  " in line
  assert "  18.5 s/step  3m 20s elapsed" in line
  training.update(200, {"loss": math.nan})
  assert "loss nan" in log.getvalue().splitlines()[-1]


def test_the_training_line_has_the_speed_per_device_and_the_share_of_the_peak(clock: Clock) -> None:
  training = progress.TrainingProgress(10_000, 512, devices=8, stream=(log := io.StringIO()), now=clock)
  train(training, clock, [2020], 20.0, images_per_second=256.0, utilisation=0.4)
  assert "  256 images/s (32 per device)  40.0% of peak  wait 25%" in log.getvalue()


def test_the_training_line_names_the_stage_and_the_time_until_its_end(clock: Clock) -> None:
  training = progress.TrainingProgress(10_000, 512, stream=(log := io.StringIO()), now=clock)
  training.enter_stage("low", 4_020, 64)
  train(training, clock, [2020], 20.0, images_per_second=256.0)
  assert log.getvalue().startswith(
    "step 2,020/10,000 20.2%  stage low to 4,020  mean loss 3.142  8m 20s left of the stage  256 images/s"
  )


@pytest.mark.parametrize(("steps", "left"), [(11, "0m 10s"), (200, "3m 19s"), (8001, "2h 13m"), (864_001, "10d 0h")])
def test_time_left(steps: int, left: str, clock: Clock) -> None:
  training = progress.TrainingProgress(steps, 1, stream=(log := io.StringIO()), now=clock)
  train(training, clock, [1], 1.0, images_per_second=1.0)
  assert f"  {left} left  " in log.getvalue()


def test_a_training_writes_few_plain_lines_to_a_log_file_and_the_last_one(clock: Clock) -> None:
  with progress.TrainingProgress(105, 8, stream=(log := io.StringIO()), now=clock) as training:
    train(training, clock, range(1, 106), 1.0)
    training.message("saved")
  *lines, message = log.getvalue().splitlines()
  assert [line.split("/")[0] for line in lines] == [f"step {step}" for step in [*range(1, 102, 10), 105]]
  assert message == "saved"
  assert not {"\r", "\x1b"} & set(log.getvalue())


def test_a_message_appears_above_the_training_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("COLUMNS", "200")
  with progress.TrainingProgress(10, 8, stream=(screen := Screen()), now=clock) as training:
    training.message("before")
    train(training, clock, [1], 1.0)
    training.message("between")
  before, between, line, end = screen.shown()
  assert (before, between, end) == ("before", "between", "")
  assert line.startswith("step 1/10 10.0%")


def test_log_lines_appear_above_the_training_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
  handler, screen = logging.get_absl_handler().python_handler, Screen()
  monkeypatch.setattr(handler, "stream", screen)
  with progress.TrainingProgress(10, 8, stream=screen, now=clock) as training:
    train(training, clock, [1], 1.0)
    handler.stream.write("a warning\n")
  assert handler.stream is screen
  assert screen.shown() == ["a warning", screen.frames()[0], ""]


def test_a_screen_is_redrawn_at_most_a_few_times_per_second(clock: Clock) -> None:
  with progress.TrainingProgress(10_000, 8, stream=(screen := Screen()), now=clock) as training:
    train(training, clock, range(1, 1001), 0.001)
  assert 9 <= len(screen.frames()) <= 12


@pytest.mark.parametrize("columns", [5, 30, 60, 80, 120])
def test_the_training_line_is_narrower_than_the_terminal(columns: int, clock: Clock) -> None:
  controller, terminal = pty.openpty()
  termios.tcsetwinsize(terminal, (24, columns))
  with open(terminal, "w") as stream, progress.TrainingProgress(10_000, 512, stream=stream, now=clock) as training:
    train(training, clock, [1, 2, 3], 20.0, images_per_second=26.0)
  shown = b""
  with contextlib.suppress(OSError):  # as Linux does when a terminal closes
    while chunk := os.read(controller, 10_000):
      shown += chunk
  os.close(controller)
  lines = [frame.rstrip() for frame in shown.decode().split("\r") if frame.strip()]
  assert len(lines) == 4  # three updates and the last state
  assert all(0 < len(line) < columns for line in lines)
  assert lines[-1] == "step 3/10,000 0.0%"[: columns - 1] or "  " in lines[-1]
  assert ("wait 25%" in lines[-1]) == (columns >= 80)


def test_a_disabled_training_line_prints_nothing(clock: Clock) -> None:
  with progress.TrainingProgress(10, 8, enabled=False, stream=(log := io.StringIO()), now=clock) as training:
    train(training, clock, range(1, 11), 20.0)
    training.message("hidden")
  assert log.getvalue() == ""


def test_missing_and_broken_metrics_do_not_stop_the_training_line(clock: Clock) -> None:
  training = progress.TrainingProgress(10, 8, stream=(log := io.StringIO()), now=clock)
  train(training, clock, [1], 1.0, metrics={"loss": math.nan, "eval/zero_shot/top1": 0.5})
  assert log.getvalue() == "step 1/10 10.0%  mean loss nan  wait 25%  0m 01s elapsed\n"


def test_a_line_fits_a_real_terminal() -> None:
  controller, terminal = pty.openpty()
  termios.tcsetwinsize(terminal, (24, 60))
  script = (
    "import time\nfrom declip_jax.reporting import progress\nprogress._QUIET_SECONDS = 0.0\n"
    "for _ in progress.track(range(30), 'indexing', unit='samples'): time.sleep(0.01)\n"
  )
  subprocess.run([sys.executable, "-c", script], stderr=terminal, check=True)
  os.close(terminal)
  shown = os.read(controller, 100_000).decode()
  os.close(controller)
  frames = [frame.strip() for frame in shown.split("\r") if frame.strip()]
  assert frames[-1].startswith("indexing: 100%|")
  assert all(len(frame) <= 60 for frame in frames)


def test_the_display_needs_neither_jax_nor_the_package() -> None:
  script = (
    "import sys\nfrom declip_jax.reporting import progress\n"
    "print(sorted(name for name in sys.modules if name.split('.')[0] in ('jax', 'declip_jax')))"
  )
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "['declip_jax', 'declip_jax.reporting', 'declip_jax.reporting.progress']"
