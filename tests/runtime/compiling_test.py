"""What the terminal shows while a program compiles."""

import time

import jax
import numpy as np
import pytest

from declip_jax.runtime import compiling


def test_a_slow_compile_is_reported_ever_less_often_without_the_alarm_of_xla(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  monkeypatch.setattr(compiling, "_FIRST_LINE", 0.1)
  monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
  with compiling.slow_compile_lines("the step"):
    assert jax.config.jax_logging_level == "CRITICAL"
    time.sleep(0.6)
  assert jax.config.jax_logging_level == "NOTSET"
  lines = capsys.readouterr().err.splitlines()
  assert lines == ["still compiling the step, after 0 min"] * 3
  time.sleep(0.3)
  assert not capsys.readouterr().err


def test_a_level_of_logging_that_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
  with compiling.slow_compile_lines("the step"):
    assert jax.config.jax_logging_level == "NOTSET"


@pytest.mark.parametrize("stage", [1, 2, 3, 4])  # traced, lowered, compiled, none of them
def test_a_program_that_nobody_wants_any_more_does_not_run(stage: int) -> None:
  asked, ran = [0], []

  @jax.jit
  def run(x: jax.Array) -> jax.Array:
    jax.debug.callback(ran.append, x)
    return x + 1

  def is_unwanted() -> bool:
    asked[0] += 1
    return asked[0] == stage

  x = jax.device_put(np.float32(1))
  found = compiling.unless_unwanted(lambda: run(x), is_unwanted)
  jax.effects_barrier()
  assert (found, len(ran)) == ((None, 0) if stage < 4 else (2, 1))
  run(jax.device_put(np.ones(2, np.float32)))  # compiles again
  assert asked == [min(stage, 3)]
