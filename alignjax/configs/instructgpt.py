"""The paper's settings, shared by instructgpt_1b3.py, instructgpt_6b.py and instructgpt_175b.py.

Numbers with a section are the paper's. [ours] marks what it does not report, or what we do
differently; the reasons stand beside it. Data are files of yours (data/sources.py has the record
formats) and pretrained weights a finished stage's folder; hours and expected numbers on real
hardware have not been measured.
"""

import ml_collections
from ml_collections import config_dict

from alignjax.configs.base import adam, no_mapping

# Brown et al. 2020, Table 2.1; 1.3B with 16 heads of 128 as in Stiennon et al. 2020, Table 3 (Brown
# prints 24 x 128, which is not 2048). "6B" read as Brown's 6.7B: the usual reading, not stated by
# the paper.
SHAPES = {
  '1b3': dict(num_layers=24, d_model=2048, num_heads=16),
  '6b': dict(num_layers=32, d_model=4096, num_heads=32),
  '175b': dict(num_layers=96, d_model=12288, num_heads=96),
}
GPT3_VOCABULARY = 50257


def gpt3(size, **changes):
  """GPT-3 architecture (appendix C). [ours] bfloat16 where the paper has fp16; both keep float32
  master weights."""
  return (
    dict(
      vocab_size=GPT3_VOCABULARY,
      max_length=2048,
      positions='learned',
      norm='layernorm',
      mlp='gelu',
      tie_embeddings=True,
      dtype='bfloat16',
      remat='full',
      **SHAPES[size],
    )
    | changes
  )


def paper_adam(lr, **kw):
  """Adam(0.9, 0.95) (appendix C). [ours] epsilon 1e-5 as in Ziegler et al. 2019; no weight decay,
  no gradient clipping: the paper reports none of the three."""
  return adam(lr, eps=1e-5, clip_norm=config_dict.placeholder(float), **kw)


def ppo(ptx_coef, policy_lr, value_lr, memory):
  """C.4: 256k episodes in batches of 512, 8 minibatches of 64, one inner epoch, clip 0.2, KL
  coefficient 0.02, EMA 0.992, warmup over 10 iterations from a tenth, 8 pretraining examples an
  episode, value network from the RM with its own rate."""
  return dict(
    build='alignjax.stages.ppo_ptx:build',
    init=dict(policy='stage:ppo_init', value='stage:rm', ref='stage:ppo_init', reward='stage:rm'),
    prompts=31_144,  # Table 6
    # penalty [ours]: none
    rollout=dict(
      episodes=512,
      samples_per_prompt=1,
      temperature=1.0,
      missing_end_penalty=0.0,
      generate_rows=memory['generate_rows'],
      # A minibatch. Fewer rows would gather the weights more often.
      score_rows=64,
      segments=config_dict.placeholder(int),
      halvings=0,
      engine=None,  # of another program (stages/outside.py); None: the compiled program samples
    ),
    reward=dict(fn='alignjax.rewards:model_reward', rows=64),
    kl=dict(coef=0.02, target=config_dict.placeholder(float), horizon=config_dict.placeholder(int)),
    # lam [ours]: Stiennon et al. 2020
    advantage=dict(fn='alignjax.ops:gae', gamma=1.0, lam=0.95),
    whiten_advantages=True,  # [ours]: Ziegler et al. 2019
    # value: [ours]
    loss=dict(
      fn='alignjax.losses:ppo_ptx', ptx_coef=ptx_coef, clip_eps=0.2, value_clip=0.2, vf_coef=0.1
    ),
    ptx=dict(documents=2_000_000 if ptx_coef else 0, rows_per_episode=8 if ptx_coef else 0),
    optimizer=dict(
      policy=paper_adam(policy_lr, warmup=80, warmup_from=0.1), value=paper_adam(value_lr)
    ),
    minibatches=8,
    inner_epochs=1,
    microbatches=memory['microbatches'],
    packed_rows=(),
    # an update, and the average is evaluated: [ours], neither is reported
    ema_decay=0.992,
    keep='ema',
    iterations=500,
    log_every=1,
    save_every=25,
  )


