"""Llama-3-8B on UltraFeedback's rankings, for eight GPUs of 80 GB or a TPU slice.

  alignjax run --config=llama3_8b           after `huggingface-cli login` (the weights are gated)
  alignjax run --config=llama3_8b:tiny      a few rows: does everything fit?

The GPUs are those of one host; a slice needs as much memory (eight chips of v5p). Parameters,
moments and the four models are sharded over all devices (fsdp): 320 GB in all, and 16 GB per device
for the weights that sampling gathers. Nothing is measured yet. By arithmetic (as in
pythia_1b_hh.py, eight H100): SFT 3 minutes, RM 1 hour, PPO-ptx 3 hours, and half an hour to sample.
"""

from alignjax.configs import recipe


def get_config(size: str = 'default'):
  recipe.check_size(size)
  c = recipe.get_config(
    'hf:meta-llama/Meta-Llama-3-8B-Instruct',
    template='chat',
    data=dict(
      demonstrations='hf:databricks/databricks-dolly-15k:train',
      comparisons='hf:openbmb/UltraFeedback:train',
      prompts='hf:databricks/databricks-dolly-15k:train',
      pretrain='hf:Salesforce/wikitext/wikitext-103-raw-v1:train',
    ),
    mapping=dict(demonstrations='dolly', comparisons='ultrafeedback', prompts='dolly'),
    lengths=(1024, 512, 2048),
    batch=64,
    episodes=256,
    iterations=300,
    lr=dict(sft=1e-5, rm=5e-6, policy=1e-6, value=5e-6),
    mesh=dict(data=1, fsdp=8),
    model=dict(dtype='bfloat16', remat='full', logits_chunk=4096, max_length=4096),
  )
  c.stages.ppo_ptx.microbatches = 8
  c.stages.sft.microbatches, c.stages.rm.microbatches = 4, 2
  return recipe.shrink(c) if size == 'tiny' else c
