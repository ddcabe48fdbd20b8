"""What every command does with its output and its errors: ASCII terminals, readers that go, folders
that cannot be written, ~."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest

import alignjax
from alignjax.commands import command, configs, main
from alignjax.runtime import files

ROOT = pathlib.Path(__file__).resolve().parent.parent

PROGRAM = """
import pathlib, sys
from alignjax.commands import command
def main(argv):
  for i in range(int(argv[0])):
    print('\\u2026 \\U0001f600 \\udc80', 'x' * 100, flush=i % 2 == 0)
  pathlib.Path(argv[1]).write_text('\\u2026')
  print('to a person', file=sys.stderr)
command.start(main, sys.argv[1:], ends_with_reader='--ends' in sys.argv)
"""


def program(*arguments, code=PROGRAM, **environment):
  env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'LC_', 'LANG'))}
  return subprocess.Popen(
    [sys.executable, '-c', code, *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=env | {'PYTHONPATH': str(ROOT)} | environment,
  )


@pytest.mark.parametrize(
  'environment',
  [
    dict(PYTHONIOENCODING='ascii'),
    dict(LC_ALL='C'),
    dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'),
    dict(LC_ALL='POSIX'),
    dict(LC_ALL='C.UTF-8'),
    dict(PYTHONIOENCODING='latin-1'),
  ],
  ids=str,
)
def test_text_that_the_output_cannot_hold_is_escaped(tmp_path, environment):
  """And files are UTF-8, whatever the locale says."""
  process = program(1, tmp_path / 'out', **environment)
  out, err = process.communicate()
  assert process.returncode == 0 and err == b'to a person\n'
  assert out.startswith(
    b'\\u2026 \\U0001f600 \\udc80'
    if 'UTF' not in environment.get('LC_ALL', '') and 'PYTHONIOENCODING' in environment
    else (b'\\u2026', '…'.encode())
  ), out
  assert (tmp_path / 'out').read_bytes() == '…'.encode()


@pytest.mark.parametrize('which', ['stdout', 'both'])
def test_a_reader_that_goes_does_not_end_the_work(tmp_path, which):
  process = program(5000, tmp_path / 'out')
  process.stdout.readline()
  process.stdout.close()
  said = process.stderr.read() if which == 'stdout' else b'to a person\n'
  process.stderr.close()
  assert process.wait(60) == 0 and said == b'to a person\n' and (tmp_path / 'out').exists()


@pytest.mark.parametrize('closed', ['1>&-', '2>&-', '0<&- 1>&- 2>&-'])
@pytest.mark.parametrize('locale', ['C', 'C.UTF-8'])
def test_a_closed_descriptor_does_not_end_the_work_nor_get_a_files_contents(
  tmp_path, closed, locale
):
  code = PROGRAM.replace(
    'def main(argv):',
    'def main(argv):\n  made = open(argv[1], "w")\n  assert sys.stdin.read() == ""',
  )
  words = [sys.executable, '-c', code, '1', str(tmp_path / 'out')]
  env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'LC_', 'LANG'))}
  done = subprocess.run(
    ['bash', '-c', f'exec "$@" {closed}', 'bash', *words],
    capture_output=True,
    stdin=subprocess.DEVNULL,
    env=env
    | {'PYTHONPATH': str(ROOT), 'LC_ALL': locale, 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'out').read_bytes() == '…'.encode()
  assert done.stderr in (b'', b'to a person\n')


def test_where_output_is_all_that_is_wanted_the_command_ends_with_its_reader(tmp_path):
  process = program(10**9, tmp_path / 'out', '--ends')
  process.stdout.readline()
  process.stdout.close()
  assert process.wait(60) == 0 and process.stderr.read() == b'' and not (tmp_path / 'out').exists()
  process.stderr.close()


@pytest.mark.parametrize(
  'raised,said',
  [
    ("open('/nowhere/x')", 'error: /nowhere/x: No such file or directory.'),
    ("int('x')", 'error: invalid literal'),
    ("import os; os.mkdir('/proc/x')", 'error: /proc/x: No such file'),
    ("raise OSError('its own words')", 'error: its own words'),
    ("'\\ud800'.encode()", "error: 'utf-8' codec"),
  ],
)
def test_an_error_is_one_line(raised, said):
  code = (
    f'from alignjax.commands import command\ndef main(argv):\n  {raised}\ncommand.start(main, [])'
  )
  process = program(code=code)
  out, err = process.communicate()
  assert (
    process.returncode == 1
    and err.decode().startswith(said)
    and err.count(b'\n') == 1
    and out == b''
  )


SCRIPT = """
import this_clone  # noqa: F401

from alignjax.commands import main

if __name__ == '__main__':
  main.main('{name}')
