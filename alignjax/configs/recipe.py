"""SFT, reward model and PPO-ptx on a pretrained checkpoint and real data: what the recipes share.

A recipe (smollm2_135m.py, pythia_1b_hh.py, llama3_8b.py) names a checkpoint and sources and changes
numbers. Everything is an entry of the config, so another checkpoint or file needs no edit:

  alignjax run --config=smollm2_135m --config.checkpoint=hf:/models/mine \\
    --config.data.comparisons=jsonl:pairs.jsonl.gz --config.data.mapping.comparisons=hh_rlhf
"""

import ml_collections
from ml_collections import config_dict

from alignjax.configs import base


def get_config(
  checkpoint: str,
  *,
  template: str,
  data: dict,
  mapping: dict,
  lengths: tuple[int, int, int],
  batch: int,
  episodes: int,
  iterations: int,
  lr: dict,
  model: dict,
  mesh: dict | None = None,
) -> ml_collections.ConfigDict:
  """The pipeline from `checkpoint`.

  Args:
    template: see alignjax/data/templates.py.
    data, mapping: sources and mappings of 'pretrain', 'demonstrations', 'comparisons', 'prompts'.
    lengths: (prompt, response, pretraining row) in tokens.
    batch: rows of SFT, and responses of an RM update (of prompts with the most responses).
    episodes, iterations: of PPO.
    lr: {'sft', 'rm', 'policy', 'value'}.
    model: changes to the checkpoint's architecture: dtype, remat, logits_chunk, max_length.
  """
  c = base.get_config()
  c.checkpoint = checkpoint

  def spec():
    return c.get_oneway_ref('checkpoint')  # one each, so that a flag changes one entry alone

  c.stages_to_run = ('ppo_ptx',)
  c.mesh.update(mesh or {})
  c.cpu_devices = config_dict.placeholder(int)  # each would hold the weights once more
  kinds = ('pretrain', 'demonstrations', 'comparisons', 'prompts')
  c.data = dict(
    tokenizer=spec(),
    template=template,
    template_date=config_dict.placeholder(str),
    mapping={**base.no_mapping(), **mapping},
    heldout=dict(share=0.02, seed=0),
    prompt_length=lengths[0],
    response_length=lengths[1],
    row_length=lengths[2],
    too_long='drop',
    pack=True,
    **{kind: data[kind] for kind in kinds},
  )
  c.model = dict(source=spec(), **model)
  s = c.stages
  del s.pretrain, s.ppo

  def adam(rate, **kw):
    return base.adam(rate, schedule='cosine', warmup=0.05, **kw)

  s.sft.update(
    init=dict(policy=spec()),
    demonstrations=config_dict.placeholder(int),
    epochs=2,
    batch_size=batch,
    documents=config_dict.placeholder(int),
    pretrain_mix=0.1,
    optimizer=dict(policy=adam(lr['sft'])),
  )
  s.rm.update(
    prompts=config_dict.placeholder(int),
    policies=(),
    evaluation_prompts=500,
    bias_demonstrations=200,
    responses_per_batch=batch,
    k_buckets=(2, 4, 9),
    row_lengths=(sum(lengths[:2]) // 2,),
    log_every=5,
    save_every=100,
    optimizer=dict(reward=adam(lr['rm'])),
  )
  p = s.ppo_ptx
  p.prompts, p.iterations, p.save_every = config_dict.placeholder(int), iterations, 10
  p.kl.coef, p.rollout.episodes, p.loss.ptx_coef = 0.05, episodes, 1.0
  p.ptx.update(documents=config_dict.placeholder(int), rows_per_episode=1)
  p.optimizer.policy.update(
    base.adam(lr['policy'], warmup=min(10, iterations // 2) * p.minibatches, warmup_from=0.1)
  )
  p.optimizer.value.update(base.adam(lr['value']))
  # at the end: --config.report.tasks="('truthfulqa_mc',)" (`alignjax evaluate --tasks=help`)
  c.report = dict(
    build='alignjax.report:tasks',
    policies=dict(pretrained=spec(), sft='sft', ppo_ptx='ppo_ptx'),
    baseline='pretrained',
    tasks=(),
    data=ml_collections.ConfigDict(),
    limit=200,
  )
  return c


def check_size(size: str, known: tuple[str, ...] = ('default', 'tiny')) -> None:
  """ValueError for an argument of get_config that is none of those known."""
  if size not in known:
    raise ValueError(f'config argument {size!r} is none of {list(known)}.')


def shrink(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """`:tiny` of every recipe: the same stages on a few rows, to see that checkpoint and data fit
  before the long run."""
  c.data.update(
    prompt_length=96,
    response_length=16,
    row_length=32,
    too_long='truncate',
    heldout=dict(share=0.1, seed=0),
  )
  s = c.stages
  s.sft.update(demonstrations=16, epochs=1, batch_size=8, documents=20, log_every=1)
  s.rm.update(
    prompts=24,
    evaluation_prompts=4,
    bias_demonstrations=8,
    responses_per_batch=8,
    row_lengths=(),
    log_every=1,
  )
  s.ppo_ptx.update(prompts=24, iterations=3)
  s.ppo_ptx.rollout.episodes = 8
  s.ppo_ptx.ptx.documents = 20
  s.ppo_ptx.optimizer.policy.warmup = 4
  s.ppo_ptx.update(microbatches=1)
  return c
