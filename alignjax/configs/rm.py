"""The sandbox up to its stage 'rm'.

alignjax run --config=rm[:tiny]
"""

from alignjax.configs import base


def get_config(size: str = 'default'):
  c = base.get_config(size)
  c.stages_to_run = ('rm',)
  return c
