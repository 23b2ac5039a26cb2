"""Tests of `launch/` and the Dockerfile: their commands, their restarts, and that signals reach all processes."""

import fnmatch
import json
import os
from pathlib import Path
import re
import signal
import subprocess
import time

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
LOCAL, PROCESSES, TPU, GKE, SLURM = "local.sh", "local_processes.sh", "tpu_vm.sh", "gke_xpk.sh", "slurm.sh"
SCRIPTS = [LOCAL, PROCESSES, TPU, GKE, SLURM]
TRAIN = ["-m", "declip_jax.train", "--config", "c.py:clip", "--workdir", "my runs/a"]
SUPERVISED = [*TRAIN, "--stopped_exit_code=143"]  # so that a stopped run does not count as finished
FIELD = "--config.data.train=('webdataset:/data/train-*.tar',)"  # needs quotes in every shell

# Replaces Python: logs its arguments, then exits with the code that the test has set for this call or this
# process; without a code it waits for SIGTERM. "gone" is a machine that was switched off, "preempted" one that was
# preempted.
FAKE_PYTHON = """#!/usr/bin/env bash
trap 'echo saving; sleep 0.3; echo saved; exit 143' TERM
printf '%s\\n' "$@" end >>"$LOG"
call=$(grep -c '^end$' "$LOG")
[[ $* == *--process\\ * ]] && call=$((${@: -1} + 1))
echo "started ${@: -1}"
for _ in {1..150}; do
  code=$(sed -n "${call}p" "$CODES")
  if [[ $code == preempted ]]; then
    printf '%s\\n' SUSPENDING SUSPENDED >~/queued-resources
    echo PREEMPTED >~/tpu-vm
    code=gone
  fi
  [[ $code == gone ]] && kill -KILL $PPID $$
  [[ $code ]] && exit "$code"
  sleep 0.1
done
"""

# Simulates gcloud and Google: logs its arguments, runs the command of `ssh` here, and has one TPU at most. The
# lines of ~/tpu-vm and ~/queued-resources are its states, one after the other; the last one remains.
FAKE_GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>"$LOG.gcloud"
printf '%s ' "${@:3:2}" >>"$LOG.verbs"
next() { head -n 1 "$1"; (($(wc -l <"$1") < 2)) || sed -i 1d "$1"; }
case $4 in
  describe)
    [[ -e ~/$3 ]] || { echo "ERROR: (gcloud) NOT_FOUND: Resource 'nodes/$5' was not found" >&2; exit 1; }
    state=$(next ~/"$3")
    [[ $state == broken ]] && { echo 'ERROR: (gcloud) no connection' >&2; exit 1; }
    echo "$state"
    ;;
  create)
    if [[ -s ~/failures ]]; then sed -i 1d ~/failures; exit 1; fi
    [[ $3 == queued-resources ]] && printf '%s\\n' WAITING_FOR_RESOURCES PROVISIONING ACTIVE >~/queued-resources
    echo READY >~/tpu-vm
    ;;
  delete) rm -rf ~/tpu-vm ~/queued-resources ~/declip_jax{,.*} ;;
  ssh)
    grep -qs -m 1 PREEMPTED ~/tpu-vm && exit 255
    command=${*: -1}
    command=${command#--command=}
    if [[ $command == *'declip_jax is'* && -s ~/answers ]]; then
      [[ $(head -n 1 ~/answers) != broken ]] || { sed -i 1d ~/answers; exit 1; }
      printf 'declip_jax is %s\\n' $(next ~/answers)
    elif [[ $command == *git\\ clone* && ${CHECKOUT:-} ]]; then
      mkdir -p ~/declip_jax/.venv/bin
      ln -sf "$CHECKOUT/launch" ~/declip_jax
      ln -sf ~/bin/python ~/declip_jax/.venv/bin
    else
      cd && exec bash -c "$command"
    fi
    ;;
esac
"""

# Simulates srun and its tasks. Signals reach the tasks only through scancel.
FAKE_SRUN = """#!/usr/bin/env bash
echo $$ >~/tasks
trap 'echo forcing job termination; exit 137' TERM
trap 'echo saving; sleep 0.3; echo saved; exit 143' USR2
printf '%s\\n' "$@" end >>"$LOG"
call=$(grep -c '^end$' "$LOG")
echo "started $call"
for _ in {1..150}; do
  code=$(sed -n "${call}p" "$CODES")
  [[ $code ]] && exit "$code"
  sleep 0.1
done
"""
NOTES = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0")" "$@" end >>"$LOG"
"""
STAND_INS = {
  "python": FAKE_PYTHON,
  "gcloud": FAKE_GCLOUD,
  "srun": FAKE_SRUN,
  "scancel": '#!/usr/bin/env bash\n[[ $* == "--signal=TERM 77" ]] && kill -USR2 "$(cat ~/tasks)"\n',
  "squeue": "#!/usr/bin/env bash\ncat ~/job\n",
  "scontrol": '#!/usr/bin/env bash\necho "scontrol $*"\n',
  "xpk": NOTES,
  "kubectl": NOTES,
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """A home with the simulated commands; `machine.log` has the arguments of every call of Python."""
  for name, text in STAND_INS.items():
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
  read = {name for script in SCRIPTS for name in re.findall(r"\b[A-Z][A-Z_]{3,}\b", (LAUNCH / script).read_text())}
  for name in read:
    monkeypatch.delenv(name, raising=False)
  settings = {"HOME": tmp_path, "LOG": tmp_path / "log", "CODES": tmp_path / "codes", "PAUSE": 0, "GRACE": 2}
  settings |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TPU_NAME": "slice", "ZONE": "us-west4-a"}
  for name, value in settings.items():
    monkeypatch.setenv(name, str(value))
  exits(tmp_path)
  return tmp_path


def exits(machine, *codes):
  """Sets the exit codes of the calls in order, or of the processes by number; "" for one that continues."""
  (machine / "codes").write_text("".join(f"{code}\n" for code in codes))


def calls(machine):
  text = (machine / "log").read_text() if (machine / "log").exists() else ""
  return [call.splitlines() for call in text.split("end\n")[:-1]]


def launch(script, *args, **env):
  command = [LAUNCH / script, *map(str, args)]
  return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=20)


def start(script, *args):
  def hear_signals():
    # Under nohup, or in the background of a script, signals are ignored, and bash then cannot trap them.
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_and_print_their_usage(script):
  subprocess.run(["bash", "-n", LAUNCH / script], check=True)
  usage, wrong = launch(script, "--help"), launch(script)
  assert (usage.returncode, usage.stderr) == (0, "")
  assert re.match(rf"usage: (sbatch \[flags\] )?launch/{script} ", usage.stdout)
  assert (wrong.returncode, wrong.stdout) == (2, "")
  assert wrong.stderr == usage.stdout


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
    (TPU, ["keep", "c.py", "--config.seed=1"]),
    (TPU, ["wait", "now"]),
    (GKE, ["run", "c.py"]),
    (GKE, ["logs", 0, 1, 2]),
    (GKE, ["delete", "--all"]),
    (SLURM, ["c.py"]),
    (SLURM, ["--nodes=2", "c.py", "runs/a"]),
  ],
)
def test_wrong_arguments_run_no_command(machine, script, args):
  result = launch(script, *args)
  assert result.returncode == 2
  assert result.stderr.startswith("usage: ")
  assert not calls(machine)
  assert not (machine / "log.gcloud").exists()


