"""The default of the sandbox: the whole method in minutes on two CPU cores.

Every other config of the sandbox is this one with other `stages_to_run`. get_config('tiny') changes
sizes to a few steps of every stage: for tests and for a first look, not for findings.
"""

import ml_collections
from ml_collections import config_dict


def adam(lr, **kw):
  """Paper: Adam(0.9, 0.95) (appendix C). Clipping, epsilon and weight decay are ours: the paper
  reports none."""
  return (
    dict(
      fn='alignjax.optim:adam',
      lr=lr,
      schedule='constant',
      warmup=0,
      warmup_from=0.0,
      final=0.1,
      b1=0.9,
      b2=0.95,
      eps=1e-8,
      eps_form='torch',
      weight_decay=0.0,
      clip_norm=1.0,
    )
    | kw
  )


def lora(rank=0, alpha=32.0, targets=()):
  """Adapters in place of whole parameters (alignjax/models/lora.py); rank 0: none. targets: () is
  all projections. quantization: 'int8' or 'nf4' keep the frozen kernels in 8 or 4 bits."""
  return dict(rank=rank, alpha=alpha, targets=targets, quantization=config_dict.placeholder(str))


def ppo(ptx_coef, iterations, episodes):
  """RL settings, those of the paper (C.4) where it reports them and they carry over to this size:
  clip 0.2, fixed KL coefficient, one inner epoch, temperature 1, warmup over 10 iterations from a
  tenth, separate value network from the RM."""
  minibatches = 4
  return dict(
    build='alignjax.stages.ppo_ptx:build',
    init=dict(policy='stage:sft', value='stage:rm', ref='stage:sft', reward='stage:rm'),
    prompts=8192,
    rollout=dict(
      episodes=episodes,
      samples_per_prompt=1,
      temperature=1.0,
      missing_end_penalty=0.0,
      generate_rows=config_dict.placeholder(int),  # None: all episodes at once
      score_rows=config_dict.placeholder(int),  # None: the rows of one gradient
      segments=config_dict.placeholder(int),  # None: by the length of responses
      halvings=0,
      engine=None,  # of another program (stages/outside.py); None: the compiled program samples
    ),
    reward=dict(fn='alignjax.rewards:model_reward'),
    kl=dict(coef=0.1, target=None, horizon=None),
    advantage=dict(fn='alignjax.ops:gae', gamma=1.0, lam=0.95),
    whiten_advantages=True,
    loss=dict(
      fn='alignjax.losses:ppo_ptx', ptx_coef=ptx_coef, clip_eps=0.2, value_clip=None, vf_coef=1.0
    ),
    ptx=dict(documents=40_000 if ptx_coef else 0, rows_per_episode=2 if ptx_coef else 0),
    optimizer=dict(
      policy=adam(5e-4, warmup=min(10, iterations // 2) * minibatches, warmup_from=0.1),
      value=adam(1e-3),
    ),
    minibatches=minibatches,
    inner_epochs=1,
    microbatches=1,
    packed_rows=(),  # parts of a batch that its live tokens may be packed into (packing.py)
    ema_decay=None,
    keep='policy',
    lora=lora(),
    iterations=iterations,
    log_every=1,
    save_every=20,
    keep_candidates=config_dict.placeholder(int),
  )


def no_mapping():
  """Records with our field names; see alignjax/data/mappings.py."""
  return {
    kind: config_dict.placeholder(str)
    for kind in ('pretrain', 'demonstrations', 'comparisons', 'prompts')
  }


def get_config(size: str = 'default') -> ml_collections.ConfigDict:
  sizes = dict(
    default=dict(
      documents=110_000,
      demos=400,
      prompts=12_000,
      evaluation=200,
      episodes=128,
      iterations=120,
      layers=2,
      width=96,
      tasks=2000,
      questions=8,
    ),
    tiny=dict(
      documents=4_000,
      demos=128,
      prompts=256,
      evaluation=24,
      episodes=32,
      iterations=6,
      layers=1,
      width=32,
      tasks=128,
      questions=1,
    ),
  )
  if size not in sizes:
    raise ValueError(f'config argument {size!r} is none of {sorted(sizes)}.')
  s = ml_collections.ConfigDict(sizes[size])
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.stages_to_run = ('ppo_ptx',)  # those they start from run first
  c.max_bad_updates = 10  # so many in a row with a loss or gradient that is not finite end the run
  c.grace_seconds = 25.0  # from SIGTERM to the end: most schedulers give 30
  # 'none', 'wandb', 'trackio', 'mlflow' or 'module:function' (alignjax/runtime/trackers.py)
  c.tracker = 'none'
  c.tracker_project = 'alignjax'
  # the folder of encoded sources that are large; None: alignjax in the user's folder of caches
  c.data_cache = config_dict.placeholder(str)
  c.world = dict(seed=c.get_oneway_ref('seed'))
  # Two halves of a batch of these small networks, one on each core, take 0.8 to 0.95 of the time of
  # two cores that share every operation. None, or XLA_FLAGS: as jax decides.
  c.cpu_devices = 2
  # data None: all that is left. sequence: devices that share the tokens of each row
  c.mesh = dict(data=config_dict.placeholder(int), fsdp=1, tensor=1, sequence=1)
  c.sharding = dict(
    batch=('data', 'fsdp'),
    embed=('fsdp', 'sequence'),
    heads='tensor',
    kv_heads='tensor',
    mlp='tensor',
    vocab='tensor',
    rows=config_dict.placeholder(tuple),  # of a batch that is sampled; None: batch and sequence
  )
  # forms: alignjax/data/templates.py
  c.data = dict(
    tokenizer='sandbox:',
    template=config_dict.placeholder(str),
    # of a chat template that prints the day; None: the run's first day
    template_date=config_dict.placeholder(str),
    pretrain='sandbox:',
    demonstrations='sandbox:',
    comparisons='sandbox:',
    prompts='sandbox:',
    mapping=no_mapping(),
    # of the prompts of files: no stage is trained on them (setup/records.py)
    heldout=dict(share=0.05, seed=0),
    prompt_length=24,
    response_length=20,
    row_length=64,
    too_long='error',
    pack=False,
  )
  c.model = dict(
    num_layers=s.layers,
    d_model=s.width,
    num_heads=4,
    max_length=96,
    positions='rotary',
    rope_theta=1000.0,
    embedding_std=0.05,
    embedding_scale=0.5 * s.width**0.5,
    tie_embeddings=True,
    qkv_bias=False,
  )
  c.reward_model = ml_collections.ConfigDict()  # empty: as the policy

  c.stages = dict(
    pretrain=dict(
      build='alignjax.stages.pretrain:build',
      init=dict(policy='random'),
      documents=s.documents,
      epochs=1,
      batch_size=16,
      microbatches=1,
      loss=dict(fn='alignjax.losses:sft'),
      optimizer=dict(policy=adam(4e-3, schedule='cosine', warmup=0.05, weight_decay=0.05)),
      log_every=20,
      save_every=500,
    ),
    sft=dict(
      build='alignjax.stages.sft:build',
      init=dict(policy='stage:pretrain'),
      demonstrations=s.demos,
      epochs=3,
      batch_size=16,
      prompt_weight=0.0,
      pretrain_mix=0.1,  # a share of the loss (stages/sft.py)
      documents=2000,
      microbatches=1,
      lora=lora(),
      loss=dict(fn='alignjax.losses:sft'),
      optimizer=dict(policy=adam(5e-4, schedule='cosine', warmup=0.05)),
      log_every=5,
      save_every=50,
      keep_candidates=config_dict.placeholder(int),  # to choose from: configs/selected.py
    ),
    rm=dict(
      build='alignjax.stages.rm:build',
      init=dict(reward='stage:sft'),
      prompts=s.prompts,
      responses=(4, 9),
      policies=(
        dict(init='stage:sft', temperature=1.0, share=0.5),
        dict(init='stage:sft', temperature=1.5, share=0.25),
        dict(init='stage:pretrain', temperature=1.0, share=0.25),
      ),
      label_noise=0.0,  # the share of prompts with a random order instead of a labeler's ranking
      evaluation_prompts=s.evaluation,
      bias_demonstrations=min(512, 4 * s.demos),
      responses_per_batch=54,  # 6 prompts of up to 9 an update
      k_buckets=(5, 7, 9),
      row_lengths=(28,),
      epochs=1,
      microbatches=1,
      packed_rows=(),
      lora=lora(),
      loss=dict(fn='alignjax.losses:reward_ranking'),
      optimizer=dict(reward=adam(2e-3, schedule='cosine', warmup=0.05)),
      log_every=20,
      save_every=500,
    ),
    ppo=ppo(0.0, s.iterations, s.episodes),
    ppo_ptx=ppo(8.0, s.iterations, s.episodes),
  )
  c.report = dict(
    build='alignjax.report:build',
    policies=ml_collections.ConfigDict(),
    win_prompts=s.tasks // 4,
    tax_items=s.tasks,
    truth_samples=s.questions,
    toxicity_prompts=s.tasks // 4,
    loss_documents=s.tasks,
  )
  return c
