#!/usr/bin/env bash
# A TPU slice of a GKE cluster as a JobSet (see --help).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'END'
launch/gke/run.sh ACTION NAME [options] [--dry-run] [-- arguments of run.py]

  start    submit the JobSet        logs     follow the first worker's output
  status   of the JobSet            delete   SIGTERM to all pods, so that the run saves, and remove the JobSet

  launch/gke/run.sh start ptx --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 -- \
    --config=configs/instructgpt_1b3.py --workdir=gs://BUCKET/ptx
  launch/gke/run.sh logs ptx
  launch/gke/run.sh delete ptx

  --image=I             built from launch/gke/Dockerfile
  --accelerator=A       tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice
  --topology=XxY[xZ]    chips of the slice; a host has --chips=4 of them
  --spot                on spot nodes
  --restarts=N          after so many failures or preemptions it gives up (50)
  --service-account=S   whose rights the pods have, on the bucket too (default)
  --dry-run             print the commands and the manifest

The cluster is that of `kubectl config current-context`; it needs JobSet (https://jobset.sigs.k8s.io) and a node pool of this topology.
END
}

die() { echo "error: $*" >&2; exit 2; }

action=${1-} name=${2-}
case $action in
  start | logs | status | delete) ;;
  -h | --help) usage; exit ;;
  *) usage >&2; exit 2 ;;
esac
[[ $name =~ ^[a-z][-a-z0-9]*$ ]] || die "launch/gke/run.sh $action NAME: a name of small letters, digits and -, not '$name'"
shift 2

image='' accelerator='' topology='' chips=4 spot='' restarts=50 account=default dry=
while (($#)); do
  case $1 in
    --image=*) image=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips=*) chips=${1#*=} ;;
    --spot) spot='cloud.google.com/gke-spot: "true"' ;;
    --restarts=*) restarts=${1#*=} ;;
    --service-account=*) account=${1#*=} ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    *) die "$1 is no option of launch/gke/run.sh; arguments of run.py stand behind --" ;;
  esac
  shift
done

manifest() {
  local arguments='"--distributed"' argument text
  for argument; do
    argument=${argument//\\/\\\\}
    arguments+=", \"${argument//\"/\\\"}\""
  done
  text=$(<"$here/jobset.yaml")
  text=${text//'{NAME}'/"$name"} text=${text//'{RESTARTS}'/"$restarts"} text=${text//'{HOSTS}'/"$((${topology//x/ * } / chips))"}
  text=${text//'{SERVICE_ACCOUNT}'/"$account"} text=${text//'{ACCELERATOR}'/"$accelerator"} text=${text//'{TOPOLOGY}'/"$topology"}
  text=${text//'{SPOT}'/"$spot"} text=${text//'{IMAGE}'/"$image"} text=${text//'{CHIPS}'/"$chips"}
  printf '%s\n' "${text//'{ARGUMENTS}'/"[$arguments]"}"
}

run() { if [[ $dry ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }

case $action in
  start)
    [[ $image && $accelerator && $topology =~ ^[0-9]+(x[0-9]+)+$ ]] || die 'start needs --image, --accelerator and --topology, such as 4x4'
    ((${topology//x/ * } % chips == 0)) || die "--topology=$topology does not divide into hosts of --chips=$chips"
    [[ " $*" == *' --config'* ]] || die 'what to run stands behind --, as in -- --config=configs/sft.py'
    if [[ $dry ]]; then
      run kubectl apply -f -
      manifest "$@"
    else
      manifest "$@" | kubectl apply -f -
    fi ;;
  logs) run kubectl logs -f -l "jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" ;;
  status) run kubectl get jobset "$name" -o wide ;;
  delete) run kubectl delete jobset "$name" ;;
esac
