"""The methods of the leaderboard, each a stage on the same SFT model.

  alignjax study leaderboard --workdir=runs/lab           the leaderboard itself
  alignjax run --config=leaderboard[:tiny]                its stages, without the table
  alignjax run --config=leaderboard --config.stages_to_run="('rloo',)"

Every method has the same budget: 12,000 rankings, and `iterations` of `episodes` samples where it
samples. RLOO and GRPO draw four samples of a prompt, of a quarter of the prompts. The three reward
models of ppo_ptx_ensemble have a third of the rankings each. PPO-ptx has the settings of the main
job; learning rates, beta and kl_coef of the others are those with the highest gold score on
development seed 1, of three to five settings each (docs/leaderboard.md).
"""

from alignjax.configs import base, dpo

SAMPLES_PER_PROMPT = 4
MEMBERS = ('rm_1', 'rm_2', 'rm_3')


def get_config(size: str = 'default'):
  c = base.get_config(size)
  s = c.stages
  s.dpo = dpo.get_config(size).stages.dpo.copy_and_resolve_references()
  s.dpo.loss.beta = 0.3
  s.ppo.optimizer.policy.lr = 2e-4
  s.rloo = grouped(s.ppo, 'leave_one_out')
  s.grpo = grouped(s.ppo, 'group_relative', kl_coef=0.3)
  s.grpo.kl.coef = 0.0
  for name in MEMBERS:
    s[name] = s.rm.copy_and_resolve_references()
    s[name].prompts = s.rm.prompts // len(MEMBERS)
  s.ppo_ptx_ensemble = s.ppo_ptx.copy_and_resolve_references()
  first, *others = (f'stage:{name}' for name in MEMBERS)
  with s.unlocked():
    s.ppo_ptx_ensemble.init.update(value=first, reward=first)
    for number, spec in enumerate(others, 2):
      s.ppo_ptx_ensemble.init[f'reward_{number}'] = spec
    s.ppo_ptx_ensemble.reward = dict(fn='alignjax.rewards:ensemble', combine='mean')
  c.stages_to_run = ('ppo', 'ppo_ptx', 'dpo', 'rloo', 'grpo', 'ppo_ptx_ensemble')
  return c


def grouped(ppo, advantage, **loss):
  """The PPO stage `ppo` with advantages of groups of samples and without a value loss."""
  made = ppo.copy_and_resolve_references()
  made.advantage = dict(fn=f'alignjax.ops:{advantage}')
  made.loss = dict(fn='alignjax.losses:policy_gradient', clip_eps=ppo.loss.clip_eps) | loss
  made.rollout.samples_per_prompt = SAMPLES_PER_PROMPT
  made.whiten_advantages = advantage == 'leave_one_out'
  return made
