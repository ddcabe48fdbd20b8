"""Times alignjax beside what people would use instead, on the machine at hand.

  python benchmarks/run.py                        W1 to W5 on CPU; on a GPU those of 135M and 1.3B
  python benchmarks/run.py --only=W1,W3 --repeats=7
  python benchmarks/run.py --tiny                 sizes that only show that all of it runs
  python benchmarks/run.py --table=FILE.jsonl     the table of earlier lines

Every framework of a workload is a process of its own. All are built and warmed up first, and then
they run in turns, one at a time, so that a change of the machine's speed meets all of them. In each
turn a step goes before the one that is timed. A line of JSON is printed for each, with the median
of its runs, and the ratio to alignjax's. What the machine can do (a matrix product, a copy) is
measured first, in the same call. Peers that are not installed are left out: transformers and torch
are in `pip install -e '.[parity]'`, and TRL had its PPOTrainer until trl==1.12.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alignjax.runtime import memory  # noqa: E402  after the path
from benchmarks import workloads  # noqa: E402

OURS = 'alignjax'
NEEDS = {
  'transformers': ('torch', 'transformers'),
  'torch': ('torch', 'transformers'),
  'trl': ('trl',),
}


class Child:
  """A process that has built one workload by one framework and runs it when it is asked to."""

  def __init__(self, framework: str, workload: str, tiny: bool):
    self.framework = framework
    command = [sys.executable, __file__, f'--serve={framework}', f'--only={workload}']
    # A GPU is shared by the frameworks, so none may take all of its memory.
    env = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    self.process = subprocess.Popen(
      [*command, *(['--tiny'] if tiny else [])],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=env,
      cwd=ROOT,
    )

  def ask(self, word: str = '') -> dict[str, Any]:
    """What the process answers to a word, or to having been started."""
    if word:
      print(word, file=self.process.stdin, flush=True)
    line = self.process.stdout.readline()
    if not line:
      return {'error': f'the process ended with {self.process.wait()}; its messages stand above.'}
    return json.loads(line)

  def stop(self) -> None:
    self.process.stdin.close()
    try:
      self.process.wait(timeout=20)
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
    self.process.stdout.close()


def serve(framework: str, name: str, tiny: bool) -> None:
  """The child's side: builds and warms up, then runs once for each line of its input."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # Whatever a library prints goes to stderr.

  def answer(**values):
    print(json.dumps(values), file=answers, flush=True)

  workload = workloads.ALL[name]
  workload = workloads.tiny(workload) if tiny else workload
  began = time.perf_counter()
  try:
    if framework == OURS:
      from benchmarks import ours

      run, facts = ours.build(workload)
    else:
      from benchmarks import peers

      run, facts = peers.PEERS[workload.kind][framework](workload), {}
    run()
    first = time.perf_counter() - began
    run()
  except Exception as error:  # noqa: BLE001 a peer may raise anything; the others are still timed
    answer(error=f'{type(error).__name__}: {error}'[:500])
    return
  answer(first=first, facts=facts)
  for _ in sys.stdin:
    run()  # After a rest beside the others' turns, a step on a CPU took up to 1.4 times as long.
    before = time.perf_counter()
    seen = run()
    answer(seconds=time.perf_counter() - before, metrics=_scalars(seen), peak_gib=_peak(framework))


