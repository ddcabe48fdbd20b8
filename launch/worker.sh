#!/usr/bin/env bash
# What tpu_vm.sh and gpu_host.sh have done on each machine; lies there in ~/alignjax/launch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
launch/worker.sh [--dry-run] setup tpu|gpu|cpu     installs alignjax in a virtual environment with a Python of its own, because
                                                   that of the machine may be too old
launch/worker.sh [--dry-run] start [ARGUMENTS]     starts run.py --distributed ARGUMENTS in the background, with its output in run.log
launch/worker.sh [--dry-run] stop                  sends SIGTERM: the run saves a checkpoint and ends
launch/worker.sh status                            prints "running", "lost" (the process is gone and left no status), "none", or the
                                                   exit status of the run
END
}

dry=
run() { if [[ $dry ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }
alive() { [[ -s run.pid ]] && kill -0 -- "-$(<run.pid)" 2>/dev/null; }

setup() {
  local extra=${1:?tpu, gpu or cpu}
  command -v uv >/dev/null || [[ -x $HOME/.local/bin/uv ]] || run python3 -m pip install --user -q uv
  export PATH="$HOME/.local/bin:$PATH"
  [[ -x .venv/bin/python ]] || run uv venv -q --python 3.12 .venv
  case $extra in
    cpu) run uv pip install -q --python .venv/bin/python -e . ;;
    *) run uv pip install -q --python .venv/bin/python -e ".[$extra,gcs]" ;;
  esac
}

start() {
  stop
  local command=(.venv/bin/python -u experiments/run.py --distributed "$@")
  if [[ $dry ]]; then
    run "${command[@]}"
    return
  fi
  echo running >run.status
  # A session of its own, which outlives the connection; bash waits for the run's end, also through stop's SIGTERM.
  # shellcheck disable=SC2016
  setsid bash -c 'trap : TERM; "$@"; echo $? >run.status' run "${command[@]}" >>run.log 2>&1 </dev/null &
  echo $! >run.pid
}

stop() {
  if [[ $dry ]]; then
    run kill -TERM -- '-<run.pid>'
    return
  fi
  alive || return 0
  kill -TERM -- "-$(<run.pid)"
  for ((i = 0; i < ${GRACE:-120} * 10; i++)); do
    alive || return 0
    sleep 0.1
  done
  kill -KILL -- "-$(<run.pid)"
}

status() {
  local said=none
  [[ ! -s run.status ]] || said=$(<run.status)
  [[ $said != running ]] || alive || said=lost
  echo "$said"
}

[[ ${1-} != --dry-run ]] || { dry=1; shift; }
case ${1-} in
  setup | start | stop | status) "$@" ;;
  -h | --help) usage ;;
  *) usage >&2; exit 2 ;;
esac
