"""A workdir belongs to one run at a time and knows what its stages were made from: another file,
checkpoint, function or ancestor is an error before any work, or what --on_changed_input says. The
loop is the real one, on a stage of one parameter vector."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from alignjax import report, train
from alignjax.configs import base
from alignjax.runtime import checkpoint, fingerprints, lock, saved_config
from alignjax.runtime.interrupt import Interrupt
from alignjax.setup import inputs
from alignjax.stages.stage import Stage
from tests.test_failures import Row, bare_config, first_state, one_step

ROOT = pathlib.Path(__file__).resolve().parent.parent

# ---- the lock

HOLD = """
import pathlib, sys, time
from alignjax.runtime import lock
if sys.argv[2] == 'lease':
  lock.HEARTBEAT = 0.3
  lock._flock = lambda path: None
with lock.held(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  sys.stdin.read()
"""


@contextlib.contextmanager
def holder(folder, how):
  with subprocess.Popen(
    [sys.executable, '-c', HOLD, str(folder), how],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      assert process.stdout.readline() == 'held\n'
      yield process
    finally:
      process.kill()


@pytest.fixture
def lease(monkeypatch):
  monkeypatch.setattr(lock, 'HEARTBEAT', 0.3)
  monkeypatch.setattr(lock, '_flock', lambda path: None)


@pytest.fixture
def waits(monkeypatch):
  """What a lock slept, call by call."""
  slept = []
  clock = {name: getattr(time, name) for name in ('time', 'monotonic', 'strftime')}
  sleep = lambda seconds: (slept.append(seconds), time.sleep(seconds))
  monkeypatch.setattr(lock, 'time', types.SimpleNamespace(**clock, sleep=sleep))
  return slept


def held(folder):
  with lock.held(folder):
    return True


def test_a_second_run_is_refused_at_once_and_a_killed_one_leaves_no_lock(tmp_path, waits):
  with holder(tmp_path, 'flock') as process:
    with pytest.raises(
      lock.Busy, match=rf'is in use: process {process.pid} on .* since .*another --workdir'
    ):
      held(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / '.lock').exists() and held(tmp_path), (
      'the kernel took the lock with the process'
    )
  assert list(tmp_path.iterdir()) == [] and waits == []


def test_a_lease_is_refused_while_it_is_renewed_and_ends_with_its_holder(
  tmp_path, lease, waits, monkeypatch
):
  with holder(tmp_path, 'lease') as process:
    with pytest.raises(lock.Busy, match=f'process {process.pid}'):
      held(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    waits.clear()
    assert held(tmp_path) and waits == [lock.HEARTBEAT / 10], (
      'a process of this machine that is no more is known to be dead'
    )
  left = json.dumps(dict(process=1, host='elsewhere', boot='x', since='', command='')).encode()
  (tmp_path / '.lock').write_bytes(left)
  monkeypatch.setattr(lock, 'LEASE', 2.0)
  began = time.monotonic()
  assert held(tmp_path) and time.monotonic() - began > 2, (
    'that of another machine has its time to be renewed'
  )


def test_two_that_want_a_lease_at_once_do_not_both_get_it(tmp_path, lease, monkeypatch):
  write, other = (
    pathlib.Path.write_bytes,
    json.dumps(dict(process=2, host='other', since='', command='')).encode(),
  )
  # who wrote last has it
  monkeypatch.setattr(pathlib.Path, 'write_bytes', lambda path, contents: write(path, other))
  with pytest.raises(lock.Busy, match='process 2 on other'):
    held(tmp_path)


# ---- what a stage was made from


def rows_of(path):
  return [float(line) for line in path.read_text().split()]


def config(**changes):
  stage = dict(build='x:y', log_every=1, save_every=2, init='random')
  return bare_config(dict(a=stage, b=stage | dict(init='stage:a')), changes)


def run(workdir, name, choice='fail', stop_at=None, outdated=None, **changes):
  """Stage `name` of 4 steps on the numbers of a file, from random weights or the last stage's."""
  setup = types.SimpleNamespace(config=config(**changes), workdir=workdir, read={})
  data = pathlib.Path('data.jsonl')

  def builder(setup, name):
    init = setup.config.stages[name].init
    setup.read.update(
      inputs.of_data('data.numbers', f'jsonl:{data}', None) | inputs.of_weights(init)
    )
    state = first_state()
    if init != 'random':
      shape = {'w': jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jnp.ones(3).sharding)}
      state = state.replace(params={'policy': checkpoint.load_params(workdir / 'a/final', shape)})
    numbers = rows_of(data)

    def batch(i):
      if i == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
      return Row(jnp.array([1.0, i, numbers[i % len(numbers)]], jnp.float32))

    return Stage(state, one_step, batch, 4, lambda s: (s.params['policy'], {'head': 'lm'}))

  with Interrupt(25.0) as interrupt:
    train.run_stage(setup, name, builder, interrupt, None, choice, outdated)


