"""The main job: the whole method on the embedded sandbox, ending with the paper's findings in
miniature.

  python experiments/run.py --config=configs/ppo_ptx.py          README.md says how long it takes
  python experiments/run.py --config=configs/ppo_ptx.py:tiny     a few steps of each stage; numbers mean nothing
  python experiments/run.py --config=configs/ppo_ptx.py:bigger   also pretrains a model 2.5 times the size of the aligned one,
                                                                 for the report

Runs pretrain, sft, rm, ppo (ptx_coef 0) and ppo_ptx, then writes WORKDIR/report.md, report.json and
plots. docs/results.md has the numbers to expect.
"""

from experiments.configs import base


def get_config(size: str = 'default'):
  bigger = size == 'bigger'
  c = base.get_config('default' if bigger else size)
  c.stages_to_run = ('ppo', 'ppo_ptx')
  c.report.policies = dict(
    pretrained='pretrain', pretrained_prompted='pretrain', sft='sft', ppo='ppo', ppo_ptx='ppo_ptx'
  )
  if bigger:
    c.stages.pretrain_bigger = c.stages.pretrain.copy_and_resolve_references()
    c.stages.pretrain_bigger.model = dict(num_layers=3, d_model=128, embedding_scale=0.5 * 128**0.5)
    c.stages.pretrain_bigger.optimizer.policy.lr = 3e-3
    c.stages_to_run = ('pretrain_bigger', *c.stages_to_run)
    c.report.policies.pretrained_bigger = 'pretrain_bigger'
  return c
