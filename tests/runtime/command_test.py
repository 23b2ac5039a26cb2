"""Commands with a working directory: their exit codes when the display is lost, and their errors."""

from pathlib import Path
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from declip_jax.reporting.progress import message
from declip_jax.runtime.command import launch

def command(workdir):
  for stream in (sys.stderr, sys.stdout):
    message("a line", stream=stream)
  {body}
  (workdir / "done").touch()

launch(command, None, is_training={training})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("body", "code"),
  [
    pytest.param("pass", 0, marks=pytest.mark.slow),
    ("raise OSError('a disk')", 74),
    pytest.param("sys.exit(3)", 3, marks=pytest.mark.slow),
  ],
)
def test_a_command_whose_display_is_lost_has_the_exit_code_of_its_work(body: str, code: int, tmp_path: Path) -> None:
  (tmp_path / "checkpoints").mkdir()
  with open("/dev/full", "w") as full:
    done = subprocess.run(
      [sys.executable, "-c", SCRIPT.format(body=body, training=False), f"--workdir={tmp_path}"],
      stdout=full,
      stderr=full,
      check=False,
    )
  assert done.returncode == code
  assert (tmp_path / "done").exists() == (code == 0)
  assert not (tmp_path / "error.txt").exists()  # the run in the working directory has not failed


def test_the_error_of_a_training_is_one_line_that_names_its_traceback(tmp_path: Path) -> None:
  (tmp_path / "checkpoints").mkdir()
  script = SCRIPT.format(body="raise ValueError('bad')", training=True)
  command = [sys.executable, "-c", script, f"--workdir={tmp_path}"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.stderr.splitlines() == ["a line", f"error: bad (traceback in {tmp_path / 'error.txt'})"]
  assert "ValueError: bad" in (tmp_path / "error.txt").read_text()


def test_a_training_that_meets_another_run_leaves_its_directory_alone(tmp_path: Path) -> None:
  (tmp_path / "checkpoints").mkdir()
  body = "from declip_jax.runtime.workdir import OtherRunError; raise OtherRunError('in use')"
  command = [sys.executable, "-c", SCRIPT.format(body=body, training=True), f"--workdir={tmp_path}"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "error: in use")
  assert not (tmp_path / "error.txt").exists()
