"""Losses against independent float64 computations, and the properties that others got wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses, steps
from alignjax.types import normalize
from tests.fakes import assert_additive, close, comparison_batch, model, ppo_batch, token_batch

PPO = dict(clip_eps=0.2, value_clip=0.2, vf_coef=0.5)


def both():
  _, nets, params, scalar = model()
  return nets, {'policy': params, 'value': scalar}


def test_sft_is_the_weighted_cross_entropy():
  _, nets, params, _ = model()
  batch = token_batch(0).normalized()
  logits = np.asarray(nets.logits(params, batch.tokens, batch.mask), np.float64)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = sum(
    -batch.weights[b, t] * np.log(p[b, t - 1, batch.tokens[b, t]])
    for b in range(4)
    for t in range(1, 7)
    if batch.mask[b, t]
  )
  loss, metrics = losses.sft({'policy': params}, batch, None, nets=nets)
  close(loss, expected, rtol=1e-4)
  assert metrics['sft/loss'] == loss


def test_item_3_the_end_token_is_trained_on_when_it_is_the_pad_too():
  _, nets, params, _ = model()
  end = 0  # pad == eos == 0
  tokens = jnp.array([[7, 8, end, end]])
  batch = token_batch(0).replace(
    tokens=tokens, mask=jnp.array([[1, 1, 1, 0]], bool), weights=jnp.array([[0, 0, 1.0, 0]])
  )
  expected = -nets.logprobs(params, tokens[:, :3], jnp.ones((1, 3), bool))[0][0, 2]
  close(losses.sft({'policy': params}, batch, None, nets=nets)[0], expected)


@pytest.mark.parametrize('seed', range(3))
def test_item_19_ranking_equals_the_explicit_pairs(seed):
  _, nets, _, scalar = model()
  batch = comparison_batch(seed).normalized()
  b, k, t = batch.tokens.shape
  total = accuracy = margin = 0.0
  for i in range(b):
    scores, margins = {}, []
    for j in range(k):
      if batch.ranks[i, j] >= 0:
        n = int(batch.mask[i, j].sum())  # one response at a time, without padding
        scores[j] = float(
          nets.scalar(scalar, batch.tokens[i, j, :n][None], jnp.ones((1, n), bool))[0, -1]
        )
    size = len(scores)
    for j in scores:
      for m in scores:
        if batch.ranks[i, j] < batch.ranks[i, m]:
          total += np.log1p(np.exp(-(scores[j] - scores[m]))) / (size * (size - 1) / 2) / b
          margins.append(scores[j] - scores[m])
    accuracy += np.mean(np.array(margins) > 0) / b
    margin += np.mean(margins) / b
  loss, metrics = losses.reward_ranking({'reward': scalar}, batch, None, nets=nets)
  close(loss, total, rtol=1e-4)
  close(
    [metrics['rm/loss'], metrics['rm/accuracy'], metrics['rm/margin']],
    [total, accuracy, margin],
    rtol=1e-4,
    atol=1e-5,
  )


def test_a_model_that_scores_all_alike_orders_nothing():
  _, nets, _, scalar = model()
  params = {'reward': jax.tree.map(jnp.zeros_like, scalar)}
  batch = comparison_batch(0).normalized()
  _, metrics = losses.reward_ranking(params, batch, None, nets=nets)
  assert metrics['rm/accuracy'] == metrics['rm/margin'] == 0 and metrics['rm/loss'] > 0.1


def test_item_19_a_prompt_of_ties_counts_for_nothing():
  """Nor does it make the others heavier: each of the four has a quarter. The figures are means over
  the three."""
  _, nets, _, scalar = model()
  batch = comparison_batch(0)
  tied = batch.replace(ranks=batch.ranks.at[0].set(jnp.where(batch.ranks[0] >= 0, 3, -1)))
  without = jax.tree.map(lambda x: x[1:], batch)
  loss = jax.jit(
    lambda batch: losses.reward_ranking({'reward': scalar}, batch.normalized(), None, nets=nets)
  )
  (a, figures), (b, expected) = loss(tied), loss(without)
  close(4 * a, 3 * b)
  for name in expected:
    close(figures[name], expected[name])


def test_weights_add_up_to_1_and_zeros_stay_zeros():
  close(normalize(jnp.array([[0.5, 0.0], [1.0, 0.5]])), [[0.25, 0], [0.5, 0.25]])
  assert (np.asarray(normalize(jnp.zeros((2, 2)))) == 0).all()


def test_a_prompt_counts_by_its_weight():
  """The logged margin of prompts that weigh 3 and 1 is three quarters the first one's."""
  _, nets, _, scalar = model()
  batch = jax.tree.map(lambda x: x[:2], comparison_batch(2))
  margin = lambda *w: float(
    losses.reward_ranking(
      {'reward': scalar}, batch.replace(weights=jnp.array(w)).normalized(), None, nets=nets
    )[1]['rm/margin']
  )
  assert margin(3.0, 1.0) == pytest.approx(
    0.75 * margin(1.0, 0.0) + 0.25 * margin(0.0, 1.0), rel=1e-4
  )
  assert margin(1.0, 0.0) != margin(0.0, 1.0)


