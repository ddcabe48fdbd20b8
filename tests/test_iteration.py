"""One whole PPO iteration, and one rollout, against an explicit loop in float64 whose gradients are
written out by hand.

The networks are tables: the logits of the next token are a row of `table`, chosen by the token
before; the value is an entry of `w`, chosen by the token just read. So each derivative is one line,
and nothing of jax but the random permutations is used twice.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax import losses, ops, optim, rollout
from alignjax.stages import ppo_ptx
from alignjax.types import Decoder, KVCache, Networks, Rollout, TokenBatch, TrainState
from tests.fakes import close

V, Q, R, B = 7, 3, 4, 8
KEY, STEP = jax.random.key(11), 3
KL_COEF, TARGET, HORIZON, TEMPERATURE, DECAY = 0.15, 0.5, 100, 0.7, 0.8
GAMMA, LAM = 0.97, 0.9
COEFFICIENTS = dict(clip_eps=0.2, value_clip=0.15, vf_coef=0.6, temperature=TEMPERATURE)
ADAM = dict(
  policy=dict(lr=0.05, b1=0.8, b2=0.9, eps=1e-2, weight_decay=0.1, clip_norm=0.2),
  value=dict(lr=0.02, b1=0.7, b2=0.95, eps=1e-2, weight_decay=0.3, clip_norm=0.1),
)
MINIBATCHES, EPOCHS = 2, 2


def _logprobs(params, tokens, mask, temperature=1.0, key=None):
  out = ops.token_logprobs(params['table'][tokens[:, :-1]] / temperature, tokens[:, 1:])
  return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in out)


NETS = Networks(
  logits=lambda params, tokens, mask, key=None: params['table'][tokens],
  logprobs=_logprobs,
  scalar=lambda params, tokens, mask: params['w'][tokens],
  decoder=Decoder(
    lambda params: params,
    lambda weights, tokens, mask, samples: (
      jnp.repeat(weights['table'][tokens[:, -1]], samples, axis=0),
      KVCache((), mask, (), jnp.int32(0)),
    ),
    lambda weights, tokens, cache: (weights['table'][tokens], cache),
  ),
)


def log_softmax(x):
  return x - np.log(np.exp(x).sum())


def episode(seed):
  """(parameters, rollout, its metrics, pretraining rows), as numpy; ratios and values on both sides
  of their clips."""
  rng = np.random.default_rng(seed)
  params = {'policy': {'table': rng.normal(0, 1, (V, V))}, 'value': {'w': rng.normal(0, 0.5, V)}}
  params = jax.tree.map(lambda x: x.astype(np.float32), params)
  prompt_mask = np.arange(Q) >= Q - rng.integers(1, Q + 1, B)[:, None]
  mask = np.arange(R) < rng.integers(1, R + 1, B)[:, None]
  tokens = rng.integers(0, V, (B, Q + R)).astype(np.int32)
  old = np.zeros((B, R))
  for b, t in zip(*np.nonzero(mask), strict=True):
    old[b, t] = log_softmax(params['policy']['table'][tokens[b, Q + t - 1]] / TEMPERATURE)[
      tokens[b, Q + t]
    ]
  noisy = lambda x, scale: np.where(mask, x + rng.normal(0, scale, mask.shape), 0).astype(
    np.float32
  )
  logprobs = noisy(old, 0.2)
  ro = Rollout(
    tokens[:, :Q],
    prompt_mask,
    tokens[:, Q:],
    mask,
    logprobs,
    noisy(logprobs, 0.4),
    noisy(params['value']['w'][tokens[:, Q - 1 : -1]], 0.2),
    rng.normal(0.3, 1, B).astype(np.float32),
  )
  metrics = {'objective/scores': ro.scores.mean(), 'objective/kl': np.float32(0.55)}
  text_mask = np.arange(5) < rng.integers(2, 6, 4)[:, None]
  weights = np.where(text_mask, rng.uniform(0.2, 1, text_mask.shape), 0).astype(np.float32)
  weights[:, 0] = 0
  return (
    params,
    ro,
    metrics,
    TokenBatch(rng.integers(0, V, (4, 5)).astype(np.int32), text_mask, weights),
  )


def adam_rate(lr, count):
  """Four updates: a warmup of two from a tenth of lr, then constant."""
  return lr * (0.1 + 0.9 * min(count, 2) / 2)


def by_hand(params, ro, given, ptx, ema, ptx_coef):
  """-> everything that an iteration changes and reports, float64."""
  f = lambda x: np.asarray(x, np.float64)
  table, w, ema = f(params['policy']['table']), f(params['value']['w']), f(ema)
  tokens, mask = np.concatenate([ro.prompts, ro.responses], 1), ro.mask
  old, ref, old_values, scores = f(ro.logprobs), f(ro.ref_logprobs), f(ro.values), f(ro.scores)

  # token rewards and advantages, one sequence at a time, backwards
  advantages, returns = np.zeros((B, R)), np.zeros((B, R))
  for b in range(B):
    ahead = value_ahead = 0.0
    for t in reversed(range(mask[b].sum())):
      reward = -KL_COEF * (old[b, t] - ref[b, t]) + (scores[b] if t == mask[b].sum() - 1 else 0.0)
      ahead = reward + GAMMA * value_ahead - old_values[b, t] + GAMMA * LAM * ahead
      value_ahead = old_values[b, t]
      advantages[b, t], returns[b, t] = ahead, ahead + old_values[b, t]
  live = advantages[mask]
  white = (advantages - live.mean()) / np.sqrt(live.var() + 1e-8)

  order_key = jax.random.split(jax.random.fold_in(KEY, STEP))[1]
  orders = [np.arange(B)] + [
    np.asarray(jax.random.permutation(k, B)) for k in jax.random.split(order_key, EPOCHS)[1:]
  ]
  moments = {
    'policy': [np.zeros_like(table), np.zeros_like(table)],
    'value': [np.zeros_like(w), np.zeros_like(w)],
  }
  logged, count = [], 0
  for order in orders:
    for part in range(MINIBATCHES):
      rows = order[part * B // MINIBATCHES : (part + 1) * B // MINIBATCHES]
      weight = 1 / mask[rows].sum()
      grads = {'policy': np.zeros_like(table), 'value': np.zeros_like(w)}
      m = dict.fromkeys(
        (
          'loss/policy',
          'loss/value',
          'policy/entropy',
          'policy/approxkl',
          'policy/clipfrac',
          'val/error',
          'val/clipfrac',
          'val/mean',
        ),
        0.0,
      )
      deviation = 0.0
      for b in rows:
        for t in range(mask[b].sum()):
          before, token = tokens[b, Q + t - 1], tokens[b, Q + t]
          logp = log_softmax(table[before] / TEMPERATURE)
          p, ratio, a = np.exp(logp), np.exp(logp[token] - old[b, t]), white[b, t]
          deviation = max(deviation, abs(ratio - 1))
          clipped = min(max(ratio, 0.8), 1.2)
          m['loss/policy'] += weight * max(-a * ratio, -a * clipped)
          m['policy/clipfrac'] += weight * (-a * clipped > -a * ratio)
          m['policy/entropy'] -= weight * (p * logp).sum()
          m['policy/approxkl'] += weight * 0.5 * (logp[token] - old[b, t]) ** 2
          if -a * ratio >= -a * clipped:
            grads['policy'][before] += (
              weight * -a * ratio * ((np.arange(V) == token) - p) / TEMPERATURE
            )
          v, o, g = w[before], old_values[b, t], returns[b, t]
          near = min(max(v, o - 0.15), o + 0.15)
          m['loss/value'] += weight * 0.5 * max((v - g) ** 2, (near - g) ** 2)
          m['val/clipfrac'] += weight * ((near - g) ** 2 > (v - g) ** 2)
          m['val/error'] += weight * (v - g) ** 2
          m['val/mean'] += weight * v
          if (v - g) ** 2 >= (near - g) ** 2:
            grads['value'][before] += 0.6 * weight * (v - g)
      m['loss/total'] = m['loss/policy'] + 0.6 * m['loss/value']
      if ptx_coef:
        some = slice(part * 4 // MINIBATCHES, (part + 1) * 4 // MINIBATCHES)
        share = f(ptx.weights[some]) / f(ptx.weights[some]).sum()
        m['loss/ptx'] = 0.0
        for row, row_weights in zip(ptx.tokens[some], share, strict=True):
          for t in range(1, 5):
            logp = log_softmax(table[row[t - 1]])
            m['loss/ptx'] -= row_weights[t] * logp[row[t]]
            grads['policy'][row[t - 1]] -= (
              ptx_coef * row_weights[t] * ((np.arange(V) == row[t]) - np.exp(logp))
            )
        m['loss/total'] += ptx_coef * m['loss/ptx']
      count += 1
      for name, values in (('policy', table), ('value', w)):
        c, grad = ADAM[name], grads[name]
        norm = np.sqrt((grad**2).sum())
        m[f'norm/{name}'] = norm
        grad = grad * min(1.0, c['clip_norm'] / norm)
        first, second = moments[name]
        first += (1 - c['b1']) * (grad - first)
        second += (1 - c['b2']) * (grad**2 - second)
        step = (first / (1 - c['b1'] ** count)) / (
          np.sqrt(second / (1 - c['b2'] ** count)) + c['eps']
        )
        if name == 'policy':  # a matrix
          step += c['weight_decay'] * values
        values -= adam_rate(c['lr'], count - 1) * step
      ema = DECAY * ema + (1 - DECAY) * table
      logged.append(m | {'deviation': deviation})

  mean = {k: np.mean([m[k] for m in logged]) for k in logged[0]}
  metrics = {f'ppo/{k}': v for k, v in mean.items() if not k.startswith(('norm/', 'deviation'))}
  metrics |= {f'optim/grad_norm_{k}': mean[f'norm/{k}'] for k in ADAM}
  kl, score = float(given['objective/kl']), scores.mean()
  residual = (returns - old_values)[mask]
  metrics |= {
    'ppo/ratio_max_dev': logged[0]['deviation'],
    'objective/kl': kl,
    'objective/scores': score,
    'objective/kl_coef': KL_COEF,
    'objective/rlhf_reward': score - KL_COEF * kl,
    'ppo/returns/mean': returns[mask].mean(),
    'ppo/val/explained_variance': 1 - (residual**2).mean() / (returns[mask].var() + 1e-8),
    'noise': float(jax.random.uniform(jax.random.split(jax.random.fold_in(KEY, STEP))[0])),
  }
  kl_coef = KL_COEF * (1 + min(max(kl / TARGET - 1, -0.2), 0.2) * B / HORIZON)
  return {
    'table': table,
    'w': w,
    'ema': ema,
    'moments': moments,
    'count': count,
    'kl_coef': kl_coef,
    'metrics': metrics,
  }


@functools.cache
def compiled(ptx_coef, microbatches):
  """(state, rollout, its metrics, pretraining rows) -> (state, metrics, rollout) of `iteration`."""
  tx = optim.make(
    {name: optim.adam(steps=4, warmup=2, warmup_from=0.1, **c) for name, c in ADAM.items()}
  )

  def run(state, ro, given, ptx):
    return ppo_ptx.iteration(
      state,
      {},
      (ro.prompts, ro.prompt_mask, ptx if ptx_coef else None),
      key=KEY,
      nets=NETS,
      rollout_fn=lambda nets, params, frozen, prompts, mask, key: (
        ro,
        given | {'noise': jax.random.uniform(key)},
      ),
      advantage_fn=functools.partial(ops.gae, gamma=GAMMA, lam=LAM),
      whiten=True,
      loss_fn=functools.partial(losses.ppo_ptx, ptx_coef=ptx_coef, **COEFFICIENTS),
      tx=tx,
      minibatches=MINIBATCHES,
      inner_epochs=EPOCHS,
      microbatches=microbatches,
      live_rows=None,
      ema_decay=DECAY,
      kl_target=TARGET,
      kl_horizon=HORIZON,
    )

  return tx, jax.jit(run)


def first_state(params, tx):
  ema = jax.tree.map(lambda x: x + np.float32(0.5), params['policy'])
  return TrainState(
    step=jnp.int32(STEP),
    params=params,
    opt_state=tx.init(params),
    ema=ema,
    extra={'kl_coef': jnp.float32(KL_COEF)},
    skipped=jnp.array([5, 2]),
  )


@pytest.mark.parametrize('ptx_coef,microbatches', [(0.0, 1), (2.5, 2)])
@pytest.mark.parametrize('seed', [0, 1])
def test_an_iteration_equals_a_float64_loop(seed, ptx_coef, microbatches):
  params, ro, given, ptx = episode(seed)
  tx, run = compiled(ptx_coef, microbatches)
  state, metrics, seen = run(first_state(params, tx), ro, given, ptx)
  want = by_hand(params, ro, given, ptx, params['policy']['table'] + np.float32(0.5), ptx_coef)
  assert (
    0.05 < want['metrics']['ppo/policy/clipfrac'] < 0.9
    and 0.05 < want['metrics']['ppo/val/clipfrac'] < 0.9
  )

  near = functools.partial(close, rtol=1e-4, atol=1e-5)
  near(state.params['policy']['table'], want['table'])
  near(state.params['value']['w'], want['w'])
  near(state.ema['table'], want['ema'])
  for name, leaf in (('policy', 'table'), ('value', 'w')):
    own = state.opt_state.inner_states[name]
    for moment, expected in zip(('mu', 'nu'), want['moments'][name], strict=True):
      near(optax.tree_utils.tree_get(own, moment)[name][leaf], expected)
    assert (
      {int(c) for _, c in optax.tree_utils.tree_get_all_with_path(own, 'count')}
      == {want['count']}
      == {4}
    )
  near(state.extra['kl_coef'], want['kl_coef'])
  assert (
    set(state.extra) == {'kl_coef'}
    and int(state.step) == STEP + 1
    and state.skipped.tolist() == [5, 0]
  )
  assert set(metrics) == set(want['metrics'])
  for name in metrics:
    close(metrics[name], want['metrics'][name], rtol=1e-4, atol=1e-5, err_msg=name)
  jax.tree.map(np.testing.assert_array_equal, seen, ro)


def test_an_iteration_without_a_finite_score_changes_no_number_but_the_counts():
  params, ro, given, ptx = episode(0)
  tx, run = compiled(2.5, 2)
  before = first_state(params, tx)
  ro = ro.replace(scores=np.full(B, np.nan, np.float32))
  state, metrics, _ = run(before, ro, given | {'objective/scores': np.float32(np.nan)}, ptx)
  same = lambda state: (state.params, state.opt_state, state.ema, state.extra)
  jax.tree.map(np.testing.assert_array_equal, same(state), same(before))
  assert int(state.step) == STEP + 1 and state.skipped.tolist() == [9, 6]


def test_a_rollout_equals_a_float64_loop():
  """Policy and reference under the same temperature, each number at its token; the metrics of the
  rollout."""
  rng = np.random.default_rng(5)
  table, ref = (rng.normal(0, 1, (V, V)).astype(np.float32) for _ in range(2))
  w, scores = rng.normal(0, 1, V).astype(np.float32), rng.normal(0, 1, 12).astype(np.float32)
  prompts, prompt_mask = (
    rng.integers(0, V, (6, Q)).astype(np.int32),
    np.arange(Q) >= np.array([[0], [1], [2]] * 2),
  )

  @jax.jit
  def run(params, frozen, scores):
    return rollout.collect(
      NETS,
      params,
      frozen,
      prompts,
      prompt_mask,
      jax.random.key(0),
      max_tokens=R,
      stop_ids=(2, 4),
      temperature=TEMPERATURE,
      samples_per_prompt=2,
      missing_end_penalty=0.5,
      score_rows=4,
      reward_fn=lambda *rows, nets, frozen: scores,
    )

  ro, metrics = jax.tree.map(
    np.asarray,
    run({'policy': {'table': table}, 'value': {'w': w}}, {'ref': {'table': ref}}, scores),
  )
  np.testing.assert_array_equal(ro.prompts, np.repeat(prompts, 2, 0))
  np.testing.assert_array_equal(ro.prompt_mask, np.repeat(prompt_mask, 2, 0))
  of = lambda table, before, token: log_softmax(
    np.asarray(table[before], np.float64) / TEMPERATURE
  )[token]
  k1, k3, entropy, lengths, ended = (
    np.zeros(12),
    np.zeros(12),
    np.zeros(12),
    np.zeros(12),
    np.zeros(12),
  )
  for b in range(12):
    before = ro.prompts[b, -1]
    for t, token in enumerate(ro.responses[b]):
      if ended[b]:
        assert (
          not ro.mask[b, t] and ro.logprobs[b, t] == ro.ref_logprobs[b, t] == ro.values[b, t] == 0
        )
        continue
      assert ro.mask[b, t]
      ours, theirs = of(table, before, token), of(ref, before, token)
      close(
        [ro.logprobs[b, t], ro.ref_logprobs[b, t], ro.values[b, t]],
        [ours, theirs, w[before]],
        rtol=1e-5,
      )
      k1[b] += ours - theirs
      k3[b] += np.exp(theirs - ours) - 1 - (theirs - ours)
      entropy[b] -= ours
      lengths[b] += 1
      ended[b], before = token in (2, 4), token
  assert 0 < ended.mean() < 1
  close(ro.scores, scores - 0.5 * (1 - ended))
  want = {
    'objective/scores': ro.scores.mean(),
    'objective/scores_std': ro.scores.std(),
    'objective/kl': k1.mean(),
    'objective/kl_k3': k3.mean(),
    'objective/entropy': entropy.mean(),
    'rollout/length': lengths.mean(),
    'rollout/ended': ended.mean(),
    'rollout/live': (ro.prompt_mask.sum() + lengths.sum()) / (len(lengths) * (Q + R)),
    'rollout/sampler_gap_max': 0.0,
  }
  assert set(metrics) == set(want)
  for name in want:
    close(metrics[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_the_stage_keeps():
  """The policy after the last update, or its moving average where the config says so (keep)."""
  params, _, _, _ = episode(0)
  state = first_state(params, compiled(0.0, 1)[0])
  assert ppo_ptx.final_params(state, 'policy') is state.params['policy']
  assert ppo_ptx.final_params(state, 'ema') is state.ema
