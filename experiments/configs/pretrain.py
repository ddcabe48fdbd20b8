"""The sandbox up to its stage 'pretrain'.

python experiments/run.py --config=configs/pretrain.py[:tiny]
"""

from experiments.configs import base


def get_config(size: str = 'default'):
  c = base.get_config(size)
  c.stages_to_run = ('pretrain',)
  return c
