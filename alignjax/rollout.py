"""The rollout: a response to each prompt, its log-probabilities under policy and reference, its
values, and its reward.

A reward is any function (prompts, prompt_mask, responses, mask, *, nets, frozen, **coefficients) ->
f32[B], or (f32[B], metrics), that the config names as c.reward = dict(fn='module:name', ...).
alignjax/rewards.py has the trained reward model, ensembles, and a reward that is a Python function
of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from alignjax import ops
from alignjax.sampling import Generation, generate
from alignjax.types import Metrics, Networks, Params, Rollout


def collect(
  nets: Networks,
  params: Params,
  frozen: Params,
  prompts: jax.Array,
  prompt_mask: jax.Array,
  key: jax.Array,
  *,
  reward_fn: Callable[..., jax.Array | tuple[jax.Array, Metrics]],
  max_tokens: int,
  stop_ids: Sequence[int],
  temperature: float = 1.0,
  samples_per_prompt: int = 1,
  missing_end_penalty: float = 0.0,
  generate_rows: int | None = None,
  score_rows: int | None = None,
  live_rows: Callable | None = None,
  segments: int | None = None,
  halvings: int = 0,
  shards: int = 1,
  sampled: Generation | None = None,
) -> tuple[Rollout, Metrics]:
  """Phases 1 to 4 of an iteration: responses, log-probabilities, values and scores.

  The log-probabilities of the policy are computed again, by the function that the loss uses. The
  ratio before the first update is therefore exactly 1, however the sampler's cache was rounded, and
  the distance between sampler and scorer is measured ('rollout/sampler_gap_max', in nats) instead
  of entering the gradient (docs/pitfalls.md, 8).

  Args:
    nets: the networks as pure functions.
    params: {'policy', 'value'}.
    frozen: {'ref', 'reward'}. They are never donated and have buffers of their own.
    prompts, prompt_mask: [B,Q], left-padded.
    key: of the samples.
    reward_fn: (prompts, prompt_mask, responses, mask, *, nets, frozen) -> f32[B], or (f32[B], what
      is added to the metrics).
    max_tokens, stop_ids, temperature, samples_per_prompt: see sampling.generate.
    missing_end_penalty: is subtracted from the score of a response without a stop token. The paper
      reports none.
    generate_rows, score_rows: rows that are generated and scored at a time; None takes all. They
      change memory, not results.
    live_rows: see steps.gradients. With it, score_rows must be the rows of an update's gradient, so
      that both make the same arrangement.
    segments, halvings, shards: see sampling.generate. They change its time, not results.
    sampled: responses of an engine outside of the program (stages/outside.py), B *
      samples_per_prompt rows; None samples them here.

  Returns:
    (Rollout of B * samples_per_prompt rows, metrics).

  Raises:
    TypeError: the reward is not floating-point.
  """
  if sampled is None:
    sampled = generate(
      nets.decoder,
      params['policy'],
      prompts,
      prompt_mask,
      key,
      max_tokens=max_tokens,
      stop_ids=stop_ids,
      temperature=temperature,
      samples_per_prompt=samples_per_prompt,
      prompts_at_once=None if generate_rows is None else generate_rows // samples_per_prompt,
      segments=segments,
      halvings=halvings,
      shards=shards,
    )
  sampled = jax.lax.stop_gradient(sampled)
  prompts, prompt_mask = (jnp.repeat(x, samples_per_prompt, axis=0) for x in (prompts, prompt_mask))
  mask, first = sampled.mask, prompts.shape[1]

  def score(rows):
    prompts, prompt_mask, responses, mask = rows
    tokens, token_mask = (
      jnp.concatenate([prompts, responses], 1),
      jnp.concatenate([prompt_mask, mask], 1),
    )

    def on(nets):
      logprobs, _ = nets.logprobs(params['policy'], tokens, token_mask, temperature=temperature)
      ref_logprobs, _ = nets.logprobs(frozen['ref'], tokens, token_mask, temperature=temperature)
      values = nets.scalar(params['value'], tokens, token_mask)
      return [
        jnp.where(mask, x, 0.0)
        for x in (logprobs[:, first:], ref_logprobs[:, first:], values[:, first - 1 : -1])
      ]

    return on(nets) if live_rows is None else live_rows(on, nets, token_mask)

  rows = (prompts, prompt_mask, sampled.responses, mask)
  with jax.named_scope('score'):
    logprobs, ref_logprobs, values = ops.in_chunks(score, rows, score_rows)
  with jax.named_scope('reward'):
    scores = reward_fn(*rows, nets=nets, frozen=frozen)
  scores, measured = scores if isinstance(scores, tuple) else (scores, {})
  if not jnp.issubdtype(scores.dtype, jnp.floating):
    raise TypeError(
      f'the reward function returned {scores.dtype}; rewards must be floating-point numbers.'
    )
  scores = scores.astype(jnp.float32)
  if missing_end_penalty:
    scores = scores - missing_end_penalty * ~sampled.ended
  rollout = Rollout(
    *rows, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, scores=scores
  )
  k1, k3 = ops.kl_estimates(logprobs, ref_logprobs, mask)
  metrics = measured | {
    'objective/scores': jnp.mean(scores),
    'objective/scores_std': jnp.std(scores),
    'objective/kl': jnp.mean(k1),
    'objective/kl_k3': jnp.mean(k3),
    'objective/entropy': jnp.mean(-jnp.sum(logprobs, -1)),
    'rollout/length': jnp.mean(jnp.sum(mask, -1).astype(jnp.float32)),
    'rollout/ended': jnp.mean(sampled.ended.astype(jnp.float32)),
    'rollout/live': jnp.mean(jnp.concatenate([prompt_mask, mask], 1).astype(jnp.float32)),
    'rollout/sampler_gap_max': jnp.max(jnp.abs(sampled.logprobs - logprobs)),
  }
  return jax.lax.stop_gradient(rollout), metrics
