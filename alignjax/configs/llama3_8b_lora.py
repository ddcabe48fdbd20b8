"""Llama-3-8B with low-rank adapters on a base of 4 bits, for one GPU of 80 GB.

  alignjax run --config=llama3_8b_lora         after `huggingface-cli login` (the weights are gated)
  alignjax run --config=llama3_8b_lora:tiny    a few rows: does everything fit?

The data of llama3_8b.py. Policy, reference, value and reward model are four sets of adapters on one
base of 6 GB (NF4 kernels, and embeddings and head in bfloat16), and the weights that sampling
reads are merged for each iteration, 16 GB. Nothing is measured yet.
"""

from alignjax.configs import llama3_8b


def get_config(size: str = 'default'):
  c = llama3_8b.get_config(size)
  c.mesh.update(data=None, fsdp=1)
  for name in ('sft', 'rm', 'ppo_ptx'):
    stage = c.stages[name]
    stage.lora.update(rank=16, alpha=32.0, quantization='nf4')
    for optimizer in stage.optimizer.values():
      optimizer.lr *= 10  # adapters need larger steps (docs/models.md)
  if size == 'default':
    c.stages.sft.microbatches = c.stages.rm.microbatches = c.stages.ppo_ptx.microbatches = 16
    c.stages.ppo_ptx.rollout.generate_rows = 128
  return c
