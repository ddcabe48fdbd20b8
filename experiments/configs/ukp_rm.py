"""A small reward model on which of two arguments convinces more, for held-out labelers: UKPConvArg's crowd votes (CC-BY 4.0).

  python experiments/heldout_labelers.py --config=configs/ukp_rm.py --rankings=9 --rounds=4 --folds=5 --seeds=3 \
    --comparisons=jsonl:DATA/ukp_convarg/judgments.jsonl.gz --config.data.demonstrations=jsonl:DATA/ukp_convarg/arguments.jsonl.gz

One layer of width 64 from random weights, so that a laptop trains fifteen of them: what it can pick up is length and some words.
`ukp_rm.py:smollm2` starts from SmolLM2-135M-Instruct instead, on a GPU. The rule "the longer argument wins" stands beside it in the
report. docs/evaluations.md has the numbers to expect.
"""

from experiments.configs import base


def get_config(size: str = 'small'):
  if size not in ('small', 'smollm2'):
    raise ValueError(f"config argument {size!r} is none of ['small', 'smollm2'].")
  c = base.get_config()
  c.stages_to_run = ('rm',)
  c.data.update(
    tokenizer='hf:HuggingFaceTB/SmolLM2-135M-Instruct',
    template='{prompt}\n',
    pretrain='',
    prompts='',
    comparisons='jsonl:data/ukp_convarg/judgments.jsonl.gz',
    demonstrations='jsonl:data/ukp_convarg/arguments.jsonl.gz',
    prompt_length=48,
    response_length=144,
    row_length=64,
    too_long='truncate',
    heldout=dict(share=0.125, seed=0),
  )  # of 32 prompts
  c.data.mapping.update(comparisons='ukp_convarg', demonstrations='ukp_convarg_demonstrations')
  c.model = dict(num_layers=1, d_model=64, num_heads=4, max_length=256, positions='learned')
  for name in list(c.stages):
    if name != 'rm':
      del c.stages[name]
  c.stages.rm.update(
    init=dict(reward='random'),
    prompts=None,
    policies=(),
    evaluation_prompts=None,
    bias_demonstrations=64,
    responses_per_batch=36,
    k_buckets=(9,),
    row_lengths=(112,),
    log_every=20,
    save_every=None,
    optimizer=dict(reward=base.adam(3e-3, schedule='cosine', warmup=0.05, weight_decay=0.1)),
  )
  if size == 'smollm2':
    c.checkpoint = 'hf:HuggingFaceTB/SmolLM2-135M-Instruct'
    c.data.tokenizer = c.get_oneway_ref('checkpoint')
    c.model = dict(source=c.get_oneway_ref('checkpoint'), dtype='bfloat16', max_length=2048)
    c.stages.rm.init.reward = c.get_oneway_ref('checkpoint')
    c.stages.rm.optimizer.reward.lr = 2e-5
  return c
