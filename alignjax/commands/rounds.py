"""Collects labels in rounds, each with a new reward model and a new policy.

    alignjax rounds --config=rounds                   on the sandbox, whose labelers answer at once
    alignjax rounds --config=rounds:tiny              a few steps of each stage
    alignjax rounds --config=rounds --config.rounds.labels="(500, 500, 500)"
    alignjax rounds --config=mine.py --config.rounds.labelers=people --workdir=runs/mine

Each round has the folder WORKDIR/round-1, ..., and `alignjax/configs/rounds.py` says what can be
chosen. The report is WORKDIR/rounds.md, rounds.json and rounds.png. With people, the command puts
the items of a round into a labeling database, prints how many rankings are missing, and ends with
the exit code 75; when labelers have made them (`alignjax label serve`), the same command goes on.
It also goes on after Ctrl-C, SIGTERM or a kill, and when rounds.labels names another round.
"""

import os
import signal
import sys

from alignjax.commands import config_flags
from alignjax.commands.run import divide_cpu, explain


def main(argv: list[str]) -> None:
  # Nothing has begun yet; train.main installs its own handler for the time of a stage.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  import jax
  from absl import flags

  jax.config.config_with_absl()

  config, name, argv = config_flags.read_config(argv)
  flags.DEFINE_string(
    'config',
    None,
    'NAME[:ARG] or FILE.py[:ARG] of a config with the entry `rounds`, such as rounds:tiny; '
    '--config.ENTRY=VALUE changes an entry.',
  )
  workdir = flags.DEFINE_string(
    'workdir', None, 'The folder to write to. Default: runs/<config>[-<arg>]-s<seed>.'
  )
  changed = flags.DEFINE_enum(
    'on_changed_input',
    'fail',
    ('fail', 'keep', 'restart'),
    'What to do if the data, a checkpoint or a function that a stage was made from has changed '
    '(alignjax run --help).',
  )

  def run():
    from absl import logging

    logging.set_verbosity(logging.WARNING)

    from alignjax import rounds
    from alignjax.label import collect
    from alignjax.runtime import failures, files, interrupt, lock

    divide_cpu(config.get('cpu_devices'))
    try:
      folder = files.absolute(workdir.value or f'runs/{name}-s{config.seed}')
    except ValueError as error:
      raise ValueError(f'--workdir={error}') from None
    print(f'config {name}, seed {config.seed}, workdir {folder}', flush=True)
    try:
      rounds.main(config, folder, changed.value)
    except collect.Missing as missing:
      print(missing, flush=True)
      raise SystemExit(interrupt.EXIT_CODE) from None
    except lock.Busy as error:
      raise SystemExit(f'error: {error}') from None  # Another run uses the folder.
    except Exception as error:  # noqa: BLE001 of every kind the message first
      explain(error, folder / failures.TRACEBACK)
    except SystemExit as stopped:
      # Everything is written. An interrupted compilation may leave threads that crash Python's
      # regular exit.
      if stopped.code == interrupt.EXIT_CODE:
        sys.stdout.flush()
        os._exit(interrupt.EXIT_CODE)
      raise

  config_flags.run_with_flags(run, __name__, argv)
