#!/usr/bin/env bash
# Starts processes of experiments/run.py on this machine, as one run (see --help).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  cat <<'END'
launch/local.sh [--devices=D] [--dry-run] N [arguments of run.py]

Starts N processes of experiments/run.py on this machine as one run. jax.distributed joins them over loopback, with gloo collectives,
and each of them has D CPU devices (2 by default). Every line of the output begins with the number of its process.

If one process fails, the others are ended within 5 seconds, and the exit status is that of the one that failed. SIGTERM and Ctrl-C are
passed on to all processes, so that they save. The exit status is then that of the run; 75 means that the same command resumes it.
With --dry-run, the commands are printed and not run.

  launch/local.sh 2 --config=configs/sft.py:tiny
  launch/local.sh --devices=4 2 --config=configs/ppo_ptx.py:tiny --config.mesh.fsdp=4

Two environment variables change the defaults. PYTHON is the interpreter, by default .venv/bin/python if it exists and python3
otherwise. PORT is the port of the coordinator, by default a free one.
END
}

devices=2 dry=
while [[ ${1-} == -* ]]; do
  case $1 in
    --devices=*) devices=${1#*=} ;;
    --dry-run) dry=1 ;;
    -h | --help) usage; exit ;;
    *) echo "error: $1 stands before N and is none of --devices=D, --dry-run, --help" >&2; exit 2 ;;
  esac
  shift
done
if ! [[ ${1-} =~ ^[1-9][0-9]*$ && $devices =~ ^[1-9][0-9]*$ ]]; then
  echo "error: the number of processes and that of devices must be 1 or more; see launch/local.sh --help" >&2
  exit 2
fi
count=$1
shift

python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON-} || -x $python ]] || python=python3
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

# A signal that comes while they are being started is passed on behind that.
stopped=
trap 'stopped=1' TERM INT
pids=()
for ((i = 0; i < count; i++)); do
  settings=(JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_COORDINATOR_BIND_ADDRESS="127.0.0.1:$port"
    JAX_NUM_PROCESSES="$count" JAX_PROCESS_ID="$i" PYTHONUNBUFFERED=1
    XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
  command=("$python" "$root/experiments/run.py" --distributed "$@")
  if [[ $dry ]]; then
    printf '%q ' env "${settings[@]}" "${command[@]}"
    echo
    continue
  fi
  # A session of its own: a terminal's Ctrl-C comes once, from here, not twice.
  setsid env "${settings[@]}" "${command[@]}" > >(exec setsid sed -u "s/^/[$i] /") 2>&1 &
  pids+=($!)
done

pass_on() { kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap pass_on TERM INT
[[ ! $stopped ]] || pass_on

status=0 deadline=
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do  # by looking: `wait -n` misses a process that ended before it was called
    kill -0 "${pids[i]}" 2>/dev/null && continue
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[$i]"
    ((status)) || status=$code
    if ((code)) && [[ ! $deadline ]]; then
      echo "process $i ended with $code" >&2
      deadline=$((SECONDS + (code == 75 ? 60 : 5)))  # 75: saved, and the others are about to; else they may say what they saw
    fi
  done
  if [[ $deadline ]] && ((SECONDS > deadline)); then
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
  sleep 0.1 || true  # a signal to the group ends it too
done
exit "$status"