def get_config(
  size: str,
  *,
  sft_lr: float,
  batch: int,
  init_lr: float,
  policy_lr: float,
  value_lr: float,
  mesh: dict,
  memory: dict,
) -> ml_collections.ConfigDict:
  """One model size. The reward model and the value network are 6B for every policy (section 3.5).

  memory: what changes memory and no result, for the slice that the mesh is meant for: generate_rows
    (responses sampled at a time), microbatches of a PPO minibatch, of the reward model's batch
    (rm_microbatches) and of a supervised one (sft_microbatches), and chunks (logits_chunk,
    attention_chunk). `alignjax estimate` says whether it fits.
  """

  def supervised(lr, epochs, **kw):
    return dict(
      build='alignjax.stages.sft:build',
      demonstrations=12_725,
      epochs=epochs,
      batch_size=batch,
      prompt_weight=0.0,  # [ours]: the paper does not say whether prompts are trained on
      microbatches=memory['sft_microbatches'],
      loss=dict(fn='alignjax.losses:sft'),
      log_every=10,
      save_every=500,
      # cosine to 10%, no warmup (C.1)
      optimizer=dict(policy=paper_adam(lr, schedule='cosine')),
      **kw,
    )

  c = ml_collections.ConfigDict()
  c.seed = 0
  c.stages_to_run = ('sft', 'ppo', 'ppo_ptx')
  c.max_bad_updates = 10  # so many in a row with a loss or gradient that is not finite end the run
  c.grace_seconds = 25.0  # from SIGTERM to the end: most schedulers give 30
  # 'none', 'wandb', 'trackio', 'mlflow' or 'module:function' (alignjax/runtime/trackers.py)
  c.tracker = 'none'
  c.tracker_project = 'alignjax'
  c.world = dict(seed=0)
  c.mesh = dict(mesh, sequence=1)
  c.sharding = dict(
    batch=('data', 'fsdp'),
    embed=('fsdp', 'sequence'),
    heads='tensor',
    kv_heads='tensor',
    mlp='tensor',
    sequence='tensor',  # of what each layer keeps for the way back
    table=('fsdp', 'sequence', 'tensor'),  # the embedding has no heads that tensor could split
    rows=config_dict.placeholder(tuple),  # of a batch that is sampled; None: batch and sequence
    # 50,257 is odd: the vocabulary axis stays whole
    vocab=config_dict.placeholder(str),
  )
  c.data = dict(
    tokenizer='openai-community/gpt2',
    template='plain',
    template_date=config_dict.placeholder(str),
    pretrain='jsonl:data/pretrain.jsonl.gz',
    demonstrations='jsonl:data/demonstrations.jsonl',
    comparisons='jsonl:data/comparisons.jsonl',
    prompts='jsonl:data/prompts.jsonl',
    # appendix C: prompts over 1k dropped, responses cut at 1k
    prompt_length=1024,
    response_length=1024,
    too_long='drop',
    pack=False,
    mapping=no_mapping(),
    # the paper's splits are files of their own, by user (3.2): experiments/prepare.py
    heldout=dict(share=0.0, seed=0),
    row_length=2048,
  )  # [ours]: the length of pretraining examples is not reported
  chunks = {name: memory[name] for name in ('logits_chunk', 'attention_chunk')}
  # residual dropout in SFT (C.1); RM and PPO run without
  c.model = gpt3(size, dropout=0.2, **chunks)
  c.reward_model = gpt3('6b', **chunks)
  c.stages = dict(
    sft=supervised(
      sft_lr,
      16,
      init=dict(policy=f'checkpoints/gpt3_{size}'),
      pretrain_mix=0.0,
      documents=0,
      # C.1: an epoch each, to choose from by RM score (stages/selection.py)
      keep_candidates=16,
    ),
    # the policy that PPO starts from and is held near: 2 epochs with 10% pretraining data (C.3): of
    # the loss [ours]
    ppo_init=supervised(
      init_lr, 2, init=dict(policy=f'checkpoints/gpt3_{size}'), pretrain_mix=0.1, documents=100_000
    ),
    rm=dict(
      build='alignjax.stages.rm:build',
      init=dict(reward='checkpoints/sft_6b'),
      prompts=33_207,
      responses=(4, 9),
      # Table 6: validation demonstrations
      policies=(),
      evaluation_prompts=0,
      bias_demonstrations=1_653,
      # C.2: 64 prompts of K <= 9, at most 2,304 comparisons
      responses_per_batch=576,
      k_buckets=(9,),
      row_lengths=(),
      epochs=1,
      microbatches=memory['rm_microbatches'],
      packed_rows=(),
      loss=dict(fn='alignjax.losses:reward_ranking'),
      optimizer=dict(reward=paper_adam(9e-6, schedule='cosine')),
      log_every=5,
      save_every=100,
    ),
    ppo=ppo(0.0, policy_lr, value_lr, memory),
    ppo_ptx=ppo(27.8, policy_lr, value_lr, memory),
  )
  c.report = dict(
    build='alignjax.report:build',
    policies=ml_collections.ConfigDict(),
    win_prompts=0,
    tax_items=0,
    truth_samples=0,
    toxicity_prompts=0,
    loss_documents=0,
  )
  return c
