#!/usr/bin/env bash
# Trains on a Cloud TPU VM, one host or all hosts of a pod slice, through gcloud.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/tpu_vm.sh create [gcloud flags, such as --spot]
       launch/tpu_vm.sh setup
       launch/tpu_vm.sh exec COMMAND
       launch/tpu_vm.sh run CONFIG WORKDIR [--config.field=value ...]
       launch/tpu_vm.sh logs [WORKER]
       launch/tpu_vm.sh stop
       launch/tpu_vm.sh delete [gcloud flags, such as --quiet]

create  makes the TPU
setup   installs declip_jax on all workers: REPO at REVISION, with Python 3.12
exec    runs a shell command on all workers, for example to mount the directory that WORKDIR and the data are in
run     starts training on all workers through launch/local.sh; it outlives the connection and restarts after a crash
logs    follows the log of a worker (default 0)
stop    sends SIGTERM to all workers and waits until they have saved a checkpoint; `run` again goes on from there
delete  deletes the TPU, with all that is on its disks

Variables:
  TPU_NAME, ZONE  always
  PROJECT         default: that of gcloud
  ACCELERATOR     create: the type, such as v5litepod-16
  VERSION         create: the software; the default depends on ACCELERATOR
  REPO            setup: git URL that the workers can read
  REVISION        setup: branch, tag or full commit (default main)
  RESTARTS        run: how often to start again after a crash at most (default 5)
  DRY_RUN         1 prints the gcloud command and does not run it
USAGE
}

require() {
  for name; do
    [[ ${!name:-} ]] || { echo "tpu_vm.sh: variable $name is not set; see launch/tpu_vm.sh --help" >&2; exit 2; }
  done
}

# tpu VERB ARGUMENTS...
tpu() {
  require TPU_NAME ZONE
  local command=(gcloud compute tpus tpu-vm "$1" "$TPU_NAME" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} "${@:2}")
  if [[ ${DRY_RUN:-} == 1 ]]; then printf '%q ' "${command[@]}"; echo; else "${command[@]}"; fi
}

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
  tpu create "--accelerator-type=$ACCELERATOR" "--version=$version" "$@"
}

# The software images come with Python 3.10, which is too old; uv brings its own.
setup() {
  require REPO
  local repo revision
  printf -v repo %q "$REPO"
  printf -v revision %q "${REVISION:-main}"
  tpu ssh --worker=all --command="set -e
    [ -d declip_jax/.git ] || git clone --quiet $repo declip_jax
    cd declip_jax
    git fetch --quiet $repo $revision
    git checkout --quiet --detach FETCH_HEAD
    python3 -m pip install --quiet --user uv
    [ -d .venv ] || python3 -m uv venv --quiet --python=3.12 .venv
    python3 -m uv pip install --quiet --python=.venv/bin/python -c constraints.txt -e '.[tpu]'
    git log -1 --oneline"
}

# A number alone could by now be that of another process.
readonly IS_RUNNING='running() { grep -qs launch/local.sh "/proc/$(cat ~/declip_jax.pid 2>/dev/null)/cmdline"; }'

run() {
  (($# >= 2)) && [[ $1 != -* && $2 != -* ]] || { usage >&2; exit 2; }
  local arguments
  printf -v arguments '%q ' "$@" --multihost
  tpu ssh --worker=all --command="$IS_RUNNING
    if running; then echo 'already running: stop it first' >&2; exit 1; fi
    cd declip_jax || exit
    export PYTHON=.venv/bin/python RESTARTS=${RESTARTS:-5}
    nohup launch/local.sh $arguments >>~/declip_jax.log 2>&1 </dev/null &
    echo \$! >~/declip_jax.pid"
}

stop() {
  tpu ssh --worker=all --command="$IS_RUNNING"'
    running || { echo "nothing is running"; exit; }
    kill -TERM "$(cat ~/declip_jax.pid)"
    while running; do sleep 1; done
    tail -n 1 ~/declip_jax.log'
}

verb=${1:-}
case $verb in
  --help) usage ;;
  create | run) "$verb" "${@:2}" ;;
  setup | stop) (($# == 1)) || { usage >&2; exit 2; }; "$verb" ;;
  exec) (($# == 2)) || { usage >&2; exit 2; }; tpu ssh --worker=all --command="$2" ;;
  logs) tpu ssh "--worker=${2:-0}" --command='tail -n 100 -F ~/declip_jax.log' ;;
  delete) tpu delete "${@:2}" ;;
  *) usage >&2; exit 2 ;;
esac
