"""Kills a run with -9 at random moments, starts it again each time, and compares its end with that
of an uninterrupted run.

  python tests/kills.py --kills=100 --folder=/tmp/kills           of the `:tiny` main job
  python tests/kills.py --kills=5 --seed=3 -- --config.seed=2     what follows `--` goes to run.py

Called again with the same folder, it goes on.

The kills go in turn to every stage and to the report, and in each to five moments: while it is
built, during its steps, while a checkpoint is written, while its result is written, and just
behind. A checkpoint and a result are seen by the names that they have before they are whole; a
moment too short to be seen is passed over. When a run has got to its end it is compared and the
next one begins. Every final parameter, metrics line, sample and figure of the report must be the
same, bit for bit; times are left out. A summary says where the kills fell.
"""

from __future__ import annotations

import argparse
import collections
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
MOMENTS = ('build', 'steps', 'save', 'final', 'behind')
# save_every, which decides no result
SAVES = {'pretrain': 20, 'sft': 4, 'rm': 10, 'ppo': 2, 'ppo_ptx': 2}
ORDER = (*SAVES, 'report')


def start(workdir: pathlib.Path, arguments: list[str], log) -> subprocess.Popen:
  command = [sys.executable, str(ROOT / 'experiments/run.py'), f'--workdir={workdir}', *arguments]
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}  # one device, whoever calls
  return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=env)


