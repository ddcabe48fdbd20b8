"""Several reward models in one reward."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import rewards, rounds, train
from alignjax.configs import reward_ensemble
from alignjax.setup.objects import make_setup
from alignjax.stages import ppo_ptx_plan
from alignjax.types import Networks
from tests.fakes import close

# Three members, two responses: each member's score of a response is its number for the last token.
TABLES = ((0.0, 1.0, 2.0), (0.0, 3.0, -2.0), (0.0, 2.0, 6.0))
SCORES = np.array([[1, 2], [3, -2], [2, 6]], np.float64)


def worst_but_one(scores):
  """A combination of a fork."""
  return jnp.sort(scores, axis=0)[1]


def no_scores(scores):
  return scores


def rewarded(**coefficients):
  nets = Networks(
    logits=None,
    logprobs=None,
    scalar=lambda table, tokens, mask: jnp.take(table, tokens),
    decoder=None,
  )
  frozen = {f'reward{end}': jnp.array(t) for end, t in zip(('', '_2', '_b'), TABLES, strict=True)}
  frozen['ref'] = jnp.full(3, jnp.nan)
  prompts, responses = jnp.zeros((2, 2), jnp.int32), jnp.array([[0, 1, 0], [0, 0, 2]])
  mask = jnp.array([[True, True, False], [True, True, True]])
  return rewards.ensemble(
    prompts, prompts == 0, responses, mask, nets=nets, frozen=frozen, **coefficients
  )


@pytest.mark.parametrize(
  'coefficients,wanted',
  [
    ({}, SCORES.mean(0)),
    (dict(combine='min'), [1, -2]),
    (dict(combine='uwo', uncertainty_coef=0.5), [2 - 0.5 * 2 / 3, 2 - 0.5 * 32 / 3]),
    (dict(combine='tests.test_ensemble:worst_but_one'), [2, 2]),
  ],
)
def test_combinations(coefficients, wanted):
  scores, metrics = rewarded(**coefficients)
  close(scores, wanted)
  close(metrics['objective/disagreement'], (math.sqrt(2 / 3) + math.sqrt(32 / 3)) / 2)


@pytest.fixture(scope='module')
def setup(tmp_path_factory):
  folder = tmp_path_factory.mktemp('ensemble')
  return make_setup(reward_ensemble.get_config('tiny'), folder, jax.devices()[:1])


def test_the_config_is_accepted_and_each_member_counts_as_work(setup):
  assert train.resolve(setup.config)[-3:] == ['warm', 'ppo_ptx_warm', 'between']
  train.find_builders(setup, train.resolve(setup.config))
  cfg = setup.config.stages.ppo_ptx
  assert ppo_ptx_plan.frozen_roles(cfg) == dict(
    ref='lm', reward='scalar', reward_2='scalar', reward_3='scalar'
  )
  one, three = (ppo_ptx_plan.work_of_iteration(setup, name) for name in ('ppo_ptx_warm', 'ppo_ptx'))
  tokens = cfg.rollout.episodes * setup.length
  assert three['tokens_scored'] - one['tokens_scored'] == 2 * tokens
  assert three['flops'] > one['flops']
  (work,) = ppo_ptx_plan.work_of_phases(setup, 'ppo_ptx')['reward']
  assert work.times == 3


@pytest.mark.parametrize(
  'init,fn,message',
  [
    (dict(rm_2='stage:rm_2'), 'ensemble', 'init.rm_2 is no network of this stage'),
    ({}, 'model_reward', r'init names 3 reward models, but stages.ppo_ptx.reward.fn reads one'),
    (dict(reward_2=None, reward_3=None), 'ensemble', 'init names one reward model'),
  ],
)
def test_reward_models_that_nothing_reads(setup, init, fn, message):
  config = setup.config.copy_and_resolve_references()
  stage = config.stages.ppo_ptx
  with config.unlocked():
    for role, spec in init.items():
      if spec is None:
        del stage.init[role]
      else:
        stage.init[role] = spec
    stage.reward = dict(fn=f'alignjax.rewards:{fn}')
  with pytest.raises(ValueError, match=message):
    ppo_ptx_plan.check_entries(setup._replace(config=config), 'ppo_ptx')


def test_rounds_train_one_reward_model():
  config = reward_ensemble.get_config('tiny')
  with config.unlocked():
    config.rounds = dict(policy='ppo_ptx', reward_model='rm')
  with pytest.raises(ValueError, match="init.reward_2='stage:rm_2', but rounds train one"):
    rounds.check_rewards(config)
  config.rounds.policy = 'ppo_ptx_warm'
  with pytest.raises(ValueError, match="init.reward='stage:warm', but rounds train one"):
    rounds.check_rewards(config)


@pytest.mark.parametrize(
  'combine,message',
  [
    ('tests.test_ensemble:no_scores', r'must return a score of each response.*float32\[3, 32\]'),
    ('median', 'reward.combine'),
  ],
)
def test_combinations_that_cannot_be(setup, combine, message):
  config = setup.config.copy_and_resolve_references()
  config.stages.ppo_ptx.reward.combine = combine
  with pytest.raises(ValueError, match=message):
    ppo_ptx_plan.check_returns(setup._replace(config=config), 'ppo_ptx')


def test_a_metric_must_be_a_number(setup, monkeypatch):
  monkeypatch.setattr(
    rewards, 'ensemble', lambda prompts, *_, nets, frozen: (jnp.zeros(len(prompts)), {'a': prompts})
  )
  config = setup.config.copy_and_resolve_references()
  config.stages.ppo_ptx.reward = dict(fn='alignjax.rewards:ensemble')
  with pytest.raises(ValueError, match="must return a number as its metric 'a'"):
    ppo_ptx_plan.check_returns(setup._replace(config=config), 'ppo_ptx')


@pytest.mark.long
def test_a_run(tmp_path):
  """PPO-ptx logs how far the members are apart, and their average weights are a reward model."""
  from alignjax.runtime import checkpoint, metrics

  c = reward_ensemble.get_config('tiny')
  c.report.policies, c.cpu_devices = {}, None
  train.main(c, tmp_path / 'run')
  log = metrics.read(tmp_path / 'run' / 'ppo_ptx' / 'metrics.jsonl')
  assert (log['objective/disagreement'] > 0).all() and (log['ppo/ratio_max_dev'] == 0).all()
  made = {
    name: checkpoint.load_info(tmp_path / 'run' / name / 'final')
    for name in ('rm', 'rm_2', 'rm_3', 'warm', 'between')
  }
  assert made['warm']['head'] == 'scalar' and made['between']['head'] == 'lm'
  assert len({made[name]['bias'] for name in ('rm', 'rm_2', 'rm_3')}) == 3
