"""Tests of `launch/`: what the scripts would run, when they start again, and that signals reach every process."""

import os
from pathlib import Path
import signal
import subprocess
import time

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
LOCAL, PROCESSES, TPU = "local.sh", "local_processes.sh", "tpu_vm.sh"
TRAIN = ["-m", "declip_jax.train", "--config", "c.py:clip", "--workdir", "my runs/a"]
FIELD = "--config.data.train=('webdataset:/data/train-*.tar',)"  # needs quotes in every shell it passes

# Stands in for Python: notes its arguments, then ends with the code that the test has for this call or this process,
# and as long as there is none, waits for SIGTERM.
FAKE_PYTHON = """#!/usr/bin/env bash
trap 'echo saving; sleep 0.3; echo saved; exit 143' TERM
printf '%s\\n' "$@" end >>"$LOG"
call=$(grep -c '^end$' "$LOG")
[[ $* == *--process\\ * ]] && call=$((${@: -1} + 1))
echo "started ${@: -1}"
for _ in {1..150}; do
  code=$(sed -n "${call}p" "$CODES")
  [[ $code ]] && exit "$code"
  sleep 0.1
done
"""

# Stands in for gcloud: notes its arguments, and runs the command of `ssh` here.
FAKE_GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>"$LOG.gcloud"
for argument; do
  [[ $argument == --command=* ]] && cd && exec bash -c "${argument#--command=}"
done
exit 0
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """A home with the stand-ins; `machine.log` holds the arguments of every call of Python."""
  for name, text in {"python": FAKE_PYTHON, "gcloud": FAKE_GCLOUD}.items():
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
  for name in ("RESTARTS", "PYTHON", "DRY_RUN", "PORT", "JAX_PLATFORMS", "ACCELERATOR", "VERSION", "PROJECT", "REPO"):
    monkeypatch.delenv(name, raising=False)
  settings = {"HOME": tmp_path, "LOG": tmp_path / "log", "CODES": tmp_path / "codes", "PAUSE": 0, "GRACE": 2}
  settings |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TPU_NAME": "slice", "ZONE": "us-west4-a"}
  for name, value in settings.items():
    monkeypatch.setenv(name, str(value))
  exits(tmp_path)
  return tmp_path


def exits(machine, *codes):
  """Sets the exit codes of the calls in order, or of the processes by number; "" for one that shall go on."""
  (machine / "codes").write_text("".join(f"{code}\n" for code in codes))


def calls(machine):
  text = (machine / "log").read_text() if (machine / "log").exists() else ""
  return [call.splitlines() for call in text.split("end\n")[:-1]]


def launch(script, *args, **env):
  command = [LAUNCH / script, *map(str, args)]
  return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=20)


