#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, one slice or several, through xpk (1.x) and kubectl.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/gke_xpk.sh run CONFIG WORKDIR [--config.field=value ...]
       launch/gke_xpk.sh list
       launch/gke_xpk.sh logs [SLICE [WORKER]]
       launch/gke_xpk.sh delete

run     submits the workload: it waits for its slices, and starts again on all of them after a crash and preemption
list    shows the workloads of the cluster
logs    follows the log of a worker of a slice (default 0 and 0, which reports for all)
delete  ends the workload with SIGTERM and gives it five minutes for a checkpoint; `run` again goes on from there

Variables:
  CLUSTER     run, list, delete: name of the cluster, made by `xpk cluster create`, with --spot or without
  ZONE        run, list, delete: of the cluster
  PROJECT     default: that of gcloud
  WORKLOAD    run, logs, delete: a name for the run
  TPU_TYPE    run: the type of each slice, such as v5litepod-256
  SLICES      run: how many (default 1)
  IMAGE       run: what the Dockerfile gives with EXTRA=tpu, in a registry
  BASE_IMAGE  run: the same, in place of IMAGE; xpk puts this checkout over it and uploads the result
  RESTARTS    run: how often to start again after a crash or preemption at most (default 100)
  XPK_FLAGS   run: further flags, such as --storage=NAME for what WORKDIR and the data are in
  DRY_RUN     1 prints the command and does not run it
USAGE
}

wrong_usage() { usage >&2; exit 2; }

require() {
  for name; do
    [[ ${!name:-} ]] || { echo "gke_xpk.sh: variable $name is not set; see launch/gke_xpk.sh --help" >&2; exit 2; }
  done
}

call() { if [[ ${DRY_RUN:-} == 1 ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }

# workload VERB FLAGS...
workload() {
  require CLUSTER ZONE
  call xpk workload "$1" "--cluster=$CLUSTER" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} "${@:2}"
}

run() {
  require CLUSTER ZONE WORKLOAD TPU_TYPE
  if [[ ${IMAGE:-} && ${BASE_IMAGE:-} ]]; then
    echo "gke_xpk.sh: set one of IMAGE and BASE_IMAGE, not both" >&2
    exit 2
  fi
  [[ ${BASE_IMAGE:-} ]] || require IMAGE
  local image=${IMAGE:+"--docker-image=$IMAGE"} train
  # exec, or else the signal would go to the shell that xpk puts around it.
  printf -v train '%q ' exec python -m declip_jax.train --config "$1" --workdir "$2" --stopped_exit_code=143 "${@:3}" --multihost
  # Without more words, xpk starts again after exit codes from 127 on. A user error, 2, stays an end.
  # shellcheck disable=SC2086 # several flags
  workload create "--workload=$WORKLOAD" "--tpu-type=$TPU_TYPE" "--num-slices=${SLICES:-1}" \
    "${image:-"--base-docker-image=$BASE_IMAGE"}" "--max-restarts=${RESTARTS:-100}" --restart-on-exit-codes=1,3-126 \
    --termination-grace-period-seconds=300 ${XPK_FLAGS:-} "--command=${train% }"
}

# xpk has no logs; it leaves kubectl pointing at the cluster.
logs() {
  require WORKLOAD
  local pod="jobset.sigs.k8s.io/job-index=${1:-0},batch.kubernetes.io/job-completion-index=${2:-0}"
  call kubectl logs --follow --tail=100 --container=jax-tpu "--selector=xpk.google.com/workload=$WORKLOAD,$pod"
}

verb=${1:-}
case $verb in
  --help) usage ;;
  run) (($# >= 3)) && [[ $2 != -* && $3 != -* ]] || wrong_usage; run "${@:2}" ;;
  list) (($# == 1)) || wrong_usage; workload list ;;
  logs) (($# <= 3)) || wrong_usage; logs "${@:2}" ;;
  delete) (($# == 1)) || wrong_usage; require WORKLOAD; workload delete "--workload=$WORKLOAD" --force ;;
  *) wrong_usage ;;
esac
