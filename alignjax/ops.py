"""The array mathematics of RLHF: token log-probabilities, masked statistics, KL, token rewards and
advantages.

All functions are pure and compute in float32. Masks are bool and come from the data. Shapes use the
letters of types.py. Each function checks ranks and dtypes first, because an integer reward would
silently round 0.9 to 0 (docs/pitfalls.md, 13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def positions(mask: jax.Array) -> jax.Array:
  """The position of each token among the real tokens of its row: i32[B,T].

  [0, 0, 1, 1, 1] -> [0, 0, 0, 1, 2]. Training, scoring and prefill all take their positions from
  here, so that a padded row is read as the unpadded one (docs/pitfalls.md, 5). Pads get 0, which
  nothing reads. In a packed row, whose mask holds document numbers, positions begin again in each
  document: [1, 1, 2, 2, 2, 0] -> [0, 1, 0, 1, 2, 0].
  """
  if mask.dtype != bool:
    column = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    first = jnp.concatenate(
      [jnp.ones_like(mask[..., :1], bool), mask[..., 1:] != mask[..., :-1]], -1
    )
    return jnp.where(
      mask > 0, column - jax.lax.cummax(jnp.where(first, column, 0), axis=mask.ndim - 1), 0
    )
  return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)


def last_live(x: jax.Array, mask: jax.Array | np.ndarray) -> jax.Array:
  """x[..., T] at the last True of mask[..., T], whichever side is padded; at position 0 where the
  mask has no True."""
  chex.assert_equal_shape([x, mask])
  length = mask.shape[-1]
  index = length - 1 - jnp.argmax(mask[..., ::-1], axis=-1)
  index = jnp.where(mask.any(-1), index, 0)
  return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]


def token_logprobs(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The log-probability of each target and the entropy of each distribution, in float32 (nats).

  The gradient is written out (d logprob = onehot - p, d entropy = -p (log p + H)). It stores the
  logits and their normalizer but no softmax, and takes one pass over the logits. The forward pass
  is the same program with and without a gradient. Automatic differentiation makes two programs of
  it, whose results differed in the last bit of one log-probability in three hundred, so that the
  PPO ratio was not exactly 1 before the first update.

  Args:
    logits: [..., V], of any float dtype, already divided by the temperature.
    targets: i32[...].

  Returns:
    (f32[...], f32[...]). The entropy costs nothing where the caller does not use it, because XLA
    drops it then.
  """
  return _token_logprobs(logits.astype(jnp.float32), targets)


@jax.custom_vjp
def _token_logprobs(logits, targets):
  return _with_normalizer(logits, targets)[:2]


def _with_normalizer(logits, targets):
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  entropy = normalizer - jnp.sum(jnp.exp(logits - normalizer[..., None]) * logits, axis=-1)
  return chosen - normalizer, entropy, normalizer


def _token_logprobs_forward(logits, targets):
  logits, targets = logits.value, targets.value
  logprobs, entropy, normalizer = _with_normalizer(logits, targets)
  return (logprobs, entropy), (logits, targets, entropy, normalizer)


def _token_logprobs_backward(saved, grads):
  logits, targets, entropy, normalizer = saved
  grad_chosen, grad_entropy = grads
  logprobs = logits - normalizer[..., None]
  p = jnp.exp(logprobs)
  grad = 0.0
  if not isinstance(grad_chosen, jax.custom_derivatives.SymbolicZero):
    onehot = jax.nn.one_hot(targets, logits.shape[-1], dtype=p.dtype)
    grad = grad_chosen[..., None] * (onehot - p)
  if not isinstance(grad_entropy, jax.custom_derivatives.SymbolicZero):
    # Where the caller does not use the entropy, neither the forward nor the backward pass
    # computes it.
    grad = grad - grad_entropy[..., None] * p * (logprobs + entropy[..., None])
  return grad, None


_token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward, symbolic_zeros=True)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """The mean of x over the True elements of mask, of all rows and devices; 0 where none is True."""
  chex.assert_equal_shape([x, mask])
  mask = mask.astype(x.dtype)
  return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def masked_variance(x: jax.Array, mask: jax.Array) -> jax.Array:
  """The population variance of x over the True elements of mask."""
  return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


def whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
  """Scales x to variance 1 over the mask of the whole batch, and to mean 0 unless shift_mean is
  False.

  The result is (x - mean) * rsqrt(var + 1e-8) with the population variance, as in
  lm-human-preferences `utils/core.py: whiten`. That code whitens each rank and minibatch apart and
  counts pads; this one whitens once, over the live tokens of the global batch. Pads become 0.
  """
  chex.assert_equal_shape([x, mask])
  chex.assert_type(x, jnp.float32)
  mean = masked_mean(x, mask)
  whitened = (x - mean) * jax.lax.rsqrt(masked_variance(x, mask) + 1e-8)
  if not shift_mean:
    whitened = whitened + mean
  return jnp.where(mask, whitened, 0.0)


def kl_estimates(
  logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Two estimates of KL(policy || reference) for each response, in nats: (k1 f32[B], k3 f32[B]).

  k1 = sum_t log(pi/ref) is the paper's penalty. It is unbiased, but single values may be negative.
  k3 = sum_t (ref/pi - 1 - log(ref/pi)) is unbiased too and never negative (J. Schulman,
  "Approximating KL divergence"). A k3 that is far from k1 on average shows that the tokens were not
  sampled from the distribution that scored them (docs/pitfalls.md, 9).
  """
  chex.assert_equal_shape([logprobs, ref_logprobs, mask])
  log_ratio = jnp.where(mask, logprobs - ref_logprobs, 0.0)
  return jnp.sum(log_ratio, -1), jnp.sum(jnp.exp(-log_ratio) - 1.0 + log_ratio, -1)


def token_rewards(
  scores: jax.Array,
  logprobs: jax.Array,
  ref_logprobs: jax.Array,
  mask: jax.Array,
  kl_coef: jax.Array | float,
) -> jax.Array:
  """The reward of every response token, f32[B,R]: -kl_coef * log(pi/ref), and the score on the last
  live token.

  Section 3.5 and Eq. 2 of the paper: r(x, y) - beta * log(pi(y|x) / ref(y|x)), where the log-ratio
  of the sequence is the sum of those of its tokens. For the mask [1, 1, 1, 0] the score goes to
  index 2, never to a pad (docs/pitfalls.md, 1).

  Args:
    scores: f32[B], the reward of each whole response.
    logprobs, ref_logprobs: f32[B,R], under the policy that sampled and under the reference.
    mask: bool[B,R].
    kl_coef: beta in Eq. 2.
  """
  chex.assert_rank([scores, logprobs, ref_logprobs, mask], [1, 2, 2, 2])
  chex.assert_equal_shape([logprobs, ref_logprobs, mask])
  chex.assert_type(
    [scores, logprobs, ref_logprobs, mask], [jnp.float32, jnp.float32, jnp.float32, bool]
  )
  live_after = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
  is_last = mask & (live_after == 1)
  penalty = jnp.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)
  return penalty + jnp.where(is_last, scores[:, None], 0.0)


def gae(
  rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation over right-padded responses.

  delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, and returns = A + V
  (Schulman et al. 2016, Eq. 16). V and A behind the last live token are 0: the episode ends there,
  whether with an end token or at the length limit. The paper does not discount (gamma 1) and does
  not report lam; 0.95 is the value of Stiennon et al. 2020.

  Args:
    rewards: f32[B,R], of token_rewards.
    values: f32[B,R], the value before each token.
    mask: bool[B,R].
    gamma: discount per token.
    lam: lambda of the estimator.

  Returns:
    (advantages, returns), both f32[B,R] and 0 on pads.
  """
  chex.assert_rank([rewards, values, mask], 2)
  chex.assert_equal_shape([rewards, values, mask])
  chex.assert_type([rewards, values, mask], [jnp.float32, jnp.float32, bool])
  values = jnp.where(mask, values, 0.0)
  next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
  deltas = jnp.where(mask, rewards + gamma * next_values - values, 0.0)

  def backwards(advantage, delta):
    advantage = delta + gamma * lam * advantage
    return advantage, advantage

  _, advantages = jax.lax.scan(backwards, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
  advantages = jnp.where(mask, advantages.T, 0.0)
  return advantages, jnp.where(mask, advantages + values, 0.0)


def leave_one_out(
  rewards: jax.Array, values: jax.Array, mask: jax.Array, *, samples_per_prompt: int
) -> tuple[jax.Array, jax.Array]:
  """The advantages of RLOO (Ahmadian et al. 2024, Eq. 7): the reward of each response less the mean
  of those of the other samples of its prompt. There is no value network.

  Args:
    rewards: f32[B,R], of token_rewards; a response has their sum. The samples of a prompt are
      neighbors.
    values: f32[B,R], which are not read.
    mask: bool[B,R].
    samples_per_prompt: 2 or more; the stage passes it.

  Returns:
    (advantages, returns), both f32[B,R], the same for every token of a response and 0 on pads.
  """
  del values
  total = _by_prompt(rewards, mask, samples_per_prompt)
  others = (jnp.sum(total, 1, keepdims=True) - total) / (samples_per_prompt - 1)
  advantages = jnp.where(mask, (total - others).reshape(-1, 1), 0.0)
  return advantages, advantages


def group_relative(
  rewards: jax.Array, values: jax.Array, mask: jax.Array, *, samples_per_prompt: int
) -> tuple[jax.Array, jax.Array]:
  """The advantages of GRPO (Shao et al. 2024, section 4.1.2): the reward of each response less the
  mean of the samples of its prompt, over their standard deviation. Where all have the same reward
  the advantages are 0. Its KL penalty stands in the loss (losses.policy_gradient), so that the
  stage has kl.coef 0. Arguments and results are those of leave_one_out."""
  del values
  total = _by_prompt(rewards, mask, samples_per_prompt)
  apart = total - jnp.mean(total, 1, keepdims=True)
  relative = apart / (jnp.std(total, 1, keepdims=True) + 1e-6)
  advantages = jnp.where(mask, relative.reshape(-1, 1), 0.0)
  return advantages, advantages


def _by_prompt(rewards: jax.Array, mask: jax.Array, samples_per_prompt: int) -> jax.Array:
  """The summed rewards of the samples of each prompt, f32[prompts, samples_per_prompt]."""
  chex.assert_rank([rewards, mask], 2)
  chex.assert_equal_shape([rewards, mask])
  chex.assert_type([rewards, mask], [jnp.float32, bool])
  if samples_per_prompt < 2:
    raise ValueError(
      'these advantages compare the samples of a prompt: rollout.samples_per_prompt must be 2 or '
      'more'
    )
  return jnp.sum(jnp.where(mask, rewards, 0.0), -1).reshape(-1, samples_per_prompt)


KL_ERROR_CLIP = 0.2  # the most that a KL counts as off its target, as a share (Ziegler et al. 2019)


def adaptive_kl_coef(
  kl_coef: jax.Array, kl: jax.Array, episodes: int, *, target: float, horizon: int
) -> jax.Array:
  """The KL coefficient after a proportional step towards a target KL, clipped to 20% (Ziegler et
  al. 2019, section 2.2). The paper keeps it fixed; this is a choice of the config.

  Args:
    kl_coef: f32[], the present coefficient.
    kl: f32[], the mean KL in nats per response.
    episodes: responses since the last step.
    target: the KL to steer to, in nats per response, above 0.
    horizon: in episodes, above KL_ERROR_CLIP * episodes; the larger it is, the more slowly the
      coefficient moves.
  """
  error = jnp.clip(kl / target - 1.0, -KL_ERROR_CLIP, KL_ERROR_CLIP)
  return kl_coef * (1.0 + error * episodes / horizon)


def in_chunks(function: Callable, rows: Any, size: int | None) -> Any:
  """Applies a function to chunks of the leading axis of `rows`, one after the other.

  Args:
    function: rows -> a tree of arrays with the same leading axis.
    rows: a tree of arrays with one leading axis.
    size: rows of a chunk, a divisor of their number; None processes all rows at once.
  """
  count = jax.tree.leaves(rows)[0].shape[0]
  if size is None or size >= count:
    return function(rows)
  if count % size:
    raise ValueError(f'{size} rows at a time do not divide the {count} rows of a rollout.')
  cut = jax.tree.map(lambda x: x.reshape(count // size, size, *x.shape[1:]), rows)
  return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), jax.lax.map(function, cut))
