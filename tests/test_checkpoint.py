"""Checkpoints: bit for bit, across layouts, and honest about what they cannot read."""

import asyncio
import functools
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from alignjax import sharding
from alignjax.runtime import checkpoint, checksums, metrics, saved_config
from alignjax.types import TrainState

CONFIG = {'seed': 0, 'model': {'d_model': 8}}


def state(scale=1.0, width=8):
  x = scale * jax.random.normal(jax.random.key(0), (8, width))
  return TrainState(
    step=jnp.int32(3),
    params={'policy': {'w': x, 'half': x.astype(jnp.bfloat16)}},
    opt_state=(jnp.int32(7), {'mu': x * 2}),
    ema=None,
    extra={'kl_coef': jnp.float32(0.1)},
  )


def abstract(tree, device_sharding=None):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device_sharding or x.sharding), tree
  )


def saved(path, steps=(1, 2), **kw):
  with checkpoint.Checkpoints(path, config=CONFIG) as c:
    for i in steps:
      c.save(i, state(i, **kw), wait=True)


def test_what_comes_back_is_what_went_in(tmp_path):
  saved(tmp_path)
  with checkpoint.Checkpoints(tmp_path, config=CONFIG) as c:
    step, back = c.restore(abstract(state()))
  assert step == 2 and checkpoint.same(back, state(2))
  assert jax.tree.structure(back) == jax.tree.structure(state()) and back.ema is None
  assert back.params['policy']['half'].dtype == jnp.bfloat16


def test_in_a_notebook_whose_thread_runs_an_event_loop(tmp_path, monkeypatch, capsys):
  """Orbax could not read there without the package nest_asyncio, and the whole checkpoint was
  reported and moved away as damaged."""
  from orbax.checkpoint._src import asyncio_utils

  monkeypatch.setattr(asyncio_utils, 'nest_asyncio', None)
  monkeypatch.setattr(asyncio_utils, 'uvloop', None)

  async def cell():
    saved(tmp_path / 'run')
    with checkpoint.Checkpoints(tmp_path / 'run', config=CONFIG) as c:
      assert c.latest_step() == 2
      step, restored = c.restore(abstract(state()))
    checkpoint.save_params(tmp_path / 'final', state(3).params, {'loss': 1.0})
    with pytest.raises(ValueError, match='weights of another model'):
      checkpoint.load_params(tmp_path / 'final', abstract(state(width=4).params))
    return step, restored, checkpoint.load_params(tmp_path / 'final', abstract(state().params))

  step, restored, final = asyncio.run(cell())
  assert step == 2 and 'damaged' not in capsys.readouterr().out
  assert checkpoint.same(restored, state(2))
  assert checkpoint.same(final, state(3).params)


def test_onto_another_mesh(tmp_path):
  mesh = sharding.make_mesh(2, 2, 2)
  spread = jax.tree.map(
    lambda x: jax.device_put(
      x, NamedSharding(mesh, PartitionSpec('fsdp') if x.ndim else PartitionSpec())
    ),
    state(),
  )
  with checkpoint.Checkpoints(tmp_path, config=CONFIG) as c:
    c.save(1, spread, wait=True)
    _, back = c.restore(abstract(state(), jax.sharding.SingleDeviceSharding(jax.devices()[0])))
    assert checkpoint.same(back, state())
    _, again = c.restore(abstract(spread))
  assert again.params['policy']['w'].sharding == spread.params['policy']['w'].sharding


def test_nothing_there(tmp_path):
  with checkpoint.Checkpoints(tmp_path, config=CONFIG) as c:
    assert c.latest_step() is None and c.restore(abstract(state())) is None


def flip(file, at=0.5):
  data = bytearray(file.read_bytes())
  data[int(at * len(data))] ^= 0x10
  file.write_bytes(data)