def test_dry_runs_print_the_commands(machine):
  local = launch(LOCAL, "c.py:clip", "my runs/a", FIELD, DRY_RUN="1")
  assert words(local.stdout) == ["python", *SUPERVISED, FIELD]
  processes = launch(PROCESSES, 2, "c.py:clip", "my runs/a", FIELD, DRY_RUN="1", PORT="1234", PYTHON="py")
  together = ["--coordinator", "localhost:1234", "--processes", "2", "--process"]
  assert [words(line) for line in processes.stdout.splitlines()] == [
    ["py", *TRAIN, FIELD, *together, number] for number in "01"
  ]
  assert not calls(machine)


SSH = ["tpu-vm", "ssh", "slice", "--zone=us-west4-a"]
NODE = ["tpu-vm", "describe", "slice", "--zone=us-west4-a", "--format=value(state)"]
REQUEST = ["queued-resources", "describe", "slice", "--zone=us-west4-a", "--format=value(state.state)"]
CREATE = ["tpu-vm", "create", "slice", "--zone=us-west4-a", "--accelerator-type=v5p-8", "--version=v2-alpha-tpuv5"]
ENQUEUE = ["queued-resources", "create", "slice", "--zone=us-west4-a", "--node-id=slice"]
ENQUEUE += ["--accelerator-type=v5p-8", "--runtime-version=v2-alpha-tpuv5"]
KEEP = {"ACCELERATOR": "v5p-8", "REPO": "https://host/repo"}


