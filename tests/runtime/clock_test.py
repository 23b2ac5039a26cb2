"""Speed and shares of the time; time is simulated."""

from collections.abc import Iterable
import contextlib
import math

import pytest

from declip_jax.runtime.clock import Clock


class Time:
  def __init__(self) -> None:
    self.now = 100.0

  def __call__(self) -> float:
    return self.now


@pytest.fixture
def time() -> Time:
  return Time()


def update(clock: Clock, time: Time, steps: Iterable[int], seconds: float) -> None:
  for step in steps:
    time.now += seconds
    clock.update(step)


@pytest.mark.parametrize("activity", ["evaluation", "save"])
def test_speed_leaves_out_compilation_saves_and_evaluations(time: Time, activity: str) -> None:
  clock = Clock(0, 64, now=time)
  with clock.spending(activity):
    time.now += 50  # before the first step
  update(clock, time, [1], 300.0)  # compiles
  assert math.isnan(clock.images_per_second)
  update(clock, time, range(2, 50), 0.5)
  with contextlib.suppress(KeyboardInterrupt), clock.spending(activity):
    time.now += 1000
    raise KeyboardInterrupt
  update(clock, time, range(50, 60), 0.5)
  assert clock.images_per_second == pytest.approx(128)


def test_speed_begins_with_the_first_step_that_is_measured_whole(time: Time) -> None:
  clock = Clock(0, 64, now=time)
  with clock.compiling():
    pass
  clock.first_step_done()
  update(clock, time, [1], 300.0)
  update(clock, time, [2], 0.001)  # dispatched, and there is no earlier one to wait for
  assert math.isnan(clock.images_per_second)
  update(clock, time, [3], 0.5)
  assert clock.images_per_second == pytest.approx(128)


def test_speed_includes_the_time_that_is_spent_on_data_and_steps(time: Time) -> None:
  clock = Clock(0, 64, now=time)
  update(clock, time, [1], 1.0)
  for step in range(2, 100):
    for activity in ("data", "step"):
      with clock.spending(activity):
        time.now += 0.25
    clock.update(step)
  assert clock.images_per_second == pytest.approx(128)


def test_speed_follows_a_change_within_minutes_and_not_at_once(time: Time) -> None:
  clock = Clock(0, 10, now=time)
  update(clock, time, range(1, 100), 1.0)
  update(clock, time, [101], 1.0)  # two steps in one second
  assert 10 < clock.images_per_second < 11
  update(clock, time, range(103, 400, 2), 1.0)
  assert clock.images_per_second == pytest.approx(20, rel=0.01)


def test_rollbacks_do_not_affect_the_measured_speed(time: Time) -> None:
  clock = Clock(0, 64, now=time)
  update(clock, time, range(1, 50), 0.5)
  clock.roll_back(20)
  time.now += 30
  update(clock, time, range(21, 60), 0.5)
  assert clock.images_per_second == pytest.approx(128)


def test_values_have_shares_since_the_last_line_and_speeds(time: Time) -> None:
  clock = Clock(0, 512, devices=8, peak=lambda text_length: 640.0, now=time)
  assert clock.utilisation is None
  assert "images_per_second" not in clock.values()
  update(clock, time, [10, 20], 20.0)
  clock.values()
  for activity, seconds in {"data": 5.0, "step": 2.5, "save": 1.0, "evaluation": 1.0}.items():
    with clock.spending(activity):
      time.now += seconds
  time.now += 0.5
  assert clock.shares == {"data": 0.5, "step": 0.25, "save": 0.1, "evaluation": 0.1}
  values = clock.values()
  assert {name: value for name, value in values.items() if name.startswith("time/")} == {
    "time/data": 0.5,
    "time/step": 0.25,
    "time/save": 0.1,
    "time/evaluation": 0.1,
  }
  assert values["images_per_second"] == pytest.approx(256)
  assert values["images_per_second_per_device"] == pytest.approx(32)
  assert values["utilisation"] == pytest.approx(0.4)
  assert clock.shares == dict.fromkeys(("data", "step", "save", "evaluation"), 0.0)


def test_the_share_of_waiting_means_something_right_after_a_line(time: Time) -> None:
  clock = Clock(0, 64, now=time)
  with clock.spending("data"):
    time.now += 10
  with clock.spending("step"):
    time.now += 89.9
  clock.values()
  with clock.spending("data"):  # nearly all of the time since, as the step that was dispatched before has finished
    time.now += 0.1
  assert clock.shares["data"] == pytest.approx(1)
  assert clock.wait == pytest.approx(0.101)
  clock.values()
  with clock.spending("step"):
    time.now += 0.1
  assert clock.wait == pytest.approx(0.5)


def test_the_first_call_is_the_compilation(time: Time) -> None:
  clock = Clock(0, 64, now=time)
  assert not clock.has_compiled
  for seconds in (42.0, 1.0):
    with clock.compiling():
      time.now += seconds
  assert "42 s" in clock.first_step_done()
  assert clock.has_compiled
  assert clock.values()["compile_seconds"] == 42.0


def test_each_length_of_texts_is_a_program_that_compiles_and_has_its_own_peak(time: Time) -> None:
  clock = Clock(0, 64, peak={16: 640.0, 32: 320.0}.__getitem__, now=time)
  step, seconds = 0, 0.0
  for length, compile_seconds in ((16, 40.0), (32, 50.0), (16, 0.0), (32, 0.0)):
    clock.begin(length)
    assert clock.has_compiled == (not compile_seconds)
    if compile_seconds:
      with clock.compiling():
        time.now += compile_seconds
      assert f"{compile_seconds:g} s, for texts of up to {length} tokens" in clock.first_step_done()
    for _ in range(20):  # 64 images at peak: 0.1 s for short texts, 0.2 s for long ones
      step += 1
      update(clock, time, [step], seconds)  # of the step before, which has finished now
      seconds = 0.25 if length == 16 else 0.5
    assert clock.utilisation == pytest.approx(0.4)
  assert clock.values()["compile_seconds"] == 90.0
  assert 128 < clock.images_per_second < 256
