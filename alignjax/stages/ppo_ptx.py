"""PPO-ptx: reinforcement learning against the reward model with pretraining gradients (paper
sections 3.5 and C.4).

`iteration` is the whole algorithm, one compiled function. ptx_coef = 0 is plain PPO.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignjax import ops, plugins, steps
from alignjax.compiler import flops
from alignjax.data import batches, encode
from alignjax.rollout import collect
from alignjax.setup.entries import check_counts, check_divides
from alignjax.setup.objects import Setup, for_stage, seed_of, stage_key
from alignjax.setup.records import encoded, records
from alignjax.setup.weights import freeze, initial_params
from alignjax.sharding import fetch
from alignjax.stages import abstract
from alignjax.stages.abstract import Plan, Work
from alignjax.stages.pretrain import text_mix
from alignjax.stages.stage import Stage, check_functions, compile_step, make_optimizer, make_state
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
  tx,
  minibatches: int,
  inner_epochs: int,
  microbatches: int,
  ema_decay: float | None,
  kl_target: float | None,
  kl_horizon: int | None,
) -> tuple[TrainState, Metrics, Rollout]:
  """One PPO-ptx iteration.

  Args:
    state: params {'policy', 'value'}, extra {'kl_coef'}.
    frozen: {'ref', 'reward'} parameters.
    batch: (prompts i32[B,Q], prompt_mask, pretraining rows or None).
  """
  prompts, prompt_mask, ptx = batch
  key = jax.random.fold_in(key, state.step)
  sample_key, order_key = jax.random.split(key)
  kl_coef = state.extra['kl_coef']

  # 1-4. sample a response to each prompt; log-probabilities of policy and reference, values, scores
  rollout, metrics = rollout_fn(nets, state.params, frozen, prompts, prompt_mask, sample_key)

  # 5. token rewards: -kl_coef * log(pi / ref) at every token, the score added at the last live one
  # (Eq. 2)
  rewards = ops.token_rewards(
    rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_coef
  )

  # 6. advantages and returns; whitening over the live tokens of the whole batch
  advantages, returns = advantage_fn(rewards, rollout.values, rollout.mask)
  if whiten:
    advantages = ops.whiten(advantages, rollout.mask)
  episodes = PPOBatch(rollout, advantages, returns, rollout.mask.astype(jnp.float32))

  # 7. minibatches: PPO + value + ptx_coef * pretraining loss in one gradient and one optimizer
  # update each
  def minibatch_update(state, minibatch):
    return steps.update(
      state,
      minibatch,
      None,
      loss_fn=loss_fn,
      nets=nets,
      tx=tx,
      microbatches=microbatches,
      ema_decay=ema_decay,
    )

  def epoch(state, order):
    cut = steps.split(episodes, minibatches, order)
    if ptx is not None:
      cut = cut.replace(ptx=steps.split(ptx, minibatches))
    return jax.lax.scan(minibatch_update, state, cut)

  # The prompts come in random order, so the first epoch takes the episodes as they are: then each
  # minibatch holds the very rows that were scored together, and even the rounding of its ratio
  # cancels. Later epochs shuffle.
  count = rollout.scores.shape[0]
  orders = jax.vmap(lambda k: jax.random.permutation(k, count))(
    jax.random.split(order_key, inner_epochs)
  )
  state, losses = jax.lax.scan(epoch, state, orders.at[0].set(jnp.arange(count)))
  metrics |= {
    name: jnp.max(x) if steps.is_maximum(name) else jnp.mean(x) for name, x in losses.items()
  }
  if 'ppo/ratio_max_dev' in losses:  # a fork's loss may have no ratio
    # before the first update: exactly 0
    metrics['ppo/ratio_max_dev'] = losses['ppo/ratio_max_dev'][0, 0]

  # 8. the KL coefficient: fixed (the paper), or steered towards a target (Ziegler et al. 2019)
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
    kl_coef = jnp.where(
      jnp.isfinite(steered) & jnp.isfinite(metrics['objective/scores']), steered, kl_coef
    )
  return state.replace(step=state.step + 1, extra={'kl_coef': kl_coef}), metrics, rollout


def build(setup: Setup, name: str) -> Stage:
  cfg = setup.config.stages[name]
  seed = (setup.config.seed, seed_of(name))

  # prompts, encoded once; pretraining rows
  prompt_records, rows = read_data(setup, name)
  prompts_by_tokens = {
    tuple(row): r['prompt'] for row, r in zip(reversed(rows), reversed(prompt_records), strict=True)
  }
  prompts = encode.left_pad(rows, setup.prompt_length, setup.text.template.pad)
  rows_per_step = cfg.rollout.episodes * cfg.ptx.rows_per_episode
  text = text_mix(setup, cfg.ptx.documents, rows_per_step, (*seed, 1)) if rows_per_step else None

  # policy and value to train, reference and reward model to keep
  load = lambda role, head: initial_params(setup, cfg.init[role], head, seed_of(f'{name}/{role}'))
  tx = optimizer(setup, name)
  state = first_state(
    setup, name, {'policy': load('policy', 'lm'), 'value': load('value', 'scalar')}, tx
  )
  frozen = {
    'ref': freeze(load('ref', 'lm'), setup.policy_model),
    'reward': freeze(load('reward', 'scalar'), setup.reward_model),
  }
  failures: list[str] = []
  compiled = make_step(setup, name, tx, state, failures, prompts_by_tokens)
  prompts_per_step = cfg.rollout.episodes // cfg.rollout.samples_per_prompt

  def batch(i):
    index = setup.sharder.local(batches.indices(len(prompt_records), prompts_per_step, i, seed))
    chosen = batches.take(prompts, index)
    if text is None:
      return (*setup.sharder.put(chosen), None)
    return setup.sharder.put((*chosen, text(i, setup.sharder.local(np.arange(rows_per_step)))))

  def observe(i, state, rollout):
    index = np.repeat(
      batches.indices(len(prompt_records), prompts_per_step, i, seed),
      cfg.rollout.samples_per_prompt,
    )
    return samples_and_gold(setup, [prompt_records[j] for j in index], rollout)

  return Stage(
    state,
    lambda state, batch: compiled(state, frozen, batch),
    batch,
    cfg.iterations,
    finish=lambda state: (final_params(state, cfg.keep), {'head': 'lm'}),
    observe=observe,
    failures=failures,
    work=lambda _: flops.ppo(
      setup.policy_model,
      setup.reward_model,
      episodes=cfg.rollout.episodes,
      samples_per_prompt=cfg.rollout.samples_per_prompt,
      prompt_length=setup.prompt_length,
      response_length=setup.response_length,
      row_length=setup.config.data.row_length,
      ptx_rows=rows_per_step,
      epochs=cfg.inner_epochs,
      reward_model=cfg.reward.fn == 'alignjax.rewards:model_reward',
    ),
  )


def read_data(setup: Setup, name: str) -> tuple[list[dict], list[list[int]]]:
  """The records of prompts that are within the lengths, and their tokens."""
  found = records(setup, 'prompts', setup.config.stages[name].prompts)
  limited = encoded(setup, 'prompts', found)
  return [found[i] for i in limited.index], [prompt for prompt, _ in limited.rows]


def final_params(state: TrainState, keep: str) -> Params:
  """What the stage ends with. keep: 'policy', the parameters after the last update, or 'ema', their
  moving average."""
  return {'policy': state.params['policy'], 'ema': state.ema}[keep]


def optimizer(setup: Setup, name: str) -> optax.GradientTransformation:
  cfg = setup.config.stages[name]
  return make_optimizer(
    cfg.optimizer, cfg.iterations * cfg.minibatches * cfg.inner_epochs, f'stages.{name}'
  )


def first_state(
  setup: Setup, name: str, params: dict[str, Params], tx: optax.GradientTransformation
) -> TrainState:
  cfg = setup.config.stages[name]
  return make_state(
    setup, params, tx, ema=cfg.ema_decay is not None, extra={'kl_coef': cfg.kl.coef}
  )


def make_step(
  setup: Setup,
  name: str,
  tx: optax.GradientTransformation,
  state: TrainState,
  failures: list[str],
  prompts_by_tokens: Mapping[tuple[int, ...], Any],
) -> Callable:
  """`iteration` as the config has it, compiled: (state, frozen, batch) -> (state, metrics,
  rollout). failures: Stage.failures.
  prompts_by_tokens: tokens of a prompt -> the prompt as its record has it."""
  cfg, where = setup.config.stages[name], f'stages.{name}'
  known = facts(setup, name, failures, prompts_by_tokens)
  reward_fn = plugins.bind(
    cfg.reward, f'{where}.reward', given=('nets', 'frozen'), facts=known['reward']
  )
  rollout_fn = functools.partial(
    collect,
    reward_fn=reward_fn,
    max_tokens=setup.response_length,
    stop_ids=setup.text.template.ends,
    temperature=cfg.rollout.temperature,
    samples_per_prompt=cfg.rollout.samples_per_prompt,
    missing_end_penalty=cfg.rollout.missing_end_penalty,
    generate_rows=cfg.rollout.generate_rows,
    score_rows=score_rows(cfg),
  )
  return compile_step(
    functools.partial(
      iteration,
      key=stage_key(setup, name),
      nets=setup.nets,
      rollout_fn=rollout_fn,
      advantage_fn=plugins.bind(cfg.advantage, f'{where}.advantage', facts=known['advantage']),
      whiten=cfg.whiten_advantages,
      loss_fn=plugins.bind(cfg.loss, f'{where}.loss', given=('nets',), facts=known['loss']),
      tx=tx,
      minibatches=cfg.minibatches,
      inner_epochs=cfg.inner_epochs,
      microbatches=cfg.microbatches,
      ema_decay=cfg.ema_decay,
      kl_target=cfg.kl.target,
      kl_horizon=cfg.kl.horizon,
    ),
    state,
  )


def facts(
  setup: Setup,
  name: str,
  failures: Sequence[str] = (),
  prompts_by_tokens: Mapping[tuple[int, ...], Any] = MappingProxyType({}),
) -> dict[str, dict]:
  """What the stage tells each of its functions that has a keyword argument of the name
  (plugins.bind)."""
  rollout = setup.config.stages[name].rollout
  samples = dict(samples_per_prompt=rollout.samples_per_prompt)
  return dict(
    loss=dict(samples, temperature=rollout.temperature),
    advantage=samples,
    # for alignjax.rewards:host_reward
    reward=dict(
      samples,
      prompts_by_tokens=prompts_by_tokens,
      decode_response=setup.text.template.decode_response,
      failures=failures,
    ),
  )


def score_rows(cfg) -> int:
  """Responses scored at a time. By default a minibatch, the rows that an update sees together where
  it has no microbatches."""
  return cfg.rollout.score_rows or cfg.rollout.episodes // cfg.minibatches


def abstract_step(setup: Setup, name: str) -> Plan:
  """The compiled step, its arguments as shapes, and the work of its phases, without data or
  weights."""
  cfg, policy, scalar = (
    setup.config.stages[name],
    abstract.params(setup, 'lm'),
    abstract.params(setup, 'scalar'),
  )
  tx = optimizer(setup, name)
  state = first_state(setup, name, {'policy': policy, 'value': scalar}, tx)
  frozen = {'ref': freeze(policy, setup.policy_model), 'reward': freeze(scalar, setup.reward_model)}
  episodes, n, row_length = (
    cfg.rollout.episodes,
    cfg.rollout.samples_per_prompt,
    setup.config.data.row_length,
  )
  text = episodes * cfg.ptx.rows_per_episode
  batch = (
    abstract.array(setup, (episodes // n, setup.prompt_length), jnp.int32),
    abstract.array(setup, (episodes // n, setup.prompt_length), bool),
    abstract.token_rows(setup, text, row_length) if text else None,
  )

  lm, value, length = (setup.policy_model, 'lm'), (setup.reward_model, 'scalar'), setup.length
  groups = episodes // (cfg.rollout.generate_rows or episodes)
  cuts, updates = (
    cfg.minibatches * cfg.microbatches,
    cfg.minibatches * cfg.microbatches * cfg.inner_epochs,
  )
  scored, at_once = score_rows(cfg), cfg.reward.get('rows') or episodes
  work = {
    'prepare': [Work('gather', *lm, 0, 0)],
    'prefill': [
      Work(
        'forward',
        setup.policy_model,
        'scalar',
        episodes // n // groups,
        setup.prompt_length,
        groups,
      )
    ],
    'decode': [
      Work('decode', *lm, episodes // groups, setup.response_length, groups, setup.prompt_length)
    ],
    'score': [Work('forward', *net, scored, length, episodes // scored) for net in (lm, lm, value)],
    'reward': [Work('forward', *value, at_once, length, episodes // at_once)]
    if cfg.reward.fn.endswith(':model_reward')
    else [],
    'update': [Work('update', *net, episodes // cuts, length, updates) for net in (lm, value)]
    + ([Work('update', *lm, text // cuts, row_length, updates)] if text else []),
  }
  return Plan(make_step(setup, name, tx, state, [], {}), (state, frozen, batch), work)


def check(setup: Setup, name: str) -> None:
  """Sizes that must divide, and choices that must fit together, before any stage runs."""
  cfg, where = setup.config.stages[name], f'stages.{name}'
  check_functions(cfg, where, facts(setup, name))
  check_counts(setup, where, 'prompts', prompts=cfg.prompts)
  if cfg.ptx.rows_per_episode:
    check_counts(setup, where, 'pretrain', **{'ptx.documents': cfg.ptx.documents})
  for cut in ('top_p', 'top_k'):
    if cfg.rollout.get(cut) is not None:
      raise ValueError(
        f'{where}.rollout.{cut}={cfg.rollout[cut]}: refused. Samples from a cut distribution are '
        f'scored under '
        'the whole one, so ratio and KL would be of a policy that did not sample them.'
      )
  check_divides(
    cfg.rollout.episodes,
    cfg.rollout.samples_per_prompt,
    f'{where}.rollout.episodes by samples_per_prompt',
  )
  check_divides(cfg.rollout.episodes, cfg.minibatches, f'{where}.rollout.episodes by minibatches')
  check_divides(
    cfg.rollout.episodes // cfg.minibatches,
    cfg.microbatches,
    f'{where}: a minibatch by microbatches',
  )
  check_divides(
    cfg.rollout.episodes // cfg.rollout.samples_per_prompt,
    setup.sharder.batch_shards,
    f'{where}: the prompts of a step by the devices that share a batch',
  )
  check_divides(cfg.rollout.episodes, score_rows(cfg), f'{where}.rollout.episodes by score_rows')
  if cfg.rollout.generate_rows is not None:
    check_divides(
      cfg.rollout.episodes, cfg.rollout.generate_rows, f'{where}.rollout.episodes by generate_rows'
    )
    check_divides(
      cfg.rollout.generate_rows,
      cfg.rollout.samples_per_prompt,
      f'{where}.rollout.generate_rows by samples_per_prompt',
    )
  if cfg.keep not in ('policy', 'ema') or (cfg.keep == 'ema' and cfg.ema_decay is None):
    raise ValueError(f"{where}.keep={cfg.keep!r} must be 'policy', or 'ema' with ema_decay set.")
  if cfg.rollout.temperature <= 0:
    raise ValueError(
      f'{where}.rollout.temperature={cfg.rollout.temperature} must be above 0: greedy samples '
      f'carry no '
      'policy gradient.'
    )
  if (cfg.kl.target is None) != (cfg.kl.horizon is None):
    raise ValueError(
      f'{where}.kl: target and horizon belong together; both None keeps kl.coef fixed.'
    )
  if cfg.loss.get('ptx_coef') and not cfg.ptx.rows_per_episode:
    raise ValueError(
      f'{where}.loss.ptx_coef={cfg.loss.ptx_coef} needs {where}.ptx.rows_per_episode > 0.'
    )
  if cfg.ptx.rows_per_episode and not cfg.loss.get('ptx_coef', True):
    raise ValueError(
      f'{where}.loss.ptx_coef=0 would not read its {cfg.ptx.rows_per_episode} pretraining rows an '
      f'episode: '
      f'set {where}.ptx.rows_per_episode=0.'
    )
  check_returns(for_stage(setup, name), name)


def check_returns(setup: Setup, name: str) -> None:
  """What reward, advantage and loss return on the stage's shapes, before any stage runs."""
  cfg, where = setup.config.stages[name], f'stages.{name}'
  _, frozen, (prompts, prompt_mask, ptx) = arguments = abstract_step(setup, name).arguments
  rows, length, known = cfg.rollout.episodes, setup.response_length, facts(setup, name)
  shape = lambda kind: jax.ShapeDtypeStruct((rows, length), kind)
  numbers, mask = shape(jnp.float32), shape(bool)
  whole = [
    jax.ShapeDtypeStruct((rows, setup.prompt_length), x.dtype) for x in (prompts, prompt_mask)
  ]
  bind = lambda entry, given: plugins.bind(
    cfg[entry], f'{where}.{entry}', given=given, facts=known[entry]
  )
  say = lambda entry: f'{where}.{entry}: {cfg[entry].fn}'

  reward = bind('reward', ('nets', 'frozen'))
  scores = abstract.evaluate(
    lambda frozen, *rows: reward(*rows, nets=setup.nets, frozen=frozen),
    say('reward'),
    frozen,
    *whole,
    shape(jnp.int32),
    mask,
  )
  abstract.check_arrays(scores, say('reward'), ('a score of each response',), (rows,))
  made = abstract.evaluate(bind('advantage', ()), say('advantage'), numbers, numbers, mask)
  abstract.check_arrays(made, say('advantage'), ('advantages', 'returns'), (rows, length))
  rollout = Rollout(
    *whole,
    shape(jnp.int32),
    mask,
    numbers,
    numbers,
    numbers,
    jax.ShapeDtypeStruct((rows,), jnp.float32),
  )
  abstract.check_loss(
    bind('loss', ('nets',)),
    f'{where}.loss',
    cfg.loss.fn,
    arguments[0].params,
    PPOBatch(rollout, numbers, numbers, numbers, ptx),
    setup.nets,
  )


