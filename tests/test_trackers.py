"""Experiment trackers: what they get, once each and in order, through kills, restarts and their own
failures. The loop is the real one; W&B, Trackio and MLflow are real, with their local stores."""

import json
import os
import signal
import struct
import sys
import threading
import types

import pytest

from alignjax import train
from alignjax.commands import config_flags
from alignjax.runtime import metrics, trackers
from tests.test_failures import one_step, run


class Recorder:
  """A tracker of a user's. calls: what it got; broken: names of the calls that raise."""

  def __init__(self):
    self.calls, self.broken, self.hold = [], set(), threading.Event()
    self.hold.set()

  def start(self, project, folder, config, run):
    assert self.hold.wait(60)
    self._check('start')
    self.calls.append(('start', project, f'{folder.parent.name}/{folder.name}', run))
    self.config = config
    return types.SimpleNamespace(id=run or 'new', log=self.log, finish=self.finish)

  def log(self, step, values):
    self._check('log')
    self.calls.append((step, values))

  def finish(self, status):
    self._check('finish')
    self.calls.append(status)

  def _check(self, call):
    if call in self.broken:
      raise ConnectionError(f'no network for {call}')

  def steps(self):
    return [call[0] for call in self.calls if isinstance(call[0], int)]

  def others(self):
    return [call for call in self.calls if not isinstance(call[0], int)]


@pytest.fixture
def recorder(monkeypatch):
  made = Recorder()
  module = types.ModuleType('mylab')
  module.start = made.start
  monkeypatch.setitem(sys.modules, 'mylab', module)
  return made


MINE = dict(tracker='mylab:start', tracker_project='p')


def failing_at(number, error=None):
  """A step that raises, or kills the process politely, when it has been done so often."""
  done = []

  def step(state, batch):
    done.append(1)
    if len(done) == number:
      if error is None:
        os.kill(os.getpid(), signal.SIGTERM)
      else:
        raise error
    return one_step(state, batch)

  return step


# ---- names


@pytest.mark.parametrize(
  'flag, words',
  [
    ('tracker=wanbd', "tracker='wanbd' is not known. Did you mean 'wandb'"),
    ('tracker=excel', "not known. It is 'none', 'wandb', 'trackio', 'mlflow' or the 'module:func"),
    (
      'tracker=mylab:stat',
      "tracker='mylab:stat': mylab has no function 'stat'; did you mean start",
    ),
    ('tracker=os:getpid', r'called as start\(project, folder, config, run\), which it does not'),
  ],
)
def test_a_wrong_name_is_an_error_before_any_stage(flag, words, tmp_path, monkeypatch, recorder):
  monkeypatch.setattr(train, 'run_stage', None)
  argv = ['--config=configs/ppo_ptx.py:tiny', f'--config.{flag}']
  with pytest.raises(ValueError, match=words):
    train.main(config_flags.read_config(argv).config, tmp_path)


def test_a_package_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
  """W&B's folder of runs, ./wandb, is no package."""
  (tmp_path / 'wandb').mkdir()
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  for name in ('wandb', 'trackio'):
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ValueError, match=rf"needs the package {name}: pip .*'alignjax\[{name}\]'"):
      trackers.of_config({'tracker': name})


def test_no_tracker_is_the_default_and_none_decides_a_result(recorder):
  plain = config_flags.read_config(['--config=configs/ppo_ptx.py:tiny']).config
  argv = ['--config=configs/ppo_ptx.py:tiny', '--config.tracker=mylab:start']
  tracked = config_flags.read_config([*argv, '--config.tracker_project=other']).config
  assert trackers.of_config(plain) is None and trackers.of_config({'tracker': None}) is None
  assert trackers.of_config(tracked)[:2] == ('mylab:start', 'other')
  assert train.identity(plain, 'sft') == train.identity(tracked, 'sft')


# ---- what a tracker gets


