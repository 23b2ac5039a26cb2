#!/usr/bin/env bash
# Trains in several processes on this machine that communicate over localhost: practice for a pod.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/local_processes.sh N CONFIG WORKDIR [--config.field=value ...]

Trains one model in N processes on the CPU of this machine, like N hosts of a pod. If one of them fails, the others are
stopped. Ctrl-C and SIGTERM reach all of them, and they save a checkpoint together; a second signal kills them.

Variables:
  PORT           port of process 0 on localhost (default: a random one)
  GRACE          seconds that the others have to exit after one has failed (default 60)
  JAX_PLATFORMS  default cpu, since every process would claim all GPUs of the machine
  PYTHON         the interpreter (default python)
  DRY_RUN        1 prints the commands without running them
USAGE
}

[[ ${1:-} == --help ]] && { usage; exit; }
(($# >= 3)) && [[ $1 =~ ^[1-9][0-9]*$ && $2 != -* && $3 != -* ]] || { usage >&2; exit 2; }

count=$1
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
command=("${PYTHON:-python}" -m declip_jax.train --config "$2" --workdir "$3" "${@:4}")
command+=(--coordinator "localhost:${PORT:-$((20000 + RANDOM % 10000))}" --processes "$count")

if [[ ${DRY_RUN:-} == 1 ]]; then
  for ((i = 0; i < count; i++)); do printf '%q ' "${command[@]}" --process "$i"; echo; done
  exit
fi

pids=() signals=0
signal_all() { for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done; }
trap 'signals=$((signals + 1)); if ((signals > 1)); then signal_all KILL; else signal_all TERM; fi' INT TERM HUP

for ((i = 0; i < count; i++)); do
  # The prefixer ignores the signals, so that the last output of its process is not lost.
  "${command[@]}" --process "$i" > >(trap '' INT TERM HUP; exec sed -u "s/^/[$i] /") 2>&1 &
  pids[i]=$!
  ((!signals)) || kill -TERM "${pids[i]}" 2>/dev/null || true # the signal came before its number was known
done

status=0
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[i]"
    if ((code && !status)); then
      status=$code deadline=$((SECONDS + ${GRACE:-60}))
      if ((!signals)); then
        echo "local_processes.sh: process $i exited with code $code; stopping the others" >&2
        signal_all TERM
      fi
    fi
  done
  if ((status && SECONDS >= deadline)); then signal_all KILL; fi
  sleep 0.2 || true # interrupted by Ctrl-C
done
wait # for the prefixers
exit "$status"
