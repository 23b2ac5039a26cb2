"""What the terminal shows while a program compiles."""

import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from declip_jax.command_line import COMPILER
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
    if threading.current_thread() is threading.main_thread():
      return False
    asked[0] += 1
    return asked[0] == stage

  x = jax.device_put(np.float32(1))
  found = compiling.unless_unwanted(lambda: run(x), is_unwanted)
  jax.effects_barrier()
  assert (found, len(ran)) == ((None, 0) if stage < 4 else (2, 1))
  run(jax.device_put(np.ones(2, np.float32)))  # compiles again
  assert asked == [min(stage, 3)]


def test_a_program_that_xla_is_compiling_is_left_alone_and_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(compiling, "_POLL", 1e-4)
  ran = []

  @jax.jit
  def run(x: jax.Array) -> jax.Array:
    jax.debug.callback(ran.append, x)
    for _ in range(200):
      x = jax.numpy.sin(x) @ x
    return x

  x = jax.device_put(np.eye(2, dtype=np.float32))
  found = compiling.unless_unwanted(lambda: run(x), lambda: threading.current_thread() is threading.main_thread())
  (compiler,) = [thread for thread in threading.enumerate() if thread.name == COMPILER]
  compiler.join()
  jax.effects_barrier()
  assert (found, ran) == (None, [])


def test_errors_of_the_program_are_raised() -> None:
  @jax.jit
  def wrong(x: jax.Array) -> jax.Array:
    raise ValueError("too odd")

  for call in (compiling.interruptible, lambda run: compiling.unless_unwanted(run, lambda: False)):
    with pytest.raises(ValueError, match="too odd"):
      call(lambda: wrong(np.float32(1)))


_ENDING = """
import atexit, os, signal, threading, time
from declip_jax import command_line
from declip_jax.runtime import compiling

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs in the background ignore it
atexit.register(print, "cleaned up")  # Python's own end, in which XLA would crash

def compile(seconds):
  threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
  compiling.interruptible(lambda: (time.sleep(seconds), print("compiled")))

"""


@pytest.mark.parametrize(
  ("call", "code", "printed"),
  [
    ("command_line.run(lambda _: compile(300), '')", 130, ""),  # a command ends at once
    ("compile(3)", -signal.SIGINT, "compiled\ncleaned up\n"),  # a script of one's own ends after XLA
  ],
)
def test_ctrl_c_while_xla_compiles(call: str, code: int, printed: str) -> None:
  start = time.monotonic()
  ended = subprocess.run([sys.executable, "-c", _ENDING + call], capture_output=True, text=True, check=False)
  assert ended.stdout == printed
  assert ended.stderr.strip().endswith("interrupted" if code == 130 else "KeyboardInterrupt")
  assert ended.returncode == code
  assert time.monotonic() - start < 300
