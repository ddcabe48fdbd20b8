"""Folders on a disk and in a bucket are used alike; a run in a bucket, killed on the way, ends with
the bits of one on the disk."""

import errno
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from alignjax.commands import command
from alignjax.runtime import files
from tests import fake_gcs

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_files_on_a_disk_are_whole(tmp_path, monkeypatch):
  path = tmp_path / 'a.json'
  files.write(path, 'first')
  files.append(path, ' and second')
  assert path.read_text() == 'first and second'
  with monkeypatch.context() as m, pytest.raises(OSError):  # a full disk: what was there stays
    m.setattr(files.os, 'replace', lambda *_: (_ for _ in ()).throw(OSError))
    files.write(path, 'third')
  assert path.read_text() == 'first and second'
  files.move(tmp_path, tmp_path.with_name('b'))
  files.remove(tmp_path)
  assert (tmp_path.with_name('b') / 'a.json').exists() and not tmp_path.exists()
  files.remove(tmp_path.with_name('b'))
  assert not tmp_path.with_name('b').exists()


def test_an_error_of_a_full_disk_names_the_file(tmp_path, monkeypatch):
  """The system's error has no name where the disk is full, and a part of the file stayed."""
  if os.path.exists('/dev/full'):
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
      files.append(pathlib.Path('/dev/full'), 'a line')

  def full(path, contents):
    path.open('wb').close()
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(pathlib.Path, 'write_bytes', full)
  with pytest.raises(OSError) as caught:
    files.write(tmp_path / 'out.jsonl', 'contents')
  assert command.in_words(caught.value) == f'{tmp_path}/out.jsonl: No space left on device.'
  assert not list(tmp_path.iterdir())


