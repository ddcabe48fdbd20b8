"""Bulk inference over lists of token rows with one compiled shape: sampling, scores, losses, greedy matches.

Each `make_*` returns a function of (params, rows, ...) that pads the last batch, puts rows on the mesh and brings numpy
arrays back. One shape, so one compilation, whatever the number of rows. put: Sharder.spread of a mesh, for every process has all
rows and gets all results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import ops
from alignjax.data import encode
from alignjax.sampling import generate
from alignjax.sharding import fetch
from alignjax.types import Networks


def make_sampler(nets: Networks, put: Callable, *, prompt_length: int, max_tokens: int, stop_ids: Sequence[int],
                 pad: int, rows: int = 256) -> Callable:
  """-> sample(params, prompts, seed, temperature=1.0, progress=None) -> (responses, ended).

  prompts: token lists of at most prompt_length; responses: token lists with the stop token where one was sampled;
  ended: bool[N]. A pure function of the seed and of a prompt's place in the list.
  """

  @jax.jit
  def run(params, tokens, mask, key, temperature):
    return generate(nets.decoder, params, tokens, mask, key, max_tokens=max_tokens, stop_ids=stop_ids,
                    temperature=temperature)

  @jax.jit
  def run_greedy(params, tokens, mask, key):
    return generate(nets.decoder, params, tokens, mask, key, max_tokens=max_tokens, stop_ids=stop_ids, temperature=0)

  def sample(params, prompts, seed: int, temperature: float = 1.0):
    tokens, mask = encode.left_pad(prompts, prompt_length, pad)
    responses, ended = [], []
    for i, batch in enumerate(_batches((tokens, mask), rows)):
      key = jax.random.fold_in(jax.random.key(seed), i)
      batch = put(batch)
      out = run(params, *batch, key, temperature) if temperature else run_greedy(params, *batch, key)
      out = fetch(out)
      responses += [row[live].tolist() for row, live in zip(out.responses, out.mask, strict=True)]
      ended.append(out.ended)
    return responses[:len(prompts)], np.concatenate(ended)[:len(prompts)]

  return sample


def make_scorer(nets: Networks, put: Callable, *, length: int, pad: int, rows: int = 256) -> Callable:
  """-> score(params, token rows) -> f32[N]: the scalar head at each row's last token."""

  @jax.jit
  def run(params, tokens, mask):
    return ops.last_live(nets.scalar(params, tokens, mask), mask)

  def score(params, sequences):
    padded = encode.right_pad(sequences, length, pad)
    return _collect(lambda *batch: run(params, *batch), padded, rows, put)

  return score


def make_likelihood(nets: Networks, put: Callable, rows: int = 128) -> Callable:
  """-> likelihood(params, tokens [N,T], mask, weights) -> (logprob f64[N], greedy bool[N]).

  logprob: the sum of the weighted tokens' log-probabilities (nats); greedy: whether each token with weight > 0 is the
  argmax, that is whether greedy decoding would have produced exactly them.
  """

  @jax.jit
  def run(params, tokens, mask, weights):
    logits = nets.logits(params, tokens[:, :-1], mask[:, :-1])
    logprobs, _ = ops.token_logprobs(logits, tokens[:, 1:])
    weights = weights[:, 1:]
    hit = (jnp.argmax(logits, -1) == tokens[:, 1:]) | (weights == 0)
    return jnp.sum(logprobs * weights, -1), jnp.all(hit, -1)

  def likelihood(params, tokens, mask, weights):
    return _collect(lambda *batch: run(params, *batch), (tokens, mask, weights), rows, put)

  return likelihood


def make_response_logprobs(nets: Networks, put: Callable, *, length: int, pad: int, rows: int = 128) -> Callable:
  """-> logprobs(params, prompts, responses) -> f64[N]: log p(response | prompt) of token lists, in nats."""
  likelihood = make_likelihood(nets, put, rows)

  def logprobs(params, prompts, responses):
    tokens, mask = encode.right_pad([list(p) + list(r) for p, r in zip(prompts, responses, strict=True)], length, pad)
    weights = np.zeros(tokens.shape, np.float32)
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
      weights[i, len(p):len(p) + len(r)] = 1.0
    return likelihood(params, tokens, mask, weights)[0]

  return logprobs


def _batches(arrays: Any, rows: int):
  """Batches of exactly `rows`; the last is filled up with copies of the first row."""
  count = len(jax.tree.leaves(arrays)[0])
  for start in range(0, count, rows):
    index = np.arange(start, start + rows)
    yield jax.tree.map(lambda x: x[np.where(index < count, index, 0)], arrays)  # noqa: B023


def _collect(function: Callable, arrays: Any, rows: int, put: Callable) -> Any:
  count = len(jax.tree.leaves(arrays)[0])
  outs = [fetch(function(*put(batch))) for batch in _batches(arrays, rows)]
  return jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *outs)