def start(script, *args):
  def hear_signals():
    # Under nohup, or in the background of a script, signals arrive ignored, and bash then cannot trap them.
    for signum in (signal.SIGINT, signal.SIGHUP):
      signal.signal(signum, signal.SIG_DFL)

  command = [LAUNCH / script, *map(str, args)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  return subprocess.Popen(command, preexec_fn=hear_signals, **pipes)


def until(condition):
  deadline = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < deadline, "nothing happened for 10 s"
    time.sleep(0.02)


def words(shell_line):
  """The words of a command line as bash reads them."""
  found = subprocess.run(["bash", "-c", f"printf '%s\\0' {shell_line}"], capture_output=True, text=True, check=True)
  return found.stdout.split("\0")[:-1]


def gcloud_calls(machine):
  return (machine / "log.gcloud").read_text().split("\0")[:-1]


@pytest.mark.parametrize("script", [LOCAL, PROCESSES, TPU])
def test_scripts_parse_and_say_how_they_are_used(script):
  subprocess.run(["bash", "-n", LAUNCH / script], check=True)
  told, wrong = launch(script, "--help"), launch(script)
  assert (told.returncode, told.stderr) == (0, "")
  assert told.stdout.startswith(f"usage: launch/{script} ")
  assert (wrong.returncode, wrong.stdout) == (2, "")
  assert wrong.stderr == told.stdout


@pytest.mark.parametrize(
  ("script", "args"),
  [
    (LOCAL, ["c.py"]),
    (LOCAL, ["--config=c.py", "runs/a"]),
    (PROCESSES, [0, "c.py", "runs/a"]),
    (PROCESSES, ["c.py", "runs/a", "--config.seed=1"]),
    (TPU, ["start"]),
    (TPU, ["run", "c.py"]),
    (TPU, ["setup", "now"]),
    (TPU, ["exec", "ls", "-l"]),
  ],
)
def test_wrong_calls_run_nothing(machine, script, args):
  result = launch(script, *args)
  assert result.returncode == 2
  assert result.stderr.startswith("usage: ")
  assert not calls(machine)
  assert not (machine / "log.gcloud").exists()


def test_dry_runs_print_what_would_be_run(machine):
  local = launch(LOCAL, "c.py:clip", "my runs/a", FIELD, DRY_RUN="1")
  assert words(local.stdout) == ["python", *TRAIN, FIELD]
  processes = launch(PROCESSES, 2, "c.py:clip", "my runs/a", FIELD, DRY_RUN="1", PORT="1234", PYTHON="py")
  together = ["--coordinator", "localhost:1234", "--processes", "2", "--process"]
  assert [words(line) for line in processes.stdout.splitlines()] == [
    ["py", *TRAIN, FIELD, *together, number] for number in "01"
  ]
  tpu = launch(TPU, "run", "c.py:clip", "my runs/a", FIELD, DRY_RUN="1")
  assert words(tpu.stdout)[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
  assert not calls(machine)
  assert not (machine / "log.gcloud").exists()


@pytest.mark.parametrize(
  ("codes", "starts", "returned"),
  [([0], 1, 0), ([1, 137, 0], 3, 0), ([1, 1, 1, 0], 3, 1), ([2], 1, 2), ([130], 1, 130), ([1, 143], 2, 143)],
)
def test_local_starts_again_after_crashes_only(machine, codes, starts, returned):
  exits(machine, *codes)
  result = launch(LOCAL, "c.py:clip", "my runs/a", FIELD, RESTARTS="2")
  assert result.returncode == returned
  assert calls(machine) == [[*TRAIN, FIELD]] * starts


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_local_passes_signals_on_and_waits_for_the_checkpoint(machine, signum):
  process = start(LOCAL, "c.py", "runs/a")
  assert process.stdout.readline() == "started runs/a\n"
  process.send_signal(signum)
  assert process.communicate(timeout=10)[0].endswith("saved\n")
  assert process.returncode == 143
  assert len(calls(machine)) == 1


def test_local_can_be_stopped_between_two_starts(machine, monkeypatch):
  monkeypatch.setenv("PAUSE", "30")
  exits(machine, 1, 0)
  process = start(LOCAL, "c.py", "runs/a")
  until(lambda: "starting again" in process.stdout.readline())
  time.sleep(0.1)
  process.terminate()
  assert process.wait(timeout=5) == 1
  assert len(calls(machine)) == 1


def test_processes_get_their_number_and_a_prefix(machine):
  exits(machine, 0, 0, 0)
  result = launch(PROCESSES, 3, "c.py:clip", "my runs/a", FIELD, PORT="1234")
  assert result.returncode == 0
  assert sorted(result.stdout.splitlines()) == [f"[{i}] started {i}" for i in range(3)]
  common = [*TRAIN, FIELD, "--coordinator", "localhost:1234", "--processes", "3", "--process"]
  # Processes write to the log side by side, so whole calls may interleave: compare the words.
  assert sorted(word for call in calls(machine) for word in call) == sorted([*common * 3, "0", "1", "2"])


def test_one_failing_process_ends_the_others(machine):
  process = start(PROCESSES, 3, "c.py", "runs/a")
  for _ in range(3):
    assert "started" in process.stdout.readline()
  exits(machine, "", "", 7)
  output = process.communicate(timeout=10)[0]
  assert process.returncode == 7
  assert "process 2 ended with exit code 7; ending the others" in output
  assert {"[0] saved", "[1] saved"} < set(output.splitlines())


def test_a_process_that_does_not_end_is_killed(machine, monkeypatch):
  monkeypatch.setenv("GRACE", "1")
  (machine / "bin" / "python").write_text(
    "#!/usr/bin/env bash\ntrap '' TERM\n[[ ${@: -1} == 0 ]] && exit 7\nfor _ in {1..150}; do sleep 0.1; done\n"
  )
  began = time.monotonic()
  assert launch(PROCESSES, 2, "c.py", "runs/a").returncode == 7
  assert time.monotonic() - began < 5


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_processes_pass_signals_on_to_all(machine, signum):
  process = start(PROCESSES, 2, "c.py", "runs/a")
  lines = [process.stdout.readline() for _ in range(2)]
  assert sorted(lines) == ["[0] started 0\n", "[1] started 1\n"]
  process.send_signal(signum)
  output = process.communicate(timeout=10)[0]
  assert sorted(output.splitlines()) == ["[0] saved", "[0] saving", "[1] saved", "[1] saving"]
  assert process.returncode == 143


@pytest.mark.parametrize(
  ("accelerator", "version"),
  [
    ("v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v5p-128", "v2-alpha-tpuv5"),
    ("v6e-8", "v2-alpha-tpuv6e"),
    ("v4-32", "tpu-ubuntu2204-base"),
  ],
)
def test_tpu_create_knows_the_software_version(machine, accelerator, version):
  assert launch(TPU, "create", "--spot", ACCELERATOR=accelerator, PROJECT="mine").returncode == 0
  flags = ["--zone=us-west4-a", "--project=mine", f"--accelerator-type={accelerator}", f"--version={version}"]
  assert gcloud_calls(machine) == ["compute", "tpus", "tpu-vm", "create", "slice", *flags, "--spot"]


@pytest.mark.parametrize(
  ("verb", "missing", "env"),
  [
    ("create", "ACCELERATOR", {}),
    ("create", "VERSION", {"ACCELERATOR": "v99-8"}),
    ("setup", "REPO", {}),
    ("stop", "ZONE", {"ZONE": ""}),
    ("delete", "TPU_NAME", {"TPU_NAME": ""}),
  ],
)
def test_tpu_names_the_variable_that_is_missing(machine, verb, missing, env):
  result = launch(TPU, verb, **env)
  assert result.returncode == 2
  assert f"variable {missing} is not set" in result.stderr
  assert not (machine / "log.gcloud").exists()


def test_tpu_delete_and_exec(machine):
  assert launch(TPU, "delete", "--quiet").returncode == 0
  assert gcloud_calls(machine)[3:] == ["delete", "slice", "--zone=us-west4-a", "--quiet"]
  assert launch(TPU, "exec", "echo $((20 + 3)) 'a  b'").stdout == "23 a  b\n"
  assert "--worker=all" in gcloud_calls(machine)


def test_tpu_setup_checks_out_the_revision_and_installs(machine):
  origin = machine / "origin"
  git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b"]
  origin.mkdir()
  subprocess.run([*git, "init", "--quiet", "--initial-branch=main"], check=True)
  for message in ("first", "second"):
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", message], check=True)
  (machine / "bin" / "python3").symlink_to(machine / "bin" / "python")
  exits(machine, *[0] * 6)
  result = launch(TPU, "setup", REPO=str(origin), REVISION="main~1")
  assert result.returncode != 0  # not a name that a remote knows
  for _ in range(2):  # a second time does no harm
    result = launch(TPU, "setup", REPO=str(origin), REVISION="main")
    assert (result.returncode, result.stdout.splitlines()[-1].endswith(" second")) == (0, True)
  assert calls(machine)[2][-4:] == ["-c", "constraints.txt", "-e", ".[tpu]"]


def test_tpu_run_outlives_its_connection_until_stop(machine):
  (machine / "declip_jax" / ".venv" / "bin").mkdir(parents=True)
  (machine / "declip_jax" / "launch").symlink_to(LAUNCH)
  (machine / "declip_jax" / ".venv" / "bin" / "python").symlink_to(machine / "bin" / "python")
  exits(machine, 1)
  assert launch(TPU, "stop").stdout == "nothing is running\n"
  assert launch(TPU, "run", "c.py:clip", "my runs/a", FIELD).returncode == 0
  try:
    until(lambda: len(calls(machine)) == 2)  # restarted after a crash
    assert calls(machine) == [[*TRAIN, FIELD, "--multihost"]] * 2
    again = launch(TPU, "run", "c.py", "runs/a")
    assert (again.returncode, again.stderr) == (1, "already running: stop it first\n")
  finally:
    stopped = launch(TPU, "stop")
  assert stopped.stdout == "saved\n"
  assert launch(TPU, "stop").stdout == "nothing is running\n"
