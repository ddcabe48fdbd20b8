"""Runs an experiment, stage by stage.

    alignjax run --config=ppo_ptx              everything, on the embedded sandbox
    alignjax run --config=ppo_ptx:tiny         a few steps of each stage, in two minutes
    alignjax run --config=sft --workdir=/tmp/sft --config.seed=3
    alignjax run --config=my_configs/mine.py   a config of your own

`alignjax configs` lists the configs that are included. `:ARG` is the argument of the config's
get_config(ARG), and `--config.a.b=VALUE` changes one entry (alignjax/commands/overrides.py). The
stages that the chosen one starts from run first; finished ones are reused. After Ctrl-C, SIGTERM or
a kill, the same command resumes from the last checkpoint. After Ctrl-C and SIGTERM the exit code is
75.
"""

import contextlib
import errno
import os
import signal
import sys
import traceback

from alignjax.commands import command, config_flags


def explain(error: Exception, path) -> None:
  """Exits with the message of an error alone. The traceback is written to the file `path`, for
  errors that the message does not explain."""
  words = command.in_words(error)
  if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
    words += ' Make room there or repair it; the same command goes on from the last checkpoint.'
  text = ''.join(traceback.format_exception(error))
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  except Exception:  # noqa: BLE001 the error may be that nothing can be written; buckets raise many kinds
    sys.stderr.write(text)
    raise SystemExit(f'error: {words}') from None
  raise SystemExit(f'error: {words}\n(traceback: {path})')


def divide_cpu(count: int | None) -> None:
  """Lets jax see the CPU as `count` devices, unless XLA_FLAGS or jax's own setting say how many, or
  jax has looked for its devices already. A run on accelerators stays on them."""
  import jax

  said = 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
  if count and not said and jax.config.jax_num_cpu_devices < 0:
    with contextlib.suppress(RuntimeError):
      jax.config.update('jax_num_cpu_devices', count)


def main(argv: list[str]) -> None:
  # Nothing has begun yet; train.main installs its own handler.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  import jax
  from absl import flags

  jax.config.config_with_absl()  # All of jax's settings are flags, which the launch scripts pass.

  config, name, argv = config_flags.read_config(argv)
  flags.DEFINE_string(
    'config',
    None,
    'NAME[:ARG] or FILE.py[:ARG], such as ppo_ptx:tiny; --config.ENTRY=VALUE changes an entry.',
  )
  workdir = flags.DEFINE_string(
    'workdir', None, 'The folder to write to. Default: runs/<config>[-<arg>]-s<seed>.'
  )
  several = flags.DEFINE_bool(
    'distributed',
    False,
    'Run as one of several processes, which a TPU slice, a Slurm job, or JAX_COORDINATOR_ADDRESS, '
    'JAX_NUM_PROCESSES and JAX_PROCESS_ID define. See launch/README.md.',
  )
  timeout = flags.DEFINE_integer(
    'distributed_timeout', 300, 'The seconds to wait for the other processes.', lower_bound=1
  )
  profile = flags.DEFINE_string(
    'profile',
    None,
    'STAGE:FIRST-LAST traces these steps to WORKDIR/STAGE/profile, for TensorBoard.',
  )
  changed = flags.DEFINE_enum(
    'on_changed_input',
    'fail',
    ('fail', 'keep', 'restart'),
    'What to do if the data, a checkpoint or a function that a stage was made from has changed: '
    'fail; keep the stage, as if the input were the same; or restart the stage, which deletes '
    'its folder.',
  )

  def run():
    from absl import logging

    # Messages about other backends and orbax's message at every step are hidden.
    logging.set_verbosity(logging.WARNING)

    from alignjax import train
    from alignjax.runtime import distributed, failures, files, interrupt, lock, trace

    divide_cpu(config.get('cpu_devices'))
    if profile.value:
      trace.keep_names()
    try:
      folder = files.folder(workdir.value or f'runs/{name}-s{config.seed}')
    except ValueError as error:
      raise ValueError(f'--workdir={error}') from None
    with contextlib.ExitStack() as stack:
      if several.value:
        facts = {**distributed.facts(config.to_dict()), '--workdir': str(folder)}
        try:
          stack.enter_context(distributed.joined(facts, timeout.value))
        except TimeoutError as error:
          print(f'error: {error}', file=sys.stderr)
          raise SystemExit(interrupt.EXIT_CODE) from None  # A retry may find all processes.
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
        raise SystemExit(f'error: {error}') from None  # Another run uses the folder.
      except Exception as error:  # noqa: BLE001 of every kind the message first
        explain(error, folder / failures.TRACEBACK)
      except SystemExit as stopped:
        # Everything is written. An interrupted compilation may leave threads that crash Python's
        # regular exit.
        if stopped.code == interrupt.EXIT_CODE and jax.process_count() == 1:
          sys.stdout.flush()
          os._exit(stopped.code)
        raise

  config_flags.run_with_flags(run, __name__, argv)
