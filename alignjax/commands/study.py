"""Runs a study of the laboratory: a question, a table over seeds, and a plot.

    alignjax study                                         lists the studies
    alignjax study NAME --workdir=runs/lab                 seeds 41 to 45
    alignjax study NAME --workdir=runs/lab --seeds=46,47   two further ones, into the same table
    alignjax study NAME --tiny --workdir=/tmp/lab          small; the numbers mean nothing
    alignjax study NAME --help                             the question, and the study's own flags

The results are WORKDIR/NAME/table.md, plot.png, rows.jsonl and facts.json. Studies of one workdir
share what they train, WORKDIR/seed-S. After Ctrl-C, SIGTERM or a kill the same command goes on
where it was. NAME may also be the dotted name of a fork's module (alignjax/studies/study.py).
"""

import os
import pathlib
import signal
import sys

from alignjax import studies
from alignjax.commands import command
from alignjax.commands.run import divide_cpu, explain


def listing() -> str:
  """Returns the names of the studies and the first lines of their docstrings."""
  folder = pathlib.Path(studies.__file__).parent
  return command.listing({name: command.headline(folder / f'{name}.py') for name in studies.NAMES})


def numbers(text: str) -> list[int]:
  """Parses '41,42' and raises ValueError for what are not different whole numbers."""
  try:
    found = [int(part) for part in text.split(',')]
  except ValueError:
    raise ValueError(f'--seeds={text} must be whole numbers with commas between them.') from None
  if len(set(found)) < len(found) or min(found) < 0:
    raise ValueError(f'--seeds={text} must be different numbers from 0 on.')
  return found


def main(argv: list[str]) -> None:
  parser = command.make_parser(__name__)
  if not argv:
    print(listing())
    return
  if argv[0].startswith('-'):
    parser.add_argument('name', metavar='NAME', help='of a study; none lists them')
    parser.parse_args(argv if {'-h', '--help'} & {*argv} else [])
    return
  # Nothing has begun yet; train.main installs its own handler for the time of a stage.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  import jax
  from absl import logging

  from alignjax.configs import base
  from alignjax.runtime import failures, files, interrupt, lock
  from alignjax.studies import study

  name, *rest = argv
  module = study.find(name)
  parser.prog, parser.description = f'{parser.prog} {name}', module.__doc__
  parser.add_argument('--workdir', required=True, help='the folder of the studies')
  parser.add_argument('--seeds', help=f'default: {",".join(map(str, study.SEEDS))}')
  parser.add_argument('--tiny', action='store_true', help='sizes for a first look, seeds 1 and 11')
  if hasattr(module, 'arguments'):
    module.arguments(parser)
  options = parser.parse_args(rest)
  default = study.DEVELOPMENT[:2] if options.tiny else study.SEEDS
  seeds = numbers(options.seeds) if options.seeds else list(default)
  logging.set_verbosity(logging.WARNING)
  divide_cpu(getattr(module, 'CPU_DEVICES', base.get_config().cpu_devices))
  try:
    folder = files.absolute(options.workdir)
  except ValueError as error:
    raise ValueError(f'--workdir={error}') from None
  failures.check_writable(folder, '--workdir')
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):  # The seeds share their programs.
    jax.config.update('jax_compilation_cache_dir', str(folder / 'compiled'))
  try:
    study.run_study(module, folder, seeds, options.tiny, options)
  except lock.Busy as error:
    raise SystemExit(f'error: {error}') from None
  except Exception as error:  # noqa: BLE001 of every kind the message first
    explain(error, folder / failures.TRACEBACK)
  except SystemExit as stopped:
    # Everything is written. An interrupted compilation may leave threads that crash Python's
    # regular exit.
    if stopped.code == interrupt.EXIT_CODE:
      sys.stdout.flush()
      os._exit(interrupt.EXIT_CODE)
    raise
  own = folder / name.rpartition('.')[2]
  print((own / 'table.md').read_text(), flush=True)
  print(f'{name}: {own / "table.md"}, {own / "plot.png"}', flush=True)
