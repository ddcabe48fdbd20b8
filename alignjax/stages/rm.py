"""The reward model: K ranked responses a prompt, one forward pass each, all pairs in one batch element (section 3.5)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignjax import plugins, steps, throughput
from alignjax.data import batches, encode
from alignjax.evals import bulk, rm_accuracy
from alignjax.stages import abstract, comparisons
from alignjax.stages.abstract import Plan, Work
from alignjax.stages.setup import (
  Setup,
  Stage,
  check_functions,
  compile_step,
  fit,
  initial_params,
  make_optimizer,
  make_state,
  records,
  seed_of,
  stage_key,
)
from alignjax.types import ComparisonBatch, TrainState


def build(setup: Setup, name: str) -> Stage:
  cfg = setup.config.stages[name]
  seed = (setup.config.seed, seed_of(name))

  # 1. comparisons: read, or sampled from the policies so far and ranked by the training labelers
  data = comparisons.training(setup, name)
  length = setup.length

  # 2. batches of about `responses_per_batch` responses; prompts of similar K and length together, so that little is padding
  sizes = np.array([len(r) for r in data.ranks])
  longest = np.array([max(len(r) for r in rows) + len(p)
                      for p, rows in zip(data.prompts, data.responses, strict=True)])
  k_of = _bucket(sizes, cfg.k_buckets, 'k_buckets')
  t_of = _bucket(longest, [t for t in cfg.row_lengths if t < length] + [length], 'row_lengths')
  bucket = [(int(k), int(t)) for k, t in zip(k_of, t_of, strict=True)]
  kinds = sorted(set(bucket))
  shards = setup.sharder.batch_shards
  per_batch = {i: prompts_per_batch(setup, name, k) for i, (k, _) in enumerate(kinds)}
  number = {kind: i for i, kind in enumerate(kinds)}
  order = [rows for epoch in range(cfg.epochs)
           for rows in batches.bucketed([number[b] for b in bucket], per_batch, (*seed, epoch))]

  def batch(i):
    rows = order[i]
    k, t = bucket[rows[0]]
    pick = lambda field: [field[j] for j in rows]
    made = encode.comparisons(pick(data.prompts), pick(data.responses), pick(data.ranks), t, k, setup.template.pad)
    made = batches.fill(made, per_batch[number[k, t]])
    return setup.sharder.put(batches.take(made, setup.sharder.local(np.arange(len(made.weights)))))

  # 3. the policy's trunk under a fresh scalar head, the K-way ranking loss
  tx = make_optimizer(cfg.optimizer, len(order), f'stages.{name}')
  params = initial_params(setup, cfg.init.reward, 'scalar', seed_of(name))
  state = make_state(setup, {'reward': params}, tx)
  step = make_step(setup, name, tx, state)

  def work(i):
    k, t = bucket[order[i][0]]
    return throughput.training(setup.reward_model, per_batch[number[k, t]] * k, t, 'scalar')

  # 4. a bias, so that labelers' demonstrations score 0 on average (section 3.5); then accuracy by labeler pool
  def finish(state):
    score = bulk.make_scorer(setup.nets, setup.sharder.spread, length=length, pad=setup.template.pad,
                             rows=max(1, cfg.responses_per_batch // shards) * shards)
    demos = [(setup.template.prompt(r['prompt']), [setup.template.response(r['response'])])
             for r in records(setup, 'demonstrations', cfg.bias_demonstrations)]
    demos = [prompt + responses[0] for prompt, responses in fit(setup, 'demonstrations', demos).rows]
    bias = float(score(state.params['reward'], demos).mean())
    params = shift_bias(state.params['reward'], -bias)
    info = {'head': 'scalar', 'bias': -bias, 'prompts': len(data.prompts),
            'pairs': int(sum(len(r) * (len(r) - 1) // 2 for r in data.ranks))}
    held_out = comparisons.evaluation(setup, name)
    if setup.labelers is None:
      if held_out.prompts:
        info['accuracy_heldout_prompts'] = rm_accuracy.on_ranks(held_out, lambda rows: score(params, rows))
    else:
      info |= rm_accuracy.by_pool(setup.labelers, held_out,
                                  lambda rows: score(params, rows), setup.config.seed)
    return params, info

  return Stage(state, step, batch, len(order), finish, work=work)


def prompts_per_batch(setup: Setup, name: str, k: int) -> int:
  """Prompts of k responses in a batch: about responses_per_batch responses, and whole rows on every device."""
  shards = setup.sharder.batch_shards
  return max(1, round(setup.config.stages[name].responses_per_batch / k / shards)) * shards


def make_step(setup: Setup, name: str, tx: optax.GradientTransformation, state: TrainState) -> Callable:
  """One update, compiled: (state, batch) -> (state, metrics, None)."""
  cfg, key = setup.config.stages[name], stage_key(setup, name)
  loss_fn = plugins.bind(cfg.loss, f'stages.{name}.loss', given=('nets',))

  def step(state, batch):
    state, metrics = steps.update(state, batch, jax.random.fold_in(key, state.step), loss_fn=loss_fn, nets=setup.nets,
                                  tx=tx, microbatches=cfg.microbatches)
    return state.replace(step=state.step + 1), metrics, None

  return compile_step(step, state)


def abstract_step(setup: Setup, name: str) -> Plan:
  """The compiled step, its arguments as shapes, and its work, without data or weights, for the largest K."""
  cfg = setup.config.stages[name]
  tx = make_optimizer(cfg.optimizer, 10**6, f'stages.{name}')  # how many updates changes a constant of the schedule only
  state = make_state(setup, {'reward': abstract.params(setup, 'scalar')}, tx)
  k = max(cfg.k_buckets)
  prompts = prompts_per_batch(setup, name, k)
  array = lambda shape, dtype: abstract.array(setup, (prompts, *shape), dtype)
  batch = ComparisonBatch(array((k, setup.length), jnp.int32), array((k, setup.length), bool), array((k,), jnp.int32),
                          array((), jnp.float32))
  work = Work('update', setup.reward_model, 'scalar', prompts * k // cfg.microbatches, setup.length, cfg.microbatches)
  return Plan(make_step(setup, name, tx, state), (state, batch), {'update': [work]})


def check(setup: Setup, name: str) -> None:
  cfg = setup.config.stages[name]
  check_functions(cfg, f'stages.{name}')
  if setup.config.data.comparisons == 'sandbox:' and not 2 <= cfg.responses[0] <= cfg.responses[1] <= max(cfg.k_buckets):
    raise ValueError(f'stages.{name}.responses={cfg.responses} must be a range from 2 up to k_buckets={cfg.k_buckets}.')


def shift_bias(params, delta: float):
  """The reward model with `delta` added to every score."""
  head = params['final']['score']
  bias = jax.device_put(jnp.asarray(head['bias']) + delta, head['bias'].sharding)
  return {**params, 'final': {**params['final'], 'score': {**head, 'bias': bias}}}


def _bucket(values: np.ndarray, edges, key: str) -> np.ndarray:
  """The smallest edge that is at least each value."""
  edges = np.asarray(sorted(edges))
  if values.max() > edges[-1]:
    raise ValueError(f'{key}={edges.tolist()}: the data has {values.max()}.')
  return edges[np.searchsorted(edges, values)]
