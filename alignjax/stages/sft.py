"""Supervised fine-tuning on demonstrations (sections 3.5 and C.1 of the paper), with an optional
pretraining mix (C.3).

pretrain_mix is the share of the loss, and so of the gradient, that belongs to pretraining text. The
paper mixes in "10% pretraining data" and does not report the unit. A share of rows, or of tokens,
would be a different share of the loss for each data set, because rows of text are full and
demonstrations are short: 10% of the rows can be most of the tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.compiler import flops
from alignjax.data import batches, encode
from alignjax.data.rows import Chosen
from alignjax.data.text import LazyRows
from alignjax.setup import adapters, encoded
from alignjax.setup.entries import check_counts
from alignjax.setup.objects import Setup, seed_of
from alignjax.stages import supervised
from alignjax.stages.abstract import Plan, array, token_rows
from alignjax.stages.pretrain import text_mix
from alignjax.stages.stage import Stage, make_optimizer, make_state, steps_per_epoch


def build(setup: Setup, name: str) -> Stage:
  """The stage `name` of the config."""
  cfg = setup.config.stages[name]
  seed = (setup.config.seed, seed_of(name))

  # 1. Demonstrations: the response and its end token are trained on, and the prompt by choice.
  pairs = read_data(setup, name)
  rows = demonstration_rows(setup, name, pairs)

  # 2. The pretraining mix is a share of the loss (types.TokenBatch.mix) and takes about the same
  # share of the rows of each batch.
  mixed = text_rows_of(cfg)
  demos = cfg.batch_size - mixed
  text = text_mix(setup, cfg.documents, mixed, (*seed, 1), setup.length) if mixed else None
  num_steps = steps_per_epoch(rows.count, demos, cfg.epochs)
  order = batches.ordered(rows.count, demos, seed)

  # 3. The model to start from, its optimizer, and the cross-entropy.
  tx = make_optimizer(cfg.optimizer, num_steps, f'stages.{name}')
  parts = adapters.load(setup, name, {'policy': 'lm'}, {}, lambda role: seed_of(name))
  state = make_state(setup, parts.params, tx)
  compiled = supervised.stage_step(setup, name, tx, state)

  def batch(i):
    # The rows of a batch are demonstrations first and then text.
    own = setup.sharder.local(np.arange(cfg.batch_size))
    parts = [rows.take(order(i)[own[own < demos]])]
    if own[-1] >= demos:
      parts.append(text(i, own[own >= demos] - demos))
    made = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    if mixed:
      made = made.replace(source=(own >= demos).astype(np.int32), mix=mix_of(cfg))
    return setup.sharder.put(made)

  return Stage(
    state=state,
    step=lambda state, batch: compiled(state, batch, parts.frozen),
    batch=batch,
    num_steps=num_steps,
    finish=lambda state: (
      state.params['policy'],
      {'head': 'lm', 'demonstrations': len(pairs)} | parts.info.get('policy', {}),
    ),
    work=lambda _: flops.training(
      setup.policy_model, cfg.batch_size, setup.length, adapters=adapters.used(setup, name)
    ),
  )


def read_data(setup: Setup, name: str) -> Chosen:
  """(prompt, [response]) of each demonstration, as tokens."""
  return encoded.chosen(setup, 'demonstrations', setup.config.stages[name].demonstrations)


def demonstration_rows(setup: Setup, name: str, pairs: Chosen) -> LazyRows:
  """The rows of the demonstrations, of which data.pack puts several into one."""
  weight, pad = setup.config.stages[name].prompt_weight, setup.text.template.pad

  def take(which):
    made = [(prompt, said[0]) for prompt, said in (pairs[int(i)] for i in which)]
    return encode.demonstrations(made, setup.length, pad, weight)

  if not setup.config.data.pack:
    return LazyRows(len(pairs), take)
  plan = encode.packing(pairs.sizes().longest.tolist(), setup.length)

  def part(i, start, end):
    prompt, (response, *_) = pairs[i]
    weights = [weight] * len(prompt) + [1.0] * len(response)
    return [*prompt, *response][start:end], weights[start:end]

  return LazyRows(
    len(plan.starts) - 1, lambda which: encode.packed(plan, which, part, setup.length, pad)
  )


def mix_of(cfg) -> tuple[tuple[str, float], ...]:
  """types.TokenBatch.mix of the stage; empty without pretraining text."""
  return (
    (('demonstrations', 1 - cfg.pretrain_mix), ('pretrain', cfg.pretrain_mix))
    if cfg.pretrain_mix
    else ()
  )


def text_rows_of(cfg) -> int:
  """The number of a batch's rows that are pretraining text. It decides the compute and the noise of
  that part of the gradient, but not its weight. The share of the loss, rounded to at least one row,
  spends about as much compute on it as it weighs."""
  return max(1, round(cfg.pretrain_mix * cfg.batch_size)) if cfg.pretrain_mix else 0


def abstract_step(setup: Setup, name: str) -> Plan:
  """The compiled step, its arguments as shapes, and its work, without data or weights."""
  cfg = setup.config.stages[name]
  batch = token_rows(setup, cfg.batch_size, setup.length)
  if cfg.pretrain_mix:
    batch = batch.replace(source=array(setup, (cfg.batch_size,), jnp.int32), mix=mix_of(cfg))
  return supervised.abstract_step(setup, name, batch)


def check(setup: Setup, name: str) -> None:
  """Raises ValueError for entries that cannot be, before any stage runs."""
  cfg = setup.config.stages[name]
  if not 0 <= cfg.pretrain_mix < 1:
    raise ValueError(
      f'stages.{name}.pretrain_mix={cfg.pretrain_mix} must be a share of the loss from 0 to below '
      '1; 1 would leave no demonstration.'
    )
  if text_rows_of(cfg) >= cfg.batch_size:
    raise ValueError(
      f'stages.{name}.pretrain_mix={cfg.pretrain_mix} leaves no demonstration in a batch of '
      f'{cfg.batch_size}: raise batch_size.'
    )
  check_counts(setup, f'stages.{name}', 'demonstrations', demonstrations=cfg.demonstrations)
  if cfg.pretrain_mix:
    check_counts(setup, f'stages.{name}', 'pretrain', documents=cfg.documents)
  supervised.check(setup, name, abstract_step)
