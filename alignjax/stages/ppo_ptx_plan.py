"""What is known of a PPO-ptx stage before it runs: its optimizer and first state, its shapes and
its work, and whether the entries of its config fit together. stages/ppo_ptx.py has the algorithm.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from alignjax import ops, plugins, rewards
from alignjax.compiler import flops
from alignjax.setup import adapters
from alignjax.setup.entries import check_counts, check_divides
from alignjax.setup.objects import Setup
from alignjax.stages import abstract, outside
from alignjax.stages.abstract import Work
from alignjax.stages.stage import check_functions, make_live_rows, make_optimizer, make_state
from alignjax.types import Params, PPOBatch, Rollout, TrainState

# The networks that are trained, and their heads.
TRAINED = {'policy': 'lm', 'value': 'scalar'}


def frozen_roles(cfg) -> dict[str, str]:
  """The networks of a stage that are frozen, and their heads: the reference, and every role of init
  whose name begins with `reward`, the members of an ensemble."""
  rewards = sorted(role for role in cfg.init if role.startswith('reward'))
  return {'ref': 'lm'} | dict.fromkeys(rewards, 'scalar')


def optimizer(setup: Setup, name: str) -> optax.GradientTransformation:
  cfg = setup.config.stages[name]
  updates = cfg.iterations * cfg.minibatches * cfg.inner_epochs
  return make_optimizer(cfg.optimizer, updates, f'stages.{name}')


def first_state(
  setup: Setup, name: str, params: dict[str, Params], tx: optax.GradientTransformation
) -> TrainState:
  """The first state of {'policy', 'value'} parameters; abstract parameters give an abstract one."""
  cfg = setup.config.stages[name]
  return make_state(
    setup, params, tx, ema=cfg.ema_decay is not None, extra={'kl_coef': cfg.kl.coef}
  )


def score_rows(cfg) -> int:
  """Responses scored at a time. The default is the rows of one gradient of an update, so that
  scoring and update run the same program on the same rows."""
  return cfg.rollout.score_rows or cfg.rollout.episodes // (cfg.minibatches * cfg.microbatches)


def reward_models(cfg, where: str) -> int:
  """How many trained reward models read the responses, whose forward passes count as work."""
  function = plugins.find(cfg.reward.fn, f'{where}.reward.fn')
  if function is rewards.ensemble:
    return len(frozen_roles(cfg)) - 1
  return int(function is rewards.model_reward)


def facts(
  setup: Setup,
  name: str,
  failures: Sequence[str] = (),
  prompts_by_tokens: Mapping[tuple[int, ...], Any] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
  """What the stage passes to its loss, advantage and reward where they have a keyword argument of
  the name (plugins.bind). failures, prompts_by_tokens: see ppo_ptx.make_step."""
  rollout = setup.config.stages[name].rollout
  samples = dict(samples_per_prompt=rollout.samples_per_prompt)
  return dict(
    loss=dict(samples, temperature=rollout.temperature),
    advantage=samples,
    reward=dict(  # the last three are for rewards.host_reward
      samples,
      live_rows=make_live_rows(setup, name),
      prompts_by_tokens=prompts_by_tokens,
      decode_response=setup.text.template.decode_response,
      failures=failures,
    ),
  )


def abstract_arguments(
  setup: Setup, name: str, tx: optax.GradientTransformation
) -> tuple[TrainState, Params, tuple]:
  """(state, frozen, batch) of ppo_ptx.iteration as shapes on their shardings."""
  cfg = setup.config.stages[name]
  parts = adapters.shapes(setup, name, TRAINED, frozen_roles(cfg))
  state, frozen = first_state(setup, name, parts.params, tx), parts.frozen
  prompts = (cfg.rollout.episodes // cfg.rollout.samples_per_prompt, setup.prompt_length)
  text_rows = cfg.rollout.episodes * cfg.ptx.rows_per_episode
  text = abstract.token_rows(setup, text_rows, setup.config.data.row_length) if text_rows else None
  batch = (abstract.array(setup, prompts, jnp.int32), abstract.array(setup, prompts, bool), text)
  return state, frozen, batch


def work_of_phases(setup: Setup, name: str) -> dict[str, list[Work]]:
  """What each phase of an iteration does with the networks, for estimates of its cost."""
  cfg, length = setup.config.stages[name], setup.length
  episodes = cfg.rollout.episodes
  groups = episodes // (cfg.rollout.generate_rows or episodes)
  parts = cfg.minibatches * cfg.microbatches
  updates = parts * cfg.inner_epochs
  scored, rewarded = score_rows(cfg), cfg.reward.get('rows') or episodes
  text_rows = episodes * cfg.ptx.rows_per_episode

  some = adapters.used(setup, name)

  def policy(kind, **counts):
    return Work(kind, setup.policy_model, 'lm', adapters=some, **counts)

  def value(kind, **counts):  # or the reward model, which has the same architecture
    return Work(kind, setup.reward_model, 'scalar', adapters=some, **counts)

  work = {
    'prepare': [policy('gather', rows=0, length=0)],
    'prefill': [
      Work(  # Only the last logits of the prompts are computed, as little as a scalar head.
        'forward',
        setup.policy_model,
        'scalar',
        rows=episodes // cfg.rollout.samples_per_prompt // groups,
        length=setup.prompt_length,
        times=groups,
      )
    ],
    'decode': [
      policy(
        'decode',
        rows=episodes // groups,
        length=setup.response_length,
        times=groups,
        prompt=setup.prompt_length,
      )
    ],
    'score': [
      net('forward', rows=scored, length=length, times=episodes // scored)
      for net in (policy, policy, value)  # policy, reference, value
    ],
    'reward': [],
    'update': [
      net('update', rows=episodes // parts, length=length, times=updates) for net in (policy, value)
    ],
  }
  if cfg.rollout.get('engine'):
    work = {phase: work[phase] for phase in ('score', 'reward', 'update')}
  if members := reward_models(cfg, f'stages.{name}'):
    times = members * (episodes // rewarded)
    work['reward'] = [value('forward', rows=rewarded, length=length, times=times)]
  if text_rows:
    row_length = setup.config.data.row_length
    work['update'].append(
      policy('update', rows=text_rows // parts, length=row_length, times=updates)
    )
  return work


def work_of_iteration(setup: Setup, name: str) -> dict[str, float]:
  """Tokens, episodes and FLOPs of an iteration, for the metrics of throughput."""
  cfg = setup.config.stages[name]
  return flops.ppo(
    setup.policy_model,
    setup.reward_model,
    episodes=cfg.rollout.episodes,
    samples_per_prompt=cfg.rollout.samples_per_prompt,
    prompt_length=setup.prompt_length,
    response_length=setup.response_length,
    row_length=setup.config.data.row_length,
    ptx_rows=cfg.rollout.episodes * cfg.ptx.rows_per_episode,
    epochs=cfg.inner_epochs,
    reward_models=reward_models(cfg, f'stages.{name}'),
    generates=not cfg.rollout.get('engine'),
    adapters=adapters.used(setup, name),
  )


def check_entries(setup: Setup, name: str) -> None:
  """Raises ValueError for the first entry that cannot be, or that does not fit another one."""
  cfg, where = setup.config.stages[name], f'stages.{name}'
  check_functions(cfg, where, facts(setup, name))
  adapters.check(setup, name, TRAINED)
  outside.bind(setup, name)
  check_roles(cfg, where)
  check_counts(setup, where, 'prompts', prompts=cfg.prompts)
  if cfg.ptx.rows_per_episode:
    check_counts(setup, where, 'pretrain', **{'ptx.documents': cfg.ptx.documents})
  for cut in ('top_p', 'top_k'):
    if cfg.rollout.get(cut) is not None:
      raise ValueError(
        f'{where}.rollout.{cut}={cfg.rollout[cut]} is refused: samples from a truncated '
        f'distribution would be scored under the whole one, so that ratio and KL would be those of '
        f'a policy that did not sample them.'
      )
  _check_sizes(setup, name)
  if cfg.keep not in ('policy', 'ema') or (cfg.keep == 'ema' and cfg.ema_decay is None):
    raise ValueError(f"{where}.keep={cfg.keep!r} must be 'policy', or 'ema' with ema_decay set.")
  if cfg.rollout.temperature <= 0:
    raise ValueError(
      f'{where}.rollout.temperature={cfg.rollout.temperature} must be above 0: greedy samples '
      f'carry no policy gradient.'
    )
  if (cfg.kl.target is None) != (cfg.kl.horizon is None):
    raise ValueError(
      f'{where}.kl: target and horizon belong together; both None keeps kl.coef fixed.'
    )
  least = ops.KL_ERROR_CLIP * cfg.rollout.episodes
  if cfg.kl.horizon is not None and cfg.kl.horizon <= least:
    raise ValueError(
      f'{where}.kl.horizon={cfg.kl.horizon} would let one iteration of {cfg.rollout.episodes} '
      f'episodes make kl.coef 0 or negative: it must be above {least:g}. Ziegler et al. (2019) '
      f'take 10000.'
    )
  if cfg.loss.get('ptx_coef') and not cfg.ptx.rows_per_episode:
    raise ValueError(
      f'{where}.loss.ptx_coef={cfg.loss.ptx_coef} needs {where}.ptx.rows_per_episode > 0.'
    )
  if cfg.ptx.rows_per_episode and not cfg.loss.get('ptx_coef', True):
    raise ValueError(
      f'{where}.loss.ptx_coef=0 would not read its {cfg.ptx.rows_per_episode} pretraining rows per '
      f'episode: set {where}.ptx.rows_per_episode=0.'
    )


def _check_sizes(setup: Setup, name: str) -> None:
  cfg, where = setup.config.stages[name], f'stages.{name}'
  episodes, samples = cfg.rollout.episodes, cfg.rollout.samples_per_prompt
  check_divides(episodes, samples, f'{where}.rollout.episodes by samples_per_prompt')
  check_divides(episodes, cfg.minibatches, f'{where}.rollout.episodes by minibatches')
  check_divides(
    episodes // cfg.minibatches, cfg.microbatches, f'{where}: a minibatch by microbatches'
  )
  check_divides(
    episodes // samples,
    setup.sharder.batch_shards,
    f'{where}: the prompts of a step by the devices that share a batch',
  )
  if not cfg.rollout.get('engine'):
    _check_sampled(setup, episodes // samples, f'{where}: the prompts of a step')
  check_divides(episodes, score_rows(cfg), f'{where}.rollout.episodes by score_rows')
  updated = episodes // (cfg.minibatches * cfg.microbatches)
  if cfg.get('packed_rows') and score_rows(cfg) != updated:
    raise ValueError(
      f'{where}.rollout.score_rows={score_rows(cfg)} does not go with {where}.packed_rows: scoring '
      f'has to pack the same {updated} rows as an update does, so that the ratio before it is '
      f'exactly 1. Set {where}.rollout.score_rows=None.'
    )
  text_rows = updated * cfg.ptx.rows_per_episode
  length, text_length = setup.length, setup.config.data.row_length
  if (
    cfg.get('packed_rows')
    and not setup.config.data.pack
    and (text_rows, text_length) == (updated, length)
  ):
    raise ValueError(
      f'{where}.packed_rows cannot tell the {text_rows} pretraining rows of {text_length} tokens '
      f'from the episodes of a gradient, which have the same shape: set data.pack=True, another '
      f'data.row_length, or {where}.packed_rows=().'
    )
  rows = cfg.rollout.generate_rows
  if rows is not None:
    check_divides(episodes, rows, f'{where}.rollout.episodes by generate_rows')
    check_divides(rows, samples, f'{where}.rollout.generate_rows by samples_per_prompt')
    _check_sampled(setup, rows // samples, f'{where}: the prompts of rollout.generate_rows')
    if cfg.rollout.get('halvings'):
      check_divides(
        rows // samples,
        setup.sharder.batch_shards,
        f'{where}.rollout.halvings: the prompts of generate_rows by the devices that share a batch',
      )


def _check_sampled(setup: Setup, prompts: int, what: str) -> None:
  """With mesh.sequence, the devices that share the tokens of a row sample different rows."""
  sharder = setup.sharder
  if prompts % sharder.row_shards and sharder.token_parts > 1:
    raise ValueError(
      f'{what} are {prompts}, which {sharder.row_shards} devices do not share equally: those of '
      f'mesh.sequence={sharder.token_parts} sample different rows. Take more prompts at a time, or '
      f'set sharding.rows={sharder.rules.get("batch")!r}, with which they all sample the same ones.'
    )


def check_roles(cfg, where: str) -> None:
  """Raises ValueError for networks in init that nothing reads."""
  known = {*TRAINED, *frozen_roles(cfg)}
  for role in cfg.init:
    if role not in known:
      raise ValueError(
        f'{where}.init.{role} is no network of this stage: {", ".join(sorted(known))}, and further '
        f'reward models under names that begin with `reward`.'
      )
  count = sum(role.startswith('reward') for role in known)
  function = plugins.find(cfg.reward.fn, f'{where}.reward.fn')
  if function is rewards.model_reward and count > 1:
    raise ValueError(
      f'{where}.init names {count} reward models, but {where}.reward.fn reads one. Use '
      f"reward.fn='alignjax.rewards:ensemble', or name one."
    )
  if function is rewards.ensemble and count < 2:
    raise ValueError(
      f'{where}.reward.fn is an ensemble, but {where}.init names one reward model. Name others as '
      f"init.reward_2='stage:rm_2'."
    )


def check_returns(setup: Setup, name: str) -> None:
  """Raises ValueError where reward, advantage or loss return something else than arrays of the
  stage's shapes. They are traced and not compiled."""
  cfg, where = setup.config.stages[name], f'stages.{name}'
  state, frozen, batch = abstract_arguments(setup, name, optimizer(setup, name))
  prompts, prompt_mask, ptx = batch
  nets = functools.partial(adapters.networks, setup, name)
  rows, length, known = cfg.rollout.episodes, setup.response_length, facts(setup, name)

  def of_responses(dtype):
    return jax.ShapeDtypeStruct((rows, length), dtype)

  def of_prompts(dtype):
    return jax.ShapeDtypeStruct((rows, setup.prompt_length), dtype)

  def bind(entry, given=()):
    return plugins.bind(cfg[entry], f'{where}.{entry}', given=given, facts=known[entry])

  def title(entry):
    return f'{where}.{entry}: {cfg[entry].fn}'

  numbers = of_responses(jnp.float32)
  rollout = Rollout(
    prompts=of_prompts(prompts.dtype),
    prompt_mask=of_prompts(prompt_mask.dtype),
    responses=of_responses(jnp.int32),
    mask=of_responses(bool),
    logprobs=numbers,
    ref_logprobs=numbers,
    values=numbers,
    scores=jax.ShapeDtypeStruct((rows,), jnp.float32),
  )
  texts = (rollout.prompts, rollout.prompt_mask, rollout.responses, rollout.mask)
  reward = bind('reward', given=('nets', 'frozen'))
  scores = abstract.evaluate(
    lambda frozen, *texts: reward(*texts, nets=nets(frozen), frozen=frozen),
    title('reward'),
    frozen,
    *texts,
  )
  if isinstance(scores, tuple) and len(scores) == 2 and isinstance(scores[1], dict):
    scores, measured = scores
    for metric, value in measured.items():
      abstract.check_arrays(value, title('reward'), (f'a number as its metric {metric!r}',), ())
  abstract.check_arrays(scores, title('reward'), ('a score of each response',), (rows,))
  made = abstract.evaluate(bind('advantage'), title('advantage'), numbers, numbers, rollout.mask)
  abstract.check_arrays(made, title('advantage'), ('advantages', 'returns'), (rows, length))
  abstract.check_loss(
    bind('loss', given=('nets',)),
    f'{where}.loss',
    cfg.loss.fn,
    state.params,
    PPOBatch(rollout=rollout, advantages=numbers, returns=numbers, weights=numbers, ptx=ptx),
    nets,
    frozen,
  )
