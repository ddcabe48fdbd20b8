"""PPO-ptx: reinforcement learning against the reward model with pretraining gradients (sections
3.5 and C.4 of the paper).

`iteration` is the whole algorithm, one compiled function; with ptx_coef = 0 it is plain PPO.
`build` loads the data and the four networks of the stage and hands them to it. Sizes, estimates and
checks are in stages/ppo_ptx_plan.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignjax import ops, plugins, steps
from alignjax.data import batches, encode
from alignjax.data.rows import ByTokens, Chosen
from alignjax.rollout import collect
from alignjax.setup import adapters, encoded
from alignjax.setup.objects import Setup, for_stage, seed_of, stage_key
from alignjax.setup.records import of_sandbox
from alignjax.sharding import fetch
from alignjax.stages import outside, ppo_ptx_plan
from alignjax.stages.abstract import Plan
from alignjax.stages.pretrain import text_mix
from alignjax.stages.stage import Stage, compile_step, make_live_rows
from alignjax.types import (
  LossFn,
  Metrics,
  Networks,
  Params,
  PPOBatch,
  Rollout,
  TokenBatch,
  TrainState,
)


def iteration(
  state: TrainState,
  frozen: Params,
  batch: tuple[jax.Array, jax.Array, TokenBatch | None],
  *,
  key: jax.Array,
  nets: Networks,
  rollout_fn: Callable,
  advantage_fn: Callable,
  whiten: bool,
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  minibatches: int,
  inner_epochs: int,
  microbatches: int,
  live_rows: Callable | None,
  ema_decay: float | None,
  kl_target: float | None,
  kl_horizon: int | None,
) -> tuple[TrainState, Metrics, Rollout]:
  """One PPO-ptx iteration: responses, rewards, advantages, then the updates.

  Args:
    state: params are {'policy', 'value'}, extra is {'kl_coef'}.
    frozen: the parameters {'ref', 'reward'}, which no update changes.
    batch: (prompts i32[B,Q], prompt_mask bool[B,Q], pretraining rows or None).
    key: the key of the stage; the number of the iteration is folded in.
    nets: the networks as pure functions.
    rollout_fn: (nets, params, frozen, prompts, prompt_mask, key) -> (Rollout, metrics), such as
      rollout.collect.
    advantage_fn: (rewards, values, mask) -> (advantages, returns), such as ops.gae.
    whiten: whether advantages are scaled to mean 0 and variance 1.
    loss_fn: a loss of a PPOBatch, such as losses.ppo_ptx.
    tx: the optimizer of {'policy', 'value'}.
    minibatches: updates per inner epoch; each takes an equal part of the episodes.
    inner_epochs: passes over the episodes of the iteration.
    microbatches: parts of a minibatch whose gradients are computed one after the other.
    live_rows: leaves out the pads of the episodes (packing.on_live_rows); None reads them too.
    ema_decay: decay of the moving average of the policy; None keeps no average.
    kl_target, kl_horizon: of ops.adaptive_kl_coef; None keeps the KL coefficient fixed.

  Returns:
    (state, metrics, rollout).
  """
  prompts, prompt_mask, ptx = batch
  key = jax.random.fold_in(key, state.step)
  sample_key, order_key = jax.random.split(key)
  kl_coef = state.extra['kl_coef']

  # 1-4. The policy samples a response to each prompt. Policy and reference give its
  # log-probabilities, the value network its values, and the reward model its score.
  rollout, metrics = rollout_fn(nets, state.params, frozen, prompts, prompt_mask, sample_key)

  # 5. Every token is rewarded with -kl_coef * log(pi / ref), and the last live one also with the
  # score (Eq. 2).
  rewards = ops.token_rewards(
    rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_coef
  )

  # 6. Advantages and returns; the advantages are whitened over the live tokens of the whole batch.
  advantages, returns = advantage_fn(rewards, rollout.values, rollout.mask)
  if whiten:
    advantages = ops.whiten(advantages, rollout.mask)
  episodes = PPOBatch(
    rollout=rollout,
    advantages=advantages,
    returns=returns,
    weights=rollout.mask.astype(jnp.float32),
  )

  # 7. Updates. The PPO, value and pretraining losses of a minibatch share one gradient and one
  # optimizer update.
  def minibatch_update(state, minibatch):
    return steps.update(
      state,
      minibatch,
      None,
      loss_fn=loss_fn,
      nets=nets,
      tx=tx,
      microbatches=microbatches,
      live_rows=live_rows,
      ema_decay=ema_decay,
    )

  def epoch(state, order):
    cut = steps.split(episodes, minibatches, order)
    if ptx is not None:
      cut = cut.replace(ptx=steps.split(ptx, minibatches))
    return jax.lax.scan(minibatch_update, state, cut)

  # The prompts come in random order, so the first epoch takes the episodes as they are. Each
  # minibatch then holds rows that were scored together, and their ratios are exactly 1, without a
  # rounding error. Later epochs shuffle.
  count = rollout.scores.shape[0]
  orders = jax.vmap(lambda k: jax.random.permutation(k, count))(
    jax.random.split(order_key, inner_epochs)
  )
  state, losses = jax.lax.scan(epoch, state, orders.at[0].set(jnp.arange(count)))
  metrics |= {
    name: jnp.max(x) if steps.is_maximum(name) else jnp.mean(x) for name, x in losses.items()
  }
  if 'ppo/ratio_max_dev' in losses:  # The loss of a fork may have no ratio.
    # The deviation before the first update, which must be exactly 0, is the one that is logged.
    metrics['ppo/ratio_max_dev'] = losses['ppo/ratio_max_dev'][0, 0]

  # 8. The KL coefficient stays fixed (the paper) or is steered towards a target KL (Ziegler et al.
  # 2019).
  metrics |= {
    'objective/kl_coef': kl_coef,
    'objective/rlhf_reward': metrics['objective/scores'] - kl_coef * metrics['objective/kl'],
    'ppo/returns/mean': ops.masked_mean(returns, rollout.mask),
    'ppo/val/explained_variance': 1
    - ops.masked_mean(jnp.square(returns - rollout.values), rollout.mask)
    / (ops.masked_variance(returns, rollout.mask) + 1e-8),
  }
  if kl_target is not None:
    steered = ops.adaptive_kl_coef(
      kl_coef, metrics['objective/kl'], len(rollout.scores), target=kl_target, horizon=kl_horizon
    )
    finite = jnp.isfinite(steered) & jnp.isfinite(metrics['objective/scores'])
    kl_coef = jnp.where(finite, steered, kl_coef)
  return state.replace(step=state.step + 1, extra={'kl_coef': kl_coef}), metrics, rollout


def build(setup: Setup, name: str) -> Stage:
  """The stage `name` of the config: its data, networks, optimizer and compiled iteration."""
  cfg = setup.config.stages[name]
  seed = (setup.config.seed, seed_of(name))

  # 1. The data are prompts, which are read by index, and rows of pretraining text. A batch is a
  # pure function of the iteration's number, so that a resumed run reads what it would have read.
  prompts = read_data(setup, name)
  prompts_per_step = cfg.rollout.episodes // cfg.rollout.samples_per_prompt
  text_rows = cfg.rollout.episodes * cfg.ptx.rows_per_episode
  text = text_mix(setup, cfg.ptx.documents, text_rows, (*seed, 1)) if text_rows else None
  indices = batches.ordered(len(prompts), prompts_per_step, seed)
  prompts_by_tokens = ByTokens(prompts, indices)

  def batch(i):
    prompts_by_tokens.note(i)
    own = [prompts[int(j)][0] for j in setup.sharder.local(indices(i))]
    chosen = encode.left_pad(own, setup.prompt_length, setup.text.template.pad)
    if text is None:
      return (*setup.sharder.put(chosen), None)
    return setup.sharder.put((*chosen, text(i, setup.sharder.local(np.arange(text_rows)))))

  # 2. Of the networks, policy and value are trained. Reference and reward models are frozen:
  # they are kept in the dtype of the computation and are no part of a checkpoint.
  parts = adapters.load(
    setup,
    name,
    trained=ppo_ptx_plan.TRAINED,
    frozen=ppo_ptx_plan.frozen_roles(cfg),
    seed=lambda role: seed_of(f'{name}/{role}'),
  )
  tx = ppo_ptx_plan.optimizer(setup, name)
  state, frozen = ppo_ptx_plan.first_state(setup, name, parts.params, tx), parts.frozen

  # 3. The step is `iteration` with the functions and coefficients of the config bound to it. What a
  # reward function on the host reports as its failure ends the run (stages/loop.py).
  failures: list[str] = []
  compiled = make_step(setup, name, tx, state, failures, prompts_by_tokens)
  engine = outside.sampler(setup, name, failures)
  key = jax.jit(lambda: stage_key(setup, name), out_shardings=setup.sharder.replicated)()

  def step(state, batch):
    if engine is None:
      return compiled(state, frozen, batch, key)
    sampled, seconds = engine(state, frozen, batch)
    if sampled is None:  # `failures` says why, and the loop stops.
      return state, {}, None
    state, metrics, rollout = compiled(state, frozen, batch, key, sampled)
    return state, metrics | {'time/engine_seconds': seconds}, rollout

  def observe(i, state, rollout):
    index = np.repeat(indices(i), cfg.rollout.samples_per_prompt)
    return samples_and_gold(setup, [prompts.record(int(j)) for j in index], rollout)

  return Stage(
    state=state,
    step=step,
    batch=batch,
    num_steps=cfg.iterations,
    finish=lambda state: (
      final_params(state, cfg.keep),
      {'head': 'lm'} | parts.info.get('policy', {}),
    ),
    observe=observe,
    failures=failures,
    work=lambda _: ppo_ptx_plan.work_of_iteration(setup, name),
  )


def read_data(setup: Setup, name: str) -> Chosen:
  """The prompts that are within the lengths, as tokens."""
  return encoded.chosen(setup, 'prompts', setup.config.stages[name].prompts)


def final_params(state: TrainState, keep: str) -> Params:
  """The parameters that the stage ends with. keep: 'policy', those after the last update, or 'ema',
  their moving average."""
  return {'policy': state.params['policy'], 'ema': state.ema}[keep]


def make_step(
  setup: Setup,
  name: str,
  tx: optax.GradientTransformation,
  state: TrainState,
  failures: list[str],
  prompts_by_tokens: Mapping[tuple[int, ...], Any],
) -> Callable:
  """Compiles `iteration` as the config has it: (state, frozen, batch, key) -> (state, metrics,
  rollout). Where an engine samples (stages/outside.py), its responses are a fifth argument. The key
  is an argument, so that runs which differ by their seed share a program in jax's cache of them.

  Args:
    tx: the optimizer of {'policy', 'value'}.
    state: the first state, or its shapes.
    failures: a list that a reward function on the host appends to (Stage.failures).
    prompts_by_tokens: the tokens of each prompt -> the prompt as its record has it.
  """
  cfg, where = setup.config.stages[name], f'stages.{name}'
  live_rows = make_live_rows(setup, name)
  facts = ppo_ptx_plan.facts(setup, name, failures, prompts_by_tokens)
  rollout_fn = functools.partial(
    collect,
    reward_fn=plugins.bind(
      cfg.reward, f'{where}.reward', given=('nets', 'frozen'), facts=facts['reward']
    ),
    max_tokens=setup.response_length,
    stop_ids=setup.text.template.ends,
    temperature=cfg.rollout.temperature,
    samples_per_prompt=cfg.rollout.samples_per_prompt,
    missing_end_penalty=cfg.rollout.missing_end_penalty,
    generate_rows=cfg.rollout.generate_rows,
    segments=cfg.rollout.get('segments'),
    halvings=cfg.rollout.get('halvings', 0),
    shards=setup.sharder.row_shards,
    score_rows=ppo_ptx_plan.score_rows(cfg),
    live_rows=live_rows,
  )
  bound = functools.partial(
    iteration,
    advantage_fn=plugins.bind(cfg.advantage, f'{where}.advantage', facts=facts['advantage']),
    whiten=cfg.whiten_advantages,
    loss_fn=plugins.bind(cfg.loss, f'{where}.loss', given=('nets',), facts=facts['loss']),
    tx=tx,
    minibatches=cfg.minibatches,
    inner_epochs=cfg.inner_epochs,
    microbatches=cfg.microbatches,
    live_rows=live_rows,
    ema_decay=cfg.ema_decay,
    kl_target=cfg.kl.target,
    kl_horizon=cfg.kl.horizon,
  )

  def step(state, frozen, batch, key, sampled=None):
    return bound(
      state,
      frozen,
      batch,
      key=key,
      nets=adapters.networks(setup, name, frozen),
      rollout_fn=functools.partial(rollout_fn, sampled=sampled),
    )

  return compile_step(step, state)


def abstract_step(setup: Setup, name: str) -> Plan:
  """The compiled step, its arguments as shapes, and the work of its phases, without data or
  weights."""
  tx = ppo_ptx_plan.optimizer(setup, name)
  key = jax.eval_shape(lambda: stage_key(setup, name))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=setup.sharder.replicated)
  arguments: tuple = (*ppo_ptx_plan.abstract_arguments(setup, name, tx), key)
  if outside.bind(setup, name) is not None:
    arguments = (*arguments, outside.shapes(setup, name))
  step = make_step(setup, name, tx, arguments[0], failures=[], prompts_by_tokens={})
  return Plan(step, arguments, ppo_ptx_plan.work_of_phases(setup, name))


def check(setup: Setup, name: str) -> None:
  """Raises ValueError for sizes that do not divide, choices that do not fit together, and functions
  that return the wrong shapes, before any stage runs."""
  ppo_ptx_plan.check_entries(setup, name)
  ppo_ptx_plan.check_returns(for_stage(setup, name), name)


def samples_and_gold(
  setup: Setup, prompt_records: list[dict], rollout: Rollout
) -> tuple[dict[str, float], list[tuple]]:
  """What a person wants to see of a rollout.

  Args:
    prompt_records: the record of each row's prompt.

  Returns:
    (metrics, rows). The metrics are the gold scores of the sandbox's labelers, and empty where the
    prompts are not the sandbox's. The rows are (prompt, response, score, gold score or None).
  """
  responses, mask, scores = fetch((rollout.responses, rollout.mask, rollout.scores))
  texts, ended = zip(
    *(
      setup.text.template.decode_response(row[live])
      for row, live in zip(responses, mask, strict=True)
    ),
    strict=True,
  )
  metrics, gold = {}, [None] * len(texts)
  if of_sandbox(setup, 'prompts'):
    from alignjax import sandbox

    judged = [
      sandbox.judge(setup.text.world, record['meta'], text, end)
      for record, text, end in zip(prompt_records, texts, ended, strict=True)
    ]
    labelers = setup.text.labelers
    features = labelers.features(judged)
    trained = labelers.gold(features, labelers.train)
    gold = [float(g) for g in trained]
    metrics = {
      'gold/train_labelers': float(trained.mean()),
      'gold/heldout_labelers': float(labelers.gold(features, labelers.heldout).mean()),
      'gold/toxic': float(np.mean([j.toxic for j in judged])),
      'gold/follow': float(np.mean([j.follow for j in judged])),
    }
  rows = [
    (record['prompt'], text, float(score), g)
    for record, text, score, g in zip(prompt_records, texts, scores, gold, strict=True)
  ]
  return metrics, rows
