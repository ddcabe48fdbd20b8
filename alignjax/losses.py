"""The losses: pure functions of one signature (types.LossFn). This is the file that a fork reads
first.

    loss, metrics = loss_fn(params, batch, key, nets=nets, **coefficients)

`batch` was normalised over the whole minibatch (batch.normalized()), so each loss is a plain
weighted sum, and the gradients of microbatches add up to the gradient of the minibatch exactly. A
loss of your own goes into a file of your own and is named in the config:
c.loss = dict(fn='mylab.losses:my_loss', beta=0.1).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from alignjax import ops
from alignjax.types import (
  ComparisonBatch,
  Metrics,
  Networks,
  Params,
  PPOBatch,
  PreferenceBatch,
  TokenBatch,
)


def sft(
  params: Params, batch: TokenBatch, key: jax.Array | None, *, nets: Networks
) -> tuple[jax.Array, Metrics]:
  """Cross-entropy of the weighted tokens in nats per token: -sum_t w_t log p(x_t | x_<t).

  It serves for pretraining, where every token has the same weight, and for supervised fine-tuning
  (section 3.5 of the paper), where the data decides: by default only the response and its end token
  have a weight. The paper does not say whether prompts were masked. Where pretraining text is mixed
  in (appendix C.3), the loss is sum_s share_s loss_s over the sources of batch.mix, and the metrics
  have the mean loss of each source and its share of the weights.
  """
  logprobs, _ = nets.logprobs(params['policy'], batch.tokens, batch.mask, key=key)
  loss = -jnp.sum(batch.weights * logprobs)
  metrics = {'sft/loss': loss}
  for i, (name, share) in enumerate(batch.mix):
    weights = batch.of_source(i)
    metrics |= {
      f'sft/loss/{name}': -jnp.sum(weights * logprobs) / share,
      f'sft/share/{name}': jnp.sum(weights),
    }
  return loss, metrics


def reward_ranking(
  params: Params, batch: ComparisonBatch, key: jax.Array | None, *, nets: Networks
) -> tuple[jax.Array, Metrics]:
  """The K-way ranking loss, Eq. 1: -(1 / C(K,2)) E[ log sigmoid( r(x, y_w) - r(x, y_l) ) ].

  Each response passes through the model once, and all C(K,2) pairs of a prompt are one batch
  element. As independent pairs, each response would be trained on K - 1 times, and one epoch
  overfits (footnote 5 of the paper). Ties are dropped (C.2) and absent responses are masked; K in
  C(K,2) is the number of responses that are present.

  The paper leaves open how ties count. Here the divisor stays C(K,2), and the stage leaves out
  prompts whose responses all tie. Every prompt has the same weight in an epoch
  (ComparisonBatch.normalized); `rm/loss` and the other metrics are means over the prompts of the
  batch.
  """
  del key  # no dropout: the paper reports none for the reward model
  assert batch.mean_weights is not None, 'normalized() makes them'
  mean_weights = batch.mean_weights
  b, k, t = batch.tokens.shape
  values = nets.scalar(
    params['reward'], batch.tokens.reshape(b * k, t), batch.mask.reshape(b * k, t)
  )
  scores = ops.last_live(values.reshape(b, k, t), batch.mask)  # [B,K]
  wins = batch.pairs()  # [B,K,K]
  margins = jnp.where(wins, scores[:, :, None] - scores[:, None, :], 0.0)
  present = jnp.sum(batch.ranks >= 0, axis=-1).astype(jnp.float32)
  all_pairs = jnp.maximum(present * (present - 1) / 2, 1.0)
  per_prompt = -jnp.sum(jnp.where(wins, jax.nn.log_sigmoid(margins), 0.0), axis=(1, 2)) / all_pairs
  loss = jnp.sum(batch.weights * per_prompt)
  count = jnp.maximum(jnp.sum(wins, axis=(1, 2)), 1)

  def mean(x):
    return jnp.sum(mean_weights * jnp.sum(jnp.where(wins, x, 0.0), axis=(1, 2)) / count)

  return loss, {
    'rm/loss': jnp.sum(mean_weights * per_prompt),
    'rm/accuracy': mean(margins > 0),
    'rm/margin': mean(margins),
  }


def response_logprobs(params: Params, batch: PreferenceBatch, *, nets: Networks) -> jax.Array:
  """f32[B,K,T]: log pi of each response token given all tokens before it, and 0 on prompts and
  pads. params: those of one language model."""
  b, k, t = batch.tokens.shape
  logprobs, _ = nets.logprobs(params, batch.tokens.reshape(b * k, t), batch.mask.reshape(b * k, t))
  return jnp.where(batch.response_mask, logprobs.reshape(b, k, t), 0.0)


def dpo(
  params: Params,
  batch: PreferenceBatch,
  key: jax.Array | None,
  *,
  nets: Networks,
  beta: float = 0.1,
) -> tuple[jax.Array, Metrics]:
  """Direct preference optimization (Rafailov et al. 2023, Eq. 7): -log sigmoid(h_w - h_l), with
  h = beta log(pi(y|x) / pi_ref(y|x)).

  Of K ranked responses the loss is the mean over the pairs without a tie; the paper has K = 2.
  pi(y|x) is the probability of the whole response, including its end token. There is no dropout, so
  that policy and reference are equal before the first update.

  Raises:
    ValueError: the batch has no ref_logprobs.
  """
  del key
  if batch.ref_logprobs is None:
    raise ValueError('dpo needs a reference: init.ref must name its weights.')
  # [B,K]
  implicit = beta * jnp.sum(
    response_logprobs(params['policy'], batch, nets=nets) - batch.ref_logprobs, axis=-1
  )
  wins = batch.pairs()
  margins = jnp.where(wins, implicit[:, :, None] - implicit[:, None, :], 0.0)
  count = jnp.maximum(jnp.sum(wins, axis=(1, 2)), 1)

  def per_prompt(x):
    return jnp.sum(jnp.where(wins, x, 0.0), axis=(1, 2)) / count

  losses = -per_prompt(jax.nn.log_sigmoid(margins))

  def mean(x):
    return jnp.sum(batch.mean_weights * x)

  return jnp.sum(batch.weights * losses), {
    'dpo/loss': mean(losses),
    'dpo/accuracy': mean(per_prompt(margins > 0)),
    'dpo/margin': mean(per_prompt(margins)),
  }


def ppo(
  params: Params,
  batch: PPOBatch,
  key: jax.Array | None,
  *,
  nets: Networks,
  clip_eps: float = 0.2,
  value_clip: float | None = 0.2,
  vf_coef: float = 1.0,
  temperature: float = 1.0,
) -> tuple[jax.Array, Metrics]:
  """The clipped surrogate and the value loss, summed over response tokens with the batch's weights.

  The policy loss is max(-A ratio, -A clip(ratio, 1 - clip_eps, 1 + clip_eps)) with
  ratio = pi(y_t|.) / pi_old(y_t|.) (Schulman et al. 2017, Eq. 7). The value loss is
  0.5 max((V - G)^2, (clip(V, V_old - value_clip, V_old + value_clip) - G)^2), as in
  lm-human-preferences `train_policy.py: loss`. There is no entropy bonus, and no dropout whatever
  the key (docs/pitfalls.md, 8).

  Args:
    clip_eps: 0.2 is the paper's (C.4).
    value_clip: not reported by the paper; None leaves the value loss at 0.5 (V - G)^2.
    vf_coef: not reported by the paper. Policy and value share no parameters, so it only matters
      with gradient clipping over both.
    temperature: of the samples.
  """
  del key
  rollout = batch.rollout
  old_logprobs, old_values = jax.lax.stop_gradient((rollout.logprobs, rollout.values))
  advantages, returns = jax.lax.stop_gradient((batch.advantages, batch.returns))
  tokens, mask = rollout.sequences()
  first = rollout.prompts.shape[1]

  def total(x):
    return jnp.sum(batch.weights * jnp.where(rollout.mask, x, 0.0))

  logprobs, entropy = nets.logprobs(params['policy'], tokens, mask, temperature=temperature)
  log_ratio = jnp.where(rollout.mask, logprobs[:, first:] - old_logprobs, 0.0)
  ratio = jnp.exp(log_ratio)
  unclipped = -advantages * ratio
  clipped = -advantages * jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps)
  policy_loss = total(jnp.maximum(unclipped, clipped))

  values = nets.scalar(params['value'], tokens, mask)[:, first - 1 : -1]  # V before token t
  error = jnp.square(values - returns)
  if value_clip is not None:
    near_old = old_values + jnp.clip(values - old_values, -value_clip, value_clip)
    clipped_error = jnp.square(near_old - returns)
  else:
    clipped_error = error
  value_loss = 0.5 * total(jnp.maximum(error, clipped_error))

  loss = policy_loss + vf_coef * value_loss
  return loss, {
    'ppo/loss/policy': policy_loss,
    'ppo/loss/value': value_loss,
    'ppo/loss/total': loss,
    'ppo/policy/entropy': total(entropy[:, first:]),
    'ppo/policy/approxkl': total(0.5 * jnp.square(log_ratio)),
    'ppo/policy/clipfrac': total(clipped > unclipped),
    'ppo/ratio_max_dev': jnp.max(jnp.abs(ratio - 1.0)),
    'ppo/val/error': total(error),
    'ppo/val/clipfrac': total(clipped_error > error),
    'ppo/val/mean': total(values),
  }


def ppo_ptx(
  params: Params,
  batch: PPOBatch,
  key: jax.Array | None,
  *,
  nets: Networks,
  ptx_coef: float,
  clip_eps: float = 0.2,
  value_clip: float | None = 0.2,
  vf_coef: float = 1.0,
  temperature: float = 1.0,
) -> tuple[jax.Array, Metrics]:
  """PPO with the pretraining term of Eq. 2: ppo + ptx_coef * E_{x ~ pretrain}[-log pi(x)], in one
  gradient.

  The paper accumulates both gradients and then takes one optimizer step (C.4). Its ptx_coef of 27.8
  multiplies a loss whose reduction (token mean or sequence sum) it does not report. Here it is the
  mean over the pretraining tokens of the minibatch, so the coefficient has to be tuned for it. With
  ptx_coef 0 this is PPO, and the batch carries no pretraining rows.

  Raises:
    ValueError: ptx_coef is not 0, but the batch has no pretraining rows.
  """
  loss, metrics = ppo(
    params,
    batch,
    key,
    nets=nets,
    clip_eps=clip_eps,
    value_clip=value_clip,
    vf_coef=vf_coef,
    temperature=temperature,
  )
  if ptx_coef == 0:
    return loss, metrics
  if batch.ptx is None:
    raise ValueError(
      f'ptx_coef is {ptx_coef} but the batch has no pretraining rows: set ptx.rows_per_episode and '
      'ptx.documents above 0 with data.pretrain, or loss.ptx_coef=0 for plain PPO.'
    )
  with jax.named_scope('ptx'):
    logprobs, _ = nets.logprobs(params['policy'], batch.ptx.tokens, batch.ptx.mask)
    ptx_loss = -jnp.sum(batch.ptx.weights * logprobs)
  loss = loss + ptx_coef * ptx_loss
  return loss, metrics | {'ppo/loss/ptx': ptx_loss, 'ppo/loss/total': loss}


def policy_gradient(
  params: Params,
  batch: PPOBatch,
  key: jax.Array | None,
  *,
  nets: Networks,
  clip_eps: float = 0.2,
  kl_coef: float = 0.0,
  temperature: float = 1.0,
) -> tuple[jax.Array, Metrics]:
  """The clipped policy term alone, without a value loss, for advantages of groups of samples: RLOO
  (ops.leave_one_out) and GRPO (ops.group_relative).

  With kl_coef it is GRPO's objective (Shao et al. 2024, Eq. 3), whose KL penalty is the k3 estimate
  of each token in the loss. Tokens have the weights of the batch, the same for all tokens of a
  minibatch, where the paper first averages over each response.

  Args:
    clip_eps: as of ppo.
    kl_coef: beta of the paper; 0 leaves the term out, for a KL penalty in the rewards.
    temperature: of the samples; the stage passes it.
  """
  del key
  rollout = batch.rollout
  tokens, mask = rollout.sequences()
  live, first = rollout.mask, rollout.prompts.shape[1]
  logprobs, _ = nets.logprobs(params['policy'], tokens, mask, temperature=temperature)
  logprobs = jnp.where(live, logprobs[:, first:], 0.0)
  old, ref = jax.lax.stop_gradient((rollout.logprobs, rollout.ref_logprobs))
  ratio = jnp.exp(logprobs - jnp.where(live, old, 0.0))
  clipped_ratio = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps)
  surrogate = jnp.minimum(batch.advantages * ratio, batch.advantages * clipped_ratio)
  loss = policy_loss = -jnp.sum(batch.weights * surrogate)
  if kl_coef:
    over = jnp.where(live, ref, 0.0) - logprobs
    loss = loss + kl_coef * jnp.sum(batch.weights * (jnp.exp(over) - 1.0 - over))
  return loss, {'ppo/loss/policy': policy_loss, 'ppo/loss/total': loss}
