"""A policy that is trained on comparisons alone, offline: without a reward model and without
sampling. The loss is that of the config: DPO (losses.dpo), or a function of a fork such as IPO,
SimPO or KTO, which takes 20 lines (examples/fork_losses.py). alignjax/configs/dpo.py is a whole
config of

    c.stages.dpo = dict(build='alignjax.stages.preference:build',
                        init=dict(policy='stage:sft', ref='stage:sft'),
                        loss=dict(fn='alignjax.losses:dpo', beta=0.1), ...)

The loss receives a types.PreferenceBatch: K ranked responses to each prompt and, where init.ref
names weights, the log-probabilities of every response token under the frozen reference.
init.ref=None leaves the reference out, for losses without one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from alignjax import ops, plugins, steps
from alignjax.compiler import flops
from alignjax.data import encode
from alignjax.losses import response_logprobs
from alignjax.setup import adapters
from alignjax.setup.objects import Setup, for_stage, seed_of, stage_key
from alignjax.stages import abstract, comparisons
from alignjax.stages.abstract import Plan, Work
from alignjax.stages.stage import (
  Stage,
  check_functions,
  compile_step,
  make_live_rows,
  make_optimizer,
  make_state,
)
from alignjax.types import Metrics, Networks, Params, PreferenceBatch, TrainState


def build(setup: Setup, name: str) -> Stage:
  """The stage `name` of the config."""
  cfg = setup.config.stages[name]

  # 1. Comparisons are read, or sampled from the policies so far and ranked by the training
  # labelers, and divided into updates of equally many prompts.
  data, plan = read_data(setup, name)

  # 2. The policy is trained; the reference is frozen.
  tx = make_optimizer(cfg.optimizer, len(plan.order), f'stages.{name}')
  parts = adapters.load(setup, name, {'policy': 'lm'}, reference(cfg), lambda role: seed_of(name))
  state, frozen = make_state(setup, parts.params, tx), parts.frozen
  compiled = make_step(setup, name, tx, state)

  def work_of(rows, length):
    own = flops.training(setup.policy_model, rows, length, adapters=adapters.used(setup, name))
    # The reference adds a forward pass over the rows of the update.
    scored = rows * flops.forward_flops(setup.policy_model, length) if 'ref' in frozen else 0
    return {**own, 'flops': own['flops'] + scored}

  info = {
    'head': 'lm',
    'prompts': len(data.prompts),
    'pairs': comparisons.pairs(data),
  } | parts.info.get('policy', {})
  return Stage(
    state=state,
    step=lambda state, batch: compiled(state, frozen, batch),
    batch=lambda i: comparisons.batch(setup, data, plan, i, encode.preferences),
    num_steps=len(plan.order),
    finish=lambda state: (state.params['policy'], info),
    work=lambda i: comparisons.work(plan, i, work_of),
  )


def reference(cfg) -> dict[str, str]:
  """{role: head} of what is frozen: the reference, where the stage has one."""
  return {} if cfg.init.ref is None else {'ref': 'lm'}


def read_data(setup: Setup, name: str) -> tuple[comparisons.Comparisons, comparisons.Updates]:
  """The comparisons, and the updates that they are divided into."""
  data = comparisons.training(setup, name)
  return data, comparisons.updates(setup, name, data)


def update(
  state: TrainState,
  frozen: Params,
  batch: PreferenceBatch,
  *,
  key: jax.Array,
  loss_fn: Callable,
  nets: Networks,
  tx: optax.GradientTransformation,
  microbatches: int,
  live_rows: Callable | None,
) -> tuple[TrainState, Metrics, None]:
  """One update: the log-probabilities of the reference, a microbatch of rows at a time, and then
  the loss."""
  if 'ref' in frozen:
    b, k, _ = batch.tokens.shape

    def read(rows):
      def on(nets):
        return response_logprobs(frozen['ref'], rows, nets=nets)

      return on(nets) if live_rows is None else live_rows(on, nets, rows.row_mask())

    batch = batch.replace(
      ref_logprobs=jax.lax.stop_gradient(ops.in_chunks(read, batch, b // microbatches))
    )
  key = jax.random.fold_in(key, state.step)
  state, metrics = steps.update(
    state,
    batch,
    key,
    loss_fn=loss_fn,
    nets=nets,
    tx=tx,
    microbatches=microbatches,
    live_rows=live_rows,
  )
  return state.replace(step=state.step + 1), metrics, None


def make_step(
  setup: Setup, name: str, tx: optax.GradientTransformation, state: TrainState
) -> Callable:
  """Compiles `update` as the config has it: (state, frozen, batch) -> (state, metrics, None)."""
  cfg, key = setup.config.stages[name], stage_key(setup, name)
  loss_fn = plugins.bind(cfg.loss, f'stages.{name}.loss', given=('nets',))
  return compile_step(
    lambda state, frozen, batch: update(
      state,
      frozen,
      batch,
      key=key,
      loss_fn=loss_fn,
      nets=adapters.networks(setup, name, frozen),
      tx=tx,
      microbatches=cfg.microbatches,
      live_rows=make_live_rows(setup, name),
    ),
    state,
  )


def abstract_step(setup: Setup, name: str) -> Plan:
  """The compiled step for the largest K, its arguments as shapes, and its work, without data or
  weights."""
  cfg = setup.config.stages[name]
  # The number of updates changes only a constant of the schedule.
  tx = make_optimizer(cfg.optimizer, 10**6, f'stages.{name}')
  parts = adapters.shapes(setup, name, {'policy': 'lm'}, reference(cfg))
  state, frozen = make_state(setup, parts.params, tx), parts.frozen
  made = comparisons.abstract_batch(setup, name)
  batch = PreferenceBatch(
    tokens=made.tokens,
    mask=made.mask,
    ranks=made.ranks,
    weights=made.weights,
    prompts=made.prompts,
    response_mask=made.mask,
  )
  rows, k, length = batch.tokens.shape

  def part(kind):
    return Work(
      kind=kind,
      model=setup.policy_model,
      head='lm',
      rows=rows * k // cfg.microbatches,
      length=length,
      times=cfg.microbatches,
      adapters=adapters.used(setup, name),
    )

  work = {'score': [part('forward')] if 'ref' in frozen else [], 'update': [part('update')]}
  return Plan(make_step(setup, name, tx, state), (state, frozen, batch), work)


def check(setup: Setup, name: str) -> None:
  """Raises ValueError for entries that cannot be, before any stage runs."""
  cfg, where = setup.config.stages[name], f'stages.{name}'
  check_functions(cfg, where)
  comparisons.check(setup, name)
  own = for_stage(setup, name)
  adapters.check(own, name, {'policy': 'lm'})
  state, frozen, batch = abstract_step(own, name).arguments
  if 'ref' in frozen:
    batch = batch.replace(ref_logprobs=jax.ShapeDtypeStruct(batch.tokens.shape, jnp.float32))
  abstract.check_stage_loss(own, name, state.params, batch, frozen, jax.random.key(0))
