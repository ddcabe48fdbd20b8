"""The sandbox up to its stage 'rm'.

python experiments/run.py --config=configs/rm.py[:tiny]
"""

from experiments.configs import base


def get_config(size: str = 'default'):
  c = base.get_config(size)
  c.stages_to_run = ('rm',)
  return c
