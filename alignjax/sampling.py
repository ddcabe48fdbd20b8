"""Sampling: one prefill, then a loop that stops when every row has finished.

`generate` does not compile itself. It is called inside the jit of its caller, so that a PPO
iteration stays one program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from alignjax.types import Decoder, KVCache, Params


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


# The tokens of a segment, and the most segments, where the caller names none: each compiles another
# decoding step.
SEGMENT, MOST_SEGMENTS = 128, 4


class _Rows(NamedTuple):
  """What the loop carries of each row: the logits of its next token, the cache, the uniform number
  of each of its tokens f32[B,R], whether it has finished, and its response so far."""

  logits: jax.Array
  cache: KVCache
  numbers: jax.Array
  out: Generation


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
  segments: int | None = None,
  halvings: int = 0,
  shards: int = 1,
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
    samples_per_prompt: n responses to each prompt from one prefill and one cache of the prompt; row
      b * n + j is sample j of prompt b.
    chunk: decoding steps between two checks of whether all rows have finished. The default is the
      largest divisor of max_tokens up to 8.
    prompts_at_once: prompts that are answered together, one group after the other; the cache is as
      large as that of one group. None answers all at once.
    segments: the cache grows in this number of parts, so that the first tokens read few empty
      slots. None makes one of every SEGMENT tokens, and MOST_SEGMENTS at most.
    halvings: how often the batch is halved, each time as soon as at most half of its rows are
      unfinished. Each segment and each halving compiles the decoding step once more.
    shards: the number of devices that share the rows. Each halves its own rows, so that none is
      sent; with several samples of a prompt, the rows of each prompt are halved. No entry of these
      four changes what a row draws.

  Returns:
    Generation of B * samples_per_prompt rows. Sampled tokens are never edited (docs/pitfalls.md,
    7).

  Raises:
    ValueError: chunk does not divide max_tokens, prompts_at_once the number of prompts, or, where
      rows are halved, shards the prompts that are answered together; or segments is below 1.
  """
  chex.assert_rank([prompts, prompt_mask], 2)
  if chunk is None:
    chunk = max(c for c in range(1, min(8, max_tokens) + 1) if max_tokens % c == 0)
  if max_tokens % chunk:
    raise ValueError(f'chunk={chunk} does not divide max_tokens={max_tokens}.')
  n = samples_per_prompt
  at_once = min(prompts_at_once or len(prompts), len(prompts))
  if len(prompts) % at_once:
    raise ValueError(f'{len(prompts)} prompts do not divide into groups of {at_once}.')
  parts = 1  # of the rows, each of which is halved on its own
  if halvings:
    if at_once % shards:
      raise ValueError(
        f'halvings={halvings}: {at_once} prompts do not divide over {shards} devices.'
      )
    parts = at_once if n > 1 else shards
  sizes = [math.ceil(at_once * n / parts / 2**i) for i in range(halvings + 1)]
  if segments is None:
    segments = min(max(1, max_tokens // SEGMENT), MOST_SEGMENTS)
  if segments < 1:
    raise ValueError(f'segments={segments} must be 1 or more, or None.')
  checks = max_tokens // chunk
  stops = sorted({chunk * math.ceil(checks * i / segments) for i in range(1, segments + 1)})
  with jax.named_scope('prepare'):
    weights = decoder.prepare(params)

  def one_token(rows, t):
    u = jax.lax.dynamic_slice_in_dim(rows.numbers, t, 1, axis=1)
    token, logprob = sample(None, rows.logits, temperature, top_k, top_p, u)
    ended = rows.out.ended
    live = ~ended
    token, logprob = jnp.where(live, token, 0), jnp.where(live, logprob, 0.0)
    if stop_ids:
      ended = ended | jnp.isin(token, jnp.asarray(stop_ids)) & live
    logits, cache = decoder.step(weights, token, rows.cache)
    columns = [
      jax.lax.dynamic_update_slice_in_dim(old, new[:, None], t, axis=1)
      for old, new in zip(rows.out[:3], (token, live, logprob), strict=True)
    ]
    return _Rows(logits, cache, rows.numbers, Generation(*columns, ended)), None

  def decode(t, rows, stop, leave):
    """Samples up to token `stop`, or until each part of the rows has at most `leave` unfinished."""

    def unfinished(state):
      t, rows = state
      return (t < stop) & (jnp.max(jnp.sum(~rows.out.ended.reshape(parts, -1), axis=1)) > leave)

    def one_chunk(state):
      t, rows = state
      return t + chunk, jax.lax.scan(one_token, rows, t + jnp.arange(chunk))[0]

    with jax.named_scope('decode'):
      rows = rows._replace(cache=rows.cache.with_slots(stop))
      return jax.lax.while_loop(unfinished, one_chunk, (t, rows))

  def respond(group):
    """The Generation of some of the prompts. numbers: the uniform numbers of their rows."""
    prompts, prompt_mask, numbers = group
    with jax.named_scope('prefill'):
      logits, cache = decoder.prefill(weights, prompts, prompt_mask, n)
    empty = [jnp.zeros(numbers.shape, d) for d in (jnp.int32, bool, jnp.float32)]
    out = Generation(*empty, ended=jnp.zeros(len(numbers), bool))
    t, rows = jnp.int32(0), _Rows(logits, cache, numbers, out)
    leaves = [*sizes[1:], 0]
    for stop in stops:
      t, rows = decode(t, rows, stop, leaves[0])
    wholes = []
    for size, leave in zip(sizes[1:], leaves[1:], strict=True):
      chosen = jnp.argsort(rows.out.ended.reshape(parts, -1), axis=1)[:, :size]
      wholes.append((rows.out, chosen))
      t, rows = decode(t, _take(rows, chosen, prompts_too=n == 1), max_tokens, leave)
    out = rows.out
    for whole, chosen in reversed(wholes):
      out = _put(whole, chosen, out)
    return out

  numbers = _uniform(key, len(prompts) * n, max_tokens)
  if at_once == len(prompts):
    return respond((prompts, prompt_mask, numbers))

  def cut(x):
    return x.reshape(len(prompts) // at_once, -1, *x.shape[1:])

  groups = jax.lax.map(respond, jax.tree.map(cut, (prompts, prompt_mask, numbers)))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), groups)


def _uniform(key: jax.Array, rows: int, length: int) -> jax.Array:
  """f32[rows,length]: the number that draws token t of a row, of its own key where it has one, and
  otherwise of its place among all rows. So a row draws the same tokens whatever is sampled with
  it."""

  def of_token(key, rows, t):
    return jax.random.uniform(jax.random.fold_in(key, t), (rows,))

  def of_key(key, rows):
    return jax.vmap(of_token, (None, None, 0), 1)(key, rows, jnp.arange(length))

  return jax.vmap(of_key, (0, None))(key, 1)[:, 0] if key.ndim else of_key(key, rows)


def _take(rows: _Rows, chosen: jax.Array, prompts_too: bool) -> _Rows:
  """The chosen rows of each part: chosen i32[parts,size]."""

  def take(x):
    x = x.reshape(len(chosen), -1, *x.shape[1:])
    return jax.vmap(lambda x, i: x[i])(x, chosen).reshape(-1, *x.shape[2:])

  cache = rows.cache.replace(response=jax.tree.map(take, rows.cache.response))
  if prompts_too:
    cache = cache.replace(
      prompt=jax.tree.map(take, cache.prompt), prompt_mask=take(cache.prompt_mask)
    )
  logits, numbers, out = jax.tree.map(take, (rows.logits, rows.numbers, rows.out))
  return _Rows(logits, cache, numbers, out)


def _put(whole: Generation, chosen: jax.Array, out: Generation) -> Generation:
  """The Generation in which the chosen rows of each part are those of `out`."""

  def put(old, new):
    old, new = (x.reshape(len(chosen), -1, *x.shape[1:]) for x in (old, new))
    return jax.vmap(lambda x, i, y: x.at[i].set(y))(old, chosen, new).reshape(-1, *old.shape[2:])

  return jax.tree.map(put, whole, out)


BLOCKS = 128  # parts of the vocabulary; a power of two fits vocabularies that devices share


def sample(
  key: jax.Array | None,
  logits: jax.Array,
  temperature: float | jax.Array = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  u: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws a token from each row of logits.

  One uniform number per row inverts the cumulative distribution: it finds a block of the vocabulary
  by the probabilities of the blocks, and then a token of that block. The whole vocabulary is read
  for its maximum and for the sums of its blocks, and nothing as large is written. The Gumbel trick
  of jax.random.categorical draws V numbers and took eight times as long at V = 50k. A token of
  probability 0 is never drawn (`_invert`). The resolution of u is 2^-23.

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
  u = jax.random.uniform(key, (len(logits), 1)) if u is None else u
  largest = jnp.max(logits, axis=-1, keepdims=True)
  padded = jnp.pad(logits, ((0, 0), (0, -logits.shape[-1] % BLOCKS)), constant_values=-jnp.inf)
  blocks = padded.reshape(len(logits), BLOCKS, -1)
  sums = jnp.sum(jnp.exp(blocks - largest[..., None]), axis=-1)
  block, u = _invert(sums, u)
  chosen = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
  place, _ = _invert(jnp.exp(chosen - largest), u)
  logprob = jnp.take_along_axis(chosen, place, axis=-1) - largest
  logprob = logprob - jnp.log(jnp.sum(sums, axis=-1, keepdims=True))
  return (block * blocks.shape[-1] + place)[:, 0], logprob[:, 0]


def _invert(weights: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Which weight the share u of their sum falls into: the first one above 0 whose cumulative sum
  exceeds it.

  A weight of 0 is never found, although the sums, which are added up in a tree, may rise and fall
  by their last bit at such weights too.

  Args:
    weights: f32[B,W], not negative, and one of each row above 0.
    u: f32[B,1], in [0, 1).

  Returns:
    (index i32[B,1], the share of that weight which lies below: f32[B,1], in [0, 1)).
  """
  u = jnp.clip(u, 2**-24, 1 - 2**-23)  # A share of exactly 0 would find any weight, however small.
  cumulative = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
  below = u * jnp.max(cumulative, axis=-1, keepdims=True)
  index = jnp.argmax(cumulative > below, axis=-1, keepdims=True)  # the first True

  def found(x):
    return jnp.take_along_axis(x, index, axis=-1)

  share = 1 - (found(cumulative) - below) / found(weights)
  return index, jnp.clip(share, 0.0, 1 - 2**-23)


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
