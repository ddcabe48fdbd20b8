"""Losses, advantages and a reward outside the package, as a research fork writes them: functions of
the public types alone (alignjax/types.py), which a config names. examples/README.md has the flags.

A loss is a weighted sum over the batch and returns (loss f32[], metrics to log). The weights were
normalised over the whole minibatch, so that the gradients of its microbatches add up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from alignjax.losses import response_logprobs
from alignjax.types import PPOBatch, PreferenceBatch


def _over_pairs(per_pair: jax.Array, batch: PreferenceBatch) -> jax.Array:
  """f32[B]: the mean of per_pair f32[B,K,K], [winner, loser], over the pairs of each prompt."""
  wins = batch.pairs()
  return jnp.sum(jnp.where(wins, per_pair, 0.0), (1, 2)) / jnp.maximum(jnp.sum(wins, (1, 2)), 1)


def ipo(params, batch: PreferenceBatch, key, *, nets, beta=0.1):
  """IPO (Azar et al. 2023, Eq. 17): (h_w - h_l - 1 / (2 beta))^2, where h is the log-ratio to the
  reference."""
  ratio = jnp.sum(response_logprobs(params['policy'], batch, nets=nets) - batch.ref_logprobs, -1)
  losses = _over_pairs(jnp.square(ratio[:, :, None] - ratio[:, None, :] - 1 / (2 * beta)), batch)
  return jnp.sum(batch.weights * losses), {'ipo/loss': jnp.sum(batch.mean_weights * losses)}


def simpo(params, batch: PreferenceBatch, key, *, nets, beta=2.0, gamma=0.5):
  """SimPO (Meng et al. 2024, Eq. 6): log-probabilities per token and a margin gamma, without a
  reference."""
  length = jnp.maximum(jnp.sum(batch.response_mask, -1), 1)
  score = beta * jnp.sum(response_logprobs(params['policy'], batch, nets=nets), -1) / length
  losses = _over_pairs(-jax.nn.log_sigmoid(score[:, :, None] - score[:, None, :] - gamma), batch)
  return jnp.sum(batch.weights * losses), {'simpo/loss': jnp.sum(batch.mean_weights * losses)}


def kto(params, batch: PreferenceBatch, key, *, nets, beta=0.1):
  """In the manner of KTO (Ethayarajh et al. 2024): each response stands for itself; the best ones
  of a prompt are desirable and the others are not. The reference point, a KL in the paper, is 0."""
  ratio = beta * jnp.sum(
    response_logprobs(params['policy'], batch, nets=nets) - batch.ref_logprobs, -1
  )
  present = batch.ranks >= 0
  losses = jnp.sum(
    jnp.where(present, 1 - jax.nn.sigmoid(jnp.where(batch.ranks == 0, ratio, -ratio)), 0.0), 1
  ) / present.sum(1)
  return jnp.sum(batch.weights * losses), {'kto/loss': jnp.sum(batch.mean_weights * losses)}


def leave_one_out(rewards, values, mask, *, samples_per_prompt):
  """RLOO (Ahmadian et al. 2024): each response against the mean of the other samples of its prompt,
  without a value network. Returns (advantages, returns), both f32[B,R]; the stage passes
  samples_per_prompt."""
  if samples_per_prompt < 2:
    raise ValueError(
      'leave_one_out compares the samples of a prompt: rollout.samples_per_prompt must be 2 or more'
    )
  total = jnp.sum(rewards * mask, -1).reshape(-1, samples_per_prompt)
  others = (total.sum(1, keepdims=True) - total) / (samples_per_prompt - 1)
  advantages = jnp.where(mask, (total - others).reshape(-1, 1), 0.0)
  return advantages, advantages


def policy_gradient(params, batch: PPOBatch, key, *, nets, clip_eps=0.2, temperature=1.0):
  """GRPO's clipped policy term (Shao et al. 2024), without a value loss. The stage passes
  temperature, that of the samples, so that the ratio is of the distribution that they come from."""
  tokens, mask = batch.rollout.sequences()
  logprobs, _ = nets.logprobs(params['policy'], tokens, mask, temperature=temperature)
  live = batch.rollout.mask
  ratio = jnp.exp(
    jnp.where(live, logprobs[:, batch.rollout.prompts.shape[1] :] - batch.rollout.logprobs, 0.0)
  )
  surrogate = jnp.minimum(
    batch.advantages * ratio, batch.advantages * jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
  )
  loss = -jnp.sum(batch.weights * surrogate)
  return loss, {'ppo/loss/policy': loss}


def many_sevens(prompts, prompt_mask, responses, mask, *, nets, frozen):
  """A reward without a model, f32[B]: the share of token 7 in each response."""
  return jnp.sum((responses == 7) & mask, -1) / jnp.maximum(mask.sum(-1), 1).astype(jnp.float32)
