"""New databases for tests of the labeling server: SQLite files, and those of a PostgreSQL server
that is started for the test."""

import contextlib
import glob
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest


def programs() -> str | None:
  """Returns the folder of PostgreSQL's programs, or None where it is not installed."""
  found = shutil.which('initdb')
  folders = sorted(glob.glob('/usr/lib/postgresql/*/bin'))
  return str(pathlib.Path(found).parent) if found else folders[-1] if folders else None


@contextlib.contextmanager
def postgres(folder: pathlib.Path, sync: bool = True):
  """Runs a PostgreSQL server on a unix socket and yields the address of its database. sync: whether
  it waits for the disk."""
  data = folder / 'data'
  folder.mkdir(parents=True, exist_ok=True)
  owner = 'postgres' if os.getuid() == 0 else None  # It refuses to run as root.
  if owner:
    shutil.chown(folder, owner)

  def call(*command: str) -> None:
    # Its messages go to a file: the server inherits them, and a pipe would stay open.
    with open(folder / 'programs.log', 'ab') as log:
      subprocess.run(
        [f'{programs()}/{command[0]}', *command[1:]],
        check=True,
        stdout=log,
        stderr=log,
        cwd='/',
        user=owner,
        group=owner,
      )

  call('initdb', '-D', str(data), '-U', 'postgres', '-A', 'trust', '-E', 'UTF8', '--locale=C', '-N')
  options = f"-k {folder} -c listen_addresses='' -c max_connections=100"
  options += '' if sync else ' -c fsync=off'
  call('pg_ctl', '-D', str(data), '-l', str(folder / 'log'), '-o', options, '-w', 'start')
  try:
    yield f'postgresql://postgres@/postgres?host={folder}'
  finally:
    call('pg_ctl', '-D', str(data), '-m', 'immediate', '-w', 'stop')


@contextlib.contextmanager
def database(kind: str, sync: bool = True):
  """Yields the address of a new database, 'sqlite' or 'postgres', in a folder of its own."""
  # A short path that everybody may pass: that of a unix socket has at most 107 characters.
  folder = pathlib.Path(tempfile.mkdtemp(prefix='label-'))
  folder.chmod(0o755)
  try:
    if kind == 'sqlite':
      yield str(folder / 'labels.db')
    else:
      with postgres(folder / 'pg', sync) as address:
        yield address
  finally:
    shutil.rmtree(folder)


def cluster() -> Iterator[str]:
  """A fixture: the address of a PostgreSQL server, or a skip that says what is missing."""
  if programs() is None:
    pytest.skip('PostgreSQL is not installed: there is no initdb.')
  pytest.importorskip('psycopg', reason='psycopg is not installed.')
  with database('postgres', sync=False) as address:
    yield address


def new(request: Any, folder: pathlib.Path) -> str:
  """A fixture: the address of a new, empty database of the kind request.param, 'sqlite' or
  'postgres'. The latter is one of the server of the fixture `cluster`."""
  if request.param == 'sqlite':
    return str(folder / 'labels.db')
  found = request.getfixturevalue('cluster')
  import psycopg

  name = 'test_' + re.sub(r'\W', '_', request.node.name.lower())[:50]
  with psycopg.connect(found, autocommit=True) as connection:
    connection.execute(f'CREATE DATABASE {name}')  # type: ignore[arg-type]
  return found.replace('/postgres?', f'/{name}?')
