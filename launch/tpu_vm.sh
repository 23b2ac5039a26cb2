#!/usr/bin/env bash
# Trains on a Cloud TPU VM, on one host or all hosts of a pod slice, through gcloud.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/tpu_vm.sh create [gcloud flags, such as --spot]
       launch/tpu_vm.sh wait
       launch/tpu_vm.sh setup
       launch/tpu_vm.sh exec COMMAND
       launch/tpu_vm.sh run CONFIG WORKDIR [--config.field=value ...]
       launch/tpu_vm.sh logs [WORKER]
       launch/tpu_vm.sh stop
       launch/tpu_vm.sh delete [gcloud flags, such as --quiet]
       launch/tpu_vm.sh keep CONFIG WORKDIR [--config.field=value ...]

create  creates the TPU; with QUEUED=1, adds a request for it to Google's queue and returns
wait    returns when the TPU is ready
setup   installs declip_jax on all workers: REPO at REVISION, with Python 3.12; then runs PREPARE
exec    runs a shell command on all workers
run     starts training on all workers through launch/local.sh; it outlives the connection and restarts after a crash
logs    follows the log of a worker (default 0)
stop    sends SIGTERM to all workers and waits until they have saved a checkpoint, from which another `run` resumes
delete  deletes the TPU and everything on its disks
keep    does all of this until the run ends by itself: creates, waits, sets up, runs and watches. A preempted TPU is
        deleted and created again, and the run resumes in WORKDIR. Returns the run's exit code: 0 when it has finished,
        2 after a user error, 143 after `stop`. The TPU is kept. Ctrl-C only stops watching.

Variables:
  TPU_NAME, ZONE  always required
  PROJECT         project (default: that of gcloud)
  QUEUED          1: create, wait, delete and keep use a queued resource, which waits for capacity
  ACCELERATOR     create, keep: type of the TPU, such as v5litepod-16
  VERSION         create, keep: software version; the default depends on ACCELERATOR
  GCLOUD_FLAGS    keep: further flags of create, such as --spot
  REPO            setup, keep: git URL that the workers can read
  REVISION        setup, keep: branch, tag or full commit (default main)
  PREPARE         setup, keep: shell command for all workers, such as mounting the file system of WORKDIR and the data
  RESTARTS        run, keep: maximum number of restarts after a crash (default 5)
  POLL            wait, keep: seconds between two checks (default 60); up to 16 times that after failures
  RETRIES         keep: maximum number of consecutive failures, also of gcloud, without a run in progress (default 100)
  CRASHES         keep: maximum number of new TPUs after crashes that RESTARTS did not recover (default 3)
  DRY_RUN         1 prints the gcloud commands without running them
USAGE
}

wrong_usage() { usage >&2; exit 2; }

require() {
  for name; do
    [[ ${!name:-} ]] || { echo "tpu_vm.sh: variable $name is not set; see launch/tpu_vm.sh --help" >&2; exit 2; }
  done
}

exec 3>&1 # dry runs print here, even where the output of a command is captured

# tpu GROUP VERB ARGUMENTS..., where GROUP is tpu-vm or queued-resources: the two have the same name
tpu() {
  local command=(gcloud compute tpus "$1" "$2" "$TPU_NAME" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} "${@:3}")
  if [[ ${DRY_RUN:-} == 1 ]]; then printf '%q ' "${command[@]}" >&3; echo >&3; else "${command[@]}" 3>&-; fi
}

# workers WHICH COMMAND; a preempted TPU does not close the connection, so keep-alive messages probe it
workers() { tpu tpu-vm ssh "--worker=$1" --ssh-flag=-oServerAliveInterval=30 "--command=$2"; }

# https://cloud.google.com/tpu/docs/runtimes
default_version() {
  case $ACCELERATOR in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) require VERSION ;;
  esac
}

create() {
  require ACCELERATOR
  local version
  version=${VERSION:-$(default_version)}
  if [[ ${QUEUED:-} == 1 ]]; then
    set -- "--node-id=$TPU_NAME" "--accelerator-type=$ACCELERATOR" "--runtime-version=$version" "$@"
    tpu queued-resources create "$@"
  else
    tpu tpu-vm create "--accelerator-type=$ACCELERATOR" "--version=$version" "$@"
  fi
}

delete() {
  if [[ ${QUEUED:-} == 1 ]]; then tpu queued-resources delete --force "$@"; else tpu tpu-vm delete "$@"; fi
}

