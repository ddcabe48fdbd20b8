"""The sandbox up to its stage 'sft'.

alignjax run --config=sft[:tiny]
"""

from alignjax.configs import base


def get_config(size: str = 'default'):
  c = base.get_config(size)
  c.stages_to_run = ('sft',)
  return c