def weights(workdir, name):
  return checkpoint.weights(workdir / name / 'final')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp('made')
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.setattr(fingerprints, 'SETTLED_SECONDS', -1)
    (folder / 'data.jsonl').write_text('1\n-1\n')
    for name in 'ab':
      run(folder / 'w', name)
  return folder


@pytest.fixture
def workdir(made, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(fingerprints, 'SETTLED_SECONDS', -1)
  shutil.copytree(made, tmp_path, dirs_exist_ok=True)
  return tmp_path / 'w'


def change(workdir, text='-1\n1\n1\n'):
  (workdir.parent / 'data.jsonl').write_text(text)


def test_what_is_the_same_is_reused(workdir, capsys):
  for name in 'ab':
    run(workdir, name)
  os.utime(workdir.parent / 'data.jsonl', (1, 1))
  run(workdir, 'a')
  assert capsys.readouterr().out.count('finished before, reused') == 3
  info = checkpoint.load_info(workdir / 'b/final')
  assert (
    info['made']['inputs']['stage:a']['fingerprint']
    == checkpoint.load_info(workdir / 'a/final')['made']['weights']
  )


def test_a_changed_file_is_an_error_that_says_what_can_be_done(workdir):
  change(workdir)
  with pytest.raises(
    inputs.ChangedInput,
    match=r'/a was made from other inputs.*\n  data.numbers \(jsonl:data.jsonl\): \w+ then, '
    r'\w+ now\n.*--on_changed_input=restart.*--on_changed_input=keep',
  ):
    run(workdir, 'a')


def test_keep_takes_the_new_contents_for_the_same(workdir, capsys):
  before = weights(workdir, 'a')
  change(workdir)
  run(workdir, 'a', 'keep')
  assert (
    weights(workdir, 'a') == before
    and 'kept, although its inputs are others' in capsys.readouterr().out
  )
  run(workdir, 'a')
  run(workdir, 'b', 'keep')
  change(workdir, '5\n')
  with pytest.raises(inputs.ChangedInput):
    run(workdir, 'a')


def test_restart_does_it_again_and_what_was_made_from_it_too(workdir, tmp_path):
  change(workdir)
  run(workdir, 'a', 'restart')
  with pytest.raises(
    inputs.ChangedInput, match=r'stage:a: \w+ then.*\n.*Weights of another stage cannot be kept'
  ):
    run(workdir, 'b', 'keep')
  run(workdir, 'b', 'restart')
  for name in 'ab':
    run(tmp_path / 'new', name)
    assert weights(tmp_path / 'new', name) == weights(workdir, name)


def test_a_stage_that_was_trained_again_is_not_mixed_with_what_was_made_from_the_old_one(workdir):
  """As the program's own message advises: the folder is deleted, and its stage trained again, by
  other data or another config."""
  shutil.rmtree(workdir / 'a')
  run(workdir, 'a')
  run(workdir, 'b')  # the same bits: reused
  shutil.rmtree(workdir / 'a')
  # another config whose weights are the same
  run(workdir, 'a', seed=1, **{'stages.a.save_every': 1})
  run(workdir, 'b')
  shutil.rmtree(workdir / 'a')
  change(workdir)
  run(workdir, 'a')
  with pytest.raises(inputs.ChangedInput, match='stage:a'):
    run(workdir, 'b')


def test_a_report_does_not_mix_a_stage_that_was_trained_again_with_what_was_made_from_the_old_one(
  workdir, capsys
):
  """Where a run does the changed stage alone: `b` was made from the old `a`."""
  setup = types.SimpleNamespace(config=config(), workdir=workdir)
  assert train.belong_together(setup, ['b'], ['a'])
  change(workdir)
  run(workdir, 'a', 'restart')
  capsys.readouterr()
  assert not train.belong_together(setup, ['a', 'b'], ['a'])
  assert re.search(r'(?s)no report, .*\n  stage:a: \w+ then, \w+ now\n', capsys.readouterr().out)
  assert train.belong_together(setup, ['a'], ['a'])
  run(workdir, 'b', 'restart')
  assert train.belong_together(setup, ['a', 'b'], ['a'])


@pytest.mark.parametrize(
  'file,text,gone',
  [
    ('report.json', dict(config=dict(stages=dict(a={}))), True),
    ('report.json', dict(config=dict(stages=dict(b={}))), False),
    ('report.json', [], True),
    ('evaluation/table.json', dict(models=dict(x='runs/w/a', y='hf:b')), True),
    ('evaluation/table.json', dict(models=dict(x='runs/w/b', y='hf:a')), False),
  ],
)
def test_a_report_goes_when_a_stage_of_it_is_made_again(workdir, file, text, gone):
  path = workdir / file
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(text))
  path.with_suffix('.md').write_text('# Old')
  run(workdir, 'a', outdated=report.outdated)  # reused
  assert path.exists()
  change(workdir)
  run(workdir, 'a', 'restart', outdated=report.outdated)
  assert [p.exists() for p in (path, path.with_suffix('.md'))] == [not gone] * 2


