"""Pretraining from scratch on text, where no pretrained model is at hand: in the sandbox it stands
in for GPT-3."""

from __future__ import annotations

from collections.abc import Callable

from alignjax.compiler import flops
from alignjax.data import batches, text
from alignjax.setup import adapters
from alignjax.setup.entries import check_counts
from alignjax.setup.objects import Setup, seed_of
from alignjax.setup.records import open_documents, records
from alignjax.stages import supervised
from alignjax.stages.abstract import Plan, token_rows
from alignjax.stages.stage import Stage, make_optimizer, make_state, steps_per_epoch


def build(setup: Setup, name: str) -> Stage:
  """The stage `name` of the config."""
  cfg = setup.config.stages[name]

  # 1. Documents are joined and cut into full rows, of which every token is trained on.
  rows = text_rows(setup, [r['text'] for r in records(setup, 'pretrain', cfg.documents)])
  num_steps = steps_per_epoch(len(rows.tokens), cfg.batch_size, cfg.epochs)

  # 2. A fresh (or given) language model and its optimizer.
  tx = make_optimizer(cfg.optimizer, num_steps, f'stages.{name}')
  parts = adapters.load(setup, name, {'policy': 'lm'}, {}, lambda role: seed_of(name))
  state = make_state(setup, parts.params, tx)

  # 3. The loss is the cross-entropy.
  compiled = supervised.stage_step(setup, name, tx, state)

  def batch(i):
    index = batches.indices(len(rows.tokens), cfg.batch_size, i, (setup.config.seed, seed_of(name)))
    return setup.sharder.put(batches.take(rows, setup.sharder.local(index)))

  return Stage(
    state=state,
    step=lambda state, batch: compiled(state, batch, parts.frozen),
    batch=batch,
    num_steps=num_steps,
    finish=lambda state: (
      state.params['policy'],
      {'head': 'lm', 'rows': len(rows.tokens)} | parts.info.get('policy', {}),
    ),
    work=lambda _: flops.training(
      setup.policy_model, cfg.batch_size, rows.tokens.shape[1], adapters=adapters.used(setup, name)
    ),
  )


def abstract_step(setup: Setup, name: str) -> Plan:
  """The compiled step, its arguments as shapes, and its work, without data or weights."""
  batch = token_rows(setup, setup.config.stages[name].batch_size, setup.config.data.row_length)
  return supervised.abstract_step(setup, name, batch)


def check(setup: Setup, name: str) -> None:
  """Raises ValueError for entries that cannot be, before any stage runs."""
  check_counts(setup, f'stages.{name}', 'pretrain', documents=setup.config.stages[name].documents)
  supervised.check(setup, name, abstract_step)


def text_rows(setup: Setup, texts: list[str], length: int | None = None):
  """The rows of pretraining text (TokenBatch), of `length` tokens, by default data.row_length."""
  return text.rows_of(
    texts,
    setup.text.template.document,
    length or setup.config.data.row_length,
    setup.text.template.pad,
    setup.config.data.pack,
  )


def text_mix(
  setup: Setup, documents: int | None, rows: int, seed: tuple[int, ...], length: int | None = None
) -> Callable:
  """(step, positions) -> rows of pretraining text, for a stage that mixes `rows` of them into every
  step."""
  return text.mix(
    open_documents(setup, documents), rows, lambda texts: text_rows(setup, texts, length), seed
  )
