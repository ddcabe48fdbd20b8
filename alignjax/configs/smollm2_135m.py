"""SmolLM2-135M on human preferences, for one GPU of 24 GB or two CPU cores.

  alignjax run --config=smollm2_135m           one GPU of 24 GB or more
  alignjax run --config=smollm2_135m:cpu       two CPU cores: short lengths, few steps
  alignjax run --config=smollm2_135m:tiny      a few rows: does everything fit?

SFT on dolly, RM on UltraFeedback's rankings of four, PPO-ptx with WikiText. Data and checkpoint
come from the hub (`pip install datasets`); local ones: see recipe.py. On an NVIDIA H200 an RM step
takes 0.2 s and a PPO-ptx iteration 13.3 s, so its 300 iterations take 67 minutes (12 were run; 17.8
GiB). By arithmetic an A100 is slower by the ratio of their memories' rates, 2.4. docs/models.md
has the figures, also those of `:cpu`.
"""

from alignjax.configs import recipe


def get_config(size: str = 'default'):
  if size not in ('default', 'cpu', 'tiny'):
    raise ValueError(f"config argument {size!r} is none of ['default', 'cpu', 'tiny'].")
  small = size != 'default'
  c = recipe.get_config(
    'hf:HuggingFaceTB/SmolLM2-135M-Instruct',
    template='chat',
    data=dict(
      demonstrations='hf:databricks/databricks-dolly-15k:train',
      comparisons='hf:openbmb/UltraFeedback:train',
      prompts='hf:databricks/databricks-dolly-15k:train',
      pretrain='hf:Salesforce/wikitext/wikitext-103-raw-v1:train',
    ),
    mapping=dict(demonstrations='dolly', comparisons='ultrafeedback', prompts='dolly'),
    lengths=(96, 96, 192) if small else (512, 512, 1024),
    batch=8 if small else 64,
    episodes=8 if small else 256,
    iterations=12 if small else 300,
    lr=dict(sft=2e-5, rm=3e-5 if small else 1e-5, policy=2e-6, value=3e-5 if small else 1e-5),
    model=dict(
      dtype='float32' if small else 'bfloat16',
      remat='none' if small else 'full',
      logits_chunk=256 if small else 4096,
      max_length=2048,
    ),
  )
  if size == 'default':
    c.stages.ppo_ptx.microbatches = c.stages.sft.microbatches = 4
  if size == 'cpu':
    c.stages.sft.update(demonstrations=600, epochs=1, documents=200, log_every=1)
    c.stages.rm.update(
      prompts=400,
      evaluation_prompts=60,
      bias_demonstrations=64,
      responses_per_batch=16,
      log_every=2,
    )
    c.stages.ppo_ptx.update(prompts=400)
    c.stages.ppo_ptx.ptx.documents = 200
  return recipe.shrink(c) if size == 'tiny' else c
