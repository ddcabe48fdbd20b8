"""Sampling: one prefill, then a loop that stops when every row has finished.

`generate` does not compile itself. It is called inside the jit of its caller, so that a PPO
iteration stays one program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from alignjax.types import Decoder, Params


class Generation(NamedTuple):
  """Sampled responses.

  Attributes:
    responses: i32[B,R], right-padded with 0.
    mask: bool[B,R], True on sampled tokens, including the stop token.
    logprobs: f32[B,R], under the distribution that was sampled from; 0 on pads.
    ended: bool[B], whether a stop token was sampled; False where the length limit cut the response.
  """

  responses: jax.Array
  mask: jax.Array
  logprobs: jax.Array
  ended: jax.Array


def generate(
  decoder: Decoder,
  params: Params,
  prompts: jax.Array,
  prompt_mask: jax.Array,
  key: jax.Array,
  *,
  max_tokens: int,
  stop_ids: Sequence[int],
  temperature: float | jax.Array = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  samples_per_prompt: int = 1,
  chunk: int | None = None,
  prompts_at_once: int | None = None,
) -> Generation:
  """Samples responses of at most max_tokens tokens to each prompt.

  Args:
    decoder: the functions of the policy (types.Decoder).
    params: the parameters of the policy.
    prompts, prompt_mask: [B,Q], left-padded; the last column is live in every row.
    key: one key, or one for each returned row, which then draws the same numbers in any batch.
    max_tokens: the length limit R.
    stop_ids: the token ids that end a response; () never ends one early. This is the only
      definition of "ended": the mask, the penalty for a missing end and the report all use what
      comes from here (docs/pitfalls.md, 2).
    temperature: 0 is greedy; it may be a traced scalar above 0.
    top_k, top_p: truncate the distribution. They are for generation only, because scoring does not
      know about the truncation (docs/pitfalls.md, 9).
    samples_per_prompt: n responses to each prompt from one prefill; row b * n + j is sample j of
      prompt b.
    chunk: decoding steps between two checks of whether all rows have finished. The default is the
      largest divisor of max_tokens up to 8.
    prompts_at_once: prompts that are answered together, one group after the other; the cache is as
      large as that of one group. None answers all at once. It changes memory, not what is drawn.

  Returns:
    Generation of B * samples_per_prompt rows. Sampled tokens are never edited (docs/pitfalls.md,
    7).

  Raises:
    ValueError: chunk does not divide max_tokens, or prompts_at_once the number of prompts.
  """
  chex.assert_rank([prompts, prompt_mask], 2)
  if chunk is None:
    chunk = max(c for c in range(1, min(8, max_tokens) + 1) if max_tokens % c == 0)
  if max_tokens % chunk:
    raise ValueError(f'chunk={chunk} does not divide max_tokens={max_tokens}.')
  n = samples_per_prompt
  total = prompts.shape[0] * n
  if key.ndim:
    draw = jax.vmap(lambda k, t: jax.random.uniform(jax.random.fold_in(k, t), (1,)), (0, None))
  else:

    def draw(key, t):
      return jax.random.uniform(jax.random.fold_in(key, t), (total, 1))

  with jax.named_scope('prepare'):
    weights = decoder.prepare(params)

  def respond(group):
    """The Generation of some of the prompts. first: the number of their first row in the batch."""
    first, prompts, prompt_mask = group
    rows = prompts.shape[0] * n
    with jax.named_scope('prefill'):
      logits, cache = decoder.prefill(weights, prompts, prompt_mask, prompts.shape[1] + max_tokens)
    if n > 1:

      def repeat(x):
        return jnp.repeat(x, n, axis=0)

      logits = repeat(logits)
      cache = cache.replace(
        k=tuple(map(repeat, cache.k)), v=tuple(map(repeat, cache.v)), mask=repeat(cache.mask)
      )

    def one_token(carry, t):
      logits, cache, done = carry
      u = draw(key, t)  # A row draws the same number in any group.
      u = u if rows == total else jax.lax.dynamic_slice_in_dim(u, first, rows)
      token, logprob = sample(None, logits, temperature, top_k, top_p, u)
      live = ~done
      token, logprob = jnp.where(live, token, 0), jnp.where(live, logprob, 0.0)
      if stop_ids:
        done = done | jnp.isin(token, jnp.asarray(stop_ids)) & live
      logits, cache = decoder.step(weights, token, live, cache)
      return (logits, cache, done), (token, live, logprob)

    def one_chunk(state):
      start, carry, out = state
      carry, new = jax.lax.scan(one_token, carry, start + jnp.arange(chunk))
      out = jax.tree.map(
        lambda o, x: jax.lax.dynamic_update_slice_in_dim(o, x.T, start, axis=1), out, new
      )
      return start + chunk, carry, out

    empty = tuple(jnp.zeros((rows, max_tokens), d) for d in (jnp.int32, bool, jnp.float32))
    state = (jnp.int32(0), (logits, cache, jnp.zeros(rows, bool)), empty)

    def unfinished(state):
      return (state[0] < max_tokens) & ~jnp.all(state[1][2])

    with jax.named_scope('decode'):
      _, (_, _, done), (responses, mask, logprobs) = jax.lax.while_loop(
        unfinished, one_chunk, state
      )
    return Generation(responses=responses, mask=mask, logprobs=logprobs, ended=done)

  if prompts_at_once is None or prompts_at_once >= prompts.shape[0]:
    return respond((0, prompts, prompt_mask))
  if prompts.shape[0] % prompts_at_once:
    raise ValueError(f'{prompts.shape[0]} prompts do not divide into groups of {prompts_at_once}.')

  def cut(x):
    return x.reshape(-1, prompts_at_once, *x.shape[1:])

  groups = jax.lax.map(
    respond, (jnp.arange(0, total, prompts_at_once * n), cut(prompts), cut(prompt_mask))
  )
  return jax.tree.map(lambda x: x.reshape(total, *x.shape[2:]), groups)


def sample(
  key: jax.Array | None,
  logits: jax.Array,
  temperature: float | jax.Array = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  u: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws a token from each row of logits.

  One uniform number per row inverts the cumulative distribution. The Gumbel trick of
  jax.random.categorical draws V of them and took eight times as long at V = 50k. The token that is
  drawn is the first one with a probability above 0 whose cumulative probability exceeds u. A token
  of probability 0 is never drawn, although the sums, which are added up in a tree, may rise and
  fall by their last bit at such tokens too. The resolution of u is 2^-23.

  Args:
    key: of the uniform numbers; not read where u is given.
    logits: f32[B,V].
    temperature, top_k, top_p: see generate.
    u: f32[B,1], the uniform numbers; None draws them.

  Returns:
    (tokens i32[B], their log-probabilities f32[B] in the distribution that was drawn from).
  """
  if isinstance(temperature, (int, float)) and temperature == 0:
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return token, jnp.zeros(token.shape, jnp.float32)
  logits = truncate(logits / temperature, top_k, top_p)
  logprobs = jax.nn.log_softmax(logits, axis=-1)
  p = jnp.exp(logprobs)
  cumulative = jnp.where(p > 0, jnp.cumsum(p, axis=-1), 0.0)
  u = (jax.random.uniform(key, (logits.shape[0], 1)) if u is None else u) * jnp.max(
    cumulative, axis=-1, keepdims=True
  )
  number = jax.lax.broadcasted_iota(jnp.int32, p.shape, 1)
  token = jnp.min(jnp.where(cumulative > u, number, p.shape[-1] - 1), axis=-1)
  return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]


def truncate(logits: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
  """Sets logits to -inf outside of the k most likely tokens, or outside of the smallest set of
  tokens whose probability is top_p."""
  if top_k is not None:
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p is not None:
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < last, -jnp.inf, logits)
  return logits
