import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from declip_jax.data.storage import jobs

MODULE = """
import os, time
def write(path, argument, advance):
  value, parent, ending = argument
  if os.getpid() != parent and ending == "dies":
    os._exit(1)
  if os.getpid() != parent and ending == "fails":
    raise ValueError("only the\\nparent can")
  if ending == "is wrong":
    raise KeyError(value)
  if ending == "is slow":
    print(os.getpid(), file=open(f"{path.parent}/pid", "w"))
    time.sleep(100)
  advance(1)
  path.write_text(f"{value} {os.getpid()}")
  advance(1)
"""


@pytest.fixture
def write(tmp_path, monkeypatch) -> jobs.Write:
  """A function of a module that other processes can import too."""
  (tmp_path / "writing_parts.py").write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "writing_parts", raising=False)
  import writing_parts

  return writing_parts.write


def listed(folder: Path, ending: str = "") -> list[jobs.Job]:
  return [jobs.Job(folder / f"{number}", [number, os.getpid(), ending], 2) for number in range(6)]


def make(write: jobs.Write, todo: list[jobs.Job], processes: int, over=lambda: False) -> list[int]:
  reports = []
  jobs.make_files(write, todo, processes, over, reports.append, 0.01)
  return reports


def test_processes_make_the_missing_files(write, tmp_path):
  todo = listed(tmp_path / "made")
  (tmp_path / "made").mkdir()
  todo[3].path.write_text("3 kept")
  reports = make(write, todo, 2)
  made = [part.path.read_text().split() for part in todo]
  assert [int(number) for number, _ in made] == list(range(6))
  makers = {pid for number, pid in made if number != "3"}
  assert made[3][1] == "kept"
  assert str(os.getpid()) not in makers
  assert 1 <= len(makers) <= 2
  assert reports == sorted(reports)
  assert set(reports) <= set(range(13))
  assert sorted(path.name for path in (tmp_path / "made").iterdir()) == list("012345")


@pytest.mark.parametrize("ending", ["dies", "fails"])
def test_files_that_a_process_cannot_make_are_made_here(write, tmp_path, ending, caplog):
  todo = listed(tmp_path / "made", ending)
  make(write, todo, 2)
  assert [part.path.read_text() for part in todo] == [f"{number} {os.getpid()}" for number in range(6)]
  assert ("so this process repeats its job: ValueError: only the parent can" in caplog.text) == (ending == "fails")


@pytest.mark.parametrize("processes", [0, 2])
def test_an_error_is_raised_and_finished_files_are_kept(write, tmp_path, processes):
  todo = listed(tmp_path / "made")
  todo[4] = todo[4]._replace(argument=[4, os.getpid(), "is wrong"])
  with pytest.raises(KeyError, match="4"):
    make(write, todo, processes)
  assert not todo[4].path.exists()
  assert [path for path in (tmp_path / "made").iterdir() if path.name.startswith(".")] == []
  todo[4] = listed(tmp_path / "made")[4]
  make(write, todo, 0)
  assert all(part.path.exists() for part in todo)


def test_nothing_is_made_once_the_files_are_no_longer_needed(write, tmp_path):
  make(write, listed(tmp_path / "made"), 0, over=lambda: True)
  assert not (tmp_path / "made").exists()


SCRIPT = """
import sys, writing_parts
from pathlib import Path
from declip_jax.data.storage import jobs
print("once", flush=True)
todo = [jobs.Job(Path(sys.argv[1]) / str(number), [number, 0, sys.argv[2]], 2) for number in range(3)]
jobs.make_files(writing_parts.write, todo, 2, lambda: False, lambda count: None, 1.0)
"""


def script(folder: Path, ending: str = "") -> subprocess.Popen:
  (folder / "script.py").write_text(SCRIPT)
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
  command = [sys.executable, str(folder / "script.py"), str(folder / "made"), ending]
  # A shell that starts the tests in the background may have them ignore Ctrl-C, which children inherit.
  hears = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=hears)


def test_a_script_without_a_main_guard_is_not_run_again(write, tmp_path):
  assert script(tmp_path).communicate(timeout=60)[0] == "once\n"
  assert len(list((tmp_path / "made").iterdir())) == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_processes_end_with_the_one_that_started_them(write, tmp_path, number):
  process = script(tmp_path, "is slow")
  pid = tmp_path / "made" / "pid"
  while not (pid.exists() and pid.read_text().endswith("\n")):
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(number)
  process.communicate(timeout=30)
  deadline = time.monotonic() + 10
  while running(int(pid.read_text())):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def running(pid: int) -> bool:
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


ARRAY = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "0"}
INDEXED = {"JOB_COMPLETION_INDEX": "2"}


@pytest.mark.parametrize(
  ("text", "environment", "expected"),
  [
    ("0/1", {}, (0, 1)),
    ("3/8", ARRAY, (3, 8)),
    ("auto", ARRAY, (5, 8)),
    ("auto/9", ARRAY, (5, 9)),  # some tasks of an array of nine, again
    ("auto/3", INDEXED, (2, 3)),
  ],
)
def test_parts(text, environment, expected):
  assert jobs.Part.of(text, environment) == expected


@pytest.mark.parametrize(
  ("text", "environment", "message"),
  [
    ("8/8", {}, "shard=8/8: .*I from 0 to N - 1"),
    ("0/0", {}, "shard=0/0"),
    ("3", {}, "shard=3: "),
    ("-1/3", {}, "shard=-1/3: .*0/8, or auto"),
    ("auto", {}, "SLURM_ARRAY_TASK_ID.*JOB_COMPLETION_INDEX"),
    ("auto", INDEXED, "give auto/N"),
    ("auto", ARRAY | {"SLURM_ARRAY_TASK_MIN": "1"}, "array from 0"),
    ("auto/5", ARRAY, "shard=auto/5: 5 of 5"),
  ],
)
def test_parts_that_do_not_exist(text, environment, message):
  with pytest.raises(ValueError, match=message):
    jobs.Part.of(text, environment)


def test_machines_without_a_piece_are_refused():
  jobs.Part(3, 4).check(4, "files")
  jobs.WHOLE.check(0, "files")
  with pytest.raises(ValueError, match="shard=3/4: expected at most as many machines as files, 3"):
    jobs.Part(3, 4).check(3, "files")


def test_results_that_are_ready_together_with_an_error_are_not_lost(monkeypatch):
  def finish(argument, advance):
    if argument == 1:
      raise KeyError(argument)
    return argument

  wait = jobs.wait
  monkeypatch.setattr(jobs, "wait", lambda pending, *options: wait(pending))  # until all are ready
  found = jobs.run(finish, [0, 1, 2, 3], 0)
  assert sorted(next(found)[0] for _ in range(3)) == [0, 2, 3]
  with pytest.raises(KeyError):
    next(found)