@pytest.mark.parametrize(
  ("args", "env", "expected"),
  [
    (["create", "--spot"], {}, [[*CREATE, "--spot"]]),
    (["create", "--spot"], {"QUEUED": "1"}, [[*ENQUEUE, "--spot"]]),
    (["wait"], {}, [NODE]),
    (["wait"], {"QUEUED": "1"}, [REQUEST, NODE]),
    (["setup"], {}, [[*SSH, "--worker=all"]]),
    (["exec", "ls"], {}, [[*SSH, "--worker=all"]]),
    (["run", "c.py:clip", "my runs/a", FIELD], {}, [[*SSH, "--worker=all"]]),
    (["logs"], {}, [[*SSH, "--worker=0"]]),
    (["logs", 3], {}, [[*SSH, "--worker=3"]]),
    (["stop"], {}, [[*SSH, "--worker=all"]]),
    (["delete", "--quiet"], {}, [["tpu-vm", "delete", *SSH[2:], "--quiet"]]),
    (["delete"], {"QUEUED": "1"}, [["queued-resources", "delete", *SSH[2:], "--force"]]),
    (
      ["keep", "c.py:clip", "my runs/a", FIELD],
      {"QUEUED": "1", "GCLOUD_FLAGS": "--spot --internal-ips"},
      [
        [*ENQUEUE, "--spot", "--internal-ips"],
        REQUEST,
        NODE,
        *[[*SSH, "--worker=all"]] * 3,  # setup, run, status
        ["queued-resources", "delete", *SSH[2:], "--force", "--quiet"],
      ],
    ),
  ],
)
def test_tpu_dry_runs_print_every_gcloud_command(machine, args, env, expected):
  result = launch(TPU, *args, **KEEP | {"DRY_RUN": "1"} | env)
  assert (result.returncode, result.stderr) == (0, "")
  lines = [words(line) for line in result.stdout.splitlines()]
  assert all(line[:3] == ["gcloud", "compute", "tpus"] for line in lines)
  assert [line[3:8] if "ssh" in line else line[3:] for line in lines] == expected
  if args[0] in ("run", "keep"):  # both shells preserve the words
    inner = next(line[-1] for line in lines if "nohup" in line[-1])
    arguments = re.search(r"local\.sh (.*) >>", inner)[1]
    assert words(arguments) == ["c.py:clip", "my runs/a", FIELD, "--multihost"]
  assert not (machine / "log.gcloud").exists()


@pytest.mark.parametrize(
  ("codes", "starts", "returned"),
  [([0], 1, 0), ([1, 137, 0], 3, 0), ([1, 1, 1, 0], 3, 1), ([2], 1, 2), ([130], 1, 130), ([1, 143], 2, 143)],
)
def test_local_restarts_only_after_crashes(machine, codes, starts, returned):
  exits(machine, *codes)
  result = launch(LOCAL, "c.py:clip", "my runs/a", FIELD, RESTARTS="2", EXIT_FILE=f"{machine}/exit")
  assert result.returncode == returned
  assert (machine / "exit").read_text() == f"{returned}\n"
  assert calls(machine) == [[*SUPERVISED, FIELD]] * starts


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_local_forwards_signals_and_waits_for_the_checkpoint(machine, signum):
  process = start(LOCAL, "c.py", "runs/a")
  assert process.stdout.readline() == "started --stopped_exit_code=143\n"
  process.send_signal(signum)
  assert process.communicate(timeout=10)[0].endswith("saved\n")
  assert process.returncode == 143
  assert len(calls(machine)) == 1


@pytest.mark.parametrize(("script", "args"), [(LOCAL, ()), (PROCESSES, (2,))])
def test_a_signal_before_the_number_of_a_process_is_known_reaches_it(machine, monkeypatch, script, args):
  (machine / "late.sh").write_text("trap '[[ $BASH_COMMAND != *=\\$! ]] || sleep 0.3' DEBUG\n")
  monkeypatch.setenv("BASH_ENV", str(machine / "late.sh"))
  process = start(script, *args, "c.py", "runs/a")
  assert "started" in process.stdout.readline()
  process.terminate()
  assert "saved\n" in process.communicate(timeout=10)[0]
  assert process.returncode == 143


def test_local_can_be_stopped_between_two_starts(machine, monkeypatch):
  monkeypatch.setenv("PAUSE", "30")
  exits(machine, 1, 0)
  process = start(LOCAL, "c.py", "runs/a")
  until(lambda: "restarting" in process.stdout.readline())
  time.sleep(0.1)
  process.terminate()
  assert process.wait(timeout=5) == 1
  assert len(calls(machine)) == 1


def test_each_process_gets_its_number_and_its_output_a_prefix(machine):
  exits(machine, 0, 0, 0)
  result = launch(PROCESSES, 3, "c.py:clip", "my runs/a", FIELD, PORT="1234")
  assert result.returncode == 0
  assert sorted(result.stdout.splitlines()) == [f"[{i}] started {i}" for i in range(3)]
  common = [*TRAIN, FIELD, "--coordinator", "localhost:1234", "--processes", "3", "--process"]
  # Processes write to the log side by side, so whole calls may interleave: compare the words.
  assert sorted(word for call in calls(machine) for word in call) == sorted([*common * 3, "0", "1", "2"])


