"""A judge of TruthfulQA's answers: SFT of any checkpoint on the released judgments (Lin et al.
2022; the paper's appendix D).

  python experiments/run.py --config=configs/truth_judge.py
  --config.data.demonstrations=jsonl:finetune_truth.jsonl python experiments/run.py
  --config=configs/truth_judge.py:info --config.data.demonstrations=jsonl:finetune_info.jsonl

The two files are in the data folder of github.com/sylinrl/TruthfulQA. `:info` is the judge of
informativeness; `:truth-cpu`, `:info-cpu` are 800 judgments for two CPU cores, `:truth-tiny`,
`:info-tiny` a few rows. A judge reads "Q: ...\\nA: ...\\nTrue:" (or "Helpful:") and says " yes" or
" no". A tenth of the questions is held out by the mapping; the agreement there:

  python experiments/evaluate.py --models=judge=runs/truth_judge-s0/sft --tasks=judge_agreement \\
    --data=judge_agreement=finetune_truth.jsonl

The originals are fine-tunes of GPT-3 6.7B for 5 epochs; of the full size here nothing is measured,
docs/evaluations.md has those of `:cpu`.
"""

from ml_collections import config_dict

from experiments.configs import base


def get_config(arg: str = 'truth'):
  kind, _, size = arg.partition('-')
  if kind not in ('truth', 'info') or size not in ('', 'cpu', 'tiny'):
    raise ValueError(
      f"config argument {arg!r} has not the form 'truth' or 'info', with '-cpu' or '-tiny' behind "
      f'it or nothing.'
    )
  small = size != ''
  c = base.get_config()
  c.checkpoint = 'hf:HuggingFaceTB/SmolLM2-135M' if small else 'hf:HuggingFaceTB/SmolLM2-1.7B'
  spec = lambda: c.get_oneway_ref('checkpoint')  # one each, so that a flag changes one entry alone
  c.stages_to_run = ('sft',)
  none = lambda: config_dict.placeholder(str)
  c.data = dict(
    tokenizer=spec(),
    template='plain',
    template_date=none(),
    pretrain=none(),
    comparisons=none(),
    prompts=none(),
    heldout=dict(share=0.0, seed=0),  # the mapping holds out a tenth of the questions
    demonstrations=f'jsonl:finetune_{kind}.jsonl',
    mapping={**base.no_mapping(), 'demonstrations': 'truthfulqa_judge'},
    prompt_length=90 if small else 120,
    response_length=6,
    row_length=96 if small else 126,
    too_long='drop',
    pack=True,
  )
  c.model = dict(
    source=spec(),
    dtype='float32' if small else 'bfloat16',
    remat='none' if small else 'full',
    logits_chunk=256,
    max_length=2048,
  )
  s = c.stages
  del s.pretrain, s.rm, s.ppo, s.ppo_ptx
  s.sft.update(
    init=dict(policy=spec()),
    demonstrations=config_dict.placeholder(int),
    epochs=5,
    batch_size=8 if small else 32,
    pretrain_mix=0.0,
    documents=0,
    log_every=10,
    optimizer=dict(policy=base.adam(1e-4 if small else 1e-5, schedule='cosine', warmup=0.05)),
  )
  if small:
    s.sft.update(demonstrations=800 if size == 'cpu' else 32, epochs=1, log_every=1)
  return c
