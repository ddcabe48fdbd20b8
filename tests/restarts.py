"""Stops a run of several processes again and again, each time in another way and on another mesh,
and compares its end with that of an uninterrupted run.

  python tests/restarts.py --restarts=100 --folder=/tmp/restarts            called again, it goes on
  python tests/restarts.py --restarts=5 --full_disks=2 --seed=3

Every start draws the number of processes (1, 2 or 4, of four devices together), the mesh, a stage,
and one way to stop after a random time in that stage:

  one    kill -9 of one process; the others have to end by themselves
  all    kill -9 of all
  term   SIGTERM to all; they save and end with status 75
  disk   the disk is full but for a random rest then, and has room again at the next start; only
         with --full_disks, and on a file system of its own in memory, for which the script
         needs to be root

When a run has got to its end, its metrics, weights and report are compared with those of one
process that nothing stopped, to the tolerance of test_processes.py: sums over devices add up in
another order on another mesh. A table says what was done.
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
sys.path.insert(0, str(ROOT))

from tests import processes  # noqa: E402

SHAPES = ((1, 4), (2, 2), (4, 1))  # processes, devices of each
MESHES = (
  dict(fsdp=1, tensor=1),
  dict(fsdp=2, tensor=1),
  dict(fsdp=4, tensor=1),
  dict(fsdp=2, tensor=2),
  dict(fsdp=1, tensor=1, sequence=2),
  dict(fsdp=2, tensor=1, sequence=2),
)
PLACES = (*processes.STAGES, 'report')
WAYS = ('one', 'all', 'term')
# within which all have ended: jax looks for signs of life every 40 s, and a slow machine may be
# compiling
ALONE_SECONDS = 600
DISK = 2**28  # bytes of the file system that is filled


def reached(workdir: pathlib.Path, place: str) -> bool:
  """Whether the run has come to a stage, or past it."""
  later = PLACES[PLACES.index(place) :]
  return any((workdir / name).exists() for name in later)


def fill(folder: pathlib.Path, rest: int) -> pathlib.Path:
  """Takes all free bytes of the file system but `rest`."""
  free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
  path = folder / 'filler'
  with path.open('wb') as file:
    os.posix_fallocate(file.fileno(), 0, max(1, free - rest))
  return path


def stop(
  started: list[subprocess.Popen], way: str, workdir: pathlib.Path, rng: random.Random
) -> str:
  """Stops the processes; '' or what they did wrong."""
  if way == 'disk':
    filler = fill(workdir.parent, rng.choice((0, rng.randrange(4096), rng.randrange(2**17))))
    codes = wait(started, ALONE_SECONDS)
    filler.unlink()
    return (
      ''
      if all(code is not None for code in codes)
      else f'with a full disk they did not end: {codes}'
    )
  if way == 'one':
    rng.choice(started).send_signal(signal.SIGKILL)
  handled = all(map(handles_sigterm, started))
  for process in started if way != 'one' else ():
    process.send_signal(signal.SIGTERM if way == 'term' else signal.SIGKILL)
  codes = wait(started, ALONE_SECONDS)
  if any(code is None for code in codes):
    return f'they did not end within {ALONE_SECONDS} s: {codes}'
  if way == 'term' and set(codes) - ({0, 75} if handled else {0, 75, -signal.SIGTERM}):
    return f'after SIGTERM they ended with {codes}'
  return ''


def handles_sigterm(process: subprocess.Popen) -> bool:
  """Whether a process has come so far that it handles SIGTERM; while it imports modules it just
  ends."""
  try:
    status = pathlib.Path(f'/proc/{process.pid}/status').read_text()
  except FileNotFoundError:
    return False
  caught = int(re.search(r'^SigCgt:\s*(\w+)', status, re.MULTILINE)[1], 16)
  return bool(caught >> (signal.SIGTERM - 1) & 1)


def wait(started: list[subprocess.Popen], seconds: float) -> list[int | None]:
  """The exit statuses; None for a process that had not ended by then and was killed."""
  end, codes = time.monotonic() + seconds, []
  for process in started:
    try:
      codes.append(process.wait(max(0.0, end - time.monotonic())))
    except subprocess.TimeoutExpired:
      codes.append(None)
      process.kill()
  return codes


def once(workdir: pathlib.Path, number: int, options: argparse.Namespace) -> dict:
  """One start and, unless it gets to its end first, one stop."""
  rng = random.Random(f'{options.seed}/{number}')
  shape, mesh, place = rng.choice(SHAPES), rng.choice(MESHES), rng.choice(PLACES)
  way = (
    'disk'
    if number % max(1, options.restarts // max(1, options.full_disks)) == 0 and options.full_disks
    else rng.choice(WAYS)
  )
  changes = [f'mesh.{name}={value}' for name, value in mesh.items()]
  began, wrong, ended = time.monotonic(), '', False
  started = processes.start(workdir, *shape, changes)
  while not reached(workdir, place) and any(p.poll() is None for p in started):
    time.sleep(0.02)
  time.sleep(rng.uniform(0, 6))
  if all(p.poll() is None for p in started):
    wrong = stop(started, way, workdir, rng)
  else:
    codes, ended = wait(started, ALONE_SECONDS), True
    wrong = '' if set(codes) <= {0} else f'nothing stopped it, and it ended with {codes}'
  return dict(
    number=number,
    shape=shape,
    mesh=mesh,
    aimed=place,
    way='none' if ended else way,
    wrong=wrong,
    seconds=round(time.monotonic() - began, 1),
  )


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--restarts', type=int, default=5)
  parser.add_argument(
    '--full_disks', type=int, default=0, help='how many of the restarts find the disk full'
  )
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--folder',
    help='kept afterwards, and gone on with when called again; default: a temporary one, deleted',
  )
  options = parser.parse_args(argv)
  folder = pathlib.Path(options.folder or tempfile.mkdtemp(prefix='restarts-'))
  folder.mkdir(parents=True, exist_ok=True)
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder / 'compiled'))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
  work = folder / 'work'
  work.mkdir(exist_ok=True)
  if options.full_disks and not os.path.ismount(work):
    subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={DISK}', 'tmpfs', str(work)], check=True)
  record = folder / 'restarts.jsonl'
  done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
  try:
    return run(folder, work, record, done, options)
  finally:
    if os.path.ismount(work):
      subprocess.run(['umount', '-l', str(work)], check=True)
    if not options.folder:
      shutil.rmtree(folder)


def run(
  folder: pathlib.Path,
  work: pathlib.Path,
  record: pathlib.Path,
  done: list[dict],
  options: argparse.Namespace,
) -> int:
  from tests.test_processes import assert_same

  if code := processes.run(folder / 'whole', 1, 4):
    print(f'the uninterrupted run ended with {code}: {folder}/whole.0.log')
    return 1
  workdir, compared, began, before = work / 'run', 0, time.monotonic(), len(done)
  while True:
    over = len(done) >= options.restarts
    if over:
      if processes.run(workdir, 1, 4, timeout=1800):
        print(f'the last start failed: {work}')
        return 1
    else:
      done.append(once(workdir, len(done), options))
      with record.open('a') as file:
        file.write(json.dumps(done[-1]) + '\n')
      each = (time.monotonic() - began) / (len(done) - before)
      left = each * (options.restarts - len(done))
      print(
        f'{len(done)}/{options.restarts}: {json.dumps(done[-1])}; {left:.0f} s left', flush=True
      )
      if done[-1]['wrong']:
        log = '\n'.join(p.read_text()[-3000:] for p in sorted(work.glob('run.*.log')))
        (folder / 'failed.log').write_text(log)
        print(f'{done[-1]["wrong"]}; {folder}/failed.log')
        return 1
    if over or done[-1]['way'] == 'none':
      assert_same(workdir, folder / 'whole')
      compared += 1
      shutil.rmtree(workdir)
      for path in work.glob('run.*.log'):
        path.unlink()
    if over:
      break
  summary(done, compared)
  return 0


def summary(done: list[dict], compared: int) -> None:
  """A table of what was done."""
  count = collections.Counter((d['way'], d['shape'][0]) for d in done)
  print(
    '| stopped by | '
    + ' | '.join(f'{n} process{"es" if n > 1 else ""}' for n, _ in SHAPES)
    + ' |\n'
    + '|---' * 4
    + '|'
  )
  for way in dict.fromkeys(d['way'] for d in done):
    print(f'| {way} | ' + ' | '.join(str(count[way, n]) for n, _ in SHAPES) + ' |')
  print(
    f'{len(done)} starts; {compared} runs got to their end since this script was started, each '
    f'with the same figures'
  )


if __name__ == '__main__':
  raise SystemExit(main(sys.argv[1:]))
