"""Supervised fine-tuning on demonstrations (paper sections 3.5 and C.1), with an optional pretraining mix (C.3)."""

from __future__ import annotations

import jax
import numpy as np

from alignjax import throughput
from alignjax.data import batches, encode
from alignjax.stages import supervised
from alignjax.stages.abstract import Plan
from alignjax.stages.pretrain import text_mix
from alignjax.stages.setup import (
  Setup,
  Stage,
  check_functions,
  fit,
  initial_params,
  make_optimizer,
  make_state,
  records,
  seed_of,
  steps_per_epoch,
)


def build(setup: Setup, name: str) -> Stage:
  cfg = setup.config.stages[name]
  seed = (setup.config.seed, seed_of(name))

  # 1. demonstrations: the response and its end token are trained on, the prompt by choice
  rows = [(setup.template.prompt(r['prompt']), [setup.template.response(r['response'])])
          for r in records(setup, 'demonstrations', cfg.demonstrations)]
  pairs = [(prompt, responses[0]) for prompt, responses in fit(setup, 'demonstrations', rows).rows]
  if setup.config.data.pack:
    rows = encode.pack([(p + r, [cfg.prompt_weight] * len(p) + [1.0] * len(r)) for p, r in pairs], setup.length,
                       setup.template.pad)
  else:
    rows = encode.demonstrations(pairs, setup.length, setup.template.pad, cfg.prompt_weight)

  # 2. the pretraining mix: a share of each batch's rows (the paper's 10%, whose unit it does not report)
  mixed = round(cfg.pretrain_mix * cfg.batch_size)
  demos = cfg.batch_size - mixed
  text = text_mix(setup, cfg.documents, mixed, (*seed, 1), setup.length) if mixed else None
  num_steps = steps_per_epoch(len(rows.tokens), demos, cfg.epochs)

  # 3. the model to start from, its optimizer, cross-entropy
  tx = make_optimizer(cfg.optimizer, num_steps, f'stages.{name}')
  state = make_state(setup, {'policy': initial_params(setup, cfg.init.policy, 'lm', seed_of(name))}, tx)
  step = supervised.stage_step(setup, name, tx, state)

  def batch(i):
    own = setup.sharder.local(np.arange(cfg.batch_size))  # of the batch's rows: demonstrations first, then text
    parts = [batches.take(rows, batches.indices(len(rows.tokens), demos, i, seed)[own[own < demos]])]
    if own[-1] >= demos:
      parts.append(text(i, own[own >= demos] - demos))
    return setup.sharder.put(jax.tree.map(lambda *x: np.concatenate(x), *parts))

  return Stage(state, step, batch, num_steps,
               finish=lambda state: (state.params['policy'], {'head': 'lm', 'demonstrations': len(pairs)}),
               work=lambda _: throughput.training(setup.policy_model, cfg.batch_size, setup.length))


def abstract_step(setup: Setup, name: str) -> Plan:
  return supervised.abstract_step(setup, name, setup.length)


def check(setup: Setup, name: str) -> None:
  cfg = setup.config.stages[name]
  check_functions(cfg, f'stages.{name}')
  if round(cfg.pretrain_mix * cfg.batch_size) >= cfg.batch_size:
    raise ValueError(f'stages.{name}.pretrain_mix={cfg.pretrain_mix} leaves no demonstration in a batch of {cfg.batch_size}.')
