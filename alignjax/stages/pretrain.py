"""Pretraining from scratch on text, where no pretrained model is at hand: in the sandbox it stands
in for GPT-3."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from alignjax.compiler import flops
from alignjax.data import batches, text
from alignjax.setup import adapters, encoded
from alignjax.setup.entries import check_counts
from alignjax.setup.objects import Setup, seed_of
from alignjax.stages import supervised
from alignjax.stages.abstract import Plan, token_rows
from alignjax.stages.stage import Stage, make_optimizer, make_state, steps_per_epoch


def build(setup: Setup, name: str) -> Stage:
  """The stage `name` of the config."""
  cfg = setup.config.stages[name]

  # 1. Documents are joined and cut into full rows, of which every token is trained on.
  documents, to_rows = encoded.documents(setup, cfg.documents)
  rows = to_rows(np.arange(documents), None)
  num_steps = steps_per_epoch(rows.count, cfg.batch_size, cfg.epochs)
  order = batches.ordered(rows.count, cfg.batch_size, (setup.config.seed, seed_of(name)))

  # 2. A fresh (or given) language model and its optimizer.
  tx = make_optimizer(cfg.optimizer, num_steps, f'stages.{name}')
  parts = adapters.load(setup, name, {'policy': 'lm'}, {}, lambda role: seed_of(name))
  state = make_state(setup, parts.params, tx)

  # 3. The loss is the cross-entropy.
  compiled = supervised.stage_step(setup, name, tx, state)

  def batch(i):
    return setup.sharder.put(rows.take(setup.sharder.local(order(i))))

  return Stage(
    state=state,
    step=lambda state, batch: compiled(state, batch, parts.frozen),
    batch=batch,
    num_steps=num_steps,
    finish=lambda state: (
      state.params['policy'],
      {'head': 'lm', 'rows': rows.count} | parts.info.get('policy', {}),
    ),
    work=lambda _: flops.training(
      setup.policy_model,
      cfg.batch_size,
      setup.config.data.row_length,
      adapters=adapters.used(setup, name),
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


def text_mix(
  setup: Setup, documents: int | None, rows: int, seed: tuple[int, ...], length: int | None = None
) -> Callable:
  """(step, positions) -> rows of pretraining text, for a stage that mixes `rows` of them into every
  step."""
  count, to_rows = encoded.documents(setup, documents)
  return text.mix(count, rows, lambda numbers: to_rows(numbers, length), seed)