def test_item_6_scores_depend_on_neither_padding_nor_company():
  _, nets, _, scalar = model()
  from alignjax import ops

  tokens = jnp.array([[4, 9, 2, 7]])
  score = lambda tokens, mask: float(ops.last_live(nets.scalar(scalar, tokens, mask), mask)[0])
  alone = score(tokens, jnp.ones((1, 4), bool))
  right = score(jnp.array([[4, 9, 2, 7, 0, 0, 0]]), jnp.array([[1, 1, 1, 1, 0, 0, 0]], bool))
  left = score(jnp.array([[3, 3, 4, 9, 2, 7]]), jnp.array([[0, 0, 1, 1, 1, 1]], bool))
  company = score(
    jnp.array([[4, 9, 2, 7, 0], [1, 2, 3, 4, 5]]), jnp.array([[1, 1, 1, 1, 0], [1] * 5], bool)
  )
  np.testing.assert_allclose([right, left, company], alone, rtol=1e-5, atol=1e-6)


def test_item_6_the_ranking_loss_does_not_know_the_padded_width():
  _, nets, _, scalar = model()
  batch = comparison_batch(0).normalized()
  wide = batch.replace(
    tokens=jnp.pad(batch.tokens, ((0, 0), (0, 0), (0, 3)), constant_values=5),
    mask=jnp.pad(batch.mask, ((0, 0), (0, 0), (0, 3))),
  )
  loss = lambda batch: losses.reward_ranking({'reward': scalar}, batch, None, nets=nets)[0]
  close(loss(wide), loss(batch), rtol=1e-5)


@pytest.mark.parametrize('value_clip', [0.2, None])
@pytest.mark.parametrize('seed', range(2))
def test_ppo_equals_a_float64_loop(seed, value_clip):
  nets, params = both()
  batch = ppo_batch(seed, ptx_rows=0).normalized()
  ro = batch.rollout
  tokens, mask = ro.sequences()
  q = ro.prompts.shape[1]
  logits = np.asarray(nets.logits(params['policy'], tokens, mask), np.float64)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  new_values = np.asarray(nets.scalar(params['value'], tokens, mask), np.float64)
  policy = value = 0.0
  for b, t in zip(*np.nonzero(np.asarray(ro.mask)), strict=True):
    ratio = p[b, q + t - 1, tokens[b, q + t]] / np.exp(float(ro.logprobs[b, t]))
    advantage, weight = float(batch.advantages[b, t]), float(batch.weights[b, t])
    policy += weight * max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
    v, old, target = new_values[b, q + t - 1], float(ro.values[b, t]), float(batch.returns[b, t])
    near = v if value_clip is None else old + min(max(v - old, -value_clip), value_clip)
    value += weight * 0.5 * max((v - target) ** 2, (near - target) ** 2)
  loss, metrics = losses.ppo(
    params, batch, None, nets=nets, clip_eps=0.2, value_clip=value_clip, vf_coef=0.5
  )
  close(metrics['ppo/loss/policy'], policy, rtol=1e-4)
  close(metrics['ppo/loss/value'], value, rtol=1e-4)
  close(loss, policy + 0.5 * value, rtol=1e-4)


