#!/usr/bin/env bash
# Trains on one machine and starts again after a crash; the run itself goes on from its newest checkpoint.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/local.sh CONFIG WORKDIR [--config.field=value ...]

Trains on this machine by one process, which takes the CPU, all GPUs, or all chips of a TPU VM. A crash starts it again.
Success, a user error (exit code 2), Ctrl-C and SIGTERM (130 and 143, after a checkpoint) do not.

Variables:
  RESTARTS  how often to start again at most (default 5)
  PAUSE     seconds before that (default 10)
  PYTHON    the interpreter (default python); CUDA_VISIBLE_DEVICES=0,1 leaves it those GPUs
  EXIT_FILE gets the exit code at the end (default: none)
  DRY_RUN   1 prints the command and does not run it
USAGE
}

[[ ${1:-} == --help ]] && { usage; exit; }
(($# >= 2)) && [[ $1 != -* && $2 != -* ]] || { usage >&2; exit 2; }

command=("${PYTHON:-python}" -m declip_jax.train --config "$1" --workdir "$2" --stopped_exit_code=143 "${@:3}")
[[ ${DRY_RUN:-} == 1 ]] && { printf '%q ' "${command[@]}"; echo; exit; }

trap 'code=$?; [[ ! ${EXIT_FILE:-} ]] || echo "$code" >"$EXIT_FILE"' EXIT
child='' stopped=''
# In the background, since bash would otherwise hold a signal back until the command has ended by itself.
trap 'stopped=1; [[ $child ]] && kill -TERM "$child" 2>/dev/null || true' INT TERM HUP

for ((restart = 0; ; restart++)); do
  "${command[@]}" &
  child=$!
  # A signal interrupts `wait`, but the command still has a checkpoint to write.
  while code=0; wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do :; done
  case $code in 0 | 2 | 130 | 143) exit "$code" ;; esac
  [[ $stopped ]] && exit "$code"
  if ((restart >= ${RESTARTS:-5})); then
    echo "local.sh: exit code $code; giving up after $restart restarts" >&2
    exit "$code"
  fi
  echo "local.sh: exit code $code; starting again in ${PAUSE:-10} s ($((restart + 1)) of ${RESTARTS:-5})" >&2
  sleep "${PAUSE:-10}" &
  child=$!
  wait "$child" || true
  [[ $stopped ]] && exit "$code"
done