# The software images come with Python 3.10, which is too old; uv brings its own.
setup() {
  require REPO
  local repo revision prepare
  printf -v repo %q "$REPO"
  printf -v revision %q "${REVISION:-main}"
  printf -v prepare %q "${PREPARE:-true}"
  workers all "set -e
    [ -d declip_jax/.git ] || git clone --quiet $repo declip_jax
    cd declip_jax
    git fetch --quiet $repo $revision
    git checkout --quiet --detach FETCH_HEAD
    python3 -m pip install --quiet --user uv
    [ -d .venv ] || python3 -m uv venv --quiet --python=3.12 .venv
    python3 -m uv pip install --quiet --python=.venv/bin/python -c constraints.txt -e '.[train,tpu]'
    bash -c $prepare
    git log -1 --oneline"
}

# The process id alone may belong to another process by now.
readonly IS_RUNNING='running() { grep -qs launch/local.sh "/proc/$(cat ~/declip_jax.pid 2>/dev/null)/cmdline"; }'

run() {
  local arguments
  printf -v arguments '%q ' "$@" --multihost
  workers all "$IS_RUNNING
    if running; then echo 'already running: stop it first' >&2; exit 1; fi
    cd declip_jax || exit
    rm -f ~/declip_jax.exit ~/declip_jax.stopped
    export PYTHON=.venv/bin/python RESTARTS=${RESTARTS:-5} EXIT_FILE=~/declip_jax.exit
    nohup launch/local.sh $arguments >>~/declip_jax.log 2>&1 </dev/null &
    echo \$! >~/declip_jax.pid"
}

stop() {
  workers all "$IS_RUNNING"'
    running || { echo "nothing is running"; exit; }
    touch ~/declip_jax.stopped
    kill -TERM "$(cat ~/declip_jax.pid)"
    while running; do sleep 1; done
    tail -n 1 ~/declip_jax.log'
}

# The state of the run in one word: running, stopped (by `stop`), absent (not on all workers), silent (a worker does not
# answer), or its exit code.
status() {
  local output code
  output=$(workers all "$IS_RUNNING"'
    if running; then word=running
    elif [ -e ~/declip_jax.stopped ]; then word=stopped
    else word=$(cat ~/declip_jax.exit 2>/dev/null || echo absent); fi
    echo "declip_jax is $word"') || { echo silent; return; }
  # The worst state first. 130 and 143 mean that the machine is going down, since nobody stopped the run.
  for code in stopped absent running 2 130 143 '[0-9]*[1-9][0-9]*' 0; do
    code=$(grep -owE "declip_jax is $code" <<<"$output" | head -n 1) || continue
    code=${code##* }
    case $code in 130 | 143) code=absent ;; esac
    echo "$code"
    return
  done
  echo silent
}

# describe GROUP FIELD: the state in capitals, NONE if there is no such TPU, silent if gcloud failed
describe() {
  local output
  output=$(tpu "$1" describe "--format=value($2)" 2>&1) || {
    case $output in *NOT_FOUND*) echo NONE ;; *) echo "$output" >&2; echo silent ;; esac
    return
  }
  [[ ${DRY_RUN:-} == 1 ]] && output=ACTIVE
  grep -oxE '[A-Z_]+' <<<"$output" | tail -n 1 || echo silent
}

# The state of the TPU, or that of the queued resource as long as there is no TPU.
state() {
  local found=ACTIVE
  if [[ ${QUEUED:-} == 1 ]]; then
    found=$(describe queued-resources state.state)
    [[ $found == ACTIVE ]] || { echo "$found"; return; }
  fi
  found=$(describe tpu-vm state)
  [[ $found == NONE && ${QUEUED:-} == 1 ]] && found=TERMINATED # the request still has to be deleted
  echo "$found"
}

# Prints a message unless it was the last one.
said=''
say() {
  [[ $1 == "$said" ]] || echo "$(date '+%F %T') tpu_vm.sh: $1" >&2
  said=$1
}

pause() {
  sleep "$1" &
  wait $! || true # in the background, so that a signal is handled at once
}

# Google calls a TPU UNKNOWN when its repair has failed.
readonly LOST='^(PREEMPTED|TERMINATED|STOPPED|SUSPENDED|UNKNOWN|FAILED)$'

