"""Pretraining from scratch on text, where no pretrained model is at hand: the sandbox's stand-in for GPT-3."""

from __future__ import annotations

from alignjax import plugins
from alignjax.data import batches, encode
from alignjax.stages.setup import (
  Setup,
  Stage,
  check_functions,
  initial_params,
  make_optimizer,
  make_state,
  records,
  seed_of,
  stage_key,
  steps_per_epoch,
)
from alignjax.stages.supervised import make_step


def build(setup: Setup, name: str) -> Stage:
  cfg = setup.config.stages[name]

  # 1. documents, one after the other, cut into full rows; every token is trained on
  rows = ptx_rows(setup, cfg.documents)
  num_steps = steps_per_epoch(len(rows.tokens), cfg.batch_size, cfg.epochs)

  # 2. a fresh (or given) language model and its optimizer
  tx = make_optimizer(cfg.optimizer, num_steps, f'stages.{name}')
  state = make_state(setup, {'policy': initial_params(setup, cfg.init.policy, 'lm', seed_of(name))}, tx)

  # 3. cross-entropy
  step = make_step(state, loss_fn=plugins.bind(cfg.loss, f'stages.{name}.loss', given=('nets',)), nets=setup.nets, tx=tx,
                   key=stage_key(setup, name), microbatches=cfg.microbatches, dropout=setup.policy_model.dropout > 0)

  def batch(i):
    index = batches.indices(len(rows.tokens), cfg.batch_size, i, (setup.config.seed, seed_of(name)))
    return setup.sharder.put(batches.take(rows, batches.local_slice(index)))

  return Stage(state, step, batch, num_steps, cfg.batch_size * rows.tokens.shape[1],
               finish=lambda state: (state.params['policy'], {'head': 'lm', 'rows': len(rows.tokens)}))


def check(setup: Setup, name: str) -> None:
  check_functions(setup.config.stages[name], f'stages.{name}')


def ptx_rows(setup: Setup, documents: int, split: str = 'train', length: int | None = None, kind: str | None = None):
  """Rows of pretraining text (TokenBatch), of data.row_length or `length` tokens. data.pack: documents do not see each other;
  else they stand one after the other in full rows, as in GPT-3's training (Brown et al. 2020, appendix B)."""
  texts = records(setup, 'pretrain', documents, split)
  texts = [r['text'] for r in texts if kind is None or r.get('kind') == kind]
  length, separator = length or setup.config.data.row_length, setup.template.separator
  if setup.config.data.pack:
    rows = ([separator, *setup.encode(text)] for text in texts)
    return encode.pack(((row, [1.0] * len(row)) for row in rows), length, setup.template.pad)
  return encode.documents(map(setup.encode, texts), length, separator)