def measure(name: str, repeats: int, tiny: bool, ceilings: dict[str, float]) -> Iterator[dict]:
  """The lines of one workload, alignjax's first."""
  workload = workloads.ALL[name]
  workload = workloads.tiny(workload) if tiny else workload
  frameworks = [OURS]
  if workload.mean_length is None and not workload.text_rows:  # TRL's PPO has neither.
    frameworks += installed_peers(workload.kind)
  with contextlib.ExitStack() as stack:
    children, begun, seconds, last = [], {}, {}, {}
    for framework in frameworks:
      child = Child(framework, name, tiny)
      stack.callback(child.stop)
      begun[framework] = child.ask()
      if 'error' not in begun[framework]:
        children.append(child)
        seconds[framework] = []
    for _ in range(repeats):
      for child in children:
        last[child.framework] = child.ask('run')
        if 'error' in last[child.framework]:
          begun[child.framework] = last[child.framework]
        else:
          seconds[child.framework].append(last[child.framework]['seconds'])
      children = [child for child in children if 'error' not in begun[child.framework]]
  base = statistics.median(seconds[OURS]) if seconds.get(OURS) else None
  for framework in frameworks:
    line = dict(workload=name, framework=framework, tiny=tiny, version=version(framework))
    if 'error' in begun[framework]:
      yield line | begun[framework]
      continue
    median, facts = statistics.median(seconds[framework]), begun[framework]['facts']
    line |= dict(
      seconds=median,
      least=min(seconds[framework]),
      all=seconds[framework],
      rate=workload.amount / median,
      unit=f'{workload.unit} per second',
      first=begun[framework]['first'],
      peak_gib=last[framework]['peak_gib'],
    )
    if base is not None:
      line['times_ours'] = median / base
    if 'flops' in facts:
      line['flops_share'] = facts['flops'] / median / ceilings['flops']
    if 'bytes' in facts:
      line['bandwidth_share'] = facts['bytes'] / median / ceilings['bandwidth']
    wanted = ('ppo/ratio_max_dev', 'rollout/sampler_gap_max', 'rollout/live', 'rollout/length')
    yield line | {k: v for k, v in last[framework]['metrics'].items() if k in wanted}


def installed_peers(kind: str) -> list[str]:
  """The peers of a kind of workload whose packages are here."""
  from importlib.util import find_spec

  from benchmarks import peers

  found = [n for n in peers.PEERS[kind] if all(find_spec(package) for package in NEEDS[n])]
  if 'trl' in found:
    try:
      there = find_spec('trl.experimental.ppo')
    except ModuleNotFoundError:  # a TRL without `experimental`
      there = None
    if there is None:
      found.remove('trl')
  return found


def machine() -> dict[str, Any]:
  """The device, what it does in a matrix product and a copy, and who measured it."""
  import jax
  import jax.numpy as jnp

  from alignjax.compiler import chips

  device = jax.devices()[0]
  on_cpu = device.platform == 'cpu'
  side, elements = (2048, 2**25) if on_cpu else (8192, 2**30)
  dtype = jnp.float32 if on_cpu else jnp.bfloat16
  square = jax.random.normal(jax.random.key(0), (side, side), dtype)
  product = _fastest(jax.jit(lambda x: x @ x), square)
  copied = jnp.zeros(elements, dtype)
  copy = _fastest(jax.jit(lambda x: x + 1), copied)
  chip = chips.of_device(device.device_kind)
  measured = dict(flops=2 * side**3 / product, bandwidth=2 * copied.nbytes / copy)
  sheet = dict(flops=chips.CHIPS[chip].flops, bandwidth=chips.CHIPS[chip].bandwidth) if chip else {}
  return dict(
    machine=device.device_kind if not on_cpu else f'{platform.machine()}, {os.cpu_count()} cores',
    jax=jax.__version__,
    measured=measured,
    data_sheet=sheet,
    commit=commit(),
    platform=device.platform,
  )


def _fastest(function: Callable, x) -> float:
  function(x).block_until_ready()
  times = []
  for _ in range(8):
    before = time.perf_counter()
    function(x).block_until_ready()
    times.append(time.perf_counter() - before)
  return min(times)


