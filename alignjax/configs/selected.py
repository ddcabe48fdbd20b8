"""The sandbox with checkpoints selected by the reward model, as in the paper, C.1.

  alignjax run --config=selected[:tiny]

SFT and PPO-ptx keep candidates; sft_selected and ppo_ptx_selected are stages that choose, the first
by the reward model's score, the second by that score less KL. The reward model starts from the last
SFT checkpoint, since none can be chosen before there is a reward model; PPO-ptx starts from the
chosen one.
"""

from ml_collections import config_dict

from alignjax.configs import base


def get_config(size: str = 'default'):
  c = base.get_config(size)
  s = c.stages
  del s.ppo
  s.sft.update(epochs=6, keep_candidates=6)  # the end of each epoch
  s.ppo_ptx.keep_candidates = 6
  s.sft_selected = selection('stage:sft', fn='alignjax.evals.reward.selection:reward')
  for role in ('policy', 'ref'):
    s.ppo_ptx.init[role] = 'stage:sft_selected'
  s.ppo_ptx_selected = selection(
    'stage:ppo_ptx',
    ref='stage:sft_selected',
    fn='alignjax.evals.reward.selection:reward_less_kl',
    kl_coef=s.ppo_ptx.kl.coef,
  )
  c.stages_to_run = ('ppo_ptx_selected',)
  c.report.policies = dict(
    pretrained='pretrain',
    sft='sft',
    sft_selected='sft_selected',
    ppo_ptx='ppo_ptx',
    ppo_ptx_selected='ppo_ptx_selected',
  )
  return c


def selection(*candidates, ref=None, source='sandbox:', mapping=None, count=200, **by):
  """A stage that chooses. ref None: no KL, as with temperature 0. On your own data:
  source='jsonl:validation_prompts.jsonl'."""

  def off():
    return config_dict.placeholder(str)

  return dict(
    build='alignjax.stages.selection:build',
    init=dict(reward='stage:rm', ref=ref or off()),
    candidates=candidates,
    by=by,
    prompts=dict(source=source, mapping=mapping or off(), count=count),
    temperature=1.0,
    rows=64,
    log_every=1,
    save_every=0,
  )
