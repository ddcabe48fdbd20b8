"""What a research fork writes: losses and advantages outside the package, by the public types alone."""

import jax
import jax.numpy as jnp


def dpo(params, batch, key, *, nets, ref, beta=0.1):
  """Rafailov et al. 2023, Eq. 7, over every ranked pair of a ComparisonBatch; policy and reference log-probabilities of
  whole sequences (the prompt's part cancels between two responses to it). ref: frozen parameters."""
  b, k, t = batch.tokens.shape
  tokens, mask = batch.tokens.reshape(b * k, t), batch.mask.reshape(b * k, t)

  def sequence(p):
    return jnp.sum(nets.logprobs(p, tokens, mask)[0] * mask, -1).reshape(b, k)

  implicit = beta * (sequence(params['policy']) - jax.lax.stop_gradient(sequence(ref)))
  wins = batch.pairs()
  margins = implicit[:, :, None] - implicit[:, None, :]
  per_prompt = -jnp.sum(jnp.where(wins, jax.nn.log_sigmoid(margins), 0.0), (1, 2)) / jnp.maximum(wins.sum((1, 2)), 1)
  accuracy = jnp.sum(jnp.where(wins, margins > 0, 0.0), (1, 2)) / jnp.maximum(wins.sum((1, 2)), 1)
  return jnp.sum(batch.weights * per_prompt), {'dpo/accuracy': jnp.sum(batch.weights * accuracy)}


def leave_one_out(rewards, values, mask, *, samples_per_prompt):
  """RLOO (Ahmadian et al. 2024): each response against the mean of the other samples of its prompt; no value network."""
  total = jnp.sum(rewards * mask, -1).reshape(-1, samples_per_prompt)
  others = (total.sum(1, keepdims=True) - total) / (samples_per_prompt - 1)
  advantages = jnp.where(mask, (total - others).reshape(-1, 1), 0.0)
  return advantages, advantages


def policy_gradient(params, batch, key, *, nets, clip_eps=0.2):
  """GRPO's clipped policy term (Shao et al. 2024), without a value loss."""
  tokens, mask = batch.rollout.sequences()
  logprobs, _ = nets.logprobs(params['policy'], tokens, mask)
  live = batch.rollout.mask
  ratio = jnp.exp(jnp.where(live, logprobs[:, batch.rollout.prompts.shape[1]:] - batch.rollout.logprobs, 0.0))
  surrogate = jnp.minimum(batch.advantages * ratio, batch.advantages * jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps))
  loss = -jnp.sum(batch.weights * surrogate)
  return loss, {'ppo/loss/policy': loss, 'ppo/ratio_max_dev': jnp.max(jnp.abs(ratio - 1))}


def many_sevens(prompts, prompt_mask, responses, mask, *, nets, frozen):
  """A reward without a model: the share of token 7 in the response."""
  return jnp.sum((responses == 7) & mask, -1) / jnp.maximum(mask.sum(-1), 1).astype(jnp.float32)
