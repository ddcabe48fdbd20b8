"""What goes wrong in long runs: updates that are not finite, host functions that fail, signals at
any moment, folders that cannot be written. The loop is the real one, on a stage of one parameter
vector."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from ml_collections import ConfigDict

from alignjax import optim, rewards, steps, train
from alignjax.runtime import checkpoint, failures, metrics
from alignjax.runtime.interrupt import Interrupt
from alignjax.stages.stage import Stage
from alignjax.types import TrainState
from tests.fakes import close


@struct.dataclass
class Row:
  x: jax.Array

  def normalized(self):
    return self


def linear(params, batch, key, *, nets):
  """sum(w x), whose gradient is x; +inf in x makes the loss infinite and leaves the gradient."""
  infinite = jnp.isposinf(batch.x)
  loss = jnp.sum(params['policy']['w'] * jnp.where(infinite, 0, batch.x)) + jnp.sum(
    jnp.where(infinite, batch.x, 0)
  )
  return loss, {'sft/loss': loss}


TX = optim.make({'policy': optax.adam(0.1)})


def first_state():
  params = {'policy': {'w': jnp.ones(3)}}
  return TrainState(
    step=jnp.int32(0), params=params, opt_state=TX.init(params), ema={'w': jnp.ones(3)}
  )


@jax.jit
def one_step(state, batch):
  state, measured = steps.update(
    state, batch, None, loss_fn=linear, nets=None, tx=TX, ema_decay=0.9
  )
  return state.replace(step=state.step + 1), measured, batch.x * 2


@pytest.mark.parametrize('bad', [np.nan, -np.inf, np.inf])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(bad):
  """inf: the loss is infinite, its gradient is not."""
  good = Row(jnp.array([1.0, -2.0, 3.0]))
  after_good, _, _ = one_step(first_state(), good)
  after_bad, measured, _ = one_step(after_good, Row(jnp.array([1.0, bad, 3.0])))
  assert not np.isfinite(measured['sft/loss'])
  for field in ('params', 'opt_state', 'ema'):
    assert checkpoint.same(getattr(after_bad, field), getattr(after_good, field))
  assert after_bad.skipped.tolist() == [1, 1] and int(after_bad.step) == 2
  twice, _, _ = one_step(after_bad, Row(jnp.array([bad, bad, 3.0])))
  assert twice.skipped.tolist() == [2, 2]
  healed, _, _ = one_step(twice, good)
  assert healed.skipped.tolist() == [2, 0]
  plain, _, _ = one_step(after_good, good)
  assert checkpoint.same(healed.params, plain.params), 'as if the bad updates had never been'
  # Adam's first step is the rate, by sign
  close(after_good.params['policy']['w'], [0.9, 1.1, 0.9], rtol=1e-4)
  close(after_good.ema['w'], [0.99, 1.01, 0.99], rtol=1e-4)


def bare_config(stages, changes):
  """What train.run reads of a config, for stages that a test builds itself."""
  c = ConfigDict(
    dict(
      seed=0,
      world={},
      data={},
      model={},
      reward_model={},
      max_bad_updates=3,
      grace_seconds=25.0,
      stages=stages,
    )
  )
  c.update_from_flattened_dict(changes)
  return c


def config(**changes):
  return bare_config(dict(s=dict(build='x:y', log_every=1, save_every=2)), changes)


def run(
  path,
  bad=(),
  step=None,
  num_steps=8,
  build=None,
  finish=None,
  failures=(),
  interrupt=None,
  **changes,
):
  """train.run_stage of 8 steps, whose batch i is [1, i, NaN if i in bad]."""

  def batch(i):
    return Row(jnp.array([1.0, i, np.nan if i in bad else 1.0], jnp.float32))

  def builder(setup, name):
    if build is not None:
      build()
    return Stage(
      first_state(),
      step or one_step,
      batch,
      num_steps,
      finish or (lambda s: (s.params['policy'], {'head': 'lm'})),
      work=lambda step: {'tokens': 3.0 * (step + 1)},
      failures=failures,
    )

  setup = types.SimpleNamespace(config=config(**changes), workdir=path, read={})
  with interrupt or Interrupt(25.0) as i:
    train.run_stage(setup, 's', builder, i)
  return result(path)


def result(path):
  return checkpoint.load_params(
    path / 's/final', {'w': jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jnp.ones(3).sharding)}
  )


def lines(path):
  return [
    {k: v for k, v in json.loads(x).items() if not k.startswith('time/')}
    for x in (path / 's/metrics.jsonl').read_text().splitlines()
  ]


def test_a_run_goes_through_a_few_bad_updates(tmp_path, capsys):
  run(tmp_path, bad=(2, 3, 6))
  log = lines(tmp_path)
  assert [x['optim/skipped'] for x in log] == [0, 0, 1, 2, 2, 2, 3, 3]
  assert log[2]['sft/loss'] is None and log[4]['sft/loss'] is not None
  assert capsys.readouterr().out.count('an update was skipped') == 1
  expected = first_state()
  for i in (0, 1, 4, 5, 7):
    expected, _, _ = one_step(expected, Row(jnp.array([1.0, i, 1.0])))
  assert checkpoint.same(result(tmp_path)['w'], expected.params['policy']['w'])


def test_tokens_per_second_are_those_of_the_steps_that_were_timed(tmp_path):
  """Step i has 3i tokens; a line for every two steps holds their mean."""
  run(tmp_path, num_steps=4, **{'stages.s.log_every': 2})
  log = [json.loads(x) for x in (tmp_path / 's/metrics.jsonl').read_text().splitlines()]
  close([x['time/tokens_per_second'] * x['time/step_seconds'] for x in log], [4.5, 10.5], rtol=1e-3)


def test_too_many_in_a_row_end_it_with_the_batch_kept(tmp_path):
  with pytest.raises(
    FloatingPointError,
    match=r'step 6: 3 updates in a row.*sft/loss=nan.*bad_batch.npz.*checkpoint 6',
  ) as error:
    run(tmp_path, bad=(3, 4, 5))
  assert 'JAX_DEBUG_NANS' in str(error.value) and 'max_bad_updates' in str(error.value)
  kept = np.load(tmp_path / 's/bad_batch.npz')
  np.testing.assert_array_equal(kept['batch/x'], [1, 5, np.nan])
  np.testing.assert_array_equal(kept['seen'], [2, 10, np.nan])
  # no other config, so the folder is not refused; it goes on behind them
  run(tmp_path, bad=(3, 4, 5), max_bad_updates=4)
  # the sixth was not written
  assert [x['optim/skipped'] for x in lines(tmp_path)] == [0, 0, 0, 1, 2, 3, 3]


def test_a_metric_that_is_not_finite_without_a_skipped_update_ends_the_run(tmp_path):
  def step(state, batch):
    state, measured, seen = one_step(state, batch)
    return state, measured | {'x/y': jnp.float32(np.inf)}, seen

  with pytest.raises(FloatingPointError, match='step 1: x/y=inf'):
    run(tmp_path, step=step)


# ---- functions on the host


CALLS: list = []


def flaky(prompts, responses):
  CALLS.append(len(prompts))
  if len(CALLS) < 3:
    raise ConnectionError('no route to host')
  return [float(len(r)) for r in responses]


GO_ON = threading.Event()


def slow(prompts, responses):
  if GO_ON.wait(60):
    return
  CALLS.append('waited to the end')


def short(prompts, responses):
  return [1.0]


def silly(prompts, responses):
  return [1.0, np.nan, 2.0]


def score(function, failures, **kw):
  ids = jnp.array([[1, 2], [3, 4], [5, 6]])
  live = jnp.array([[True, True], [True, False], [False, False]])
  f = jax.jit(
    lambda *x: rewards.host_reward(
      *x,
      nets=None,
      frozen=None,
      function=f'tests.test_failures:{function}',
      failures=failures,
      prompts_by_tokens={(1, 2): 'a', (3,): 'b', (): 'c'},
      decode_response=lambda ids: ('x' * len(ids), False),
      **({'pause': 0.01} | kw),
    )
  )
  return np.asarray(f(ids, live, ids, live))


def test_a_host_function_is_tried_again(capsys):
  from tests.test_failures import CALLS  # of the module by the name that the config uses

  CALLS.clear()
  failures: list = []
  assert (
    score('flaky', failures).tolist() == [2.0, 1.0, 0.0] and CALLS == [3, 3, 3] and not failures
  )
  assert (
    'test_failures:flaky, attempt 2 of 3: ConnectionError: no route to host'
    in capsys.readouterr().out
  )


@pytest.mark.parametrize(
  'function,words',
  [
    ('flaky', 'failed 2 times, at last with ConnectionError: no route to host.'),
    ('slow', 'failed 2 times, at last with TimeoutError: no answer in 0.1 s.'),
    ('short', r'ValueError: returned shape (1,) for 3 responses.'),
    ('silly', 'ValueError: returned nan for response 1.'),
  ],
)
def test_a_host_function_that_fails_is_named(function, words):
  from tests.test_failures import CALLS, GO_ON

  CALLS.clear()
  GO_ON.clear()
  failures: list = []
  assert np.isnan(
    score(function, failures, attempts=2, timeout=0.1 if function == 'slow' else 60.0)
  ).all()
  assert (
    len(failures) == 1
    and failures[0].endswith(words)
    and f'test_failures:{function}' in failures[0]
  )
  if function == 'slow':
    assert not CALLS, 'a call that hangs is left behind'
    GO_ON.set()


def test_a_wrong_host_function_fails_before_anything_runs():
  from alignjax.stages.stage import check_functions

  spec = dict(
    reward=dict(fn='alignjax.rewards:host_reward', function='tests.test_failures:flakey'),
    optimizer={},
  )
  with pytest.raises(
    ValueError, match=r"stages.ppo.reward.function='tests.test_failures:flakey'.*did you mean flaky"
  ):
    check_functions(
      ConfigDict(spec),
      'stages.ppo',
      dict(reward=dict(prompts_by_tokens={}, decode_response=None, failures=[])),
    )


def test_a_run_whose_host_function_fails_loses_nothing(tmp_path):
  """Step 6 of 8 fails; checkpoints are every 4 steps; what is kept is the state after step 5, and
  the end is that of no failure."""
  said: list = []
  broken = [True]

  def step(state, batch):
    if broken and int(state.step) == 5:
      said.append('the reward function mylab:rule failed 3 times, at last with OSError: gone.')
      batch = batch.replace(x=batch.x * np.nan)
    return one_step(state, batch)

  with pytest.raises(
    failures.StepFailed,
    match=r'step 6: the reward function mylab:rule failed 3 times.*5 steps before',
  ):
    run(tmp_path / 'a', step=step, failures=said, **{'stages.s.save_every': 4})
  assert sorted(
    p.name for p in (tmp_path / 'a/s/checkpoints/steps').iterdir() if p.name.isdigit()
  ) == ['4', '5']
  broken.clear()
  said.clear()
  again = run(tmp_path / 'a', step=step, failures=said, **{'stages.s.save_every': 4})
  assert checkpoint.same(again, run(tmp_path / 'b')) and lines(tmp_path / 'a') == lines(
    tmp_path / 'b'
  )


# ---- signals


def later(seconds=0.3, number=signal.SIGTERM):
  threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_data_is_built(tmp_path, number):
  slept: list = []
  with pytest.raises(SystemExit) as error:
    run(tmp_path, build=lambda: (later(number=number), time.sleep(60), slept.append(True)))
  assert error.value.code == 75 and not slept
  assert checkpoint.same(run(tmp_path), run(tmp_path / 'b'))


def test_a_signal_in_the_loop_saves_that_step(tmp_path, capsys):
  def step(state, batch):
    if int(state.step) == 2 and not (tmp_path / 'sent').exists():
      (tmp_path / 'sent').touch()
      os.kill(os.getpid(), signal.SIGTERM)
      os.kill(os.getpid(), signal.SIGTERM)  # schedulers may send more than one
    return one_step(state, batch)

  with pytest.raises(SystemExit) as error:
    run(tmp_path, step=step, **{'stages.s.save_every': 100})
  assert error.value.code == 75 and 'stopped by SIGTERM at step 3' in capsys.readouterr().out
  run(tmp_path, step=step, **{'stages.s.save_every': 100})
  assert 's: goes on from step 3 of 8' in capsys.readouterr().out
  assert checkpoint.same(result(tmp_path), run(tmp_path / 'b'))


@pytest.mark.parametrize('when', ['last step', 'finish'])
def test_a_signal_after_the_loop_keeps_its_last_state(tmp_path, capsys, when):
  """Evaluations at the end of a stage, or the choice of a selection stage: nothing of the training
  before is done again."""

  def finish(state):
    later()
    time.sleep(20)

  def step(state, batch):
    if when == 'last step' and int(state.step) == 7:
      os.kill(os.getpid(), signal.SIGTERM)
    return one_step(state, batch)

  with pytest.raises(SystemExit) as error:
    run(tmp_path, step=step, finish=finish, **{'stages.s.save_every': None})
  assert error.value.code == 75
  run(tmp_path)
  assert 'goes on from step 8 of 8' in capsys.readouterr().out
  assert checkpoint.same(result(tmp_path), run(tmp_path / 'b'))


BUSY = """
import jax, jax.numpy as jnp, numpy as np, sys, threading, time
from alignjax.runtime.interrupt import Interrupt
jax.config.update('jax_cpu_enable_async_dispatch', False)  # the main thread itself runs the program