def test_an_unfinished_stage_does_not_go_on_with_other_data(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'data.jsonl').write_text('1\n-1\n')
  with pytest.raises(SystemExit):
    run(tmp_path / 'w', 'a', stop_at=2)
  change(tmp_path / 'w')
  with pytest.raises(inputs.ChangedInput, match='/a goes on from other inputs'):
    run(tmp_path / 'w', 'a')
  change(tmp_path / 'w', '1\n-1\n')
  run(tmp_path / 'w', 'a')
  run(tmp_path / 'v', 'a')
  assert weights(tmp_path / 'w', 'a') == weights(tmp_path / 'v', 'a')


def test_another_config_is_named_also_where_config_json_is_gone(workdir):
  with pytest.raises(saved_config.Mismatch, match='seed: 0 -> 5'):
    run(workdir, 'a', seed=5)
  (workdir / 'a/checkpoints/config.json').unlink()
  with pytest.raises(saved_config.Mismatch, match='another config than this one'):
    run(workdir, 'a', seed=5)
  run(workdir, 'a')


def test_a_file_that_is_gone_is_told_and_the_result_reused(workdir, capsys):
  (workdir.parent / 'data.jsonl').unlink()
  run(workdir, 'a')
  assert 'a: reused, although this cannot be compared' in capsys.readouterr().out


