"""InstructGPT 175B by the paper's numbers (instructgpt.py has them by section).

  alignjax run --config=instructgpt_175b --workdir=gs://BUCKET/instructgpt_175b --distributed

[ours] policy rate: the larger of the two that the paper tried, 2.55e-6 and 3.74e-6 (C.4); which one
was released is not reported. [ours] the mesh. Not run at this size by us.
"""

from ml_collections import config_dict

from alignjax.configs import instructgpt


def get_config():
  return instructgpt.get_config(
    '175b',
    sft_lr=5.03e-6,
    batch=8,
    init_lr=2.45e-6,
    policy_lr=3.74e-6,
    value_lr=5e-6,
    mesh=dict(data=config_dict.placeholder(int), fsdp=64, tensor=8),
    memory=dict(
      generate_rows=config_dict.placeholder(int),
      microbatches=1,
      rm_microbatches=1,
      sft_microbatches=1,
      logits_chunk=65_536,
      attention_chunk=512,
    ),
  )