"""


def test_every_subcommand_is_a_module_and_a_script():
  folder = ROOT / 'alignjax/commands'
  shared = {'__init__', 'main', 'command', 'config_flags', 'overrides', 'estimate_page'}
  assert {p.stem for p in folder.glob('*.py')} == {*main.SUBCOMMANDS, *shared}
  scripts = {p.stem: p.read_text() for p in (ROOT / 'experiments').glob('*.py')}
  assert scripts.keys() == {*main.SUBCOMMANDS, 'this_clone', 'measure_rounds'} - {'configs'}
  for name in scripts.keys() - {'this_clone', 'measure_rounds'}:
    assert scripts[name].endswith(SCRIPT.format(name=name)), name
    assert f'experiments/{name}.py ' in scripts[name].removesuffix(SCRIPT.format(name=name)), name


@pytest.mark.parametrize(
  'arguments, name, calls',
  [
    (['run', '--config=sft'], None, ['large pages', ('run', ['--config=sft'])]),
    (['--config=sft'], 'run', ['large pages', ('run', ['--config=sft'])]),
    (['label', 'status'], None, [('label', ['status'])]),
    (['run'], 'export', [('export', ['run'])]),
    ([], None, [('--help', [])]),
  ],
)
def test_subcommands_that_compute_ask_for_large_pages(arguments, name, calls, monkeypatch):
  made = []
  monkeypatch.setattr(sys, 'argv', ['alignjax', *arguments])
  monkeypatch.setattr(main.memory, 'restart_with_large_pages', lambda: made.append('large pages'))
  monkeypatch.setattr(main, 'start', lambda *given: made.append(given))
  main.main(name)
  assert made == calls


CONSOLE = 'from alignjax.commands.main import main; main()'


def console(*arguments, code=CONSOLE):
  process = program(*arguments, code=code)
  out, err = process.communicate()
  return process.returncode, out.decode(), err.decode()


def test_the_console_command_lists_its_subcommands_without_importing_them():
  quick = f"""
import sys
try:
  {CONSOLE.replace('; ', chr(10) + '  ')}
finally:
  assert not {{'jax', 'numpy', 'absl', 'ml_collections'}} & sys.modules.keys()
"""
  for flags in ((), ('--help',), ('-h',)):
    code, out, err = console(*flags, code=quick)
    assert code == 0 and not err
    lines = [line for line in out.splitlines() if line.startswith('  ')]
    assert [line.split()[0] for line in lines] == list(main.SUBCOMMANDS)
    for line in lines:
      name, words = line.split(maxsplit=1)
      module = importlib.import_module(f'alignjax.commands.{name}')
      assert module.__doc__.splitlines()[0] == words and words.endswith('.') and len(line) <= 100
  code, out, err = console('configs', code=quick)
  assert code == 0 and out == command.listing(configs.included()) + '\n' and not err
  assert console('--version') == (0, f'{alignjax.__version__}\n', '')


def test_only_commands_without_another_result_end_with_their_reader(monkeypatch):
  asked = {}
  monkeypatch.setattr(
    command, 'start', lambda call, argv, ends_with_reader: asked.update({argv[0]: ends_with_reader})
  )
  for name in main.SUBCOMMANDS:
    main.start(name, [name])
  assert {name for name, ends in asked.items() if ends} == {'configs', 'generate', 'summarize'}


def test_an_unknown_subcommand_is_an_error_with_the_nearest_name():
  code, out, err = console('evalaute', '--tasks=help')
  assert code == 1 and not out and err.count('\n') == 1
  assert err.startswith("error: alignjax has no subcommand 'evalaute'. Did you mean 'evaluate'?")
  assert 'Did you mean' not in console('xyzzy')[2]


@pytest.mark.parametrize('name', main.SUBCOMMANDS)
def test_help_of_a_subcommand_is_its_docstring_by_both_ways(name):
  """absl's commands show their own flags, too, though Python runs another file."""
  module = importlib.import_module(f'alignjax.commands.{name}')
  ways = []
  if name in ('configs', 'run', 'export'):
    ways.append((['-c', CONSOLE, name], f'-c {name}'))
  if name != 'configs':
    ways.append(([str(ROOT / f'experiments/{name}.py')], f'{name}.py'))
  for words, called in ways:
    done = subprocess.run(
      [sys.executable, *words, '--help'],
      capture_output=True,
      text=True,
      check=False,
      env=os.environ | {'PYTHONPATH': str(ROOT), 'COLUMNS': '100'},
    )
    assert module.__doc__.strip() in done.stdout, done.stdout + done.stderr
    if 'config_flags' in vars(module):
      assert done.returncode == 1 and '--config: NAME[:ARG]' in done.stdout
    else:
      assert done.returncode == 0 and done.stdout.startswith(f'usage: {called}')


