#!/usr/bin/env bash
# Trains on one machine and restarts after a crash; the run resumes from its newest checkpoint.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/local.sh CONFIG WORKDIR [--config.field=value ...]

Trains on this machine in one process, which uses the CPU, all GPUs, or all chips of a TPU VM. It is restarted after a
crash, but not after success, a user error (exit code 2), or Ctrl-C and SIGTERM (130 and 143, after a checkpoint).

CONFIG is the name of a config, such as demo or slip/slip_base_25ep, or the path of a file.

Variables:
  RESTARTS  maximum number of restarts (default 5)
  PAUSE     seconds before a restart (default 10)
  PYTHON    the interpreter (default python); CUDA_VISIBLE_DEVICES=0,1 restricts it to those GPUs
  EXIT_FILE file to write the exit code to at the end (default: none)
  DRY_RUN   1 prints the command without running it
USAGE
}

[[ ${1:-} == --help ]] && { usage; exit; }
(($# >= 2)) && [[ $1 != -* && $2 != -* ]] || { usage >&2; exit 2; }

command=("${PYTHON:-python}" -m declip_jax.train --config "$1" --workdir "$2" --stopped_exit_code=143 "${@:3}")
[[ ${DRY_RUN:-} == 1 ]] && { printf '%q ' "${command[@]}"; echo; exit; }

trap 'code=$?; [[ ! ${EXIT_FILE:-} ]] || echo "$code" >"$EXIT_FILE"' EXIT
child='' stopped=''
# In the background: otherwise bash handles a signal only after the command has exited by itself.
trap 'stopped=1; [[ $child ]] && kill -TERM "$child" 2>/dev/null || true' INT TERM HUP

for ((restart = 0; ; restart++)); do
  child=''
  "${command[@]}" &
  child=$!
  [[ ! $stopped ]] || kill -TERM "$child" 2>/dev/null || true # the signal came before its number was known
  # A signal interrupts `wait` while the command still writes its checkpoint.
  while code=0; wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do :; done
  case $code in 0 | 2 | 130 | 143) exit "$code" ;; esac
  [[ $stopped ]] && exit "$code"
  if ((restart >= ${RESTARTS:-5})); then
    echo "local.sh: exit code $code; giving up after $restart restarts" >&2
    exit "$code"
  fi
  echo "local.sh: exit code $code; restarting in ${PAUSE:-10} s ($((restart + 1)) of ${RESTARTS:-5})" >&2
  sleep "${PAUSE:-10}" &
  child=$!
  wait "$child" || true
  [[ $stopped ]] && exit "$code"
done
