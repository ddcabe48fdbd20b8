"""ops against hand-made numbers and independent float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import ops
from tests.fakes import close


def ragged(seed, rows=6, length=7):
  rng = np.random.default_rng(seed)
  mask = np.arange(length) < rng.integers(1, length + 1, rows)[:, None]
  return rng, mask


def test_positions_come_from_the_mask():
  mask = jnp.array([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
  assert ops.positions(mask)[0, 2:].tolist() == [0, 1]
  assert ops.positions(mask)[1, :2].tolist() == [0, 1]
  assert ops.positions(mask)[2].tolist() == [0, 1, 2, 3]
  assert ops.positions(mask).min() == 0


def test_last_live_on_either_side_of_padding():
  x = jnp.arange(12.0).reshape(3, 4)
  mask = jnp.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]], bool)
  assert ops.last_live(x, mask).tolist() == [1.0, 7.0, 10.0]


def test_token_logprobs_and_entropy_in_float64():
  rng = np.random.default_rng(0)
  logits, targets = rng.normal(0, 3, (4, 5, 11)), rng.integers(0, 11, (4, 5))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  logprobs, entropy = ops.token_logprobs(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
  close(logprobs, np.log(np.take_along_axis(p, targets[..., None], -1))[..., 0], rtol=1e-5)
  close(entropy, -(p * np.log(p)).sum(-1), rtol=1e-5)


@pytest.mark.parametrize('seed', range(3))
def test_the_gradient_of_token_logprobs_is_that_of_their_definition(seed):
  rng = np.random.default_rng(seed)
  logits, targets = (
    jnp.asarray(rng.normal(0, 2, (4, 9)), jnp.float32),
    jnp.asarray(rng.integers(0, 9, 4)),
  )
  a, b = (jnp.asarray(rng.normal(0, 1, 4), jnp.float32) for _ in range(2))

  def definition(logits):
    p = jax.nn.softmax(logits)
    return jnp.sum(a * jnp.log(p[jnp.arange(4), targets])) - jnp.sum(
      b * jnp.sum(p * jnp.log(p), -1)
    )

  def ours(logits):
    logprobs, entropy = ops.token_logprobs(logits, targets)
    return jnp.sum(a * logprobs) + jnp.sum(b * entropy)

  close(jax.grad(ours)(logits), jax.grad(definition)(logits), rtol=1e-4, atol=1e-5)
  half = jax.grad(lambda x: ops.token_logprobs(x, targets)[0].sum())(logits.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16


def test_token_logprobs_are_float32_even_of_bfloat16_logits():
  logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (3, 50)), jnp.bfloat16)
  logprobs, entropy = ops.token_logprobs(logits, jnp.zeros(3, jnp.int32))
  exact = jax.nn.log_softmax(logits.astype(jnp.float32))[:, 0]
  assert logprobs.dtype == entropy.dtype == jnp.float32
  close(logprobs, exact)


@pytest.mark.parametrize('shift_mean', [True, False])
@pytest.mark.parametrize('seed', [0, 1])
def test_item_11_and_12_whitening_counts_the_live_tokens_of_the_whole_batch(seed, shift_mean):
  rng, mask = ragged(seed)
  x = rng.normal(3, 2, mask.shape)
  live = x[mask]
  expected = np.where(
    mask, (x - live.mean()) / np.sqrt(live.var() + 1e-8) + (0 if shift_mean else live.mean()), 0
  )
  polluted = np.where(mask, x, 1e6)  # what stands on pads must not matter
  close(
    ops.whiten(jnp.asarray(polluted, jnp.float32), jnp.asarray(mask), shift_mean),
    expected,
    rtol=1e-4,
    atol=1e-4,
  )


def test_kl_estimates_by_hand():
  logprobs, ref = jnp.log(jnp.array([[0.5, 0.25, 0.9]])), jnp.log(jnp.array([[0.25, 0.5, 0.1]]))
  k1, k3 = ops.kl_estimates(logprobs, ref, jnp.array([[True, True, False]]))
  close(k1, [np.log(2) - np.log(2)], atol=1e-6)
  close(k3, [(0.5 - 1 + np.log(2)) + (2 - 1 - np.log(2))], rtol=1e-5)
  assert k3 >= 0


@pytest.mark.parametrize('seed', range(3))
def test_item_12_kl_ignores_pads(seed):
  rng, mask = ragged(seed)
  a, b = rng.normal(-2, 1, mask.shape), rng.normal(-2, 1, mask.shape)
  k1, k3 = ops.kl_estimates(
    jnp.asarray(np.where(mask, a, 9), jnp.float32),
    jnp.asarray(np.where(mask, b, -9), jnp.float32),
    jnp.asarray(mask),
  )
  close(k1, ((a - b) * mask).sum(1), rtol=1e-4, atol=1e-5)
  close(k3, ((np.exp(b - a) - 1 - (b - a)) * mask).sum(1), rtol=1e-4, atol=1e-4)


def test_item_1_the_score_lands_on_the_last_live_token():
  mask = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
  zeros = jnp.zeros((3, 4))
  rewards = ops.token_rewards(jnp.array([0.9, -0.25, 2.0]), zeros, zeros, mask, 0.1)
  close(rewards, [[0, 0, 0.9, 0], [0, 0, 0, -0.25], [2.0, 0, 0, 0]])


@pytest.mark.parametrize('seed', range(3))
def test_item_1_rewards_add_up_to_score_minus_kl(seed):
  rng, mask = ragged(seed)
  logprobs, ref = (
    np.where(mask, rng.normal(-2, 1, mask.shape), 0).astype(np.float32) for _ in range(2)
  )
  scores = rng.normal(0, 1, len(mask)).astype(np.float32)
  rewards = np.asarray(ops.token_rewards(*map(jnp.asarray, (scores, logprobs, ref, mask)), 0.07))
  close((rewards * mask).sum(1), scores - 0.07 * (logprobs - ref).sum(1), rtol=1e-4, atol=1e-5)
  polluted = [np.where(mask, x, 1e3 * i) for i, x in enumerate((logprobs, ref), 1)]
  again = np.asarray(
    ops.token_rewards(
      *(jnp.asarray(x, jnp.float32) for x in (scores, *polluted)), jnp.asarray(mask), 0.07
    )
  )
  assert (rewards[~mask] == 0).all() and (again == rewards).all()


def test_item_13_integer_scores_are_refused():
  mask = jnp.ones((1, 2), bool)
  with pytest.raises(AssertionError):
    ops.token_rewards(jnp.array([1]), jnp.zeros((1, 2)), jnp.zeros((1, 2)), mask, 0.1)
  with pytest.raises(AssertionError):
    ops.gae(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2)), mask)


@pytest.mark.parametrize(
  'seed,gamma,lam', [(0, 1.0, 0.95), (1, 0.9, 0.5), (2, 1.0, 1.0), (3, 1.0, 0.0)]
)
def test_item_12_gae_equals_a_loop_over_each_sequence(seed, gamma, lam):
  rng, mask = ragged(seed)
  rewards, values = rng.normal(0, 1, mask.shape), rng.normal(0, 1, mask.shape)
  expected, expected_returns = np.zeros(mask.shape), np.zeros(mask.shape)
  for row, n in enumerate(mask.sum(1)):
    for t in range(n):  # A_t = sum_k (gamma lam)^k delta_{t+k}, by its definition
      for k in range(n - t):
        after = values[row, t + k + 1] if t + k + 1 < n else 0.0
        delta = rewards[row, t + k] + gamma * after - values[row, t + k]
        expected[row, t] += (gamma * lam) ** k * delta
      expected_returns[row, t] = expected[row, t] + values[row, t]
  polluted = [jnp.asarray(np.where(mask, x, 1e3), jnp.float32) for x in (rewards, values)]
  advantages, returns = ops.gae(*polluted, jnp.asarray(mask), gamma=gamma, lam=lam)
  close(advantages, expected, rtol=1e-4, atol=1e-5)
  close(returns, expected_returns, rtol=1e-4, atol=1e-5)


def test_adaptive_kl_coef_by_hand():
  step = lambda kl: float(
    ops.adaptive_kl_coef(jnp.float32(0.2), jnp.float32(kl), 512, target=6.0, horizon=10_000)
  )
  assert step(6.0) == pytest.approx(0.2)
  assert step(60.0) == pytest.approx(0.2 * (1 + 0.2 * 512 / 10_000))
  assert step(0.0) == pytest.approx(0.2 * (1 - 0.2 * 512 / 10_000))
  assert step(6.6) == pytest.approx(0.2 * (1 + 0.1 * 512 / 10_000))
