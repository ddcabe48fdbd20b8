"""Pythia-1B on hh-rlhf, in its dialogue form, for one GPU of 80 GB.

  alignjax run --config=pythia_1b_hh
  alignjax run --config=pythia_1b_hh:tiny      a few rows: does everything fit?

SFT on the chosen answers, RM on the pairs, PPO-ptx with WikiText. Data and checkpoint come from the
hub (`pip install datasets`); local ones: see recipe.py. Nothing is measured yet. By arithmetic (6
FLOPs per parameter and token to train, 2 to score, a third more for remat, at 40% of an H100's
peak): SFT 4 minutes, RM half an hour (161k pairs), PPO-ptx 1 hour, a few minutes of it for
sampling.
"""

from alignjax.configs import recipe


def get_config(size: str = 'default'):
  recipe.check_size(size)
  hh = 'hf:Anthropic/hh-rlhf:train'
  c = recipe.get_config(
    'hf:EleutherAI/pythia-1b',
    template='dialogue',
    data=dict(
      demonstrations=hh,
      comparisons=hh,
      prompts=hh,
      pretrain='hf:Salesforce/wikitext/wikitext-103-raw-v1:train',
    ),
    mapping=dict(
      demonstrations='hh_rlhf_demonstrations',
      comparisons='hh_rlhf',
      prompts='hh_rlhf_demonstrations',
    ),
    lengths=(384, 128, 512),
    batch=64,
    episodes=256,
    iterations=300,
    lr=dict(sft=1e-5, rm=1e-5, policy=1.5e-6, value=1e-5),
    model=dict(dtype='bfloat16', remat='full', logits_chunk=4096),
  )
  c.stages.ppo_ptx.microbatches = c.stages.sft.microbatches = 4
  c.stages.sft.demonstrations = 20_000
  return recipe.shrink(c) if size == 'tiny' else c