def test_what_is_no_folder_is_refused(monkeypatch):
  with pytest.raises(ValueError, match='s3://bucket/x: a folder is a local one or gs://'):
    files.folder('s3://bucket/x')
  monkeypatch.setattr(files.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(
    ValueError, match=r"gs://bucket/x: buckets need the package gcsfs: pip install -e '\.\[gcs\]'"
  ):
    files.folder('gs://bucket/x')
  assert (
    files.folder('runs/x') == pathlib.Path('runs/x')
    and files.absolute('runs/x') == pathlib.Path.cwd() / 'runs/x'
  )


@pytest.fixture(scope='module')
def bucket():
  if importlib.util.find_spec('gcsfs') is None:
    pytest.skip("no gcsfs here: pip install -e '.[gcs]'")
  with fake_gcs.Bucket() as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def python(bucket, *command: str, **more) -> subprocess.Popen:
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | fake_gcs.environment(
    bucket.port
  )
  environment['PYTHONPATH'] = str(ROOT)
  return subprocess.Popen(
    [sys.executable, *command],
    env=environment,
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    **more,
  )


FILES = """
from alignjax.runtime import files
from alignjax.data import sources
from alignjax.runtime import journal
a = files.folder('gs://bucket/files/a')
files.write(a / 'x', 'first')
files.append(a / 'x', ' and second')
files.append(a / 'y', 'new')
assert (a / 'x').read_text() == 'first and second' and (a / 'y').read_text() == 'new'
files.move(a, a.with_name('b'))
files.remove(a)
assert not (a / 'x').exists() and sorted(p.name for p in a.with_name('b').iterdir()) == ['x', 'y']
files.remove(a.with_name('b'))
assert not a.with_name('b').exists()
journal.append(a / 'k.jsonl', [{'i': 1}])
journal.append(a / 'k.jsonl', [{'i': 2}])
assert journal.read(a / 'k.jsonl') == [{'i': 1}, {'i': 2}]
for name in 'ab':
  files.write(a / f'{name}.txt', f'text {name}')
files.write(a / 'r.jsonl', '{"text": "one"}\\n{"text": "two"}\\n')
texts = lambda source: [r['text'] for r in sources.read(source, 'pretrain')]
assert texts('jsonl:gs://bucket/files/a/r.jsonl') == ['one', 'two']
assert texts('text:gs://bucket/files/a/*.txt') == ['text a', 'text b']
assert texts('text:gs://bucket/files/a/b.txt') == ['text b']
"""


def test_files_in_a_bucket(bucket):
  process = python(bucket, '-c', FILES)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0, out


RUN = (
  'experiments/run.py',
  '--config=configs/pretrain.py:tiny',
  '--config.stages.pretrain.documents=200',
  '--config.stages.pretrain.save_every=2',
  '--config.stages.pretrain.log_every=1',
)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_on_the_disk(bucket, tmp_path):
  """Killed -9 when its first checkpoint is whole, and gone on with, compiled programs from the
  bucket too; its checksums are those of the run on the disk."""
  kept = (
    '--jax_compilation_cache_dir=gs://bucket/compiled',
    '--jax_persistent_cache_min_compile_time_secs=0.2',
  )
  disk = python(bucket, *RUN, f'--workdir={tmp_path}/run')
  killed = python(bucket, *RUN, *kept, '--workdir=gs://bucket/run')
  # nothing is answered from then on
  bucket.hold = 'run/pretrain/checkpoints/steps/2/commit_success.txt'
  end = time.monotonic() + 300
  while bucket.hold not in bucket.objects:
    if time.monotonic() > end or killed.poll() is not None:
      killed.kill()
      pytest.fail(killed.communicate()[0])
    time.sleep(0.02)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  assert 'run/pretrain/final/info.json' not in bucket.objects
  bucket.hold = None
  assert [name for name in bucket.objects if name.startswith('compiled/jit_')]
  again = python(bucket, *RUN, *kept, '--workdir=gs://bucket/run')
  out, _ = again.communicate(timeout=300)
  assert (
    again.returncode == 0
    and 'pretrain: goes on from step' in out
    and 'persistent compilation cache' not in out
  ), out
  assert disk.communicate(timeout=300)[0] and disk.returncode == 0
  local, there = tmp_path / 'run/pretrain', lambda name: bucket.objects[f'run/pretrain/{name}'][0]
  assert json.loads(there('final/sums.json')) == json.loads((local / 'final/sums.json').read_text())
  rows = [
    [
      {k: v for k, v in json.loads(line).items() if not k.startswith(('time/', 'device/'))}
      for line in lines.splitlines()
    ]
    for lines in (there('metrics.jsonl'), (local / 'metrics.jsonl').read_text())
  ]
  assert rows[0] == rows[1] and [r['step'] for r in rows[0]] == list(range(1, len(rows[0]) + 1))
  names = {p.relative_to(local).as_posix() for p in local.rglob('*') if p.is_file()}
  for name in ('checkpoints/config.json', 'final/info.json', 'metrics.jsonl'):
    assert name in names and f'run/pretrain/{name}' in bucket.objects
  assert any('/events.out.tfevents' in name for name in bucket.objects)


def test_a_bucket_that_cannot_be_written_ends_the_run_with_what_to_do(bucket):
  process = python(bucket, *RUN, '--workdir=gs://other/run')
  out, _ = process.communicate(timeout=300)
  assert (
    process.returncode == 1
    and 'error: cannot write to gs://other/run' in out
    and 'use another --workdir' in out
  )


LOCK = """
import sys
from alignjax.runtime import files, lock
from alignjax.setup import inputs
lock.HEARTBEAT = 0.3  # the lease stays long: a holder on a busy machine may be late with it
folder = files.folder('gs://bucket/locked')
try:
  with lock.held(folder):
    print('held', flush=True)
    if sys.argv[1] == 'wait':
      sys.stdin.read()
    files.write(folder / 'data.jsonl', '{}')
    known = {}
    first = inputs.fingerprint('data', 'jsonl:gs://bucket/locked/data.jsonl', folder, known)
    files.write(folder / 'data.jsonl', '[1]')
    assert inputs.fingerprint('data', 'jsonl:gs://bucket/locked/data.jsonl', folder, known) != first
  assert not (folder / '.lock').exists()
except lock.Busy as error:
  print('busy:', error)
"""


def test_a_workdir_in_a_bucket_is_held_by_one_run(bucket):
  first = python(bucket, '-c', LOCK, 'wait', stdin=subprocess.PIPE)
  assert first.stdout.readline() == 'held\n'
  out, _ = python(bucket, '-c', LOCK, 'go').communicate(timeout=300)
  assert f'busy: gs://bucket/locked is in use: process {first.pid} on' in out, out
  out, _ = first.communicate('', timeout=300)
  assert first.returncode == 0, out
  third = python(bucket, '-c', LOCK, 'go')
  out, _ = third.communicate(timeout=300)
  assert third.returncode == 0 and out == 'held\n', out
