"""The main job in miniature over several real processes on this machine; test_processes.py starts
it.

python tests/processes.py WORKDIR PROCESSES DEVICES_EACH [stages.sft.epochs=2 ...]

starts all of them and waits until the last has ended.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = ('pretrain', 'sft', 'rm', 'ppo_ptx')


def micro():
  """Every stage and the report, in a few steps of a model of 16 dimensions."""
  from alignjax.configs import ppo_ptx

  c = ppo_ptx.get_config('tiny')
  c.stages_to_run, c.mesh.fsdp = ('ppo_ptx',), 2
  c.sharding.vocab = None  # the sandbox's 247 words do not divide over a tensor axis
  c.model.update(d_model=16, num_heads=8, embedding_scale=2.0)
  s = c.stages
  s.pretrain.update(documents=300, log_every=1, save_every=2)
  s.sft.update(demonstrations=32, epochs=1, documents=300, log_every=1, save_every=1)
  s.rm.update(
    prompts=16,
    evaluation_prompts=8,
    bias_demonstrations=16,
    k_buckets=(9,),
    row_lengths=(),
    log_every=1,
    save_every=1,
    policies=(dict(init='stage:sft', temperature=1.0, share=1.0),),
  )
  s.ppo_ptx.update(prompts=64, iterations=2, minibatches=2, save_every=1)
  s.ppo_ptx.rollout.episodes = 16
  s.ppo_ptx.ptx.documents = 300
  s.ppo_ptx.optimizer.policy.warmup = 2
  c.report.policies = dict(pretrained='pretrain', sft='sft', ppo_ptx='ppo_ptx')
  c.report.update(
    win_prompts=16, tax_items=16, truth_samples=1, toxicity_prompts=16, loss_documents=64
  )
  return c


def length(prompts: list[str], responses: list[str]) -> list[float]:
  """A reward on the host, of one process's own: it is broken where the environment says so."""
  if os.environ.get('BROKEN'):
    raise ConnectionError('no route to host')
  return [len(r) / 10 for r in responses]


def rows(workdir: pathlib.Path, stage: str) -> list[dict]:
  """What a stage logged, without its times."""
  lines = (workdir / stage / 'metrics.jsonl').read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith('time/')} for line in lines
  ]


FLAGS = ''  # more flags of XLA for every process
HELD: list = []  # locks of ports, for the life of this process


def address() -> str:
  """Of a port of this machine that is free and stays so: one below those that the system gives to
  whoever asks for any, and locked against other test processes until this one ends."""
  ports = list(range(20_000, 32_000))
  random.SystemRandom().shuffle(ports)
  for port in ports:
    lock = open(pathlib.Path(tempfile.gettempdir()) / f'alignjax-port-{port}', 'w')  # noqa: SIM115  it stays open
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      with socket.socket() as s:
        s.bind(('127.0.0.1', port))
    except OSError:
      lock.close()
      continue
    HELD.append(lock)
    return f'127.0.0.1:{port}'
  raise OSError('no port is free.')


def start(
  workdir: pathlib.Path, processes: int, devices: int, changes: list[str]
) -> list[subprocess.Popen]:
  """The processes, each with its output in WORKDIR.NUMBER.log."""
  where, out = address(), []
  for i in range(processes):
    environment = os.environ | {
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} {FLAGS}',
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(ROOT),
      'JAX_COORDINATOR_ADDRESS': where,
      'JAX_NUM_PROCESSES': str(processes),
      'JAX_PROCESS_ID': str(i),
    }
    command = [sys.executable, __file__, '--one', str(processes), str(workdir), *changes]
    with workdir.with_name(f'{workdir.name}.{i}.log').open('a') as log:
      out.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
  return out


def run(
  workdir: pathlib.Path,
  processes: int,
  devices: int,
  changes: list[str] = (),
  kill_when=None,
  timeout: float = 2400,
) -> int:
  """Runs to the end, or until kill_when() is true, then -9 for all; 10 s behind one that failed.
  The largest exit status."""
  started, end = start(workdir, processes, devices, list(changes)), time.monotonic() + timeout
  try:
    while any(p.poll() is None for p in started):
      if any(p.poll() not in (None, 0) for p in started):
        end = min(end, time.monotonic() + 10)  # the others say what they saw
      if time.monotonic() > end or kill_when is not None and kill_when():
        break
      time.sleep(0.05)
  finally:
    for p in started:
      if p.poll() is None:
        p.send_signal(signal.SIGKILL)
  return max(abs(p.wait()) for p in started)


def one(processes: int, workdir: str, changes: list[str]) -> None:
  from absl import logging

  logging.set_verbosity(logging.WARNING)
  from alignjax import train
  from alignjax.runtime import distributed

  c = micro()
  c.update_from_flattened_dict(
    {k: ast.literal_eval(v) for k, v in (change.split('=', 1) for change in changes)}
  )
  with (
    distributed.joined(distributed.facts(c.to_dict()), 60)
    if processes > 1
    else contextlib.nullcontext()
  ):
    train.main(c, workdir)


if __name__ == '__main__':
  if sys.argv[1] == '--one':
    one(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
  else:
    raise SystemExit(
      run(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:], timeout=3600)
    )
