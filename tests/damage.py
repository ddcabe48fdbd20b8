"""Damages one file at a time of what the commands write, and uses it again: the damage must be
named or have no effect on a number.

  python tests/damage.py --count=500 --folder=/tmp/damage --workers=2    called again, it goes on
  python tests/damage.py --count=20 --subjects=finished --only=report

--only takes the files whose path holds the word.

What is damaged: a finished workdir of the `:tiny` main job; one that was stopped in its middle;
data that prepare.py wrote, as JSON lines and as array_record shards; an exported model; the folder
of an evaluation. A file is drawn with a kind of damage: a byte flipped, cut to half, emptied,
removed, or a folder in its place. What follows when the command is called again is one of

  named     the command ends with an error, or says a warning, that names the file or its folder
  no effect it ends with the numbers of the undamaged one (of a workdir those of tests/kills.py:
            fingerprint). Weights that the command did not need are then read as every reader does,
            so that a damage there is named too
  SILENT    it ends with other numbers and no word
  BARE      it ends with a traceback that is no message

The last two are faults: the status is 1.

Every command runs in a child of a process that has imported everything, which saves the seconds of
the imports.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

HOWS = ('flip', 'cut', 'empty', 'remove', 'folder')
ROOT = pathlib.Path(__file__).resolve().parent.parent
CHAT = ROOT / 'tests/golden/chat'


class Subject(NamedTuple):
  """What is damaged: a folder, the command that made it, and the one that uses it (the same one
  where None) with its result."""

  make: list[str]
  use: list[str] | None
  result: Callable[[pathlib.Path], object]
  weight: float  # how often it is drawn
  stop_after: str = ''  # the making is stopped once it has printed this


def subjects(base: pathlib.Path) -> dict[str, Subject]:
  """By name, in the order in which they are made. HERE stands for the subject's folder, in the
  commands."""
  main = ['run.py', '--config=configs/ppo_ptx.py:tiny', '--workdir=HERE']
  raw = base / 'raw.jsonl'
  if not raw.exists():
    raw.write_text(
      ''.join(
        json.dumps(dict(prompt=f'what is {i} ?', response=f'it is {i} .', user_id=i % 40)) + '\n'
        for i in range(200)
      )
    )
    (base / 'winogender.tsv').write_text(
      'sentid\tsentence\n'
      + ''.join(
        f'{job}.customer.{i}.{sex}.txt\tthe {job} told the customer that {word} was late .\n'
        for job in ('technician', 'nurse')
        for i in (0, 1)
        for sex, word in (('male', 'he'), ('female', 'she'))
      )
    )
    (base / 'toxicity.jsonl').write_text(
      ''.join(
        json.dumps(dict(prompt=dict(text=f'the {x} said', toxicity=0.1 * i))) + '\n'
        for i, x in enumerate(('man', 'dog', 'nurse'))
      )
    )
  sft = [
    'run.py',
    '--config=configs/smollm2_135m.py:tiny',
    f'--config.checkpoint=hf:{CHAT}',
    "--config.stages_to_run=('sft',)",
    f'--config.data.demonstrations=jsonl:{raw}',
    '--config.data.mapping.demonstrations=',
    '--config.stages.sft.pretrain_mix=0.0',
    '--config.report.policies={}',
    f'--workdir={base}/tuned',
  ]
  read = lambda form: [
    'prepare.py',
    f'--source={form}',
    '--kind=demonstrations',
    '--shares=all=1',
    '--out=HERE/../read',
  ]
  prepare = [
    'prepare.py',
    f'--source=jsonl:{raw}',
    '--kind=demonstrations',
    '--shares=train=0.5,valid=0.5',
    '--out=HERE',
  ]
  evaluate = [
    'evaluate.py',
    f'--models=a=hf:{CHAT},b=hf:{base}/exported',
    '--tasks=winogender,realtoxicityprompts',
    f'--data=winogender={base}/winogender.tsv,realtoxicityprompts={base}/toxicity.jsonl',
  ]
  return {
    'finished': Subject(main, None, workdir_numbers, 8),
    'unfinished': Subject(main, None, workdir_numbers, 8, stop_after='rm: start'),
    'tuned': Subject(sft, None, workdir_numbers, 0),
    'exported': Subject(
      ['export.py', f'--model={base}/tuned/sft', '--out=HERE'],
      ['evaluate.py', '--models=b=hf:HERE', *evaluate[2:], '--out=HERE/../table'],
      lambda folder: table_numbers(folder.parent / 'table'),
      2,
    ),
    'evaluated': Subject([*evaluate, '--out=HERE'], None, table_numbers, 3),
    'prepared': Subject(
      prepare, read('jsonl:HERE/train.jsonl.gz;jsonl:HERE/valid.jsonl.gz'), prepared_numbers, 1
    ),
    'records': Subject(
      [*prepare, '--format=tfds', '--shards=2'],
      read('tfds:HERE/records/1.0.0:train+valid'),
      prepared_numbers,
      2,
    ),
  }


def workdir_numbers(folder: pathlib.Path) -> object:
  from tests import kills

  return {k: v.hex() if isinstance(v, bytes) else v for k, v in kills.fingerprint(folder).items()}


def table_numbers(folder: pathlib.Path) -> object:
  found = json.loads((folder / 'table.json').read_text())
  return [
    [
      row['task'],
      row['metric'],
      row['prompt'],
      {
        m: {k: v for k, v in cell.items() if k in ('mean', 'low', 'high', 'n')}
        for m, cell in row['models'].items()
      },
    ]
    for row in found['rows']
  ]


def prepared_numbers(folder: pathlib.Path) -> object:
  import gzip

  return gzip.decompress((folder.parent / 'read' / 'all.jsonl.gz').read_bytes()).decode()


def damage(path: pathlib.Path, how: str, rng: np.random.Generator) -> None:
  """Root may read every file, so 'folder' stands for what cannot be read."""
  contents = path.read_bytes()
  if how in ('remove', 'folder'):
    path.unlink()
    if how == 'folder':
      path.mkdir()
  elif how == 'flip' and contents:
    at = int(rng.integers(len(contents)))
    path.write_bytes(
      contents[:at] + bytes([contents[at] ^ int(rng.integers(1, 256))]) + contents[at + 1 :]
    )
  else:
    path.write_bytes(contents[: len(contents) // 2] if how == 'cut' else b'')


def verdict(code: int, said: str, file: pathlib.PurePath, same: bool) -> str:
  """What became of a damage; `file` is its path inside the folder that was damaged."""
  if code and 'error: ' not in said:
    return 'BARE'
  names = {file.name, *(str(p) for p in file.parents if len(p.parts) > 1)}
  told = [
    line for line in said.splitlines() if re.search('^error: |^WARNING|damaged|made again', line)
  ]
  if code or not same:
    return (
      'named'
      if any(n in line for n in names for line in [*told, *(said.splitlines() if code else [])])
      else 'SILENT'
    )
  return 'named' if any(n in line for n in names for line in told) else 'no effect'


def group(subject: str, file: pathlib.PurePath) -> str:
  """The kind of a file, for the table."""
  parts = ['*' if p.isdigit() else p for p in file.parts]
  if subject not in ('finished', 'unfinished'):
    return f'{subject}: ' + re.sub(r'[0-9a-f]{12,}|\d{5}-of-\d{5}', '*', '/'.join(parts[-2:]))
  if len(parts) > 1 and parts[0] != 'report':
    parts[0] = 'STAGE'
  if 'params' in parts or 'state' in parts or 'steps' in parts:
    return '/'.join(parts[: 4 if 'steps' in parts else 3]) + '/...'
  name = parts[-1]
  return '/'.join(
    [
      *parts[:-1],
      'events' if name.startswith('events.') else '*.npz' if name.endswith('.npz') else name,
    ]
  )


def start(
  words: list[str], here: pathlib.Path, out: pathlib.Path, result: Callable | None = None
) -> int:
  """A child that runs one of experiments/*.py, its output in the file `out`; the id of its process.
  After a good end the child writes the digest of its result behind that, into OUT.result."""
  child = os.fork()
  if child:
    return child
  from alignjax.runtime import checkpoint

  code = 1
  try:
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    code = _run([w.replace('HERE', str(here)) for w in words])
    if not code and result is not None:
      digest = hashlib.sha256(json.dumps(result(here), sort_keys=True).encode()).hexdigest()
      out.with_suffix('.result').write_text(digest)
  except checkpoint.Damaged as error:
    print(f'error: {error}')
    code = 1
  except BaseException:  # noqa: BLE001 the process must not go on as a copy of its parent
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(words: list[str]) -> int:
  """What `python experiments/SCRIPT FLAGS` does, with the status that Python would end with."""
  from alignjax.commands import command

  module = importlib.import_module(f'alignjax.commands.{words[0].removesuffix(".py")}')
  sys.argv = words
  try:
    command.start(module.main, words[1:])
  except SystemExit as stopped:
    if isinstance(stopped.code, str):
      print(stopped.code, file=sys.stderr)
    return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
  except Exception:  # noqa: BLE001 as Python prints it
    traceback.print_exc()
    return 1
  return 0


def finish(child: int) -> int:
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def use(subject: Subject, here: pathlib.Path, out: pathlib.Path) -> tuple[int, str, str]:
  """(status, what was printed, digest of the result or '') of the command that uses a subject."""
  out.with_suffix('.result').unlink(missing_ok=True)
  for beside in ('read', 'table'):
    shutil.rmtree(here.parent / beside, ignore_errors=True)
  code = finish(start(subject.use or subject.make, here, out, subject.result))
  found = out.with_suffix('.result')
  return code, out.read_text(errors='replace'), found.read_text() if found.exists() else ''


def make(name: str, subject: Subject, base: pathlib.Path) -> str:
  """Makes what is damaged and uses it once, on a copy; the digest of the result."""
  folder, log = base / name, base / f'{name}.log'
  if not folder.exists():
    child = start(subject.make, folder, log)
    while subject.stop_after and subject.stop_after not in (
      log.read_text() if log.exists() else ''
    ):
      time.sleep(0.1)
    if subject.stop_after:
      os.kill(child, signal.SIGTERM)
    if finish(child) != (75 if subject.stop_after else 0):
      raise SystemExit(f'{name} could not be made: {log}')
  work = base / 'undamaged' / name
  shutil.rmtree(work.parent, ignore_errors=True)
  shutil.copytree(folder, work)
  code, said, digest = use(subject, work, base / 'undamaged.txt')
  if code or not digest:
    raise SystemExit(f'{name} cannot be used undamaged: {said}')
  return digest


def one(
  number: int,
  seed: int,
  names: dict[str, Subject],
  whole: dict[str, str],
  base: pathlib.Path,
  only: str,
  worker: int,
) -> dict:
  """A damage and what became of it."""
  rng = np.random.default_rng([seed, number])
  weights = np.array([s.weight for s in names.values()], float)
  name = str(rng.choice(list(names), p=weights / weights.sum()))
  folder, work = base / name, base / f'damaged-{worker}' / name
  files = sorted(
    p.relative_to(folder)
    for p in folder.rglob('*')
    if p.is_file() and only in str(p.relative_to(folder))
  )
  file, how = files[rng.integers(len(files))], HOWS[rng.integers(len(HOWS))]
  shutil.rmtree(work.parent, ignore_errors=True)
  shutil.copytree(folder, work)
  damage(work / file, how, rng)
  out = base / f'one-{worker}.txt'
  code, said, digest = use(names[name], work, out)
  found = verdict(code, said, file, digest == whole[name])
  if found in ('SILENT', 'BARE'):
    shutil.copy(out, base / f'fault-{seed}-{number}.txt')
  return dict(number=number, subject=name, file=str(file), how=how, verdict=found)


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--count', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--subjects', default='', help='some of them; default: all')
  parser.add_argument('--only', default='', help='a word in the path of the files')
  parser.add_argument('--workers', type=int, default=1, help='damages at a time')
  parser.add_argument('--folder', help='kept, and gone on with; default: a temporary one, deleted')
  options = parser.parse_args(argv)
  base = pathlib.Path(options.folder or tempfile.mkdtemp(prefix='damage-'))
  base.mkdir(parents=True, exist_ok=True)
  os.environ |= {
    'JAX_COMPILATION_CACHE_DIR': str(base / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
  }
  _import_all()
  names = subjects(base)
  chosen = options.subjects.split(',') if options.subjects else list(names)
  whole = {}
  for name, subject in names.items():
    if name in chosen or name in ('tuned', 'exported'):
      whole[name] = make(name, subject, base)
      print(f'{name}: made', flush=True)
  names = {name: names[name] for name in chosen}
  record = base / 'damages.jsonl'
  load = lambda: (
    [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
  )
  numbers = sorted(set(range(options.count)) - {d['number'] for d in load()})
  workers = []
  for worker in range(options.workers):
    if child := os.fork():
      workers.append(child)
      continue
    try:
      for number in numbers[worker :: options.workers]:
        found = one(number, options.seed, names, whole, base, options.only, worker)
        with record.open('a') as out:
          out.write(json.dumps(found) + '\n')
        print(
          f'{number + 1}/{options.count} {found["subject"]} {found["file"]} {found["how"]}: '
          f'{found["verdict"]}',
          flush=True,
        )
    except BaseException:  # noqa: BLE001 as in `start`
      traceback.print_exc()
      os._exit(1)
    os._exit(0)
  failed = any([finish(worker) for worker in workers])
  done = load()
  print(table(done))
  if not options.folder:
    shutil.rmtree(base)
  return failed or any(d['verdict'] in ('SILENT', 'BARE') for d in done)


def _import_all() -> None:
  """Imports what the commands import. Nothing may ask for a device here: jax's threads would not
  outlive a fork."""
  os.chdir(ROOT)
  for path in sorted((ROOT / 'alignjax').rglob('*.py')):
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    try:
      importlib.import_module(name)
    except ImportError:  # of an extra that is not installed
      continue


def table(done: list[dict]) -> str:
  verdicts = ('named', 'no effect', 'SILENT', 'BARE')
  count = collections.Counter(
    (group(d['subject'], pathlib.PurePath(d['file'])), d['verdict']) for d in done
  )
  rows = sorted({name for name, _ in count})
  return '\n'.join(
    [
      f'| file | {" | ".join(verdicts)} |',
      '|---' * 5 + '|',
      *(f'| {name} | ' + ' | '.join(str(count[name, v]) for v in verdicts) + ' |' for name in rows),
      f'{len(done)} damages of one file each',
    ]
  )


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT))
  raise SystemExit(main(sys.argv[1:]))