def cut(file):
  os.truncate(file, file.stat().st_size // 2)


def delete(file):
  file.unlink()


# tasks that orbax leaves when it fails
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('damage', [flip, cut, delete])
def test_a_damaged_newest_one_is_named_and_the_one_before_used(tmp_path, capsys, damage):
  """Each file in turn. Where the damage hits nothing that is read, what comes back has the right
  bits all the same."""
  saved(tmp_path / 'whole')
  whole = tmp_path / 'whole'
  files = sorted(
    p.relative_to(whole) for p in (whole / 'steps/2').rglob('*') if p.is_file() and p.stat().st_size
  )
  assert len(files) > 5
  outcomes = {}
  for i, file in enumerate(files):
    folder = tmp_path / str(i)
    shutil.copytree(tmp_path / 'whole', folder)
    damage(folder / file)
    with checkpoint.Checkpoints(folder, config=CONFIG) as c:
      step, back = c.restore(abstract(state()))
      assert checkpoint.same(back, state(step)), file
      outcomes[str(file)] = step
      told = 'steps/2 is damaged' in capsys.readouterr().out
      assert told == (step == 1) == (folder / 'damaged/2').exists(), file
      c.save(2, state(2), wait=True)  # the step can be saved again
    with checkpoint.Checkpoints(folder, config=CONFIG) as c:
      assert c.restore(abstract(state()))[0] == 2
  largest = max(
    outcomes, key=lambda file: (tmp_path / 'whole' / file).stat().st_size if '/d/' in file else 0
  )
  assert outcomes[largest] == 1 and sum(step == 1 for step in outcomes.values()) >= 3, outcomes


def test_a_changed_number_in_an_array_is_seen(tmp_path, monkeypatch, capsys):
  """What orbax reads without a word: the sums were taken of other bits than it returns."""
  import orbax.checkpoint as ocp

  saved(tmp_path)
  real = ocp.CheckpointManager.restore

  def restore(self, step, **kw):
    out = real(self, step, **kw)
    if step == 2 and 'state' in out:
      leaves = dict(out.state)
      leaves['params.policy.w'] = leaves['params.policy.w'].at[3, 4].multiply(1 + 2**-23)
      return ocp.args.Composite(state=leaves)
    return out

  monkeypatch.setattr(ocp.CheckpointManager, 'restore', restore)
  with checkpoint.Checkpoints(tmp_path, config=CONFIG) as c:
    assert c.restore(abstract(state()))[0] == 1
  assert 'Damaged: checksums differ in params.policy.w)' in capsys.readouterr().out


def test_all_of_them_damaged(tmp_path):
  saved(tmp_path)
  for i in (1, 2):
    shutil.rmtree(tmp_path / f'steps/{i}/state')
  with checkpoint.Checkpoints(tmp_path, config=CONFIG) as c:
    with pytest.raises(
      ValueError, match=r'none of the checkpoints \[2, 1\] can be read; they are in .*/damaged'
    ):
      c.restore(abstract(state()))
    assert c.restore(abstract(state())) is None, 'the next call starts again'


def test_what_a_killed_save_left_is_cleared(tmp_path):
  saved(tmp_path)
  shutil.copytree(tmp_path / 'steps/2', tmp_path / 'steps/3.orbax-checkpoint-tmp')
  with checkpoint.Checkpoints(tmp_path, config=CONFIG) as c:
    assert c.restore(abstract(state()))[0] == 2
    c.save(3, state(3), wait=True)
  assert sorted(p.name for p in (tmp_path / 'steps').iterdir() if p.is_dir()) == ['2', '3']


def test_a_config_file_that_is_damaged(tmp_path):
  saved(tmp_path)
  cut(tmp_path / 'config.json')
  with pytest.raises(ValueError, match=r'config.json cannot be read'):
    checkpoint.Checkpoints(tmp_path, config=CONFIG)


def test_another_config(tmp_path):
  saved(tmp_path)
  with pytest.raises(saved_config.Mismatch, match=r'model.d_model: 8 -> 16') as error:
    checkpoint.Checkpoints(tmp_path, config={'seed': 0, 'model': {'d_model': 16}})
  assert '--workdir' in str(error.value) and 'seed' not in str(error.value)


def test_another_architecture(tmp_path):
  saved(tmp_path)
  with (
    checkpoint.Checkpoints(tmp_path, config=CONFIG) as c,
    pytest.raises(ValueError, match=r'\(8, 8\).*\(8, 9\)'),
  ):
    c.restore(abstract(state(width=9)))


def test_final_weights(tmp_path):
  params = state().params['policy']
  assert not checkpoint.is_finished(tmp_path / 'final')
  checkpoint.save_params(tmp_path / 'final', params, {'head': 'lm', 'accuracy': 0.7})
  assert checkpoint.is_finished(tmp_path / 'final')
  info = checkpoint.load_info(tmp_path / 'final')
  assert info == {
    'head': 'lm',
    'accuracy': 0.7,
    'made': {'weights': checkpoint.weights(tmp_path / 'final')},
  }
  assert checkpoint.same(checkpoint.load_params(tmp_path / 'final', abstract(params)), params)
  with pytest.raises(ValueError, match='weights of another model'):
    checkpoint.load_params(tmp_path / 'final', abstract({'w': params['w']}))
  other = {
    k: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding) for k, x in params.items()
  }
  with pytest.raises(
    ValueError,
    match=r'another model: half: bfloat16 \(8, 8\) on disk, float32 \(8, 8\) in the model',
  ):
    checkpoint.load_params(tmp_path / 'final', other)  # not damaged: its checksums are of bfloat16


