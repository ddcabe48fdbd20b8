"""Kills the main job with -9 at random moments, starts it again each time, and compares it with an uninterrupted run.

  python tests/kills.py --kills=100                               of the `:tiny` main job
  python tests/kills.py --kills=5 --seed=3 -- --config.seed=2     what follows `--` goes to run.py

Moments are drawn over the length of the uninterrupted run, and shorter ones too, so that saves and starts are hit. Every
final parameter file, metrics line and figure of the report must be the same, bit for bit; the times of day are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def start(workdir: pathlib.Path, arguments: list[str], log) -> subprocess.Popen:
  command = [sys.executable, str(ROOT / 'experiments/run.py'), f'--workdir={workdir}', *arguments]
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}  # one device, whoever calls
  return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=env)


def fingerprint(workdir: pathlib.Path) -> dict[str, object]:
  """What a run leaves behind, without times: metrics by stage, final parameters, report."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  out: dict[str, object] = {}
  for final in sorted(workdir.glob('*/final')):
    with ocp.StandardCheckpointer() as checkpointer:
      path = final.absolute() / 'params'
      saved = checkpointer.metadata(path)
      saved = getattr(saved, 'item_metadata', saved)
      shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here) for k, v in getattr(saved, 'tree', saved).items()}
      params = checkpointer.restore(path, shapes)
    out |= {f'{final.parent.name}:{k}': np.asarray(v).tobytes() for k, v in params.items()}
  for path in sorted(workdir.glob('*/metrics.jsonl')):
    for line in path.read_text().splitlines():
      row = {k: v for k, v in json.loads(line).items() if not k.startswith('time/')}
      out[f'{path.parent.name}:metrics:{row["step"]}'] = json.dumps(row, sort_keys=True)
  report = workdir / 'report.json'
  if report.exists():
    out['report'] = {k: v for k, v in json.loads(report.read_text()).items() if k not in ('seconds', 'versions')}
  return out


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--kills', type=int, default=5)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--folder', help='kept afterwards; default: a temporary one, deleted')
  options, arguments = parser.parse_known_args(argv)
  arguments = [a for a in arguments if a != '--']
  if not any(a.startswith('--config=') for a in arguments):
    arguments = ['--config=configs/ppo_ptx.py:tiny', *arguments]
  folder = pathlib.Path(options.folder or tempfile.mkdtemp(prefix='kills-'))
  folder.mkdir(parents=True, exist_ok=True)
  log_path = folder / 'log.txt'
  with log_path.open('a') as log:
    began = time.monotonic()
    if start(folder / 'whole', arguments, log).wait():
      print(f'the uninterrupted run failed: {log_path}\n{log_path.read_text()[-2000:]}')
      return 1
    length = time.monotonic() - began
    print(f'uninterrupted: {length:.0f} s')
    rng = random.Random(options.seed)
    kills = starts = 0
    while True:
      process = start(folder / 'killed', arguments, log)
      starts += 1
      try:
        code = process.wait(timeout=rng.uniform(0.05, 0.6) * length if kills < options.kills else None)
      except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        shown = re.findall(r'^(\S+: (?:start|goes on|finished|done).*)$', log_path.read_text(), re.M)
        print(f'kill {kills} after {time.monotonic() - began:.0f} s; last: {shown[-1] if shown else "start"}', flush=True)
        continue
      if code:
        print(f'start {starts} ended with {code}: {log_path}\n{log_path.read_text()[-2000:]}')
        return 1
      if kills >= options.kills:
        break
      done = fingerprint(folder / 'killed')  # ended before it was killed: compare, and begin again
      if not compare(fingerprint(folder / 'whole'), done):
        return 1
      shutil.rmtree(folder / 'killed')
  same = compare(fingerprint(folder / 'whole'), fingerprint(folder / 'killed'))
  print(f'{kills} kills, {starts} starts: {"the same bits" if same else "DIFFERENT"}')
  if not options.folder:
    shutil.rmtree(folder)
  return 0 if same else 1


def compare(a: dict[str, object], b: dict[str, object]) -> bool:
  wrong = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
  if wrong or not a:
    print(f'{len(wrong)} of {len(a)} entries differ: {wrong[:5]}')
  return bool(a) and not wrong


if __name__ == '__main__':
  raise SystemExit(main(sys.argv[1:]))
