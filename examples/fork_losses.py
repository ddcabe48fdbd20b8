"""Losses and a reward outside the package, as a research fork writes them: functions of
the public types alone (alignjax/types.py), which a config names. examples/README.md has the flags.

A loss is a weighted sum over the batch and returns (loss f32[], metrics to log). The weights were
normalised over the whole minibatch, so that the gradients of its microbatches add up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from alignjax.losses import response_logprobs
from alignjax.types import PreferenceBatch


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


def many_sevens(prompts, prompt_mask, responses, mask, *, nets, frozen):
  """A reward without a model, f32[B]: the share of token 7 in each response."""
  return jnp.sum((responses == 7) & mask, -1) / jnp.maximum(mask.sum(-1), 1).astype(jnp.float32)