@pytest.mark.parametrize('damage', [flip, cut, delete])
def test_damaged_final_weights(tmp_path, damage):
  params = state().params['policy']
  checkpoint.save_params(tmp_path / 'final', params, {})
  damage(next(p for p in sorted((tmp_path / 'final').rglob('d/*')) if p.stat().st_size > 100))
  with pytest.raises(
    checkpoint.Damaged,
    match=r'final is damaged \(.*Delete it, and the run that wrote it makes it again',
  ):
    checkpoint.load_params(tmp_path / 'final', abstract(params))


@pytest.mark.parametrize(
  'x',
  [
    jnp.arange(24, dtype=jnp.int32).reshape(2, 3, 4),
    jnp.linspace(-1, 1, 24).reshape(4, 6),
    jnp.linspace(-1, 1, 24).astype(jnp.bfloat16),
    jnp.arange(24) % 3 == 0,
    jnp.float32(2.5),
    jnp.zeros((0, 3)),
  ],
  ids=lambda x: f'{x.dtype}{list(x.shape)}',
)
def test_checksums_see_every_bit_and_every_swap(x):
  whole = int(checksums.checksum(x))
  raw = np.asarray(x).copy()
  flat = raw.reshape(-1).view(np.uint8)
  for byte in range(len(flat)):
    for bit in (0,) if raw.dtype == bool else range(8):
      flat[byte] ^= 1 << bit
      assert int(checksums.checksum(jnp.asarray(raw))) != whole
      flat[byte] ^= 1 << bit
  if raw.size > 1:
    assert (
      int(checksums.checksum(jnp.asarray(np.roll(raw.reshape(-1), 1).reshape(raw.shape)))) != whole
    )
    assert int(checksums.checksum(x[::-1])) != whole


def test_checksums_do_not_depend_on_the_mesh():
  x = jax.random.normal(jax.random.key(0), (8, 6))
  mesh = sharding.make_mesh(2, 2, 2)
  spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), 'tensor')))
  assert (
    checksums.describe({'x': spread})
    == checksums.describe({'x': x})
    == {'x': [[8, 6], 'float32', int(checksums.checksum(x))]}
  )
  assert checksums.different({'x': x, 'y': x}, checksums.describe({'x': x, 'y': x + 1})) == ['y']


def test_no_thread_outlives_an_error(tmp_path, monkeypatch):
  """One that still cleared what a killed save left would print a traceback of its own behind the
  error's message."""
  import asyncio
  import threading

  from orbax.checkpoint._src.path import temporary_paths

  async def slow(*_, **__):
    await asyncio.sleep(2)

  monkeypatch.setattr(temporary_paths, 'cleanup_temporary_paths', slow)
  before = set(threading.enumerate())
  with (
    pytest.raises(ValueError, match='a clear error'),
    checkpoint.Checkpoints(tmp_path / 'c', config={}),
  ):
    raise ValueError('a clear error')
  assert not [t for t in set(threading.enumerate()) - before if 'target_setting_result' in t.name]


@pytest.mark.parametrize('name', metrics.LOGS)
@pytest.mark.parametrize('damage', [flip, cut, delete])
def test_a_log_that_changed_under_an_unfinished_run_is_named(tmp_path, capsys, name, damage):
  """Up to the step of the checkpoint alone: what came later is dropped anyway."""
  logs = functools.partial(metrics.sums, tmp_path)
  with (
    metrics.Writer(tmp_path) as writer,
    checkpoint.Checkpoints(tmp_path / 'checkpoints', config=CONFIG, logs=logs) as c,
  ):
    for i in (1, 2, 3):
      writer.write(i, {'loss': 1.2345 * i})
      writer.samples(i, [('a prompt', 'a response', 1.5, None)])
      if i < 3:
        c.save(i, state(i), wait=True)
  with (tmp_path / name).open('a') as file:
    file.write('{"step": 3, "to')  # torn by a kill
  for told in (False, True):
    with checkpoint.Checkpoints(tmp_path / 'checkpoints', config=CONFIG, logs=logs) as c:
      step, _ = c.restore(abstract(state()))
    assert step == 2
    assert (
      f'WARNING: {tmp_path / name}: damaged or changed up to step 2' in capsys.readouterr().out
    ) == told
    if not told:
      damage(tmp_path / name)
