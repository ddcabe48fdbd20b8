"""The wheel: what is in it, and that it works from another folder, without the repository."""

import configparser
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from alignjax.commands import configs

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Built from a copy of the files that the Dockerfile copies, so that the image holds the same. A
  build leaves files in the tree, which a later one would pick up."""
  folder = tmp_path_factory.mktemp('wheel')
  (folder / 'tree').mkdir()
  lines = (ROOT / 'Dockerfile').read_text().splitlines()
  copied = [name for line in lines if line.startswith('COPY ') for name in line.split()[1:-1]]
  assert 'alignjax' in copied
  for path in (ROOT / name for name in copied):
    if path.is_dir():
      ignore = shutil.ignore_patterns('__pycache__')
      shutil.copytree(path, folder / 'tree' / path.name, ignore=ignore)
    else:
      shutil.copy(path, folder / 'tree')
  flags = ('--no-deps', '--no-build-isolation', '--no-index', '--disable-pip-version-check')
  pip('wheel', '-q', *flags, '-w', str(folder), str(folder / 'tree'))
  (made,) = folder.glob('*.whl')
  return made


def pip(*arguments):
  done = subprocess.run(
    [sys.executable, '-m', 'pip', *arguments], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr


def run(words, folder, **environment):
  """(status, output) of a command in a folder where the repository is not to be found."""
  env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'XLA_FLAGS')} | environment
  done = subprocess.run(
    words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  return done.returncode, done.stdout


def test_the_wheel_has_every_file_of_the_package_and_the_command(wheel):
  with zipfile.ZipFile(wheel) as file:
    names = set(file.namelist())
    (entry_points,) = (name for name in names if name.endswith('.dist-info/entry_points.txt'))
    found = configparser.ConfigParser()
    found.read_string(file.read(entry_points).decode())
  files = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / 'alignjax').rglob('*')
    if path.is_file() and '__pycache__' not in path.parts
  }
  assert {'alignjax/configs/ppo_ptx.py', 'alignjax/evals/public/task_files/sst.yaml'} <= files
  assert {name for name in names if '.dist-info/' not in name} == files
  assert found['console_scripts']['alignjax'] == 'alignjax.commands.main:main'


def test_the_unpacked_wheel_works_from_another_folder(wheel, tmp_path):
  zipfile.ZipFile(wheel).extractall(tmp_path / 'unpacked')
  (tmp_path / 'elsewhere').mkdir()
  code = (
    'import alignjax; print(alignjax.__file__); from alignjax.commands.main import main; main()'
  )

  def command(*arguments):
    code_and_arguments = [sys.executable, '-c', code, *arguments]
    status, output = run(
      code_and_arguments, tmp_path / 'elsewhere', PYTHONPATH=str(tmp_path / 'unpacked')
    )
    first, _, rest = output.partition('\n')
    assert first == str(tmp_path / 'unpacked/alignjax/__init__.py')
    return status, rest

  status, listed = command('configs')
  assert status == 0 and [line.split()[0] for line in listed.splitlines()] == [*configs.included()]
  status, shown = command('run', '--help')
  assert 'Runs an experiment' in shown and '--config: NAME' in shown
  status, shown = command('run', '--config=ppo_ptx:tinyy')
  assert status == 1 and "ppo_ptx.py:tinyy: config argument 'tinyy' is none of" in shown


@pytest.mark.long
def test_the_installed_wheel_runs_the_main_job(wheel, tmp_path):
  """In a clean virtual environment, which finds the dependencies in this one's folder."""
  venv.create(tmp_path / 'venv', with_pip=False)
  python = tmp_path / 'venv/bin/python'
  pip('--python', str(python), 'install', '-q', '--no-deps', '--no-index', str(wheel))
  (installed,) = (tmp_path / 'venv').glob('lib/python*/site-packages')
  # A folder that a .pth file names is searched last, and its own .pth files are not read: an
  # editable install of alignjax there has no effect.
  (installed / 'dependencies.pth').write_text(sysconfig.get_path('purelib'))
  (tmp_path / 'elsewhere').mkdir()
  where = [str(python), '-c', 'import alignjax; print(alignjax.__file__)']
  assert run(where, tmp_path / 'elsewhere') == (0, f'{installed}/alignjax/__init__.py\n')
  words = [str(tmp_path / 'venv/bin/alignjax'), 'run', '--config=ppo_ptx:tiny', '--workdir=work']
  status, output = run(words, tmp_path / 'elsewhere')
  assert status == 0, output
  assert {'report.md', 'report.json', 'ppo_ptx'} <= {
    path.name for path in (tmp_path / 'elsewhere/work').iterdir()
  }
  report = json.loads((tmp_path / 'elsewhere/work/report.json').read_text())
  assert report['made_by']['command'] == 'alignjax run --config=ppo_ptx:tiny --workdir=work'
