"""The workloads by alignjax: each returns a function that does one run and waits for its end."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from ml_collections import config_dict

from alignjax.compiler import flops
from alignjax.configs import instructgpt_1b3
from alignjax.models import transformer
from alignjax.models.config import TransformerConfig
from alignjax.runtime import memory
from alignjax.sampling import generate
from alignjax.setup.objects import Setup, for_stage
from alignjax.setup.weights import freeze
from alignjax.stages import abstract, ppo_ptx, ppo_ptx_plan, rm, sft
from alignjax.stages.stage import make_optimizer, make_state
from benchmarks.workloads import Workload


def build(workload: Workload) -> tuple[Callable[[], Any], dict[str, float]]:
  """(run, facts). facts: 'flops', the operations of one run, and for 'generate' 'bytes', the least
  that one run reads: for each token the weights and the keys and values so far."""
  if jax.default_backend() == 'cpu':
    memory.keep_freed_memory()  # as train.main does
  return {'generate': _generate, 'sft': _sft, 'rm': _rm, 'ppo': _ppo}[workload.kind](workload)


def _generate(w: Workload):
  cfg = TransformerConfig(**w.model)
  nets, params = transformer.make_networks(cfg), _weights(cfg, 'lm', 0)
  prompts = jax.random.randint(jax.random.key(1), (w.rows, w.prompt), 0, cfg.vocab_size, jnp.int32)
  seeds = itertools.count()

  @jax.jit
  def sample(params, key):
    live = jnp.ones(prompts.shape, bool)
    return generate(nets.decoder, params, prompts, live, key, max_tokens=w.response, stop_ids=())

  width = jnp.dtype(cfg.dtype).itemsize
  weights = width * sum(x.size for x in jax.tree.leaves(params))
  slot = width * 2 * cfg.num_layers * cfg.kv_heads * cfg.head_width * w.rows
  slots = sum(range(w.prompt, w.prompt + w.response))
  facts = {'bytes': float(w.response * weights + slots * slot)}
  return lambda: jax.block_until_ready(sample(params, jax.random.key(next(seeds)))), facts


def _sft(w: Workload):
  c = _config(w)
  c.stages.sft.update(batch_size=w.rows, microbatches=w.microbatches)
  c.stages.sft.optimizer.policy.clip_norm = 1.0
  setup = for_stage(abstract.setup(c, jax.devices()[:1]), 'sft')
  plan = sft.abstract_step(setup, 'sft')
  tx = make_optimizer(c.stages.sft.optimizer, 10**6, 'stages.sft')
  state = make_state(setup, {'policy': _weights(setup.policy_model, 'lm', 0)}, tx)
  batch = _filled(plan.arguments[1], setup)
  return _stepper(plan.step, state, batch), flops.training(
    setup.policy_model, w.rows, w.prompt + w.response
  )


def _rm(w: Workload):
  c = _config(w)
  c.stages.rm.update(
    k_buckets=(w.k,), responses_per_batch=w.rows * w.k, microbatches=w.microbatches
  )
  c.stages.rm.optimizer.reward.clip_norm = 1.0
  setup = for_stage(abstract.setup(c, jax.devices()[:1]), 'rm')
  plan = rm.abstract_step(setup, 'rm')
  tx = make_optimizer(c.stages.rm.optimizer, 10**6, 'stages.rm')
  state = make_state(setup, {'reward': _weights(setup.reward_model, 'scalar', 0)}, tx)
  batch = _filled(plan.arguments[1], setup)
  ranks = jnp.broadcast_to(jnp.arange(w.k, dtype=jnp.int32), batch.ranks.shape)
  return _stepper(plan.step, state, batch.replace(ranks=ranks)), flops.training(
    setup.reward_model, w.rows * w.k, w.prompt + w.response, 'scalar'
  )


def _ppo(w: Workload):
  name = 'ppo_ptx' if w.text_rows else 'ppo'
  c = _config(w)
  s = c.stages[name]
  s.update(
    minibatches=w.minibatches,
    microbatches=w.microbatches,
    packed_rows=w.packed_rows,
    ema_decay=config_dict.placeholder(float),
    keep='policy',
  )
  s.rollout.update(
    episodes=w.rows,
    generate_rows=config_dict.placeholder(int),
    score_rows=config_dict.placeholder(int),
  )
  s.reward.rows = w.rows // w.minibatches
  s.ptx.rows_per_episode = w.text_rows
  setup = for_stage(abstract.setup(c, jax.devices()[:1]), name)
  if w.mean_length is not None:  # So many ids stop a response that it has this length on average.
    stops = tuple(range(max(1, w.model['vocab_size'] // w.mean_length)))
    template = setup.text.template._replace(ends=stops)
    setup = setup._replace(text=setup.text._replace(template=template))
  plan = ppo_ptx.abstract_step(setup, name)
  policy, value = setup.policy_model, setup.reward_model
  state = ppo_ptx_plan.first_state(
    setup,
    name,
    {'policy': _weights(policy, 'lm', 0), 'value': _weights(value, 'scalar', 1)},
    ppo_ptx_plan.optimizer(setup, name),
  )
  frozen = {
    'ref': freeze(_weights(policy, 'lm', 0), policy),
    'reward': freeze(_weights(value, 'scalar', 2), value),
  }
  prompts, live, text = _filled(plan.arguments[2], setup)
  if w.mean_length is not None:  # Prompts are short too: up to three quarters of the limit.
    lengths = jnp.arange(len(prompts)) % max(1, w.prompt * 3 // 4) + 1
    live = jnp.arange(w.prompt)[None] >= w.prompt - lengths[:, None]
  run = _stepper(plan.step, state, frozen, (prompts, live, text), jax.random.key(0))
  return run, ppo_ptx_plan.work_of_iteration(setup, name)


def _config(w: Workload) -> ml_collections.ConfigDict:
  c = instructgpt_1b3.get_config()
  c.mesh = dict(data=config_dict.placeholder(int), fsdp=1, tensor=1)
  c.model, c.reward_model = dict(w.model), dict(w.scalar or w.model)
  c.data.update(
    prompt_length=w.prompt, response_length=w.response, row_length=w.prompt + w.response
  )
  return c


def _weights(cfg: TransformerConfig, head: str, seed: int):
  return jax.jit(lambda: transformer.init(cfg, jax.random.key(seed), head))()


def _filled(shapes: Any, setup: Setup) -> Any:
  """Arrays in place of shapes: random tokens, all of them live and of weight 1."""
  keys = iter(jax.random.split(jax.random.key(7), 100))

  def fill(x):
    if x.dtype == jnp.int32:
      return jax.random.randint(next(keys), x.shape, 1, setup.policy_model.vocab_size - 1, x.dtype)
    return jnp.ones(x.shape, x.dtype)

  filled = jax.tree.map(fill, shapes)
  if getattr(filled, 'mask', None) is not None and filled.mask.dtype == jnp.int32:
    filled = filled.replace(mask=jnp.ones_like(filled.mask))  # one document in each row
  if getattr(filled, 'source', None) is not None:
    filled = filled.replace(source=jnp.arange(len(filled.source)) % len(filled.mix))
  return filled


def _stepper(step: Callable, state: Any, *arguments: Any) -> Callable[[], Any]:
  """A function that does one step of a state which each step replaces, and returns the step's
  metrics."""
  held = [state]

  def run():
    held[0], metrics, *_ = step(held[0], *arguments)
    return jax.block_until_ready(metrics)

  return run