def test_a_users_function_counts_ours_do_not(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  module = tmp_path / 'mylab_of_this_test.py'
  module.write_text('def loss():\n  return 1\n')
  c = config(**{'stages.a.build': 'alignjax.stages.sft:build'})
  c.stages.a.loss = ConfigDict(
    dict(fn='mylab_of_this_test:loss', ratio='4:3', inner=('hf:mylab_of_this_test', 'x:loss'))
  )
  read = inputs.of_config(c, 'a')
  assert read == {'stages.a.loss.fn': ('function', 'mylab_of_this_test:loss')}
  before = inputs.record(tmp_path / 'w', 'a', {}, read)['inputs']['stages.a.loss.fn']['fingerprint']
  module.write_text('# a comment\ndef loss():\n  return 1\n')
  inputs.record(tmp_path / 'w', 'a', {}, read)
  module.write_text('def loss():\n  return 2\n')
  with pytest.raises(inputs.ChangedInput, match='stages.a.loss.fn changed'):
    inputs.record(tmp_path / 'w', 'a', {}, read)
  assert len(before) == fingerprints.LENGTH
  mapped = inputs.of_data('data.x', 'jsonl:a;jsonl:b', 'dolly; mylab_of_this_test:loss')
  assert mapped['data.x, mapping 2'] == ('function', 'mylab_of_this_test:loss') and len(mapped) == 2


def folder(path, **contents):
  path.mkdir(exist_ok=True)
  for name, text in contents.items():
    (path / name.replace('__', '.')).write_text(text)
  return path


def test_of_a_checkpoint_what_is_read_counts(tmp_path):
  of = lambda kind: inputs.fingerprint(kind, f'hf:{tmp_path / "m"}', tmp_path, {})
  kinds = ('tokenizer', 'architecture', 'checkpoint')
  folder(
    tmp_path / 'm', config__json='{}', model__safetensors='x', tokenizer__json='{}', README__md='x'
  )
  first = {kind: of(kind) for kind in kinds}
  changed = {
    'README__md': (),
    'consolidated__safetensors': (),
    'model__safetensors': ('checkpoint',),
    'tokenizer__json': ('tokenizer',),
    'chat_template__jinja': ('tokenizer',),
    'config__json': kinds,
  }
  for name, touched in changed.items():
    before = {kind: of(kind) for kind in kinds}
    folder(tmp_path / 'm', **{name: '{"a": 1}'})
    assert {kind for kind in kinds if of(kind) != before[kind]} == set(touched), name
  assert all(of(kind) != first[kind] for kind in kinds)
  index = json.dumps({'weight_map': {'t': 'part-1.safetensors'}})
  (tmp_path / 'm' / 'model.safetensors').unlink()  # it would be read in place of an index
  folder(tmp_path / 'm', **{'model__safetensors__index__json': index, 'part-1__safetensors': 'a'})
  before = of('checkpoint')
  folder(tmp_path / 'm', **{'part-1__safetensors': 'b'})
  assert of('checkpoint') != before


@pytest.mark.parametrize(
  'source,file',
  [
    ('jsonl:{0}/a.jsonl', 'a.jsonl'),
    ('text:{0}/*.txt', 'b.txt'),
    ('hf:{0}:train', 'c/x.json'),
    ('tfds:{0}:train[:5%]', 'c/x.json'),
    ('jsonl:{0}/a.jsonl; text:{0}/b.txt', 'b.txt'),
    ('jsonl:{0}/d;e.jsonl', 'd;e.jsonl'),
  ],
)
def test_every_file_of_a_source_counts(tmp_path, source, file):
  for name in ('a.jsonl', 'b.txt', 'c/x.json', 'd;e.jsonl'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('1')
  name = source.format(tmp_path)
  before = inputs.fingerprint('data', name, tmp_path, {})
  (tmp_path / file).write_text('2')
  assert inputs.fingerprint('data', name, tmp_path, {}) != before


def test_what_lies_beside_a_source_counts_where_the_mapping_reads_it(tmp_path):
  assert inputs.of_data('data.x', 'jsonl:a', 'ukp_convarg')['data.x, beside it'] == (
    'beside',
    'jsonl:a',
  )
  (tmp_path / 'a').write_text('1')
  before = inputs.fingerprint('beside', f'jsonl:{tmp_path}/a', tmp_path, {})
  (tmp_path / 'arguments').write_text('1')
  assert inputs.fingerprint('beside', f'jsonl:{tmp_path}/a', tmp_path, {}) != before


def test_a_large_file_is_read_once(tmp_path, monkeypatch):
  import hashlib

  path, reads = tmp_path / 'big', []
  path.write_text('1')
  monkeypatch.setattr(fingerprints, 'SETTLED_SECONDS', -1)
  real = hashlib.file_digest
  monkeypatch.setattr(hashlib, 'file_digest', lambda *a: reads.append(1) or real(*a))
  known = {}
  first = fingerprints.of_files([path], known)
  assert (
    fingerprints.of_files([path], known) == first == fingerprints.of_files([path])
    and len(reads) == 2
  )
  stat = path.stat()
  path.write_text('2')
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  # of the same size and time: the kernel's own time of change tells
  while path.stat().st_ctime_ns == stat.st_ctime_ns:  # on older kernels it moves by milliseconds
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert fingerprints.of_files([path], known) != first
  monkeypatch.setattr(fingerprints, 'SETTLED_SECONDS', 60)
  assert len(known) == 1 and fingerprints.of_files([path], fresh := {}) and not fresh, (
    'one just written is not remembered'
  )


# ---- damage


@pytest.mark.parametrize(
  'stage,file',
  [
    (s, f)
    for s in 'ab'
    for f in (
      'inputs.json',
      'final/info.json',
      'final/sums.json',
      'checkpoints/config.json',
      'metrics.jsonl',
      '../hashed.json',
    )
  ],
)
@pytest.mark.parametrize('how', ['flip', 'cut', 'empty', 'remove', 'folder'])
def test_a_damaged_file_is_named_or_without_effect(workdir, stage, file, how, capsys):
  from tests.damage import damage

  expected = {s: weights(workdir, s) for s in 'ab'}
  damage(workdir / stage / file, how, np.random.default_rng(0))
  try:
    for name in 'ab':
      run(workdir, name)
  except (ValueError, OSError) as error:
    assert pathlib.Path(file).name in str(error) or 'another config' in str(error), error
    return
  assert {
    s: checkpoint.load_info(workdir / s / 'final')['made']['weights'] for s in 'ab'
  } == expected
  if file == 'metrics.jsonl':
    assert f'WARNING: {workdir / stage / file}: damaged' in capsys.readouterr().out


def test_entries_that_came_later_do_not_count_where_they_ask_for_what_was():
  c = base.get_config('tiny')
  before = train.identity(c, 'rm')
  assert not {'label_noise', 'packed_rows', 'lora'} & before['stages']['rm'].keys()
  c.stages.rm.label_noise = 0.1
  assert train.identity(c, 'rm')['stages']['rm'] == before['stages']['rm'] | {'label_noise': 0.1}
