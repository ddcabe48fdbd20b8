"""Damages one file of a workdir at a time and runs the same command again: it must name the damage or end with the same numbers.

  python tests/damage.py --count=500 --folder=/tmp/damage          called again, it goes on
  python tests/damage.py --count=20 --only=report -- --config=configs/sft.py:tiny    files whose path holds a word; flags of run.py

Of a finished workdir of the `:tiny` main job and of one that was stopped in its middle, a file is drawn with a kind of damage: a
byte flipped, cut to half, emptied, removed, or a folder in its place. What follows is one of

  named     the command ends with an error, or says a warning, that names the file or its folder
  no effect the run ends with the numbers of the undamaged one (tests/kills.py: fingerprint)
  SILENT    it ends with other numbers and no word; BARE: with a traceback that is no message. Both are faults: the status is 1.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time

import numpy as np

HOWS = ('flip', 'cut', 'empty', 'remove', 'folder')


def damage(path: pathlib.Path, how: str, rng: np.random.Generator) -> None:
  """Root may read every file, so 'folder' stands for what cannot be read."""
  contents = path.read_bytes()
  if how in ('remove', 'folder'):
    path.unlink()
    if how == 'folder':
      path.mkdir()
  elif how == 'flip' and contents:
    at = int(rng.integers(len(contents)))
    path.write_bytes(contents[:at] + bytes([contents[at] ^ int(rng.integers(1, 256))]) + contents[at + 1:])
  else:
    path.write_bytes(contents[:len(contents) // 2] if how == 'cut' else b'')


def verdict(code: int, said: str, file: pathlib.PurePath, same: bool) -> str:
  """What became of a damage; `file` is its path inside the workdir."""
  if code and 'error: ' not in said:
    return 'BARE'
  names = {file.name, *(str(p) for p in file.parents if len(p.parts) > 1)}
  told = [line for line in said.splitlines() if re.search('^error: |^WARNING|damaged|made again', line)]
  if code or not same:
    return 'named' if any(n in line for n in names for line in [*told, *(said.splitlines() if code else [])]) else 'SILENT'
  return 'named' if any(n in line for n in names for line in told) else 'no effect'


def group(file: pathlib.PurePath) -> str:
  """The kind of a file, for the table."""
  parts = ['*' if p.isdigit() else p for p in file.parts]
  if len(parts) > 1 and parts[0] != 'report':
    parts[0] = 'STAGE'
  if 'params' in parts or 'state' in parts or 'steps' in parts:
    return '/'.join(parts[:4 if 'steps' in parts else 3]) + '/...'
  name = parts[-1]
  return '/'.join([*parts[:-1], 'events' if name.startswith('events.') else '*.npz' if name.endswith('.npz') else name])


def main(argv: list[str]) -> int:
  from tests import kills
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--count', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', default='', help='a word in the path of the files')
  parser.add_argument('--stop_after', default='rm: start', help='what the unfinished run has printed when it is stopped')
  parser.add_argument('--folder', help='kept, and gone on with; default: a temporary one, deleted')
  options, arguments = parser.parse_known_args(argv)
  arguments = [a for a in arguments if a != '--']
  if not any(a.startswith('--config=') for a in arguments):
    arguments = ['--config=configs/ppo_ptx.py:tiny', *arguments]
  folder = pathlib.Path(options.folder or tempfile.mkdtemp(prefix='damage-'))
  folder.mkdir(parents=True, exist_ok=True)
  arguments = [*arguments, f'--jax_compilation_cache_dir={folder}/compiled', '--jax_persistent_cache_min_compile_time_secs=0.5']
  log = folder / 'log.txt'
  with log.open('a') as out:
    if kills.start(folder / 'finished', arguments, out).wait():
      print(f'the undamaged run failed: {log}')
      return 1
    if not (folder / 'unfinished').exists():
      stop(kills, folder / 'unfinished', arguments, out, log, options.stop_after)
  whole = kills.fingerprint(folder / 'finished')
  files = [(kind, p.relative_to(folder / kind)) for kind in ('finished', 'unfinished') for p in sorted((folder / kind).rglob('*'))
           if p.is_file() and options.only in str(p.relative_to(folder / kind))]
  record = folder / 'damages.jsonl'
  done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
  for i in range(len(done), options.count):
    rng = np.random.default_rng([options.seed, i])
    kind, file = files[rng.integers(len(files))]
    how = HOWS[rng.integers(len(HOWS))]
    work = folder / 'damaged'
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder / kind, work)
    damage(work / file, how, rng)
    with (folder / 'one.txt').open('w') as out:
      code = kills.start(work, arguments, out).wait()
    said = (folder / 'one.txt').read_text()
    try:
      same = not code and kills.fingerprint(work) == whole
    except Exception:  # noqa: BLE001 what cannot be read is not the same
      same = False
    done.append(dict(kind=kind, file=str(file), how=how, verdict=verdict(code, said, file, same)))
    if done[-1]['verdict'] in ('SILENT', 'BARE'):
      shutil.copy(folder / 'one.txt', folder / f'fault-{i}.txt')
    with record.open('a') as out:
      out.write(json.dumps(done[-1]) + '\n')
    print(f'{i + 1}/{options.count} {kind} {file} {how}: {done[-1]["verdict"]}', flush=True)
  print(table(done))
  if not options.folder:
    shutil.rmtree(folder)
  return any(d['verdict'] in ('SILENT', 'BARE') for d in done)


def stop(kills, workdir: pathlib.Path, arguments: list[str], out, log: pathlib.Path, words: str) -> None:
  """A run that is stopped once it has printed the words, behind what was printed before it."""
  behind = log.stat().st_size
  process = kills.start(workdir, arguments, out)
  while words not in log.read_text()[behind:] and process.poll() is None:
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  process.wait()


def table(done: list[dict]) -> str:
  verdicts = ('named', 'no effect', 'SILENT', 'BARE')
  count = collections.Counter((group(pathlib.PurePath(d['file'])), d['verdict']) for d in done)
  rows = sorted({name for name, _ in count})
  return '\n'.join([f'| file | {" | ".join(verdicts)} |', '|---' * 5 + '|',
                    *(f'| {name} | ' + ' | '.join(str(count[name, v]) for v in verdicts) + ' |' for name in rows),
                    f'{len(done)} damages of one file each'])


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
  raise SystemExit(main(sys.argv[1:]))
