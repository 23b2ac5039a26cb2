#!/usr/bin/env bash
#SBATCH --job-name=declip_jax --output=%x-%j.log --open-mode=append
#SBATCH --nodes=1 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8
#SBATCH --requeue --signal=B:USR1@300
# Trains on the GPUs of one or more nodes as a Slurm job, which is requeued and resumes when its time is up.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: sbatch [flags] launch/slurm.sh CONFIG WORKDIR [--config.field=value ...]

Trains with one task per GPU, since JAX assigns GPU N to task N of a node. Five minutes before the time limit all tasks
get SIGTERM and save a checkpoint together, and the job is requeued, as it is after preemption or the failure of a
node. After a crash all tasks are restarted. Success and a user error (exit code 2) end the job. WORKDIR and the data
must be in a directory that all nodes share.

Flags of sbatch, with their defaults:
  --nodes=1 --gpus-per-node=8 --ntasks-per-node=8  as many tasks as GPUs
  --cpus-per-task=8                                for reading data
  --signal=B:USR1@300                              seconds before the end of --time=... to save a checkpoint

Variables:
  RESTARTS  maximum number of restarts after a crash (default 5)
  PAUSE     seconds before a restart (default 10)
  PYTHON    the interpreter (default python)
  DRY_RUN   1 prints the command without running it
USAGE
}

[[ ${1:-} == --help ]] && { usage; exit; }
(($# >= 2)) && [[ $1 != -* && $2 != -* ]] || { usage >&2; exit 2; }

# After a task has crashed, the others have time to notice and to report it.
command=(srun --label --gpu-bind=none --kill-on-bad-exit=0 --wait=600 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-8}")
command+=("${PYTHON:-python}" -m declip_jax.train --config "$1" --workdir "$2" --stopped_exit_code=143 "${@:3}" --multihost)
[[ ${DRY_RUN:-} == 1 ]] && { printf '%q ' "${command[@]}"; echo; exit; }

for name in SLURM_JOB_ID SLURM_GPUS_ON_NODE SLURM_NTASKS_PER_NODE; do
  [[ ${!name:-} ]] || { echo "slurm.sh: variable $name is not set: submit by sbatch, with GPUs" >&2; exit 2; }
done
if ((SLURM_NTASKS_PER_NODE != SLURM_GPUS_ON_NODE)); then
  echo "slurm.sh: --ntasks-per-node=$SLURM_NTASKS_PER_NODE, but $SLURM_GPUS_ON_NODE GPUs on a node: must be equal" >&2
  exit 2
fi

# Requeues the job, unless Slurm is already ending it, as after scancel.
requeue() {
  local state
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
  if [[ $state == RUNNING ]]; then
    echo "slurm.sh: requeueing the job"
    scontrol requeue "$SLURM_JOB_ID" || echo "slurm.sh: Slurm rejected that; submit the same command again" >&2
  fi
  exit "$code"
}

leaving=''
# Not through srun, which turns a SIGTERM to itself into a SIGKILL for the tasks.
trap 'leaving=1; echo "slurm.sh: the time limit is near"; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1
trap : TERM # the tasks are signalled too, and still write a checkpoint

for ((restart = 0; ; restart++)); do
  "${command[@]}" &
  child=$!
  while code=0; wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do :; done
  case $code in
    0 | 2) exit "$code" ;;
    130 | 143) requeue ;;
  esac
  [[ $leaving ]] && requeue
  if ((restart >= ${RESTARTS:-5})); then
    echo "slurm.sh: exit code $code; giving up after $restart restarts" >&2
    exit "$code"
  fi
  echo "slurm.sh: exit code $code; restarting in ${PAUSE:-10} s ($((restart + 1)) of ${RESTARTS:-5})" >&2
  sleep "${PAUSE:-10}" &
  wait $! || true
  [[ $leaving ]] && requeue
done
