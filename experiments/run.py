"""Runs an experiment.

    python experiments/run.py --config=configs/ppo_ptx.py                 everything, on the embedded sandbox
    python experiments/run.py --config=configs/ppo_ptx.py:tiny            the same in two minutes
    python experiments/run.py --config=configs/sft.py --workdir=/tmp/sft --config.seed=3

A config is looked up in the working directory, then beside this file. `:arg` goes to its get_config(arg);
`--config.a.b=` changes one entry. Stages that the chosen one starts from run first; finished ones are reused. Stopped by
Ctrl-C, SIGTERM or kill, the same command goes on from the last checkpoint; of the first two the exit code is 75.
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


def find_config(argv: list[str]) -> list[str]:
  """argv with --config=FILE[:arg] looked up in the working directory, then beside run.py."""
  out, take_next = [], False
  for argument in argv:
    if take_next or argument.startswith(('--config=', '-config=')):
      prefix, value = ('', argument) if take_next else argument.split('=', 1)
      path, colon, arg = value.partition(':')
      if not pathlib.Path(path).exists() and (HERE / path).exists():
        path = str(HERE / path)
      elif not pathlib.Path(path).exists():
        known = sorted(p.relative_to(HERE).as_posix() for p in (HERE / 'configs').glob('*.py'))
        raise SystemExit(f'--config={value}: no such file, here or beside {HERE.name}/run.py. There are: {", ".join(known)}')
      argument, take_next = (f'{prefix}={path}{colon}{arg}' if prefix else f'{path}{colon}{arg}'), False
    elif argument in ('--config', '-config'):
      take_next = True
    out.append(argument)
  return out


def explain(error: Exception, folder) -> None:
  """Ends with the message alone; the traceback goes to a file, for when the message is not enough."""
  if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
    error = OSError(f'{error.strerror}: {error.filename or folder}. Make room there or mend it; the same command goes on from the '
                    'last checkpoint.').with_traceback(error.__traceback__)
  path = folder / 'traceback.txt'
  text = ''.join(traceback.format_exception(error))
  try:
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  except Exception:  # noqa: BLE001 the error may be that nothing can be written; buckets raise many kinds
    sys.stderr.write(text)
    raise SystemExit(f'error: {error}') from None
  raise SystemExit(f'error: {error}\n(traceback: {path})')


def parse_flags(argv: list[str]) -> list[str]:
  """absl's, with one line for an override of what the config does not have."""
  from absl import app
  try:
    return app.parse_flags_with_usage(argv)
  except AttributeError as error:  # of ml_collections: --config.no_such_entry
    message = str(error).strip('"').replace("\\'", "'").replace('\\n', ' ')
    raise SystemExit(f'error: a --config. override names an entry that the config does not have: {message}') from None


def main(argv: list[str]) -> None:
  import jax
  from absl import app, flags
  from ml_collections import config_flags

  jax.config.config_with_absl()  # all of its settings are flags, which the launch scripts hand on

  config = config_flags.DEFINE_config_file('config', None, 'FILE.py[:arg], such as configs/ppo_ptx.py:tiny.',
                                           lock_config=True)
  workdir = flags.DEFINE_string('workdir', None, 'Where everything is written. Default: runs/<config>[-<arg>]-s<seed>.')
  several = flags.DEFINE_bool('distributed', False, 'As one of several processes: of a TPU slice, a Slurm job, or as '
                              'JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say. See launch/README.md.')
  timeout = flags.DEFINE_integer('distributed_timeout', 300, 'Seconds to wait for the other processes.', lower_bound=1)
  profile = flags.DEFINE_string('profile', None, 'STAGE:FIRST-LAST: trace these steps into WORKDIR/STAGE/profile, for TensorBoard.')
  flags.mark_flag_as_required('config')

  def run(_):
    from absl import logging
    logging.set_verbosity(logging.WARNING)  # not the search for other backends, nor orbax's every step

    from alignjax import distributed, files, interrupt, train, trouble
    path, _, arg = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
    name = pathlib.Path(path).stem + (f'-{arg}' if arg else '')
    try:
      folder = files.folder(workdir.value or f'runs/{name}-s{config.value.seed}')
    except ValueError as error:
      raise SystemExit(f'error: --workdir={error}') from None
    with contextlib.ExitStack() as stack:
      if several.value:
        facts = {**distributed.facts(config.value.to_dict()), '--workdir': str(folder)}
        try:
          stack.enter_context(distributed.joined(facts, timeout.value))
        except ValueError as error:
          raise SystemExit(f'error: {error}') from None
        except TimeoutError as error:
          print(f'error: {error}', file=sys.stderr)
          raise SystemExit(interrupt.EXIT_CODE) from None  # the same command may find them all
      if jax.process_index() == 0:
        print(f'config {name}, seed {config.value.seed}, workdir {folder}, {jax.device_count()} {jax.devices()[0].platform} '
              'device(s)' + (f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''), flush=True)
      try:
        distributed.check_shared(folder)
        train.main(config.value, folder, profile.value)
      except (ValueError, TypeError, OSError, FloatingPointError, trouble.StepFailed) as error:
        explain(error, folder)
      except SystemExit as stopped:
        if stopped.code == interrupt.EXIT_CODE and jax.process_count() == 1:  # all is written; an interrupted compilation may
          sys.stdout.flush()                                                  # leave threads that crash Python's own way out
          os._exit(stopped.code)
        raise

  app.run(run, argv=argv, flags_parser=parse_flags)


if __name__ == '__main__':
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # train.main has its own; here nothing has begun
  main([sys.argv[0], *find_config(sys.argv[1:])])
