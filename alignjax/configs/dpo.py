"""DPO on comparisons, in place of the reward model and PPO.

  alignjax run --config=dpo[:tiny]                   on the sandbox's comparisons
  alignjax run --config=dpo:smollm2[-cpu|-tiny]      SmolLM2 on UltraFeedback's rankings
  alignjax run --config=dpo --config.stages.dpo.loss="dict(fn='mylab.losses:ipo', beta=0.1)"

The stage is that of alignjax/stages/preference.py. The argument `smollm2` takes checkpoint and data
from smollm2_135m.py. Another loss is another dict in its place: it needs a function of your own and
no other line. Nothing is measured yet; the learning rate and beta are the usual ones and not tuned.
"""

from ml_collections import config_dict

from alignjax.configs import base, smollm2_135m

# What the stage has in common with the reward model.
SHARED = (
  'prompts',
  'responses',
  'policies',
  'label_noise',
  'responses_per_batch',
  'k_buckets',
  'row_lengths',
  'epochs',
  'microbatches',
  'packed_rows',
  'log_every',
  'save_every',
)


def get_config(size: str = 'default'):
  real = size.startswith('smollm2')
  c = (
    smollm2_135m.get_config(size.removeprefix('smollm2').removeprefix('-') or 'default')
    if real
    else base.get_config(size)
  )
  s = c.stages
  s.dpo = dict(
    build='alignjax.stages.preference:build',
    init=dict(policy='stage:sft', ref='stage:sft'),
    loss=dict(fn='alignjax.losses:dpo', beta=0.1),
    optimizer=dict(policy=base.adam(1e-6 if real else 2e-4, schedule='cosine', warmup=0.05)),
    lora=base.lora(),
    keep_candidates=config_dict.placeholder(int),
    **{key: s.rm[key] for key in SHARED},
  )
  for name in ('rm', 'ppo', 'ppo_ptx'):
    if name in s:
      del s[name]
  c.stages_to_run = ('dpo',)
  if real:
    c.report.policies = dict(pretrained=c.get_oneway_ref('checkpoint'), sft='sft', dpo='dpo')
  return c
