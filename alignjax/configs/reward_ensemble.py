"""The sandbox with three reward models, which differ by their seeds.

  alignjax run --config=reward_ensemble[:tiny]

PPO-ptx against all three (alignjax/rewards.py: ensemble), against the average of their weights
(stages/average.py, WARM), and the average of SFT and the first policy. Other entries of
stages.ppo_ptx.reward.combine: mean, min, uwo.
"""

from alignjax.configs import base

MEMBERS = ('rm', 'rm_2', 'rm_3')


def average(*members, head='lm', fn='alignjax.stages.average:linear', **coefficients):
  """A stage that averages finished models: policies with head='lm', reward models with 'scalar'. fn
  and **coefficients: how; `slerp` takes the model that the others started from first."""
  return dict(
    build='alignjax.stages.average:build',
    members=members,
    head=head,
    merge=dict(fn=fn) | coefficients,
    log_every=1,
    save_every=0,
  )


def get_config(size: str = 'default'):
  c = base.get_config(size)
  s = c.stages
  del s.ppo
  for name in MEMBERS[1:]:  # The name decides what is drawn: data, order and head.
    s[name] = s.rm.copy_and_resolve_references()
  s.warm = average(*(f'stage:{name}' for name in MEMBERS), head='scalar')
  s.ppo_ptx_warm = s.ppo_ptx.copy_and_resolve_references()
  s.ppo_ptx_warm.init.reward = 'stage:warm'
  with s.unlocked():
    s.ppo_ptx.init.update(reward_2='stage:rm_2', reward_3='stage:rm_3')
    s.ppo_ptx.reward = dict(fn='alignjax.rewards:ensemble', combine='mean', uncertainty_coef=0.1)
  s.between = average('stage:sft', 'stage:ppo_ptx', weights=(0.5, 0.5))
  c.stages_to_run = ('ppo_ptx', 'ppo_ptx_warm', 'between')
  c.report.policies = dict(
    pretrained='pretrain',
    sft='sft',
    ppo_ptx='ppo_ptx',
    ppo_ptx_warm='ppo_ptx_warm',
    between='between',
  )
  return c