def test_a_stage_is_a_run_with_its_config_steps_and_end(tmp_path, recorder):
  run(tmp_path / 'w', bad=(2,), **MINE)
  assert recorder.others() == [('start', 'p', 'w/s', None), 'finished']
  assert recorder.config['stages'] == {'s': {'build': 'x:y'}}
  logged = metrics.read(tmp_path / 'w/s/metrics.jsonl')
  assert recorder.steps() == list(range(1, 9)) == logged['step'].tolist()
  for step, values in (call for call in recorder.calls if isinstance(call[0], int)):
    assert ('sft/loss' in values) == (step != 3), 'what is not finite is left out'
    for name, value in values.items():
      assert value == logged[name][step - 1]
  kept = json.loads((tmp_path / 'w/s/tracker.json').read_text())
  assert kept == {'mylab:start p': {'run': 'new', 'sent': 8}}


def test_a_resumed_stage_goes_on_in_its_run_and_repeats_no_step(tmp_path, recorder):
  """It fails in step 6, after a checkpoint of step 4: step 5 is done twice."""
  with pytest.raises(RuntimeError, match='out of memory'):
    run(tmp_path, step=failing_at(6, RuntimeError('out of memory')), **MINE)
  assert recorder.steps() == [1, 2, 3, 4, 5] and recorder.calls[-1] == 'failed'
  (path,) = tmp_path.glob('s/tracker.json')
  name = f'{tmp_path.name}/s'
  run(tmp_path, **MINE)
  assert recorder.steps() == [1, 2, 3, 4, 5, 6, 7, 8]
  assert recorder.others() == [
    ('start', 'p', name, None),
    'failed',
    ('start', 'p', name, 'new'),
    'finished',
  ]
  assert json.loads(path.read_text())['mylab:start p']['sent'] == 8


def test_a_signal_stops_the_run_of_the_tracker(tmp_path, recorder):
  with pytest.raises(SystemExit):
    run(tmp_path, step=failing_at(3), **MINE)
  assert recorder.steps() == [1, 2, 3] and recorder.calls[-1] == 'stopped'


def test_a_tracker_that_a_restart_names_gets_all_steps(tmp_path, recorder):
  with pytest.raises(RuntimeError):
    run(tmp_path, step=failing_at(6, RuntimeError()))
  assert recorder.calls == [] and not (tmp_path / 's/tracker.json').exists()
  run(tmp_path, **MINE)
  assert recorder.steps() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_another_project_is_another_run(tmp_path, recorder):
  with pytest.raises(RuntimeError):
    run(tmp_path, step=failing_at(6, RuntimeError()), **MINE)
  run(tmp_path, **MINE | dict(tracker_project='q'))
  assert ('start', 'q', f'{tmp_path.name}/s', None) in recorder.calls
  assert set(json.loads((tmp_path / 's/tracker.json').read_text())) == {
    'mylab:start p',
    'mylab:start q',
  }


def test_only_the_first_process_has_a_tracker(tmp_path, recorder):
  tracker = trackers.of_config(MINE)
  with metrics.Writer(tmp_path / 'other', active=False, tracker=tracker) as writer:
    writer.write(1, {'x': 1.0})
  assert recorder.calls == [] and not (tmp_path / 'other').exists()
  with metrics.Writer(tmp_path / 'first', tracker=tracker) as writer:
    writer.write(1, {'x': 1.0})
  assert recorder.calls[1:] == [(1, {'x': 1.0}), 'finished']


# ---- trackers that fail


def test_a_tracker_that_does_not_start_is_said_once_and_gets_all_later(tmp_path, recorder, capsys):
  recorder.broken = {'start'}
  with pytest.raises(RuntimeError):
    run(tmp_path, step=failing_at(6, RuntimeError()), **MINE)
  out = capsys.readouterr().out
  assert out.count('the tracker mylab:start failed: ConnectionError: no network for start.') == 1
  assert 'metrics.jsonl' in out and "tracker='none'" in out
  recorder.broken = set()
  run(tmp_path, **MINE)
  assert recorder.steps() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize('broken', [('log',), ('finish',), ('log', 'finish')])