def test_a_process_that_fails_ends_the_others(machine):
  process = start(PROCESSES, 3, "c.py", "runs/a")
  for _ in range(3):
    assert "started" in process.stdout.readline()
  exits(machine, "", "", 7)
  output = process.communicate(timeout=10)[0]
  assert process.returncode == 7
  assert "process 2 exited with code 7; stopping the others" in output
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
def test_signals_reach_all_processes(machine, signum):
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
def test_tpu_create_chooses_the_software_version(machine, accelerator, version):
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
def test_tpu_names_a_missing_variable(machine, verb, missing, env):
  result = launch(TPU, verb, **env)
  assert result.returncode == 2
  assert f"variable {missing} is not set" in result.stderr
  assert not (machine / "log.gcloud").exists()


def test_tpu_delete_and_exec_call_gcloud(machine):
  assert launch(TPU, "delete", "--quiet").returncode == 0
  assert gcloud_calls(machine)[3:] == ["delete", "slice", "--zone=us-west4-a", "--quiet"]
  assert launch(TPU, "exec", "echo $((20 + 3)) 'a  b'").stdout == "23 a  b\n"
  assert "--worker=all" in gcloud_calls(machine)


def test_tpu_setup_checks_out_the_revision_and_installs_it(machine):
  origin = machine / "origin"
  git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b"]
  origin.mkdir()
  subprocess.run([*git, "init", "--quiet", "--initial-branch=main"], check=True)
  for message in ("first", "second"):
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", message], check=True)
  (machine / "bin" / "python3").symlink_to(machine / "bin" / "python")
  exits(machine, *[0] * 9)
  result = launch(TPU, "setup", REPO=str(origin), REVISION="main~1")
  assert result.returncode != 0  # not a name that a remote knows
  for _ in range(2):  # a second time does no harm
    result = launch(TPU, "setup", REPO=str(origin), REVISION="main", PREPARE="echo 'a  b' | tee ~/prepared")
    assert (result.returncode, result.stdout.splitlines()[-1].endswith(" second")) == (0, True)
  assert calls(machine)[2][-4:] == ["-c", "constraints.txt", "-e", ".[train,tpu]"]
  assert (machine / "prepared").read_text() == "a  b\n"
  assert launch(TPU, "setup", REPO=str(origin), PREPARE="false").returncode != 0


def test_a_run_on_a_tpu_outlives_its_connection_and_ends_with_stop(machine):
  (machine / "declip_jax" / ".venv" / "bin").mkdir(parents=True)
  (machine / "declip_jax" / "launch").symlink_to(LAUNCH)
  (machine / "declip_jax" / ".venv" / "bin" / "python").symlink_to(machine / "bin" / "python")
  exits(machine, 1)
  assert launch(TPU, "stop").stdout == "nothing is running\n"
  assert launch(TPU, "run", "c.py:clip", "my runs/a", FIELD).returncode == 0
  try:
    until(lambda: len(calls(machine)) == 2)  # restarted after a crash
    assert calls(machine) == [[*SUPERVISED, FIELD, "--multihost"]] * 2
    again = launch(TPU, "run", "c.py", "runs/a")
    assert (again.returncode, again.stderr) == (1, "already running: stop it first\n")
  finally:
    stopped = launch(TPU, "stop")
  assert stopped.stdout == "saved\n"
  assert launch(TPU, "stop").stdout == "nothing is running\n"


def keep(*args, **env):
  return ([TPU, "keep", *args], KEEP | {"CHECKOUT": str(ROOT), "POLL": "0", "RESTARTS": "0"} | env)


def watch(machine, *codes, **env):
  """Runs `keep` with these exit codes of the trainings; returns its result and its changing calls of gcloud."""
  exits(machine, *codes)
  command, env = keep("c.py:clip", "my runs/a", FIELD, **env)
  result = launch(*command, **env)
  return result, acts(machine)


def acts(machine):
  """The calls of gcloud that change something."""
  pairs = (machine / "log.verbs").read_text().split()
  return [verb for verb in pairs[1::2] if verb in ("create", "delete")]


def test_keep_creates_a_tpu_and_returns_when_the_run_has_finished(machine):
  result, done = watch(machine, 0, GCLOUD_FLAGS="--spot --internal-ips")
  assert (result.returncode, done) == (0, ["create"])
  assert calls(machine) == [[*SUPERVISED, FIELD, "--multihost"]]
  assert {"--spot", "--internal-ips"} < set(gcloud_calls(machine))
  assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d tpu_vm.sh: creating slice$", result.stderr, re.MULTILINE)
  assert "finished (exit code 0)" in result.stderr


