"""A fork's DPO and RLOO/GRPO, named by 'module:function' as in a config, train."""

import functools

import jax
import jax.numpy as jnp
import pytest

from alignjax import optim, plugins, rollout, steps
from alignjax.stages.ppo_ptx import iteration
from alignjax.types import TrainState
from tests.fakes import assert_additive, comparison_batch, model, prompts


def new_state(params, lr):
  tx = optim.make({name: optim.adam(steps=100, lr=lr, clip_norm=1.0) for name in params})
  return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), extra={'kl_coef': jnp.float32(0.0)}), tx


def test_dpo_trains():
  _, nets, policy, _ = model()
  loss = functools.partial(plugins.bind(dict(fn='tests.fork_losses:dpo', beta=0.2), 'loss', given=('nets', 'ref')),
                           ref=model(seed=3)[2])  # not the policy itself: there every margin is rounding noise around 0
  batch = comparison_batch(0)
  assert_additive(loss, {'policy': policy}, batch, nets)
  state, tx = new_state({'policy': policy}, 3e-3)
  step = jax.jit(lambda s: steps.update(s, batch, None, loss_fn=loss, nets=nets, tx=tx))
  accuracy = [float(step(state)[1]['dpo/accuracy'])]
  for _ in range(30):
    state, metrics = step(state)
    accuracy.append(float(metrics['dpo/accuracy']))
  assert accuracy[0] < 0.8 and accuracy[-1] > 0.9


@pytest.mark.slow
def test_rloo_with_a_rule_for_a_reward_trains():
  _, nets, policy, scalar = model()
  state, tx = new_state({'policy': policy, 'value': scalar}, 2e-2)
  step = jax.jit(functools.partial(
      iteration, key=jax.random.key(0), nets=nets, tx=tx, whiten=False, minibatches=1, inner_epochs=1, microbatches=1,
      ema_decay=None, kl_target=None, kl_horizon=None,
      loss_fn=plugins.bind(dict(fn='tests.fork_losses:policy_gradient', clip_eps=0.2), 'loss', given=('nets',)),
      advantage_fn=plugins.bind(dict(fn='tests.fork_losses:leave_one_out', samples_per_prompt=4), 'advantage'),
      rollout_fn=functools.partial(
          rollout.collect, max_tokens=6, stop_ids=(), samples_per_prompt=4,
          reward_fn=plugins.bind(dict(fn='tests.fork_losses:many_sevens'), 'reward', given=('nets', 'frozen')))))
  frozen = {'ref': policy, 'reward': scalar}
  scores = []
  for i in range(40):
    state, metrics, _ = step(state, frozen, (*prompts(i, rows=16), None))
    scores.append(float(metrics['objective/scores']))
  assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.3
