"""The reward model (section 3.5 of the paper): K ranked responses per prompt, one forward pass
each, and all pairs in one batch element."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from alignjax import plugins, steps
from alignjax.compiler import flops
from alignjax.data import encode
from alignjax.evals.reward import accuracy
from alignjax.inference import bulk
from alignjax.setup import adapters, encoded
from alignjax.setup.entries import check_counts
from alignjax.setup.objects import Setup, seed_of, stage_key
from alignjax.setup.records import of_sandbox
from alignjax.stages import abstract, comparisons
from alignjax.stages.abstract import Plan, Work
from alignjax.stages.comparisons import Comparisons, Updates
from alignjax.stages.stage import (
  Stage,
  check_functions,
  compile_step,
  make_live_rows,
  make_optimizer,
  make_state,
)
from alignjax.types import TrainState


def build(setup: Setup, name: str) -> Stage:
  """The stage `name` of the config."""
  cfg = setup.config.stages[name]

  # 1. Comparisons are read, or sampled from the policies so far and ranked by the training
  # labelers, and divided into updates of equally many prompts.
  data, plan, held_out, demos = read_data(setup, name)
  length = setup.length

  # 2. The trunk of the policy gets a fresh scalar head and is trained with the ranking loss.
  tx = make_optimizer(cfg.optimizer, len(plan.order), f'stages.{name}')
  parts = adapters.load(setup, name, {'reward': 'scalar'}, {}, lambda role: seed_of(name))
  state = make_state(setup, parts.params, tx)
  compiled = make_step(setup, name, tx, state)

  # 3. A bias is set such that the labelers' demonstrations score 0 on average (section 3.5). Then
  # the accuracy is measured by labeler pool.
  def finish(state):
    of_whole = bulk.make_scorer(
      setup.nets,
      setup.sharder,
      length=length,
      pad=setup.text.template.pad,
      rows=cfg.responses_per_batch,
    )

    def score(params, rows):
      return of_whole(adapters.whole(setup, name, 'scalar', params, parts.frozen), rows)

    bias = float(score(state.params['reward'], demos).mean())
    params = shift_bias(state.params['reward'], -bias)
    info = {
      'head': 'scalar',
      'bias': -bias,
      'prompts': len(data.prompts),
      'pairs': comparisons.pairs(data),
    } | parts.info.get('reward', {})
    if held_out is None:
      made = comparisons.evaluation(setup, name)
      if made.prompts:
        info |= accuracy.by_pool(
          setup.text.labelers, made, lambda rows: score(params, rows), setup.config.seed
        )
    elif held_out.prompts:
      info['accuracy_heldout_prompts'] = accuracy.on_ranks(
        held_out, lambda rows: score(params, rows)
      )
    return params, info

  return Stage(
    state=state,
    step=lambda state, batch: compiled(state, batch, parts.frozen),
    batch=lambda i: comparisons.batch(setup, data, plan, i, encode.comparisons),
    num_steps=len(plan.order),
    finish=finish,
    work=lambda i: comparisons.work(
      plan,
      i,
      lambda rows, t: flops.training(
        setup.reward_model, rows, t, 'scalar', adapters.used(setup, name)
      ),
    ),
  )


def read_data(
  setup: Setup, name: str
) -> tuple[Comparisons, Updates, Comparisons | None, list[list[int]]]:
  """(comparisons, their updates, held-out comparisons, the rows of demonstrations that set the
  bias). The held-out ones are None where the sandbox makes the comparisons: then they are sampled
  at the end."""
  data = comparisons.training(setup, name)
  plan = comparisons.updates(setup, name, data)
  sampled = of_sandbox(setup, 'comparisons')
  held_out = None if sampled else comparisons.evaluation(setup, name)
  count = setup.config.stages[name].bias_demonstrations
  demos = encoded.chosen(setup, 'demonstrations', count)
  return data, plan, held_out, [prompt + responses[0] for prompt, responses in demos]


def make_step(
  setup: Setup, name: str, tx: optax.GradientTransformation, state: TrainState
) -> Callable:
  """One compiled update: (state, batch, frozen) -> (state, metrics, None)."""
  cfg, key = setup.config.stages[name], stage_key(setup, name)
  loss_fn = plugins.bind(cfg.loss, f'stages.{name}.loss', given=('nets',))
  live_rows = make_live_rows(setup, name)

  def step(state, batch, frozen=None):
    state, metrics = steps.update(
      state,
      batch,
      jax.random.fold_in(key, state.step),
      loss_fn=loss_fn,
      nets=adapters.networks(setup, name, frozen),
      tx=tx,
      microbatches=cfg.microbatches,
      live_rows=live_rows,
    )
    return state.replace(step=state.step + 1), metrics, None

  return compile_step(step, state)


def abstract_step(setup: Setup, name: str) -> Plan:
  """The compiled step for the largest K, its arguments as shapes, and its work, without data or
  weights."""
  cfg = setup.config.stages[name]
  # The number of updates changes only a constant of the schedule.
  tx = make_optimizer(cfg.optimizer, 10**6, f'stages.{name}')
  parts = adapters.shapes(setup, name, {'reward': 'scalar'}, {})
  state = make_state(setup, parts.params, tx)
  batch = comparisons.abstract_batch(setup, name)
  rows, k, length = batch.tokens.shape
  work = Work(
    kind='update',
    model=setup.reward_model,
    head='scalar',
    rows=rows * k // cfg.microbatches,
    length=length,
    times=cfg.microbatches,
    adapters=adapters.used(setup, name),
  )
  step = make_step(setup, name, tx, state)
  return Plan(step, (state, batch, parts.frozen), {'update': [work]})


def check(setup: Setup, name: str) -> None:
  """Raises ValueError for entries that cannot be, before any stage runs."""
  cfg, where = setup.config.stages[name], f'stages.{name}'
  check_functions(cfg, where)
  comparisons.check(setup, name)
  check_counts(setup, where, 'demonstrations', bias_demonstrations=cfg.bias_demonstrations)
  adapters.check(setup, name, {'reward': 'scalar'})
  state, batch, frozen = abstract_step(setup, name).arguments
  abstract.check_stage_loss(setup, name, state.params, batch, frozen, jax.random.key(0))


def shift_bias(params, delta: float):
  """The parameters of the reward model with `delta` added to every score."""
  head = params['final']['score']
  bias = jax.device_put(jnp.asarray(head['bias']) + delta, head['bias'].sharding)
  return {**params, 'final': {**params['final'], 'score': {**head, 'bias': bias}}}