@pytest.mark.parametrize("queued", ["", "1"])
def test_keep_creates_another_tpu_after_preemption_and_resumes_in_the_same_workdir(machine, queued):
  result, done = watch(machine, "preempted", "preempted", 0, QUEUED=queued)
  assert (result.returncode, done) == (0, ["create", *["delete", "create"] * 2])
  assert calls(machine) == [[*SUPERVISED, FIELD, "--multihost"]] * 3
  for state in ["WAITING_FOR_RESOURCES", "PROVISIONING"] if queued else ["PREEMPTED"]:
    assert f"slice is {state}\n" in result.stderr
  group = "queued-resources" if queued else "tpu-vm"
  assert (machine / "log.verbs").read_text().count(f"{group} create") == 3
  assert ("--force" in gcloud_calls(machine)) == bool(queued)


def test_keep_deletes_a_request_that_has_lost_its_tpu(machine):
  (machine / "queued-resources").write_text("ACTIVE\n")
  result, done = watch(machine, 0, QUEUED="1")
  assert (result.returncode, done) == (0, ["delete", "create"])


@pytest.mark.parametrize(
  ("queued", "states"),
  [
    ("", ["CREATING", "PREEMPTED"]),
    pytest.param("", ["REPAIRING", "UNKNOWN"], marks=pytest.mark.slow),
    pytest.param("", ["STOPPING", "STOPPED"], marks=pytest.mark.slow),
    pytest.param("", ["TERMINATED"], marks=pytest.mark.slow),
    ("1", ["SUSPENDING", "SUSPENDED"]),
    ("1", ["PROVISIONING", "FAILED"]),
  ],
)
def test_keep_replaces_a_tpu_in_a_final_state_and_waits_for_one_that_changes(machine, queued, states):
  (machine / ("queued-resources" if queued else "tpu-vm")).write_text("\n".join(states) + "\n")
  result, done = watch(machine, 0, QUEUED=queued)
  assert (result.returncode, done) == (0, ["delete", "create"])
  assert all(f"slice is {state}\n" in result.stderr for state in states)


def test_keep_ends_with_a_user_error(machine):
  result, done = watch(machine, 2, 0, RESTARTS="5")
  assert (result.returncode, done, len(calls(machine))) == (2, ["create"], 1)
  assert "a user error (exit code 2)" in result.stderr


def test_keep_tries_another_tpu_after_a_crash_but_not_forever(machine):
  result, done = watch(machine, 1, 134, 7, 0, CRASHES="2")
  assert (result.returncode, done) == (7, ["create", *["delete", "create"] * 2])
  assert "crashed with exit code 134; another TPU may help (2 of 2)" in result.stderr


@pytest.mark.parametrize("code", ["gone", 143])
def test_keep_restarts_the_run_once_a_machine_is_back(machine, code):
  result, done = watch(machine, code, code, 0)
  assert (result.returncode, done, len(calls(machine))) == (0, ["create"], 3)


def test_keep_ignores_the_end_of_another_run(machine):
  (machine / "tpu-vm").write_text("READY\n")
  (machine / "declip_jax.exit").write_text("2\n")
  result, done = watch(machine, 0)
  assert (result.returncode, done, len(calls(machine))) == (0, [], 1)


@pytest.mark.parametrize(
  ("answers", "returned", "done"),
  [
    (["running", "0 0"], 0, []),
    (["running", "running 1", "running 0", "1 1", "0"], 0, ["delete", "create"]),  # waits for the others to end
    (["running", "running absent", "running", "0"], 0, ["run"]),  # one machine came back without its run
    (["running", "143 0", "running", "0"], 0, ["run"]),
    (["running", "1 2 137"], 2, []),
    (["running", "stopped running 143"], 143, []),
    (["running", "broken", "broken", "running", "0"], 0, []),
  ],
)
def test_keep_combines_the_answers_of_several_workers(machine, answers, returned, done):
  (machine / "tpu-vm").write_text("READY\n")
  (machine / "answers").write_text("\n".join(answers) + "\n")
  result, replaced = watch(machine, 0)
  runs = ["run" for word in gcloud_calls(machine) if "nohup" in word]
  assert (result.returncode, replaced + runs) == (returned, done)


def test_keep_waits_longer_after_every_failure_and_gives_up(machine):
  (machine / "bin" / "sleep").write_text('#!/usr/bin/env bash\necho "$1" >>"$LOG.sleep"\n')
  (machine / "bin" / "sleep").chmod(0o755)
  (machine / "failures").write_text("\n" * 9)
  result, done = watch(machine, RETRIES="7", POLL="3")
  assert (result.returncode, done) == (1, ["create"] * 8)
  assert (machine / "log.sleep").read_text().split() == ["3", "6", "12", "24", "48", "48", "48"]
  assert "creating slice failed; retrying in 48 s (retry 7 of 7)" in result.stderr
  assert "creating slice failed; giving up after 7 retries" in result.stderr