def test_a_tracker_that_fails_later_is_said_once_and_ends_nothing(
  broken, tmp_path, recorder, capsys
):
  recorder.broken = set(broken)
  run(tmp_path, **MINE)
  assert capsys.readouterr().out.count('the tracker mylab:start failed') == 1
  assert (tmp_path / 's/final/info.json').exists()


def test_rows_that_a_tracker_did_not_take_come_with_a_later_one(tmp_path, recorder, capsys):
  tracker = trackers.of_config(MINE)
  sender = trackers.Sender(tracker, tmp_path, {})
  recorder.broken = {'log'}
  tried = threading.Event()
  complain = sender._complain
  sender._complain = lambda why: (complain(why), tried.set())
  sender.send({'step': 1, 'x': 1.0})
  assert tried.wait(60)
  recorder.broken = set()
  sender.send({'step': 2, 'x': 2.0})
  sender.close('finished')
  assert recorder.steps() == [1, 2]
  assert capsys.readouterr().out.count('failed') == 1


def test_training_does_not_wait_for_a_tracker(tmp_path, recorder, monkeypatch, capsys):
  monkeypatch.setattr(trackers, 'PATIENCE', {'finished': 0.01})
  recorder.hold.clear()
  run(tmp_path, **MINE)
  assert recorder.calls == [] and (tmp_path / 's/final/info.json').exists()
  assert 'it has not taken all metrics within 0.01 s' in capsys.readouterr().out
  (thread,) = [t for t in threading.enumerate() if t.name == 'tracker']
  recorder.hold.set()
  thread.join(60)
  assert recorder.steps() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_damaged_file_starts_a_new_run(tmp_path, recorder):
  (tmp_path / 's').mkdir()
  for text in ('{"mylab:start p": ', '[]', '{"mylab:start p": {"run": "old"}}'):
    (tmp_path / 's/tracker.json').write_text(text)
    with metrics.Writer(tmp_path / 's', tracker=trackers.of_config(MINE)):
      pass
  assert [call[-1] for call in recorder.calls if call[0] == 'start'] == [None] * 3


# ---- the real ones


def twice(tmp_path, name):
  """A stage that fails in step 6 and is resumed, and the id of its run, which both have."""
  wanted = dict(tracker=name, tracker_project='p')
  ids = []
  for error in (RuntimeError('out of memory'), None):
    if error:
      with pytest.raises(RuntimeError, match='out of memory'):
        run(tmp_path / 'w', step=failing_at(6, error), **wanted)
    else:
      run(tmp_path / 'w', **wanted)
    kept = json.loads((tmp_path / 'w/s/tracker.json').read_text())[f'{name} p']
    ids.append(kept['run'])
  assert kept['sent'] == 8 and ids[0] == ids[1]
  return ids[0], metrics.read(tmp_path / 'w/s/metrics.jsonl')


@pytest.mark.filterwarnings('ignore')
def test_trackio(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'store'))
  pytest.importorskip('trackio', reason="pip install 'alignjax[trackio]'")
  from trackio import utils
  from trackio.sqlite_storage import SQLiteStorage

  monkeypatch.setattr(utils, 'TRACKIO_DIR', tmp_path / 'store')
  monkeypatch.setattr(sys.modules['trackio.sqlite_storage'], 'TRACKIO_DIR', tmp_path / 'store')
  run_name, logged = twice(tmp_path, 'trackio')
  assert run_name.startswith('w/s-') and SQLiteStorage.get_runs('p') == [run_name]
  rows = [row for row in SQLiteStorage.get_logs('p', run_name) if 'sft/loss' in row]
  assert [row['step'] for row in rows] == list(range(1, 9))
  assert [row['sft/loss'] for row in rows] == logged['sft/loss'].tolist()
  assert 'failed' not in capsys.readouterr().out