def samples_and_gold(
  setup: Setup, prompt_records: list[dict], rollout: Rollout
) -> tuple[dict, list]:
  """What a person wants to see of a rollout: sample rows (prompt, response, score, gold or None),
  gold scores where known."""
  responses, mask, scores = fetch((rollout.responses, rollout.mask, rollout.scores))
  texts, ended = zip(
    *(
      setup.text.template.decode_response(row[live])
      for row, live in zip(responses, mask, strict=True)
    ),
    strict=True,
  )
  metrics, gold = {}, [None] * len(texts)
  if setup.text.world is not None:
    from alignjax import sandbox

    judged = [
      sandbox.judge(setup.text.world, r['meta'], t, e)
      for r, t, e in zip(prompt_records, texts, ended, strict=True)
    ]
    features = setup.text.labelers.features(judged)
    gold = setup.text.labelers.gold(features, setup.text.labelers.train)
    metrics = {
      'gold/train_labelers': float(gold.mean()),
      'gold/heldout_labelers': float(
        setup.text.labelers.gold(features, setup.text.labelers.heldout).mean()
      ),
      'gold/toxic': float(np.mean([j.toxic for j in judged])),
      'gold/follow': float(np.mean([j.follow for j in judged])),
    }
  rows = [
    (r['prompt'], t, float(s), None if g is None else float(g))
    for r, t, s, g in zip(prompt_records, texts, scores, gold, strict=True)
  ]
  return metrics, rows