def test_keep_resets_its_failure_count_once_the_run_has_trained(machine):
  (machine / "tpu-vm").write_text("broken\nbroken\nREADY\nbroken\nbroken\nREADY\n")
  (machine / "answers").write_text("running\n0\n")
  result, done = watch(machine, RETRIES="2")
  assert (result.returncode, done) == (0, [])
  assert result.stderr.count("no connection") == 4


def test_keep_gives_up_on_a_request_that_fails_repeatedly(machine):
  (machine / "queued-resources").write_text("FAILED\n")
  (machine / "failures").write_text("\n")
  result, done = watch(machine, QUEUED="1", RETRIES="1")
  assert (result.returncode, done) == (1, ["delete", "create"])


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupting_keep_does_not_stop_the_run(machine, monkeypatch, signum):
  command, env = keep("c.py", "runs/a")
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  (machine / "tpu-vm").write_text("READY\n")
  exits(machine, "", 0)
  try:
    for verb in (["setup"], ["run", "c.py", "runs/a"]):
      assert launch(TPU, *verb).returncode == 0
    monkeypatch.setenv("POLL", "60")
    watcher = start(*command)
    until(lambda: "running" in watcher.stdout.readline())
    time.sleep(0.3)  # during the pause
    watcher.send_signal(signum)
    output = watcher.communicate(timeout=5)[0]
    assert watcher.returncode == 130
    assert "the run on slice continues, and the same command watches it again" in output
    monkeypatch.setenv("POLL", "0")
    watcher = start(*command)
    until(lambda: "running" in watcher.stdout.readline())
    assert launch(TPU, "stop").stdout == "saved\n"
    assert "stopped (exit code 143)" in watcher.communicate(timeout=10)[0]
    assert watcher.returncode == 143
    assert launch(*command).returncode == 0  # it was stopped before, but this time it has finished
  finally:
    launch(TPU, "stop")
  assert (len(calls(machine)), acts(machine)) == (2, [])


def test_keep_names_missing_variables_before_it_creates_anything(machine):
  for missing in KEEP:
    result = launch(TPU, "keep", "c.py", "runs/a", **KEEP | {missing: ""})
    assert (result.returncode, f"variable {missing} is not set" in result.stderr) == (2, True)
  result = launch(TPU, "keep", "c.py", "runs/a", **KEEP | {"ACCELERATOR": "v99-8"})
  assert (result.returncode, "variable VERSION is not set" in result.stderr) == (2, True)
  assert not (machine / "log.gcloud").exists()


@pytest.mark.parametrize(
  ("states", "returned"),
  [("CREATING\nbroken\nREADY\n", 0), ("CREATING\nPREEMPTED\n", 1), (None, 1)],
)
def test_wait_returns_when_the_tpu_is_ready_or_lost(machine, states, returned):
  if states:
    (machine / "tpu-vm").write_text(states)
  result = launch(TPU, "wait", POLL="0")
  assert result.returncode == returned
  assert ("slice is CREATING" in result.stderr) == bool(states)


GKE_ENV = {"CLUSTER": "pod", "WORKLOAD": "demo", "TPU_TYPE": "v5litepod-16", "IMAGE": "host/declip:1"}


def test_gke_runs_lists_logs_and_deletes_a_workload(machine):
  env = GKE_ENV | {"SLICES": "4", "XPK_FLAGS": "--storage=nfs --priority=high", "PROJECT": "mine"}
  where = ["--cluster=pod", "--zone=us-west4-a", "--project=mine"]
  pod = "jobset.sigs.k8s.io/job-index={},batch.kubernetes.io/job-completion-index={}"
  logs = ["kubectl", "logs", "--follow", "--tail=100", "--container=jax-tpu"]
  logs += [f"--selector=xpk.google.com/workload=demo,{pod}"]
  # The arguments of xpk 1.16, whose own dry run turns them into a JobSet.
  create = ["xpk", "workload", "create", *where, "--workload=demo", "--tpu-type=v5litepod-16", "--num-slices=4"]
  create += ["--docker-image=host/declip:1", "--max-restarts=100", "--restart-on-exit-codes=1,3-126"]
  create += ["--termination-grace-period-seconds=300", "--storage=nfs", "--priority=high"]
  expected = {
    ("list",): ["xpk", "workload", "list", *where],
    ("logs",): [*logs[:-1], logs[-1].format(0, 0)],
    ("logs", "1", "2"): [*logs[:-1], logs[-1].format(1, 2)],
    ("delete",): ["xpk", "workload", "delete", *where, "--workload=demo", "--force"],
    ("run", "c.py:clip", "my runs/a", FIELD): create,
  }
  for args, command in expected.items():
    dry = launch(GKE, *args, **env | {"DRY_RUN": "1"})
    assert (dry.returncode, dry.stderr, len(calls(machine))) == (0, "", 0)
    assert words(dry.stdout)[: len(command)] == command
    assert launch(GKE, *args, **env).returncode == 0
    assert calls(machine) == [words(dry.stdout)]
    (machine / "log").unlink()
  inner = words(dry.stdout)[-1].removeprefix("--command=")
  assert words(inner) == ["exec", "python", *SUPERVISED, FIELD, "--multihost"]