def test_item_15_no_gradient_through_what_happened():
  nets, params = both()
  batch = ppo_batch(0, ptx_rows=0).normalized()

  def loss(parts):
    logprobs, values, advantages, returns = parts
    changed = batch.replace(
      rollout=batch.rollout.replace(logprobs=logprobs, values=values),
      advantages=advantages,
      returns=returns,
    )
    return losses.ppo(params, changed, None, nets=nets, **PPO)[0]

  grads = jax.grad(loss)(
    (batch.rollout.logprobs, batch.rollout.values, batch.advantages, batch.returns)
  )
  assert all((np.asarray(g) == 0).all() for g in grads)


def test_item_16_one_gradient_of_ppo_and_pretraining():
  nets, params = both()
  batch = ppo_batch(0)
  grad = lambda fn, batch: jax.jit(lambda p: steps.gradients(fn, p, batch, None, nets=nets)[0])(
    params
  )
  total = grad(functools.partial(losses.ppo_ptx, ptx_coef=3.0, **PPO), batch)
  ppo = grad(functools.partial(losses.ppo, **PPO), batch)
  lm = grad(losses.sft, batch.ptx)
  jax.tree.map(
    lambda t, a, b: close(t, a + 3.0 * b, rtol=1e-4), total['policy'], ppo['policy'], lm['policy']
  )
  jax.tree.map(close, total['value'], ppo['value'])
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(lm['policy'])) > 1e-3


def test_item_16_a_ptx_coefficient_without_rows_is_an_error():
  nets, params = both()
  with pytest.raises(ValueError, match='rows_per_episode'):
    losses.ppo_ptx(params, ppo_batch(0, ptx_rows=0), None, nets=nets, ptx_coef=1.0)


def test_ptx_coef_0_is_ppo():
  nets, params = both()
  batch = ppo_batch(0, ptx_rows=0).normalized()
  assert (
    losses.ppo_ptx(params, batch, None, nets=nets, ptx_coef=0.0, **PPO)[0]
    == losses.ppo(params, batch, None, nets=nets, **PPO)[0]
  )


@pytest.mark.parametrize('parts', [2, 4])
def test_item_10_microbatches_add_up(parts):
  nets, params = both()
  assert_additive(
    functools.partial(losses.ppo_ptx, ptx_coef=2.0, **PPO), params, ppo_batch(0), nets, parts
  )
  assert_additive(losses.sft, params, token_batch(1), nets, parts)
  assert_additive(
    losses.reward_ranking, {'reward': params['value']}, comparison_batch(1), nets, parts
  )


def test_the_objective_points_the_right_way():
  """A step along the gradient makes tokens of positive advantage likelier."""
  nets, params = both()
  batch = ppo_batch(0, ptx_rows=0)
  first = jnp.zeros_like(batch.advantages).at[:, 0].set(1.0)
  batch = batch.replace(
    advantages=first,
    rollout=batch.rollout.replace(
      logprobs=nets.logprobs(params['policy'], *batch.rollout.sequences())[0][:, 5:]
    ),
  )
  grads, _, _ = steps.gradients(losses.ppo, params, batch, None, nets=nets)
  moved = jax.tree.map(lambda p, g: p - 0.01 * g, params['policy'], grads['policy'])
  chosen = lambda p: nets.logprobs(p, *batch.rollout.sequences())[0][:, 5].mean()
  assert chosen(moved) > chosen(params['policy'])
