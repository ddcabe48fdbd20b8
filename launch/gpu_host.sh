#!/usr/bin/env bash
# GPU machines that ssh reaches, one or several, as one run (see --help).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  cat <<'END'
launch/gpu_host.sh ACTION HOST[,HOST...] [--dry-run] [arguments of run.py]

Runs an experiment on one or several GPU machines that ssh reaches. The actions are:

  setup    copies this clone to ~/alignjax on every host and installs it with CUDA's jax.
  start    starts the run on every host, in the background. Each host has one process with all of its GPUs, and the first host is
           the coordinator.
  logs     follows the output of the first host.
  status   shows the status of the run on every host.
  stop     sends SIGTERM to all hosts: the run saves a checkpoint and ends.

  launch/gpu_host.sh setup gpu-1,gpu-2
  launch/gpu_host.sh start gpu-1,gpu-2 --config=configs/instructgpt_1b3.py --workdir=/shared/runs/1b3
  launch/gpu_host.sh logs gpu-1,gpu-2

The hosts must reach each other by these names, and the first one at the port that the variable PORT sets (8476 by default). All of
them must share the --workdir, which is a network folder or a bucket (gs://). With --dry-run, the commands are printed and not run.
END
}

die() { echo "error: $*" >&2; exit 2; }

action=${1-} dry=
case $action in
  setup | start | logs | status | stop) ;;
  -h | --help) usage; exit ;;
  *) usage >&2; exit 2 ;;
esac
[[ ${2-} && ${2-} != -* ]] || die "launch/gpu_host.sh $action needs HOST[,HOST...]"
IFS=, read -r -a hosts <<<"$2"
shift 2
[[ ${1-} != --dry-run ]] || { dry=1; shift; }
[[ $action != start || " $*" == *' --config'* ]] || die "launch/gpu_host.sh start: what to run follows the hosts, as in --config=configs/sft.py"
[[ $action == start || $# == 0 ]] || die "launch/gpu_host.sh $action takes no '$1'"

run() { if [[ $dry ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }

setup() {
  local archive commit host
  archive=$(mktemp --suffix=.tar.gz)
  commit=$(git -C "$root" stash create || true)  # tracked files as they are now; empty: as committed
  run git -C "$root" archive --format=tar.gz -o "$archive" "${commit:-HEAD}"
  for host in "${hosts[@]}"; do
    run scp -q "$archive" "$host:alignjax.tar.gz"
    run ssh "$host" 'mkdir -p alignjax && tar xzf alignjax.tar.gz -C alignjax && alignjax/launch/worker.sh setup gpu'
  done
  rm -f "$archive"
}

start() {
  local i place
  for i in "${!hosts[@]}"; do
    place="JAX_COORDINATOR_ADDRESS=${hosts[0]#*@}:${PORT:-8476} JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$i"
    run ssh "${hosts[i]}" "$place alignjax/launch/worker.sh start ${*@Q}"
  done
}

each() {
  local host
  for host in "${hosts[@]}"; do run ssh "$host" "alignjax/launch/worker.sh $1" & done  # together: they save together
  wait
}

case $action in
  setup) setup ;;
  start) start "$@" ;;
  logs) run ssh "${hosts[0]}" 'tail -n 200 -F alignjax/run.log' ;;
  *) each "$action" ;;
esac