wait_for_tpu() {
  local found
  for (( ; ; )); do
    found=$(state)
    [[ ${DRY_RUN:-} == 1 || $found == READY ]] && return
    [[ $found == NONE || $found =~ $LOST ]] && { echo "tpu_vm.sh: $TPU_NAME is $found" >&2; return 1; }
    say "$TPU_NAME is $found"
    pause "${POLL:-60}"
  done
}

# keep checks the state, takes the one step that it requires, and checks again: it can be interrupted anywhere.
keep() {
  require ACCELERATOR REPO
  VERSION=${VERSION:-$(default_version)}
  if [[ ${DRY_RUN:-} == 1 ]]; then
    # shellcheck disable=SC2086 # several flags
    create ${GCLOUD_FLAGS:-}
    state >/dev/null
    setup
    run "$@"
    status >/dev/null
    delete --quiet
    return
  fi
  local found run='' mine='' failures=0 crashes=0 delay
  trap 'leave' INT TERM HUP
  for (( ; ; )); do
    delay=${POLL:-60} run='' found=$(state)
    if [[ $found == READY ]]; then
      run=$(status)
      # The exit code may be that of an earlier run.
      [[ $mine || $run == running || $run == silent ]] || run=absent
    fi
    case $found/$run in
      READY/running)
        say "running"
        mine=1 failures=0
        ;;
      READY/absent)
        say "setting up and starting the run"
        # If only some workers have lost the run, this fails on the others, and the next check finds it running.
        if setup && run "$@"; then mine=1; else fail "the start"; fi
        ;;
      READY/silent) fail "asking the workers" ;;
      READY/stopped) end 143 "stopped" ;;
      READY/0) end 0 "finished" ;;
      READY/2) end 2 "a user error" ;;
      READY/*)
        ((crashes < ${CRASHES:-3})) || end "$run" "crashed"
        crashes=$((crashes + 1))
        say "crashed with exit code $run; another TPU may help ($crashes of ${CRASHES:-3})"
        replace || fail "replacing $TPU_NAME"
        ;;
      NONE/)
        say "creating $TPU_NAME"
        # shellcheck disable=SC2086 # several flags
        create ${GCLOUD_FLAGS:-} || fail "creating $TPU_NAME"
        ;;
      silent/) fail "asking for the state of $TPU_NAME" ;;
      *)
        say "$TPU_NAME is $found"
        if [[ $found =~ $LOST ]]; then
          [[ $found == FAILED ]] && fail "the request"
          replace || fail "replacing $TPU_NAME"
        fi
        ;;
    esac
    pause "$delay"
  done
}

# shellcheck disable=SC2086 # several flags
replace() { delete --quiet && create ${GCLOUD_FLAGS:-}; }

# Counts a failure and makes the delay longer.
fail() {
  if ((failures >= ${RETRIES:-100})); then
    say "$1 failed; giving up after $failures retries. Run the same command again to continue"
    exit 1
  fi
  delay=$((${POLL:-60} << (failures < 4 ? failures : 4)))
  failures=$((failures + 1))
  said='' # every failure is printed
  say "$1 failed; retrying in $delay s (retry $failures of ${RETRIES:-100})"
}

end() {
  workers 0 'tail -n 5 ~/declip_jax.log' || true
  say "the run has ended: $2 (exit code $1). $TPU_NAME still exists and is billed: launch/tpu_vm.sh delete"
  exit "$1"
}

leave() {
  local sleeper
  for sleeper in $(jobs -p); do kill "$sleeper" 2>/dev/null || true; done
  say "no longer watching; the run on $TPU_NAME continues, and the same command watches it again.
  launch/tpu_vm.sh stop stops the run, launch/tpu_vm.sh delete deletes the TPU"
  exit 130
}

verb=${1:-}
case $verb in
  --help) usage; exit ;;
  create | delete) ;;
  wait | setup | stop) (($# == 1)) || wrong_usage ;;
  exec) (($# == 2)) || wrong_usage ;;
  logs) (($# <= 2)) || wrong_usage ;;
  run | keep) (($# >= 3)) && [[ $2 != -* && $3 != -* ]] || wrong_usage ;;
  *) wrong_usage ;;
esac
require TPU_NAME ZONE
case $verb in
  wait) wait_for_tpu ;;
  exec) workers all "$2" ;;
  logs) workers "${2:-0}" 'tail -n 100 -F ~/declip_jax.log' ;;
  *) "$verb" "${@:2}" ;;
esac