@pytest.mark.filterwarnings('ignore')
def test_wandb_offline(tmp_path, monkeypatch, capsys):
  wandb = pytest.importorskip('wandb', reason="pip install 'alignjax[wandb]'")
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  monkeypatch.delenv('WANDB_DIR', raising=False)
  wandb.teardown()  # it reads its variables once
  try:
    run_id, logged = twice(tmp_path, 'wandb')
  finally:
    wandb.teardown()
  paths = sorted((tmp_path / 'w/s/wandb').glob(f'offline-run-*-{run_id}/run-{run_id}.wandb'))
  assert len(paths) == 2
  (first, rows), (again, more) = map(wandb_file, paths)
  for made in (first, again):
    facts = (made.project, made.display_name, made.run_group, made.job_type, made.run_id)
    assert facts == ('p', 'w/s', 'w', 's', run_id)
  assert list(rows) == [1, 2, 3, 4, 5] and list(more) == [6, 7, 8]
  assert [(rows | more)[i]['sft/loss'] for i in range(1, 9)] == logged['sft/loss'].tolist()
  assert 'failed' not in capsys.readouterr().out


@pytest.mark.filterwarnings('ignore')
def test_wandb_without_a_login_asks_nobody(tmp_path, monkeypatch, capsys):
  """In a terminal, W&B would ask for a key and wait."""
  wandb = pytest.importorskip('wandb', reason="pip install 'alignjax[wandb]'")
  for name in ('WANDB_MODE', 'WANDB_API_KEY', 'WANDB_IDENTITY_TOKEN_FILE'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
  monkeypatch.setattr(wandb, 'init', None)
  wandb.teardown()
  try:
    run(tmp_path / 'w', tracker='wandb')
  finally:
    wandb.teardown()
  out = capsys.readouterr().out
  assert 'the tracker wandb failed: ValueError: nobody is logged in to W&B.' in out
  assert 'WANDB_MODE=offline' in out and (tmp_path / 'w/s/final/info.json').exists()


def wandb_file(path):
  """(the record of the run, {step: metrics}) of a file that waits for `wandb sync`."""
  from wandb.proto import wandb_internal_pb2

  made, rows = None, {}
  for data in log_records(path.read_bytes()):
    record = wandb_internal_pb2.Record()
    record.ParseFromString(data)
    if record.WhichOneof('record_type') == 'run':
      made = made or record.run
    if record.WhichOneof('record_type') == 'history':
      rows[record.history.step.num] = {
        item.key or '.'.join(item.nested_key): json.loads(item.value_json)
        for item in record.history.item
      }
  return made, rows


def log_records(raw):
  """The records of a file in LevelDB's log format: blocks of 32 KiB with pieces of records, each
  with 4 bytes of checksum, 2 of length and 1 of kind before it. The file begins with 7 bytes that
  count as its first block's."""
  at, whole = 7, b''
  while at + 7 <= len(raw):
    if 2**15 - at % 2**15 < 7:  # the end of a block, too short for a piece
      at += 2**15 - at % 2**15
    size, kind = struct.unpack('<HB', raw[at + 4 : at + 7])
    whole += raw[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # a whole record, or the last piece of one
      yield whole
      whole = b''


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_mlflow(tmp_path, monkeypatch, capsys):
  pytest.importorskip('mlflow', reason="pip install 'alignjax[mlflow]'")
  from mlflow import MlflowClient

  monkeypatch.chdir(tmp_path)  # for artifacts, of which there are none
  monkeypatch.setenv('MLFLOW_TRACKING_URI', f'sqlite:///{tmp_path}/mlflow.db')
  run_id, logged = twice(tmp_path, 'mlflow')
  client = MlflowClient()
  made = client.get_run(run_id)
  assert (made.info.run_name, made.info.status) == ('w/s', 'FINISHED')
  assert made.data.params['stages.s.build'] == 'x:y' and made.data.tags['workdir'] == 'w'
  history = client.get_metric_history(run_id, 'sft/loss')
  assert [h.step for h in history] == list(range(1, 9))
  assert [h.value for h in history] == logged['sft/loss'].tolist()
  assert len(client.search_runs([made.info.experiment_id])) == 1
  assert 'failed' not in capsys.readouterr().out
