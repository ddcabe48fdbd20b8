"""InstructGPT 6B by the paper's numbers (instructgpt.py has them by section).

  alignjax run --config=instructgpt_6b --workdir=gs://BUCKET/instructgpt_6b --distributed

[ours] policy rate: the released one is not reported; the scan was 2.55e-6 to 2.55e-5, and above
8.05e-6 PPO without ptx diverged (C.4, E.9). [ours] the mesh. Not run at this size by us.
"""

from ml_collections import config_dict

from alignjax.configs import instructgpt


def get_config():
  return instructgpt.get_config(
    '6b',
    sft_lr=9.65e-6,
    batch=32,
    init_lr=1.04e-5,
    policy_lr=8.05e-6,
    value_lr=9e-6,
    mesh=dict(data=config_dict.placeholder(int), fsdp=16, tensor=4),
    memory=dict(
      generate_rows=256,
      microbatches=4,
      rm_microbatches=4,
      sft_microbatches=1,
      logits_chunk=16_384,
      attention_chunk=512,
    ),
  )