def test_signals_reach_python_through_the_shell_in_which_xpk_starts_it(machine):
  dry = launch(GKE, "run", "c.py", "runs/a", **GKE_ENV | {"DRY_RUN": "1"})
  inner = words(dry.stdout)[-1].removeprefix("--command=")
  around = f"({inner}) & PID=$!; sleep 0.5; kill -TERM $PID; wait $PID"
  result = subprocess.run(["bash", "-c", around], capture_output=True, text=True, timeout=10)
  assert (result.returncode, result.stdout) == (143, "started --multihost\nsaving\nsaved\n")


@pytest.mark.parametrize(
  ("args", "env", "message"),
  [
    (["run", "c.py", "runs/a"], {"IMAGE": ""}, "variable IMAGE is not set"),
    (["run", "c.py", "runs/a"], {"BASE_IMAGE": "other"}, "one of IMAGE and BASE_IMAGE"),
    (["run", "c.py", "runs/a"], {"TPU_TYPE": ""}, "variable TPU_TYPE is not set"),
    (["list"], {"CLUSTER": ""}, "variable CLUSTER is not set"),
    (["logs"], {"WORKLOAD": ""}, "variable WORKLOAD is not set"),
    (["delete"], {"WORKLOAD": ""}, "variable WORKLOAD is not set"),  # xpk would delete all of them
  ],
)
def test_gke_names_the_error(machine, args, env, message):
  result = launch(GKE, *args, **GKE_ENV | env)
  assert (result.returncode, message in result.stderr) == (2, True)
  assert not calls(machine)


def test_gke_accepts_a_base_image_instead_of_an_image(machine):
  result = launch(GKE, "run", "c.py", "runs/a", **GKE_ENV | {"IMAGE": "", "BASE_IMAGE": "host/base", "DRY_RUN": "1"})
  images = [word for word in words(result.stdout) if "image" in word]
  assert images == ["--base-docker-image=host/base"]


@pytest.fixture
def job(machine, monkeypatch):
  """A running Slurm job on a node with four GPUs."""
  settings = {"JOB_ID": 77, "GPUS_ON_NODE": 4, "NTASKS_PER_NODE": 4, "CPUS_PER_TASK": 6}
  for name, value in settings.items():
    monkeypatch.setenv(f"SLURM_{name}", str(value))
  (machine / "job").write_text("RUNNING\n")
  return machine


SRUN = ["--label", "--gpu-bind=none", "--kill-on-bad-exit=0", "--wait=600"]


def test_slurm_dry_run_needs_no_job(machine):
  result = launch(SLURM, "c.py:clip", "my runs/a", FIELD, DRY_RUN="1")
  command = ["srun", *SRUN, "--cpus-per-task=8", "python", *SUPERVISED, FIELD, "--multihost"]
  assert words(result.stdout) == command
  assert not calls(machine)


def test_slurm_reads_its_options_at_the_top_of_the_script(machine):
  lines = (LAUNCH / SLURM).read_text().splitlines()
  flags = " ".join(line.removeprefix("#SBATCH") for line in lines if line.startswith("#SBATCH")).split()
  command = next(number for number, line in enumerate(lines) if not line.startswith("#"))
  assert max(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) < command
  assert {"--requeue", "--open-mode=append", "--signal=B:USR1@300"} < set(flags)
  given = dict(flag.split("=") for flag in flags if flag != "--requeue")
  assert given["--gpus-per-node"] == given["--ntasks-per-node"]
  for flag in ("--nodes=1 --gpus-per-node=8 --ntasks-per-node=8", "--cpus-per-task=8", "--signal=B:USR1@300"):
    assert set(flag.split()) < set(flags)
    assert flag in launch(SLURM, "--help").stdout


@pytest.mark.parametrize(
  ("codes", "starts", "returned"), [([0], 1, 0), ([1, 137, 0], 3, 0), ([1, 1, 1, 0], 3, 1), ([2], 1, 2), ([1, 2], 2, 2)]
)
def test_slurm_restarts_only_after_crashes(job, codes, starts, returned):
  exits(job, *codes)
  result = launch(SLURM, "c.py:clip", "my runs/a", FIELD, RESTARTS="2")
  assert result.returncode == returned
  assert calls(job) == [[*SRUN, "--cpus-per-task=6", "python", *SUPERVISED, FIELD, "--multihost"]] * starts
  assert "scontrol" not in result.stdout


