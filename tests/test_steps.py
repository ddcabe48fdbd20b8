"""One update equals plain optax; the moving average moves; batches are cut evenly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax import losses, optim, steps
from alignjax.stages.stage import compile_step, make_optimizer, steps_per_epoch
from alignjax.types import TrainState
from tests.fakes import close, model, token_batch


def state_of(params, tx, ema=None):
  return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), ema=ema)


@pytest.mark.parametrize('microbatches', [1, 2])
def test_update_is_a_gradient_step(microbatches):
  _, nets, policy, _ = model()
  params, tx = {'policy': policy}, optim.make({'policy': optax.sgd(0.1)})
  batch = token_batch(0)
  state, metrics = steps.update(
    state_of(params, tx),
    batch,
    None,
    loss_fn=losses.sft,
    nets=nets,
    tx=tx,
    microbatches=microbatches,
  )
  grads = jax.grad(lambda p: losses.sft(p, batch.normalized(), None, nets=nets)[0])(params)
  jax.tree.map(
    lambda new, p, g: close(new, p - 0.1 * g, rtol=1e-4, atol=1e-5), state.params, params, grads
  )
  norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
  close(metrics['optim/grad_norm_policy'], norm, rtol=1e-4)
  close(metrics['sft/loss'], losses.sft(params, batch.normalized(), None, nets=nets)[0], rtol=1e-4)


def test_item_18_the_moving_average_is_float32_and_moves():
  """In bfloat16, 1 + 0.008 * 0.01 would stay 1."""
  _, nets, policy, _ = model()
  tx = optim.make({'policy': optax.sgd(0.0)})
  params = {'policy': jax.tree.map(lambda p: jnp.full(p.shape, 1.01, jnp.bfloat16), policy)}
  ema = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.float32), policy)
  state, _ = steps.update(
    state_of(params, tx, ema),
    token_batch(0),
    None,
    loss_fn=losses.sft,
    nets=nets,
    tx=tx,
    ema_decay=0.992,
  )
  for leaf in jax.tree.leaves(state.ema):
    assert leaf.dtype == jnp.float32
    close(leaf, 1 + 0.008 * (float(jnp.bfloat16(1.01)) - 1), rtol=1e-6)


def test_split_keeps_rows_together_and_refuses_remainders():
  batch = {'a': jnp.arange(6), 'b': jnp.arange(12).reshape(6, 2)}
  cut = steps.split(batch, 3, jnp.array([5, 4, 3, 2, 1, 0]))
  assert cut['a'].tolist() == [[5, 4], [3, 2], [1, 0]]
  assert cut['b'][0].tolist() == [[10, 11], [8, 9]]
  with pytest.raises(ValueError, match='6 rows do not divide into 4'):
    steps.split(batch, 4)


def test_maxima_are_told_by_name():
  assert steps.is_maximum('ppo/ratio_max_dev') and steps.is_maximum('rollout/sampler_gap_max')
  assert not steps.is_maximum('max/loss') and not steps.is_maximum('ppo/maximal')


@pytest.mark.parametrize(
  'rows,epochs,batch,expected',
  [
    (100, 1.1, 10, 11),
    (12_725, 16, 32, 6_363),
    (10, 0.3, 1, 3),
    (7, 1, 2, 4),
    (5, 0, 2, 0),
    (1, 1, 64, 1),
  ],
)
def test_steps_of_epochs(rows, epochs, batch, expected):
  assert steps_per_epoch(rows, batch, epochs) == expected


def test_a_step_takes_the_buffers_of_its_state_and_leaves_the_batch():
  state, batch = (
    state_of({'policy': jnp.ones(3)}, optim.make({'policy': optax.sgd(0.1)})),
    jnp.ones(3),
  )
  step = compile_step(lambda state, batch: (state.replace(step=state.step + 1), {}, None), state)
  before = jax.tree.leaves(state)
  step(state, batch)
  assert all(x.is_deleted() for x in before) and not batch.is_deleted()


def test_the_only_update_of_a_run_is_not_a_warmup_from_zero():
  spec = dict(fn='alignjax.optim:adam', lr=0.1, schedule='cosine', warmup=0.05, final=0.1)
  params = {'policy': {'w': jnp.ones((2, 2))}}
  for steps_of_run in (0, 1):
    tx = make_optimizer({'policy': spec}, steps_of_run, 'stages.x')
    updates, _ = tx.update(params, tx.init(params), params)
    close(updates['policy']['w'], np.full((2, 2), -0.1), rtol=1e-3)
