#!/usr/bin/env bash
# Cloud TPU VMs by queued resource: from nothing to a run that outlives preemptions (see --help).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  cat <<'END'
launch/tpu_vm.sh ACTION NAME [--zone=Z] [--type=T] [--spot] [--dry-run] [-- arguments of run.py]

Runs an experiment on a slice of Cloud TPU VMs, which it asks for as a queued resource. The actions are:

  up       does everything: it creates the slice, waits for it, copies and installs this clone, runs the experiment and watches it. After
           a preemption or a failure of a machine it starts again, until the run has ended. The same command goes on with what is there.
  create   asks for the slice as a queued resource (this needs --type).
  wait     waits until the slice is there.
  setup    copies this clone to all workers and installs it.
  start    starts the run on all workers, in the background.
  logs     follows the output of the first worker, or of another one with --worker=N or --worker=all.
  status   shows the status of the slice, and of the run on the first worker.
  stop     sends SIGTERM to all workers: the run saves a checkpoint and ends.
  delete   deletes the slice and everything on its disks.

  launch/tpu_vm.sh up ptx --zone=us-east5-a --type=v5p-128 --spot -- --config=configs/instructgpt_6b.py --workdir=gs://BUCKET/ptx
  launch/tpu_vm.sh logs ptx --zone=us-east5-a
  launch/tpu_vm.sh delete ptx --zone=us-east5-a

  --type=T       the accelerator type, such as v5p-128, v5litepod-16 or v6e-64
  --runtime=R    the software version; by default, the one that belongs to the type
  --spot         asks for a spot slice, which is cheaper and may be preempted at any time
  --restarts=N   `up` gives up after N starts on one slice none of which ran for ten minutes (3 by default)
  --every=S      the seconds between two checks of the slice and the run (30 by default)
  --dry-run      prints the commands and does not run them

The project is that of `gcloud config`, and so is the zone if --zone is left out. Put the run's --workdir on gs://, because the disks
of the slice are deleted with it.
END
}

die() { echo "error: $*" >&2; exit 2; }

action=${1-} name=${2-}
case $action in
  up | create | wait | setup | start | logs | status | stop | delete) ;;
  -h | --help) usage; exit ;;
  *) usage >&2; exit 2 ;;
esac
[[ $name =~ ^[a-z][-a-z0-9]*$ ]] || die "launch/tpu_vm.sh $action NAME: a name of small letters, digits and -, not '$name'"
shift 2

zone=() type='' runtime='' spot=() worker=0 restarts=3 every=30 dry=
while (($#)); do
  case $1 in
    --zone=*) zone=("$1") ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --worker=*) worker=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --every=*) every=${1#*=} ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    *) die "$1 is no option of launch/tpu_vm.sh; arguments of run.py stand behind --" ;;
  esac
  shift
done
arguments=("$@")

case $type in
  '') [[ $action != create && $action != up ]] || die "launch/tpu_vm.sh $action needs --type, such as --type=v5litepod-16" ;;
  v5p-*) runtime=${runtime:-v2-alpha-tpuv5} ;;
  v5litepod-*) runtime=${runtime:-v2-alpha-tpuv5-lite} ;;
  v6e-*) runtime=${runtime:-v2-alpha-tpuv6e} ;;
  *) runtime=${runtime:-tpu-ubuntu2204-base} ;;
esac
if [[ $action == up || $action == start ]]; then
  [[ " ${arguments[*]}" == *' --config'* ]] || die "launch/tpu_vm.sh $action: what to run stands behind --, as in -- --config=configs/sft.py"
fi

run() { if [[ $dry ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }
queued() { run gcloud compute tpus queued-resources "$1" "${@:2}" "${zone[@]}"; }
on() { run gcloud compute tpus tpu-vm ssh "$name" --worker="$1" --quiet "${zone[@]}" --command="$2"; }
say() { [[ $dry ]] || echo "$(date +%T) $*"; }

create() { queued create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" "${spot[@]}"; }
delete() { queued delete "$name" --force --quiet; }
state() { queued list --filter="name~(^|/)$name\$" --format='value(state.state)'; }  # nothing where there is none
run_status() { on "${1:-0}" 'alignjax/launch/worker.sh status 2>/dev/null || echo absent'; }

wait_for_it() {
  local now
  while true; do
    now=$(state)
    if [[ $dry ]]; then echo "$now"; return; fi
    case $now in
      ACTIVE) return ;;
      SUSPENDED | FAILED | '') die "the queued resource $name is ${now:-absent}" ;;
    esac
    say "$name: $now"
    sleep "$every"
  done
}

setup() {
  local archive commit
  archive=$(mktemp --suffix=.tar.gz)
  commit=$(git -C "$root" stash create || true)  # tracked files as they are now; empty: as committed
  # shellcheck disable=SC2015
  run git -C "$root" archive --format=tar.gz -o "$archive" "${commit:-HEAD}" &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:alignjax.tar.gz" --worker=all --quiet "${zone[@]}" || return
  rm -f "$archive"
  on all 'mkdir -p alignjax && tar xzf alignjax.tar.gz -C alignjax && alignjax/launch/worker.sh setup tpu'
}

start() { on all "alignjax/launch/worker.sh start ${arguments[*]@Q}"; }
stop() { on all 'alignjax/launch/worker.sh stop'; }

up() {
  if [[ $dry ]]; then
    create; wait_for_it; setup; start
    run_status
    echo '# after a preemption: the next line, and all again'
    delete
    return
  fi
  local left=$restarts running=0 now ended
  while true; do
    now=$(state)
    case $now in
      '') say "$name: create"; create; left=$restarts ;;
      SUSPENDED | FAILED) say "$name: $now; delete it and ask again"; delete ;;
      ACTIVE)
        ended=$(run_status | tail -n 1) || ended=unreachable
        case $ended in
          unreachable | '') say "$name: no answer" ;;
          running) ((++running * every < 600)) || left=$restarts ;;
          0) say "$name: the run has ended; the slice is still there: launch/tpu_vm.sh delete $name"; return ;;
          *)
            if ((left-- == 0)); then
              echo "error: $name: started $restarts times, and ended soon ($ended); see launch/tpu_vm.sh logs $name" >&2
              exit 1
            fi
            say "$name: the run: $ended; start"
            running=0
            if [[ $ended == absent ]]; then setup && start; else start; fi || say "$name: that failed; trying again"
        esac ;;
      *) say "$name: $now" ;;
    esac
    sleep "$every"
  done
}

case $action in
  wait) wait_for_it ;;
  status) state; run_status "$worker" ;;
  logs) on "$worker" 'tail -n 200 -F alignjax/run.log' ;;
  *) "$action" ;;
esac
