"""The sandbox up to its stage 'pretrain'.

alignjax run --config=pretrain[:tiny]
"""

from alignjax.configs import base


def get_config(size: str = 'default'):
  c = base.get_config(size)
  c.stages_to_run = ('pretrain',)
  return c