def test_a_script_runs_the_alignjax_of_its_clone_from_anywhere(tmp_path):
  """Though another one is installed, or named by PYTHONPATH; and no script hides a library of its
  name."""
  (tmp_path / 'other/alignjax').mkdir(parents=True)
  (tmp_path / 'other/alignjax/__init__.py').write_text('raise ImportError("the other one")')
  (tmp_path / 'other/evaluate.py').write_text('library = True')
  code = (
    f'import sys; sys.path[0] = {str(ROOT / "experiments")!r}; '
    'import this_clone, alignjax, evaluate; assert evaluate.library; print(alignjax.__file__)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(tmp_path / 'other')},
  )
  assert done.stdout == f'{ROOT}/alignjax/__init__.py\n', done.stderr
  script = [sys.executable, str(ROOT / 'experiments/prepare.py'), '--help']
  env = os.environ | {'PYTHONPATH': str(tmp_path / 'other')}
  assert (
    subprocess.run(script, capture_output=True, check=False, cwd=tmp_path, env=env).returncode == 0
  )


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
  'name,arguments',
  [
    ('export', '--model={0}/none --out={0}/file/x'),
    ('evaluate', '--tasks=truthfulqa_mc --models=a=hf:x --out={0}/file/x'),
    ('prepare', '--source=jsonl:x --kind=prompts --out={0}/file/x'),
    ('best_of_n', '--policy=x --reward_model=y --out={0}/file/x'),
    ('preference', '--policies=a=x,b=y --prompts=jsonl:x --judge=rm:x --out={0}/file/x'),
    ('estimate', '--config=configs/sft.py:tiny --out={0}/file/x'),
    ('heldout_labelers', '--config=configs/ukp_rm.py --out={0}/file/x'),
    ('run', '--config=configs/sft.py:tiny --workdir={0}/file/x'),
  ],
)
def test_a_folder_that_cannot_be_written_is_one_line_before_any_work(tmp_path, name, arguments):
  (tmp_path / 'file').touch()
  call = [sys.executable, str(ROOT / f'experiments/{name}.py'), *arguments.format(tmp_path).split()]
  done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=tmp_path)
  line = next(x for x in done.stderr.splitlines() if x.startswith('error: '))
  assert done.returncode == 1 and f'cannot write to {tmp_path}/file' in line
  assert 'Not a directory' in line or 'File exists' in line


def test_home_folders_are_found(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert files.folder('~/runs') == tmp_path / 'runs' and files.absolute('~') == tmp_path
  assert files.folder('a~b/~') == pathlib.Path('a~b/~')
  with pytest.raises(ValueError, match='~nobodyhasthisname/x: no user'):
    files.folder('~nobodyhasthisname/x')
  with pytest.raises(ValueError, match='zero byte'):
    files.folder('a\0b')
  assert command.in_words(KeyError('x')) == "KeyError: 'x'"


@pytest.mark.parametrize(
  'before,flags,expected',
  [
    ('', '', 3),
    ('', '--xla_force_host_platform_device_count=4', 4),  # XLA's own flag goes first
    ("jax.config.update('jax_num_cpu_devices', 5)", '', 5),  # as --jax_num_cpu_devices=5 does
    ('jax.devices()', '', 1),  # too late: jax has its devices, and the run uses them
  ],
)
def test_a_config_divides_the_cpu_into_devices(before, flags, expected):
  code = f"""
import jax
{before}
from alignjax.commands import run
run.divide_cpu(3)
print(jax.device_count())
run.divide_cpu(None)
"""
  env = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True, check=False
  )
  assert (done.stdout.strip(), done.returncode) == (str(expected), 0), done.stderr


@pytest.mark.parametrize(
  'seconds,flags,waits', [(1, '', False), (1, f'--{command.PATIENCE}=60', True), (60, '', True)]
)
def test_a_device_waits_for_another(seconds, flags, waits):
  """A collective of two CPU devices of which one is 4 s late: what a command sets is what XLA goes
  by, and a user's own setting stays."""
  code = f"""
import time
import jax
import numpy as np
from jax.sharding import PartitionSpec
from alignjax.commands import command, run

command.PATIENT_SECONDS = {seconds}
command.let_devices_wait()
run.divide_cpu(2)
late = lambda x: (time.sleep(4 * float(x[0])), x)[1]

def add(x):
  x = jax.pure_callback(late, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
  return jax.lax.psum(x, 'data')

mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
specs = dict(in_specs=PartitionSpec('data'), out_specs=PartitionSpec(), check_vma=False)
print(jax.jit(jax.shard_map(add, mesh=mesh, **specs))(np.arange(2, dtype=np.float32)))
"""
  warned = '--xla_cpu_collective_call_warn_stuck_timeout_seconds=1'  # The limit counts from there.
  env = os.environ | {'XLA_FLAGS': f'{warned} {flags}', 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True, check=False
  )
  assert (done.returncode == 0, '[1.]' in done.stdout) == (waits, waits), done.stderr[-2000:]