def test_a_slurm_job_saves_and_is_requeued_before_its_time_limit(job):
  process = start(SLURM, "c.py", "runs/a")
  assert process.stdout.readline() == "started 1\n"
  process.send_signal(signal.SIGUSR1)
  lines = process.communicate(timeout=10)[0].splitlines()
  assert lines[-3:] == ["saved", "slurm.sh: requeueing the job", "scontrol requeue 77"]
  assert "forcing job termination" not in lines
  assert (process.returncode, len(calls(job))) == (143, 1)


def test_a_slurm_job_that_crashes_at_its_time_limit_is_requeued_too(job, monkeypatch):
  monkeypatch.setenv("RESTARTS", "0")
  (job / "bin" / "scancel").write_text("#!/usr/bin/env bash\nexit 1\n")
  process = start(SLURM, "c.py", "runs/a")
  assert process.stdout.readline() == "started 1\n"
  process.send_signal(signal.SIGUSR1)
  assert "the time limit is near" in process.stdout.readline()
  exits(job, 1, 0)
  assert "scontrol requeue 77" in process.communicate(timeout=10)[0]
  assert len(calls(job)) == 1


def test_a_slurm_job_does_not_restart_at_its_time_limit(job, monkeypatch):
  monkeypatch.setenv("PAUSE", "30")
  exits(job, 1, 0)
  process = start(SLURM, "c.py", "runs/a")
  until(lambda: "restarting" in process.stdout.readline())
  time.sleep(0.1)
  process.send_signal(signal.SIGUSR1)
  until(lambda: process.stdout.readline() == "scontrol requeue 77\n")
  assert process.wait(timeout=5) == 1
  assert len(calls(job)) == 1


def test_a_slurm_job_is_requeued_if_something_else_stopped_its_tasks(job):
  exits(job, 143)
  assert launch(SLURM, "c.py", "runs/a").stdout.endswith("scontrol requeue 77\n")


def test_a_cancelled_slurm_job_waits_for_its_tasks_and_is_not_requeued(job):
  (job / "job").write_text("COMPLETING\n")
  process = start(SLURM, "c.py", "runs/a")
  assert process.stdout.readline() == "started 1\n"
  process.terminate()
  time.sleep(0.3)
  assert process.poll() is None
  exits(job, 143)
  assert "scontrol" not in process.communicate(timeout=10)[0]
  assert process.returncode == 143


@pytest.mark.parametrize(
  ("env", "message"),
  [
    ({"SLURM_JOB_ID": ""}, "variable SLURM_JOB_ID is not set: submit by sbatch"),
    ({"SLURM_GPUS_ON_NODE": ""}, "variable SLURM_GPUS_ON_NODE is not set"),
    ({"SLURM_GPUS_ON_NODE": "8"}, "--ntasks-per-node=4, but 8 GPUs on a node"),
  ],
)
def test_slurm_names_the_error(job, env, message):
  result = launch(SLURM, "c.py", "runs/a", **env)
  assert (result.returncode, message in result.stderr) == (2, True)
  assert not calls(job)


def docker_lines():
  text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
  return [line.split(maxsplit=1) for line in text.splitlines() if line]


def test_the_image_contains_the_tracked_files_that_it_names_and_no_others():
  copied = [rest.split()[:-1] for name, rest in docker_lines() if name == "COPY" and "--from" not in rest]
  sources = {source for line in copied for source in line}
  assert all((ROOT / source).exists() for source in sources)
  ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
  assert ignored[0] == "*"
  assert {line[1:] for line in ignored if line.startswith("!")} == sources
  tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True).stdout.splitlines()
  again = [pattern.removeprefix("**/") for pattern in ignored if pattern not in ("*",) and pattern[0] != "!"]
  lost = [path for path in tracked if any(fnmatch.fnmatch(part, name) for part in path.split("/") for name in again)]
  assert not lost


def test_the_image_trains_as_an_unprivileged_user():
  lines = docker_lines()
  assert json.loads(dict(lines)["ENTRYPOINT"]) == ["python", *TRAIN[:2]]
  user = next(rest for name, rest in lines if name == "USER")
  assert user == "$RUN_AS"
  assert ["ARG", "RUN_AS=declip"] in lines
  assert all(rest.startswith("python:3.12-slim") for name, rest in lines if name == "FROM")
  extras = re.findall(r'^    "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
  named = re.search(r"# Extras of setup.py: ([\w, ]+), \.\.\.", (ROOT / "Dockerfile").read_text())[1]
  assert set(named.split(", ")) <= set(extras)
