"""Times what stands between a stage's records and its first batch.

  python benchmarks/records.py --folder=/tmp/records --counts=10000,100000
  python benchmarks/records.py --folder=/tmp/records --kinds=comparisons --counts=1000

Each count is a process with an empty cache (cold) and then one that finds it full (warm). A process
first builds the stage on ten records. Then it builds it on all of them and makes the first batch,
which is measured: the seconds, and by how much the memory of the process was higher at its peak
than before, in GiB. Prompts are those of PPO and of about 200 characters, demonstrations are SFT's,
comparisons rank four responses, and a document of pretraining text has 4,000 characters. The
tokenizer is one of bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = dict(prompts='ppo_ptx', demonstrations='sft', comparisons='rm', pretrain='pretrain')


def source(folder: pathlib.Path, kind: str, count: int) -> pathlib.Path:
  """The file of so many records of a kind, which is written unless it is there."""
  path = folder / f'{kind}-{count}.jsonl'
  if path.exists():
    return path
  said = 'Answers of the benchmark say a little about each of the things that were asked. ' * 3
  with path.with_suffix('.partial').open('w') as file:
    for i in range(count):
      prompt = f'Prompt {i}. {said[:190]}'
      record = dict(
        prompts=dict(prompt=prompt),
        demonstrations=dict(prompt=prompt, response=said),
        comparisons=dict(prompt=prompt, responses=[said[j:] for j in range(4)], ranks=[0, 1, 2, 2]),
        pretrain=dict(text=f'{i} {said * 17}'[:4000]),
      )[kind]
      file.write(json.dumps(record) + '\n')
  path.with_suffix('.partial').rename(path)
  return path


def config(folder: pathlib.Path, kind: str, path: pathlib.Path):
  """The recipe with a tiny model of random weights."""
  from alignjax.configs import pythia_1b_hh

  c = pythia_1b_hh.get_config()
  few = {other: source(folder, other, 10) for other in STAGES}
  for other in STAGES:
    c.data[other], c.data.mapping[other] = f'jsonl:{few[other]}', None
  c.data[kind] = f'jsonl:{path}'
  c.data.update(tokenizer=f'hf:{ROOT}/tests/golden/chat', template='plain', pack=False)
  c.data.update(prompt_length=256, response_length=256, row_length=512)
  c.data.heldout.share = 0.0
  if 'data_cache' in c:  # Versions without a cache can be measured too.
    c.data_cache = str(folder / 'cache')
  c.model = dict(num_layers=1, d_model=16, num_heads=2, max_length=1024, positions='rotary')
  c.model.vocab_size = 320
  s = c.stages
  s.sft.update(demonstrations=None, documents=0, pretrain_mix=0.0)
  s.rm.update(prompts=None, evaluation_prompts=0, bias_demonstrations=8)
  s.rm.k_buckets = (4,)
  s.ppo_ptx.prompts = None
  s.ppo_ptx.ptx.update(documents=0, rows_per_episode=0)
  s.ppo_ptx.loss.ptx_coef = 0.0
  for name in ('sft', 'rm', 'ppo_ptx'):
    s[name].init = {role: 'random' for role in s[name].init}
  s.pretrain = dict(s.sft.to_dict(), build='alignjax.stages.pretrain:build', documents=None)
  return c


def memory(name: str) -> float:
  """VmRSS or VmHWM of this process, in GiB."""
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(name))


def measure(folder: pathlib.Path, kind: str, count: int) -> dict:
  """What the first batch of this process takes."""
  import jax

  from alignjax import plugins
  from alignjax.setup.objects import make_setup

  def first(path):
    setup = make_setup(config(folder, kind, path), folder / 'run', jax.devices()[:1])
    stage = plugins.find(setup.config.stages[STAGES[kind]].build, 'build')(setup, STAGES[kind])
    jax.block_until_ready(stage.batch(0))
    return stage

  first(source(folder, kind, 10))
  path, before = source(folder, kind, count), memory('VmRSS')
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # The peak is that from now on.
  start = time.perf_counter()
  first(path)
  seconds = time.perf_counter() - start
  others = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
  return dict(
    kind=kind,
    records=count,
    seconds=round(seconds, 2),
    memory=round(memory('VmHWM') - before, 3),
    largest_child=round(others, 3),
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--folder', type=pathlib.Path, required=True, help='for sources and cache')
  parser.add_argument('--kinds', default='prompts,demonstrations,comparisons,pretrain')
  parser.add_argument('--counts', default='10000,100000')
  parser.add_argument('--package', default=str(ROOT), help='the clone that is measured')
  parser.add_argument('--cold', action='store_true', help='no second process')
  parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
  options = parser.parse_args()
  options.folder.mkdir(parents=True, exist_ok=True)
  for kind in options.kinds.split(','):
    for count in map(int, options.counts.split(',')):
      if options.serve:
        print(json.dumps(measure(options.folder, kind, count)))
        continue
      source(options.folder, kind, count)
      subprocess.run(['rm', '-rf', options.folder / 'cache', options.folder / 'run'], check=True)
      for state in ('cold',) if options.cold else ('cold', 'warm'):
        one = [f'--folder={options.folder}', f'--kinds={kind}', f'--counts={count}', '--serve']
        env = os.environ | dict(PYTHONPATH=options.package, JAX_PLATFORMS='cpu')
        found = subprocess.run(
          [sys.executable, __file__, *one], check=True, stdout=subprocess.PIPE, text=True, env=env
        ).stdout.splitlines()[-1]
        print(json.dumps(dict(state=state, **json.loads(found))), flush=True)


if __name__ == '__main__':
  main()