def stack():
  frame = sys._current_frames()[threading.main_thread().ident]
  while frame:
    yield frame.f_code.co_filename
    frame = frame.f_back

def say():
  while any(name.endswith('callback.py') for name in stack()):  # Python still has a turn
    time.sleep(0.01)
  print('ready', flush=True)

def inside(x):
  threading.Thread(target=say, daemon=True).start()
  return np.asarray(x)

@jax.jit
def forever(x):
  x = jax.pure_callback(inside, jax.ShapeDtypeStruct((), jnp.float32), x)
  return jax.lax.while_loop(lambda c: c >= 0, lambda c: c + 1, x)

with Interrupt(grace=1.0) as i:
  {body}
"""


@pytest.mark.parametrize(
  'body',
  ['forever(jnp.float32(0))', 'with i.held(): say(); time.sleep(60)'],
  ids=['in XLA', 'in a step'],
)
def test_the_grace_time_holds_where_python_does_not_get_a_turn(body):
  """Inside XLA no handler of Python runs; a compilation looks the same. Each says itself that it is
  there."""
  with subprocess.Popen(
    [sys.executable, '-c', BUSY.format(body=body)], stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == 'ready\n'
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75 and time.monotonic() - began > 0.9
    assert 'stopped by SIGTERM after grace_seconds=1' in process.stdout.read()


def test_handlers_are_put_back():
  before = (
    signal.getsignal(signal.SIGTERM),
    signal.getsignal(signal.SIGINT),
    signal.set_wakeup_fd(-1),
  )
  with Interrupt(1.0):
    assert signal.getsignal(signal.SIGTERM) is not before[0]
  assert (
    signal.getsignal(signal.SIGTERM),
    signal.getsignal(signal.SIGINT),
    signal.set_wakeup_fd(-1),
  ) == before


# ---- folders that cannot be written


FULL = """
import resource, sys, pathlib, jax.numpy as jnp, jax
from alignjax.runtime import checkpoint
folder = pathlib.Path(sys.argv[1])
big = {'w': jax.random.normal(jax.random.key(0), (1_000_000,))}
with checkpoint.Checkpoints(folder / 'checkpoints', config={}) as saved:
  saved.save(1, big, wait=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
  if sys.argv[2] == 'save':
    with checkpoint.Checkpoints(folder / 'checkpoints', config={}) as saved:
      # In the background: the error comes when the folder is closed, or with the next save.
      saved.save(2, big)
  else:
    checkpoint.save_params(folder / 'final', big, {})
except OSError as error:
  print('error:', error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
with checkpoint.Checkpoints(folder / 'checkpoints', config={}) as saved:
  shape = jax.ShapeDtypeStruct((1_000_000,), jnp.float32, sharding=big['w'].sharding)
  step, back = saved.restore({'w': shape})
  assert step == 1 and checkpoint.same(back, big)
"""


@pytest.mark.parametrize('what', ['save', 'final'])
def test_a_file_that_cannot_be_written_is_an_error_and_the_one_before_stays(tmp_path, what):
  done = subprocess.run(
    [sys.executable, '-c', FULL, str(tmp_path), what], capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr[-2000:]
  words = 'checkpoint 2 could not be written to' if what == 'save' else 'final could not be written'
  assert (
    f'error: {words}' in done.stdout.replace(f'{tmp_path}/', '')
    and 'Make room there' in done.stdout
  )


def test_a_failed_save_in_the_background_ends_the_run_at_the_next_one(tmp_path, monkeypatch):
  """And the error is not hidden by what closes the folder."""
  import orbax.checkpoint as ocp

  saves = []

  def wait(self):
    if saves:
      raise RuntimeError('RESOURCE_EXHAUSTED: No space left on device')

  monkeypatch.setattr(ocp.CheckpointManager, 'wait_until_finished', wait)
  monkeypatch.setattr(ocp.CheckpointManager, 'save', lambda self, step, **kw: saves.append(step))
  monkeypatch.setattr(ocp.CheckpointManager, 'close', lambda self: None)
  with pytest.raises(
    OSError,
    match=r'checkpoint 2 could not be written to .*No space left on device.*the same command goes '
    r'on',
  ):
    run(tmp_path)
  assert saves == [2]


def test_a_folder_that_cannot_be_written_is_found_before_any_work(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(
    OSError, match=r'cannot write to .*file/run \(Not a directory\); use another --workdir'
  ):
    failures.check_writable(tmp_path / 'file' / 'run')
  failures.check_writable(tmp_path / 'new' / 'run')
  assert list((tmp_path / 'new' / 'run').iterdir()) == []


def test_samples_of_repeated_steps_are_not_there_twice(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.samples(1, [('p', 'r', '1', '')])
    writer.samples(2, [('p', 'r', '1', '')])
  with metrics.Writer(tmp_path, start_step=1) as writer:
    writer.samples(2, [('p', 's', '2', '')])
  rows = [json.loads(x) for x in (tmp_path / 'samples.jsonl').read_text().splitlines()]
  assert [(r['step'], r['response']) for r in rows] == [(1, 'r'), (2, 's')]
