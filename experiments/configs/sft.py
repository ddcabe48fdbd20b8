"""The sandbox up to its stage 'sft'.

python experiments/run.py --config=configs/sft.py[:tiny]
"""

from experiments.configs import base


def get_config(size: str = 'default'):
  c = base.get_config(size)
  c.stages_to_run = ('sft',)
  return c
