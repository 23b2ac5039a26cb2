#!/usr/bin/env bash
# Trains on the TPUs of a GKE cluster, on one or more slices, through xpk (1.x) and kubectl.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/gke_xpk.sh run CONFIG WORKDIR [--config.field=value ...]
       launch/gke_xpk.sh list
       launch/gke_xpk.sh logs [SLICE [WORKER]]
       launch/gke_xpk.sh delete

run     submits the workload, which waits for its slices and restarts on all of them after a crash or preemption
list    lists the workloads of the cluster
logs    follows the log of a worker of a slice (default 0 and 0, the worker that prints the progress of the run)
delete  stops the workload by SIGTERM, with five minutes to save a checkpoint, from which another `run` resumes

Variables:
  CLUSTER     run, list, delete: name of the cluster, created by `xpk cluster create`, with or without --spot
  ZONE        run, list, delete: zone of the cluster
  PROJECT     project (default: that of gcloud)
  WORKLOAD    run, logs, delete: a name for the run
  TPU_TYPE    run: type of each slice, such as v5litepod-256
  SLICES      run: number of slices (default 1)
  IMAGE       run: the image of the Dockerfile with EXTRA=tpu, in a registry
  BASE_IMAGE  run: the same, instead of IMAGE; xpk copies this checkout over it and uploads the result
  RESTARTS    run: maximum number of restarts after a crash or preemption (default 100)
  XPK_FLAGS   run: further flags, such as --storage=NAME for the file system of WORKDIR and the data
  DRY_RUN     1 prints the command without running it
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
  # exec: otherwise the signal goes to the shell that xpk wraps around it.
  printf -v train '%q ' exec python -m declip_jax.train --config "$1" --workdir "$2" --stopped_exit_code=143 "${@:3}" --multihost
  # By default xpk restarts after exit codes from 127 on. After a user error, 2, it must not.
  # shellcheck disable=SC2086 # several flags
  workload create "--workload=$WORKLOAD" "--tpu-type=$TPU_TYPE" "--num-slices=${SLICES:-1}" \
    "${image:-"--base-docker-image=$BASE_IMAGE"}" "--max-restarts=${RESTARTS:-100}" --restart-on-exit-codes=1,3-126 \
    --termination-grace-period-seconds=300 ${XPK_FLAGS:-} "--command=${train% }"
}

# xpk shows no logs, but it has configured kubectl for the cluster.
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