def fingerprint(workdir: pathlib.Path) -> dict[str, object]:
  """What a run leaves behind, without times: metrics and samples by stage, final parameters,
  report."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  from alignjax.runtime import checkpoint

  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  out: dict[str, object] = {}
  for final in sorted(workdir.glob('*/final')):
    try:
      with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(final.absolute() / 'params')
    except Exception as error:  # noqa: BLE001 orbax raises many kinds
      raise checkpoint.Damaged(f'{final} is damaged: {error}') from error
    saved = getattr(saved, 'item_metadata', saved)
    shapes = {
      k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here)
      for k, v in getattr(saved, 'tree', saved).items()
    }
    # as every reader does: Damaged where the weights are not what was written
    params = checkpoint.load_params(final, shapes)
    out |= {f'{final.parent.name}:{k}': np.asarray(v).tobytes() for k, v in params.items()}
  for path in sorted(workdir.glob('*/metrics.jsonl')):
    for line in path.read_text().splitlines():
      row = {k: v for k, v in json.loads(line).items() if not k.startswith(('time/', 'device/'))}
      out[f'{path.parent.name}:metrics:{row["step"]}'] = json.dumps(row, sort_keys=True)
  out |= {
    f'{path.parent.name}:samples': path.read_text()
    for path in sorted(workdir.glob('*/samples.jsonl'))
  }
  report = workdir / 'report.json'
  if report.exists():
    out['report'] = {
      k: v
      for k, v in json.loads(report.read_text()).items()
      if k not in ('seconds', 'versions', 'made_by')
    }
  return out


def compare(a: dict[str, object], b: dict[str, object]) -> bool:
  wrong = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
  if wrong or not a:
    print(f'{len(wrong)} of {len(a)} entries differ: {wrong[:5]}')
  return bool(a) and not wrong


class Watch:
  """What a started process has got to, from what it prints and leaves on the disk."""

  def __init__(self, workdir: pathlib.Path, log: pathlib.Path):
    self.workdir, self.log, self.from_ = workdir, log, log.stat().st_size

  def printed(self) -> str:
    with self.log.open('rb') as file:
      file.seek(self.from_)
      return file.read().decode(errors='replace')

  def stage(self) -> str:
    """The stage it is in; 'start' before the first."""
    names = re.findall(r'^(\w+): (?:start|goes|done|finished|measuring)', self.printed(), re.M)
    return names[-1] if names else 'start'

  def unfinished(self) -> str:
    """What was being written: 'save', 'final', 'report', or 'none'."""
    found = lambda pattern: any(True for _ in self.workdir.glob(pattern))
    if found('*/checkpoints/steps/*tmp*'):
      return 'save'
    if found('*/final.partial') or found('*/candidates/*.partial'):
      return 'final'
    return 'report' if found('report/*.partial') else 'none'

  def reached(self, stage: str, moment: str) -> bool:
    """Whether the moment has come, or is past."""
    text, folder = self.printed(), self.workdir / stage
    if stage == 'report':
      began = 'report: measuring' in text
      measured = any(True for _ in folder.glob('pretrained-*.npz'))
      return (
        began
        and {
          'build': True,
          'steps': measured,
          'save': self.unfinished() == 'report',
          'final': (self.workdir / 'report.json').exists(),
          'behind': (self.workdir / 'report.md').exists(),
        }[moment]
      )
    if f'{stage}: done' in text or f'{stage}: finished before' in text:
      return True
    begun = f'{stage}: start' in text
    if moment == 'build' or not begun:
      return begun
    if moment == 'steps':
      return f'\n{stage} ' in text
    if moment == 'save':
      return f'\n{stage} ' in text and any(True for _ in folder.glob('checkpoints/steps/*tmp*'))
    return moment == 'final' and (folder / 'final.partial').exists()


def wait_for(
  process: subprocess.Popen, watch: Watch, stage: str, moment: str, after: float
) -> bool:
  """Kills the process `after` seconds behind the moment; False where it ended before that."""
  while not watch.reached(stage, moment):
    if process.poll() is not None:
      return False
    time.sleep(0.002)
  try:
    process.wait(timeout=after)
    return False
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--kills', type=int, default=5)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--folder',
    help='kept afterwards, and gone on with when called again; default: a temporary one, deleted',
  )
  parser.add_argument('--moments', default=','.join(MOMENTS), help='which of them')
  parser.add_argument('--stages', default=','.join(ORDER), help='which of them')
  options, arguments = parser.parse_known_args(argv)
  if unknown := set(options.stages.split(',')) - set(ORDER):
    parser.error(f'--stages: no {", ".join(sorted(unknown))}; there are {", ".join(ORDER)}')
  arguments = [a for a in arguments if a != '--']
  if not any(a.startswith('--config=') for a in arguments):
    arguments = ['--config=configs/ppo_ptx.py:tiny', *arguments]
  arguments = [
    arguments[0],
    *(f'--config.stages.{s}.save_every={n}' for s, n in SAVES.items()),
    *arguments[1:],
  ]
  folder = pathlib.Path(options.folder or tempfile.mkdtemp(prefix='kills-'))
  folder.mkdir(parents=True, exist_ok=True)
  record = folder / 'kills.jsonl'
  kills = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
  log_path, began = folder / 'log.txt', time.monotonic()
  with log_path.open('a') as log:
    # again where it was cut off; at once where it is there
    if start(folder / 'whole', arguments, log).wait():
      print(f'the uninterrupted run failed: {log_path}\n{log_path.read_text()[-2000:]}')
      return 1
    whole = fingerprint(folder / 'whole')
    print(
      f'uninterrupted: {time.monotonic() - began:.0f} s, {len(whole)} entries; {len(kills)} kills '
      f'before',
      flush=True,
    )
    cells = [
      (stage, moment)
      for stage in options.stages.split(',')
      for moment in options.moments.split(',')
    ]
    began, before, compared, missed = time.monotonic(), len(kills), 0, 0
    while True:
      over = len(kills) >= options.kills
      stage, moment = cells[(len(kills) + missed) % len(cells)]
      past = any((folder / 'killed' / later).exists() for later in ORDER[ORDER.index(stage) + 1 :])
      to_its_end = over or past
      watch = Watch(folder / 'killed', log_path)
      process = start(folder / 'killed', arguments, log)
      killed = False
      if not to_its_end:
        rng = random.Random(f'{options.seed}/{len(kills)}')
        after = rng.uniform(
          0, {'build': 4.0, 'steps': 2.0, 'save': 0.05, 'final': 0.1, 'behind': 0.5}[moment]
        )
        killed = wait_for(process, watch, stage, moment, after)
      if killed:
        kills.append(
          dict(aimed=f'{stage}/{moment}', stage=watch.stage(), unfinished=watch.unfinished())
        )
        with record.open('a') as file:
          file.write(json.dumps(kills[-1]) + '\n')
        each = (time.monotonic() - began) / (len(kills) - before)
        print(
          f'kill {len(kills)}/{options.kills}, aimed at {stage}/{moment}: in '
          f'{kills[-1]["stage"]}, unfinished on disk: '
          f'{kills[-1]["unfinished"]}; {each * (options.kills - len(kills)):.0f} s left',
          flush=True,
        )
        continue
      if code := process.wait():
        print(f'a start ended with {code}: {log_path}\n{log_path.read_text()[-2000:]}')
        return 1
      if not compare(whole, fingerprint(folder / 'killed')):
        print(f'DIFFERENT after {len(kills)} kills; see {folder}')
        return 1
      compared += 1
      missed += not to_its_end  # the moment was too short to be seen: on to the next one
      shutil.rmtree(folder / 'killed')
      if over:
        break
  summary(kills, compared)
  if not options.folder:
    shutil.rmtree(folder)
  return 0


def summary(kills: list[dict], compared: int) -> None:
  stages = list(dict.fromkeys(k['stage'] for k in kills))
  whats = ('none', 'save', 'final', 'report')
  count = collections.Counter((k['stage'], k['unfinished']) for k in kills)
  print(
    '| killed in | '
    + ' | '.join(f'unfinished on disk: {w}' for w in whats)
    + ' |\n'
    + '|---' * 5
    + '|'
  )
  for stage in stages:
    print(f'| {stage} | ' + ' | '.join(str(count[stage, w]) for w in whats) + ' |')
  print(
    f'{len(kills)} kills; {compared} runs got to their end since this script was started, each '
    f'with the same bits',
    flush=True,
  )


if __name__ == '__main__':
  raise SystemExit(main(sys.argv[1:]))
