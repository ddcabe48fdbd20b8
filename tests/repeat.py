"""Runs the suite again and again in random orders, some of the runs beside a process that keeps a
core busy, and says which tests ever failed.

  python tests/repeat.py --times=20 --folder=/tmp/repeat      called again, it goes on
  python tests/repeat.py --times=5 -- tests/test_failures.py   what follows `--` goes to pytest

Every run gets a seed, which `pytest --random-order --random-order-seed=SEED` takes to repeat its
order. The runs share the programs that jax compiled. The status is 1 where any run was not green.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def once(
  number: int, options: argparse.Namespace, folder: pathlib.Path, arguments: list[str]
) -> dict:
  """One run of the suite; every third one beside a busy process."""
  busy = number % 3 == 2
  command = [
    sys.executable,
    '-m',
    'pytest',
    '-q',
    '-n',
    str(options.workers),
    '--random-order',
    f'--random-order-seed={number}',
    *arguments,
  ]
  env = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
    'ALIGNJAX_SAMPLE': str(number),
  }
  began = time.monotonic()
  beside = subprocess.Popen([sys.executable, '-c', 'while True: pass']) if busy else None
  try:
    with (folder / f'run-{number}.txt').open('w') as log:
      code = subprocess.run(
        command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT
      ).returncode
  finally:
    if beside:
      beside.kill()
      beside.wait()
  said = (folder / f'run-{number}.txt').read_text()
  failed = re.findall(r'^(?:FAILED|ERROR) (\S+)', said, re.M)
  last = said.strip().splitlines()[-1].strip('= ') if said.strip() else 'no output'
  return dict(
    number=number,
    busy=busy,
    code=code,
    seconds=round(time.monotonic() - began),
    failed=failed,
    said=last,
  )


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--times', type=int, default=20)
  parser.add_argument('--workers', type=int, default=2, help='of pytest-xdist')
  parser.add_argument('--folder', help='of the logs and the record; default: a new temporary one')
  options, arguments = parser.parse_known_args(argv)
  folder = pathlib.Path(options.folder or tempfile.mkdtemp(prefix='repeat-'))
  folder.mkdir(parents=True, exist_ok=True)
  record = folder / 'runs.jsonl'
  done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
  for number in range(len(done), options.times):
    done.append(once(number, options, folder, [a for a in arguments if a != '--']))
    with record.open('a') as file:
      file.write(json.dumps(done[-1]) + '\n')
    print(f'{number + 1}/{options.times}: {done[-1]}', flush=True)
  red = [d for d in done if d['code']]
  print(
    f'{len(done)} runs, {sum(d["busy"] for d in done)} of them beside a busy process: {len(red)} '
    f'not green; logs in {folder}'
  )
  return int(bool(red))


if __name__ == '__main__':
  raise SystemExit(main(sys.argv[1:]))
