"""Bulk inference over lists of token rows: sampling, scores, losses and greedy matches, over any
number of rows of any length.

batching.py decides which rows are computed together. Each `make_*` returns a function of (params,
rows, ...) that pads the rows of a batch, puts them on the mesh and returns numpy arrays. Its
sharder is that of the mesh, or None for one device. Every process passes all rows and gets all
results. The optional callback done(i, result) is called as results arrive, which is not in the
order of the rows.

The result of a row depends on the row alone and not on the rows that it is computed with, up to the
rounding of another shape.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import ops
from alignjax.data import encode
from alignjax.inference import batching
from alignjax.sampling import generate
from alignjax.sharding import Sharder, fetch
from alignjax.types import Networks


class Speed(NamedTuple):
  """Rough figures of a device, which serve only to choose between padding, more batches and more
  shapes.

  Attributes:
    compile: seconds to compile a shape.
    flops: FLOPs per second.
    bytes: bytes of weights read per second.
    step: seconds of overhead for any step.
    tokens: the most tokens that are read at once. With more, the activations of a layer leave the
      caches of a CPU: for the sandbox's model, 8,192 tokens took six times as long as 2,048.
  """

  compile: float
  flops: float
  bytes: float
  step: float
  tokens: int = 2**31


SPEEDS, OTHER = dict(cpu=Speed(1.0, 3e10, 1e10, 5e-4, 2048)), Speed(10.0, 5e13, 1.5e12, 3e-3)


def each(
  run: Callable,
  make: Callable[[list[int], int], Any],
  lengths: Sequence[int],
  params: Any,
  *,
  most: int,
  rows: int | Callable[[int], int],
  sharder: Sharder | None,
  more: int = 0,
  done: Callable[[int, Any], None] | None = None,
) -> list[Any]:
  """Returns the result of `run` for each row.

  Args:
    run: a function of (params, *arrays) that returns arrays with one row per input row.
    make: a function of (positions of rows, padded length) that returns a tuple of numpy arrays.
    lengths: the lengths of the rows.
    params: the parameters. Their number determines the costs of the plan.
    most: as in batching.plan.
    rows: as in batching.plan.
    sharder: the Sharder of the mesh, or None for one device.
    more: as in batching.plan.
    done: an optional callback done(i, result), which is called as results arrive.
  """
  speed, size = (
    SPEEDS.get(jax.default_backend(), OTHER),
    max(1, sum(x.size for x in jax.tree.leaves(params))),
  )
  token = 2 * size / speed.flops  # seconds
  costs = dict(
    shape_cost=speed.compile / token,
    batch_cost=(1 + more) * (speed.step + 4 * size / speed.bytes) / token,
  )

  def at_most(length):
    limit = rows(length) if callable(rows) else rows
    return limit if more else min(limit, max(1, speed.tokens // length))

  out: list[Any] = [None] * len(lengths)

  def collect(batch, made):
    leaves, structure = jax.tree.flatten(fetch(made))
    for place, i in enumerate(batch.rows):
      out[i] = structure.unflatten([leaf[place] for leaf in leaves])
      if done:
        done(i, out[i])

  shards = 1
  if sharder:
    shards = sharder.row_shards if more else sharder.batch_shards
  running = None  # The device computes a batch while the results of the one before are collected.
  try:
    for batch in batching.plan(lengths, most, at_most, shards=shards, more=more, **costs):
      arrays = make(batch.rows + batch.rows[:1] * (batch.size - len(batch.rows)), batch.length)
      made = run(params, *(sharder.put_full(arrays) if sharder else arrays))
      before, running = running, (batch, made)
      if before:
        collect(*before)
  finally:  # What was computed before an error is not lost.
    if running:
      collect(*running)
  return out


def make_sampler(
  nets: Networks,
  sharder: Sharder | None,
  *,
  prompt_length: int,
  max_tokens: int,
  stop_ids: Sequence[int],
  pad: int,
  rows: int | Callable[[int], int] = 256,
  top_k: int | None = None,
  top_p: float | None = None,
) -> Callable:
  """Returns a function sample(params, prompts, seed, temperature=1.0, numbers=None, done=None) ->
  (responses, ended).

  `prompts` are token lists of 1 to prompt_length tokens. `responses` are token lists that include
  the stop token if one was sampled, and `ended` is bool[N]. `numbers` distinguish the samples of
  one prompt; None counts how often the prompt occurred before in the list. A response depends on
  params, seed, temperature, its prompt and its number alone, and not on the other prompts or on the
  position of its prompt. top_k and top_p truncate the distribution (sampling.generate).
  """

  def sample(
    params,
    prompts,
    seed: int,
    temperature: float = 1.0,
    numbers: Sequence[int] | None = None,
    done=None,
  ):
    run = _sampled(nets, max_tokens, tuple(stop_ids), not temperature, top_k, top_p)
    names = np.array([zlib.crc32(np.asarray(p, np.int32).tobytes()) for p in prompts], np.uint32)
    numbers = np.asarray(
      occurrences(map(tuple, prompts)) if numbers is None else numbers, np.uint32
    )

    def make(some, length):
      return (*encode.left_pad([prompts[i] for i in some], length, pad), names[some], numbers[some])

    def response(row):
      return row.responses[row.mask].tolist(), bool(row.ended)

    out = each(
      lambda params, *batch: run(params, jax.random.key(seed), temperature, *batch),
      make,
      list(map(len, prompts)),
      params,
      most=prompt_length,
      rows=rows,
      sharder=sharder,
      more=max_tokens,
      done=done and (lambda i, row: done(i, response(row))),
    )
    return [response(row)[0] for row in out], np.array([row.ended for row in out], bool)

  return sample


def occurrences(names: Any) -> list[int]:
  """Returns how often each name occurred before: 'abab' -> [0, 0, 1, 1]."""
  seen: dict[Any, int] = {}
  out = []
  for name in names:
    out.append(seen.get(name, 0))
    seen[name] = out[-1] + 1
  return out


@functools.lru_cache(maxsize=32)
def _sampled(
  nets: Networks,
  max_tokens: int,
  stop_ids: tuple[int, ...],
  greedy: bool,
  top_k: int | None,
  top_p: float | None,
) -> Callable:
  """Returns the compiled function. It is cached by the network's functions and not by the model, so
  that the cache keeps no parameters alive."""

  @jax.jit
  def run(params, key, temperature, tokens, mask, names, numbers):
    keys = jax.vmap(lambda name, number: jax.random.fold_in(jax.random.fold_in(key, name), number))(
      names, numbers
    )
    return generate(
      nets.decoder,
      params,
      tokens,
      mask,
      keys,
      max_tokens=max_tokens,
      stop_ids=stop_ids,
      temperature=0 if greedy else temperature,
      top_k=top_k,
      top_p=top_p,
      segments=1,  # Every new length is compiled, and soon done.
    )

  return run


def make_scorer(
  nets: Networks,
  sharder: Sharder | None,
  *,
  length: int,
  pad: int,
  rows: int | Callable[[int], int] = 256,
) -> Callable:
  """Returns a function score(params, sequences, done=None) -> f32[N], the scalar head at the last
  token of each row. Rows have at most `length` tokens."""
  return at_last(_scored(nets), sharder, length=length, pad=pad, rows=rows)


def at_last(
  run: Callable,
  sharder: Sharder | None,
  *,
  length: int,
  pad: int,
  rows: int | Callable[[int], int] = 256,
) -> Callable:
  """Returns a function of (params, sequences, done=None), with the results of
  run(params, tokens [B,T], mask) of every sequence as f32[N,...]. run is compiled, and returns a
  value for each row. Rows have at most `length` tokens."""

  def results(params, sequences, done=None):
    def make(some, width):
      return encode.right_pad([sequences[i] for i in some], width, pad)

    return np.array(
      each(
        run,
        make,
        list(map(len, sequences)),
        params,
        most=length,
        rows=rows,
        sharder=sharder,
        done=done,
      ),
      np.float32,
    )

  return results


@functools.lru_cache(maxsize=32)
def _scored(nets: Networks) -> Callable:
  return jax.jit(
    lambda params, tokens, mask: ops.last_live(nets.scalar(params, tokens, mask), mask)
  )


def make_likelihood(
  nets: Networks,
  sharder: Sharder | None,
  rows: int | Callable[[int], int] = 128,
  temperature: float = 1.0,
) -> Callable:
  """Returns a function likelihood(params, tokens [N,T], mask, weights, done=None) -> (logprob
  f64[N], greedy bool[N]) of right-padded rows.

  logprob is the sum of the weighted log-probabilities of the tokens in nats. greedy is whether
  every token with weight > 0 is the argmax, that is, whether greedy decoding would produce exactly
  these tokens. Logits are computed only where a token has a weight, W positions of each row. rows
  is the largest number of rows of a batch, as a number or a function of W. The probabilities are
  those of the logits over the temperature, as a sampler at this temperature draws.
  """

  def likelihood(params, tokens, mask, weights, done=None):
    # The last token is only predicted.
    tokens, targets, weights = tokens[:, :-1], tokens[:, 1:], weights[:, 1:]
    lengths = np.maximum(
      np.where(mask, np.arange(1, mask.shape[1] + 1), 0).max(1, initial=0) - 1, 1
    )
    # The head is computed only where a token is weighted: [N,W], and others where a row has fewer.
    most = batching.bucket(int((weights != 0).sum(1).max(initial=1)), weights.shape[1])
    positions = np.argsort(weights == 0, axis=1, kind='stable')[:, :most].astype(np.int32)
    targets, weights = (np.take_along_axis(x, positions, 1) for x in (targets, weights))

    def cut(some, length):
      # A position beyond the padded length has weight 0.
      where = np.minimum(positions[some], length - 1)
      return tokens[some, :length], mask[some, :length], where, targets[some], weights[some]

    found = each(
      _likelihood(nets, temperature),
      cut,
      lengths.tolist(),
      params,
      most=tokens.shape[1],
      rows=rows(most) if callable(rows) else rows,
      sharder=sharder,
      done=done,
    )
    return np.array([value for value, _ in found], np.float64), np.array(
      [hit for _, hit in found], bool
    )

  return likelihood


@functools.lru_cache(maxsize=32)
def _likelihood(nets: Networks, temperature: float) -> Callable:

  @jax.jit
  def run(params, tokens, mask, positions, targets, weights):
    logits = nets.logits(params, tokens, mask, positions=positions)
    logprobs, _ = ops.token_logprobs(logits / temperature, targets)
    hit = (jnp.argmax(logits, -1) == targets) | (weights == 0)
    return jnp.sum(logprobs * weights, -1), jnp.all(hit, -1)

  return run


def make_response_logprobs(
  nets: Networks,
  sharder: Sharder | None,
  *,
  length: int,
  pad: int,
  rows: int = 128,
  temperature: float = 1.0,
) -> Callable:
  """Returns a function logprobs(params, prompts, responses) -> f64[N], the log p(response | prompt)
  of token lists in nats, at a temperature (make_likelihood)."""
  likelihood = make_likelihood(nets, sharder, rows, temperature)

  def logprobs(params, prompts, responses):
    tokens, mask = encode.right_pad(
      [list(p) + list(r) for p, r in zip(prompts, responses, strict=True)], length, pad
    )
    weights = np.zeros(tokens.shape, np.float32)
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
      weights[i, len(p) : len(p) + len(r)] = 1.0
    return likelihood(params, tokens, mask, weights)[0]

  return logprobs
