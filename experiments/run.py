"""Runs an experiment.

    python experiments/run.py --config=configs/ppo_ptx.py                 everything, on the embedded sandbox
    python experiments/run.py --config=configs/ppo_ptx.py:tiny            the same with a few steps of each stage
    python experiments/run.py --config=configs/sft.py --workdir=/tmp/sft --config.seed=3

A config is looked up in the working directory, then beside this file. `:arg` goes to its
get_config(arg); `--config.a.b=VALUE` changes one entry (experiments/overrides.py). Stages that the
chosen one starts from run first; finished ones are reused. Stopped by Ctrl-C, SIGTERM or kill, the
same command goes on from the last checkpoint; of the first two the exit code is 75.
"""

import contextlib
import errno
import os
import pathlib
import signal
import sys
import traceback

HERE = pathlib.Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
  sys.path.insert(0, str(HERE.parent))  # runs from a clone, installed or not

from experiments import command  # noqa: E402  after the path


def explain(error: Exception, path) -> None:
  """Ends with the message alone; the traceback goes to the file `path`, for when the message is not
  enough."""
  words = command.in_words(error)
  if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
    words += ' Make room there or mend it; the same command goes on from the last checkpoint.'
  text = ''.join(traceback.format_exception(error))
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  except Exception:  # noqa: BLE001 the error may be that nothing can be written; buckets raise many kinds
    sys.stderr.write(text)
    raise SystemExit(f'error: {words}') from None
  raise SystemExit(f'error: {words}\n(traceback: {path})')


def main(argv: list[str]) -> None:
  import jax
  from absl import app, flags

  jax.config.config_with_absl()  # all of its settings are flags, which the launch scripts hand on

  config, name, argv = command.read_config(argv)
  flags.DEFINE_string(
    'config',
    None,
    'FILE.py[:arg], such as configs/ppo_ptx.py:tiny; --config.ENTRY=VALUE changes an entry.',
  )
  workdir = flags.DEFINE_string(
    'workdir', None, 'Where everything is written. Default: runs/<config>[-<arg>]-s<seed>.'
  )
  several = flags.DEFINE_bool(
    'distributed',
    False,
    'As one of several processes: of a TPU slice, a Slurm job, or as '
    'JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say. See launch/README.md.',
  )
  timeout = flags.DEFINE_integer(
    'distributed_timeout', 300, 'Seconds to wait for the other processes.', lower_bound=1
  )
  profile = flags.DEFINE_string(
    'profile',
    None,
    'STAGE:FIRST-LAST: trace these steps into WORKDIR/STAGE/profile, for TensorBoard.',
  )
  changed = flags.DEFINE_enum(
    'on_changed_input',
    'fail',
    ('fail', 'keep', 'restart'),
    'Where the data, a checkpoint or a function '
    'that a stage was made from is another one now: fail; keep what is there and take the new one '
    'for '
    'the same; or restart the stage, which deletes its folder.',
  )

  def run(_):
    from absl import logging

    # not the search for other backends, nor orbax's every step
    logging.set_verbosity(logging.WARNING)

    from alignjax import train
    from alignjax.runtime import distributed, failures, files, interrupt, lock

    try:
      folder = files.folder(workdir.value or f'runs/{name}-s{config.seed}')
    except ValueError as error:
      raise SystemExit(f'error: --workdir={error}') from None
    with contextlib.ExitStack() as stack:
      if several.value:
        facts = {**distributed.facts(config.to_dict()), '--workdir': str(folder)}
        try:
          stack.enter_context(distributed.joined(facts, timeout.value))
        except ValueError as error:
          raise SystemExit(f'error: {error}') from None
        except TimeoutError as error:
          print(f'error: {error}', file=sys.stderr)
          raise SystemExit(interrupt.EXIT_CODE) from None  # the same command may find them all
      if jax.process_index() == 0:
        print(
          f'config {name}, seed {config.seed}, workdir {folder}, {jax.device_count()} '
          f'{jax.devices()[0].platform} '
          'device(s)' + (f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''),
          flush=True,
        )
      try:
        distributed.check_shared(folder)
        train.main(config, folder, profile.value, changed.value)
      except lock.Busy as error:
        raise SystemExit(f'error: {error}') from None  # the folder is another run's
      except Exception as error:  # noqa: BLE001 of every kind the message first
        explain(error, folder / failures.TRACEBACK)
      except SystemExit as stopped:
        # all is written; an interrupted compilation may
        if stopped.code == interrupt.EXIT_CODE and jax.process_count() == 1:
          # leave threads that crash Python's own way out
          sys.stdout.flush()
          os._exit(stopped.code)
        raise

  app.run(run, argv=[sys.argv[0], *argv])


if __name__ == '__main__':
  # train.main has its own; here nothing has begun
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  command.start(main, sys.argv[1:])
