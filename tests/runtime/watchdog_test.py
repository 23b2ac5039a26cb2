"""A process that hangs exits and records its stacks; one that was suspended does not."""

from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.slow
def test_a_hang_ends_the_process_and_leaves_the_stacks(tmp_path: Path) -> None:
  script = """
import pathlib, sys, time
from declip_jax.runtime.watchdog import Watchdog

def stand_still():
  time.sleep(600)

with Watchdog(pathlib.Path(sys.argv[1]), 0.5) as watchdog:
  time.sleep(1)  # before the first beat nothing is due
  for step in range(5):
    watchdog.beat(f"step {step}")
    time.sleep(0.2)
  stand_still()
"""
  done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
  assert done.returncode == 70
  assert "error: step 4 has not finished" in done.stderr
  assert "config.safety.hang_timeout=0.5" in done.stderr
  stacks = (tmp_path / "hang.0.txt").read_text()
  assert "step 4" in stacks
  assert "in stand_still" in stacks


@pytest.mark.slow
def test_neither_a_suspended_process_nor_an_exempt_activity_hangs(tmp_path: Path) -> None:
  script = """
import pathlib, sys, time
from declip_jax.runtime.watchdog import Watchdog

with Watchdog(pathlib.Path(sys.argv[1]), 0.5) as watchdog:
  watchdog.beat("a step")
  watchdog.exempt("compiling")
  time.sleep(1)
  watchdog.beat("reading")
  print("ready", flush=True)
  sys.stdin.readline()
"""
  pipe = subprocess.PIPE
  process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=pipe, stdout=pipe, text=True)
  assert process.stdin is not None
  assert process.stdout is not None
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGSTOP)
  time.sleep(1)
  process.send_signal(signal.SIGCONT)
  time.sleep(0.1)
  process.stdin.close()
  assert process.wait(timeout=60) == 0
  process.stdout.close()
