"""Checkpoints: bit for bit, across layouts, and honest about what they cannot read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from alignjax import checkpoint, sharding
from alignjax.types import TrainState

CONFIG = {'seed': 0, 'model': {'d_model': 8}}


def state(scale=1.0, width=8):
  x = scale * jax.random.normal(jax.random.key(0), (8, width))
  return TrainState(step=jnp.int32(3), params={'policy': {'w': x, 'half': x.astype(jnp.bfloat16)}},
                    opt_state=(jnp.int32(7), {'mu': x * 2}), ema=None, extra={'kl_coef': jnp.float32(0.1)})


def abstract(tree, device_sharding=None):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device_sharding or x.sharding), tree)


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


def test_onto_another_mesh(tmp_path):
  mesh = sharding.make_mesh(2, 2, 2)
  spread = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec('fsdp') if x.ndim else PartitionSpec())),
                        state())
  with checkpoint.Checkpoints(tmp_path, config=CONFIG) as c:
    c.save(1, spread, wait=True)
    _, back = c.restore(abstract(state(), jax.sharding.SingleDeviceSharding(jax.devices()[0])))
    assert checkpoint.same(back, state())
    _, again = c.restore(abstract(spread))
  assert again.params['policy']['w'].sharding == spread.params['policy']['w'].sharding


def test_nothing_there(tmp_path):
  with checkpoint.Checkpoints(tmp_path, config=CONFIG) as c:
    assert c.latest_step() is None and c.restore(abstract(state())) is None


def test_a_damaged_newest_one_is_named_and_the_one_before_used(tmp_path, capsys):
  saved(tmp_path)
  for file in (tmp_path / 'steps' / '2').rglob('*'):
    if file.is_file() and 'd' in file.parts[-2:][0] or file.name.startswith(('manifest', 'd')):
      if file.is_file():
        file.write_bytes(b'garbage')
  with checkpoint.Checkpoints(tmp_path, config=CONFIG) as c:
    step, back = c.restore(abstract(state()))
  assert step == 1 and checkpoint.same(back, state(1))
  assert 'steps/2 is damaged' in capsys.readouterr().out


def test_another_config(tmp_path):
  saved(tmp_path)
  with pytest.raises(checkpoint.ConfigMismatch, match=r'model.d_model: 8 -> 16') as error:
    checkpoint.Checkpoints(tmp_path, config={'seed': 0, 'model': {'d_model': 16}})
  assert '--workdir' in str(error.value) and 'seed' not in str(error.value)


def test_another_architecture(tmp_path):
  saved(tmp_path)
  with (checkpoint.Checkpoints(tmp_path, config=CONFIG) as c, pytest.raises(ValueError, match=r'\(8, 8\).*\(8, 9\)')):
    c.restore(abstract(state(width=9)))


def test_final_weights(tmp_path):
  params = state().params['policy']
  assert not checkpoint.is_finished(tmp_path / 'final')
  checkpoint.save_params(tmp_path / 'final', params, {'head': 'lm', 'accuracy': 0.7})
  assert checkpoint.is_finished(tmp_path / 'final')
  assert checkpoint.load_info(tmp_path / 'final') == {'head': 'lm', 'accuracy': 0.7}
  assert checkpoint.same(checkpoint.load_params(tmp_path / 'final', abstract(params)), params)
  with pytest.raises(ValueError, match='weights of another model'):
    checkpoint.load_params(tmp_path / 'final', abstract({'w': params['w']}))
  assert np.asarray(params['w']).size