def commit() -> str:
  """The commit of this source, with '+' where files differ from it; '' outside of git."""

  def git(*words):
    return subprocess.run(['git', *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

  return git('rev-parse', '--short', 'HEAD') + ('+' if git('status', '--porcelain') else '')


def version(framework: str) -> str:
  if framework == OURS:
    return commit()
  return ', '.join(f'{name} {importlib.metadata.version(name)}' for name in NEEDS[framework])


def _scalars(seen: Any) -> dict[str, float]:
  if not isinstance(seen, dict):
    return {}
  return {name: float(value) for name, value in seen.items()}


def _peak(framework: str) -> float | None:
  """The peak memory of the device in GiB; on CPU that of the process."""
  if framework == OURS:
    import jax

    known = jax.local_devices()[0].memory_stats() or {}
    if 'peak_bytes_in_use' in known:
      return known['peak_bytes_in_use'] / 2**30
  else:
    import torch

    if torch.cuda.is_available():
      return torch.cuda.max_memory_allocated() / 2**30
  import resource

  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def table(lines: list[dict]) -> str:
  """The Markdown table of lines of this program, a machine above its workloads."""
  out = []
  for line in lines:
    if 'machine' in line:
      m = line['measured']
      out += [
        '',
        f'{line["machine"]}, jax {line["jax"]}, commit {line["commit"]}; a matrix product '
        f'{m["flops"] / 1e12:.3g} TFLOP/s, a copy {m["bandwidth"] / 1e9:.3g} GB/s',
        '',
        '| workload | framework | seconds | rate | times ours | of the peak |',
        '|---|---|---|---|---|---|',
      ]
    elif 'error' in line:
      out.append(f'| {line["workload"]} | {line["framework"]} | failed: {line["error"]} | | | |')
    else:
      share = line.get('flops_share', line.get('bandwidth_share'))
      kind = 'FLOP/s' if 'flops_share' in line else 'bandwidth'
      out.append(
        f'| {line["workload"]} | {line["framework"]} | {line["seconds"]:.3g} | '
        f'{line["rate"]:,.4g} {line["unit"]} | {line.get("times_ours", float("nan")):.2f} | '
        f'{f"{share:.1%} of the {kind}" if share is not None else ""} |'
      )
  return '\n'.join(out).strip()


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', help=f'some of {", ".join(workloads.ALL)}')
  parser.add_argument('--repeats', type=int, default=5, help='runs of each; the median counts')
  parser.add_argument('--tiny', action='store_true')
  parser.add_argument('--out', type=pathlib.Path, help='a file that the lines are appended to')
  parser.add_argument('--table', type=pathlib.Path, help='of the lines of this file')
  parser.add_argument('--serve', help=argparse.SUPPRESS)
  options = parser.parse_args(argv)
  if options.table:
    print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
    return 0
  if options.serve:
    serve(options.serve, options.only, options.tiny)
    return 0
  # The parent computes nothing while the children run, and holds no memory of the device.
  facts = json.loads(
    subprocess.run(
      [
        sys.executable,
        '-c',
        'import json; from benchmarks import run; print(json.dumps(run.machine()))',
      ],
      cwd=ROOT,
      check=True,
      stdout=subprocess.PIPE,
      text=True,
    ).stdout.splitlines()[-1]
  )
  names = (
    options.only.split(',')
    if options.only
    else list(workloads.CPU if facts['platform'] == 'cpu' else workloads.GPU)
  )
  for name in names:
    if name not in workloads.ALL:
      parser.error(f'--only={name}: the workloads are {", ".join(workloads.ALL)}.')
  lines = [facts]
  _write(facts, options.out)
  for name in names:
    for line in measure(
      name, options.repeats, options.tiny, facts['data_sheet'] or facts['measured']
    ):
      lines.append(line)
      _write(line, options.out)
  print(table(lines), file=sys.stderr)
  return int(any('error' in line for line in lines))


def _write(line: dict, out: pathlib.Path | None) -> None:
  text = json.dumps(line)
  print(text, flush=True)
  if out is not None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open('a') as file:
      file.write(text + '\n')


if __name__ == '__main__':
  memory.restart_with_large_pages()  # for every framework
  raise SystemExit(main())
