"""The main job: the whole method on the embedded sandbox, ending with the paper's findings in miniature.

  python experiments/run.py --config=configs/ppo_ptx.py          two CPU cores, under ten minutes
  python experiments/run.py --config=configs/ppo_ptx.py:tiny     under two minutes; numbers mean nothing

Runs pretrain, sft, rm, ppo (ptx_coef 0) and ppo_ptx, then writes WORKDIR/report.md, report.json and plots. Numbers to
expect: README, "Results".
"""

from experiments.configs import base


def get_config(size: str = 'default'):
  c = base.get_config(size)
  c.stages_to_run = ('ppo', 'ppo_ptx')
  c.report.policies = dict(pretrained='pretrain', pretrained_prompted='pretrain', sft='sft', ppo='ppo', ppo_ptx='ppo_ptx')
  return c
