"""Computes how likely texts are under a model, and continues texts greedily or at a temperature,
for any number of rows as token lists.

Rows are grouped by length, so that a few compiled shapes serve any number of them, and are divided
over the model's mesh if it has one (loading.load(..., mesh=...)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from alignjax.data import encode
from alignjax.inference import batching, bulk
from alignjax.inference.loading import Model


def scorer(model: Model, logits_bytes: int = 2**28) -> Callable[..., list[tuple[float, bool]]]:
  """Returns a function score(pairs, done=None) of (context, continuation) token lists that returns
  (log-likelihood in nats, whether greedy decoding produces the continuation) for each pair.

  The optional callback done(i, result) is called as results arrive, which is not in the order of
  the pairs. An empty context is the start of a document, which is not scored.

  Args:
    model: the model.
    logits_bytes: the largest size of the float32 logits that exist at once on a device. It decides
      how many rows are scored together.
  """
  cfg = model.cfg
  shards = model.sharder.batch_shards if model.sharder else 1

  def at_once(positions):
    return shards * max(1, min(64, logits_bytes // (4 * positions * cfg.vocab_size)))

  likelihood = bulk.make_likelihood(model.nets, model.sharder, at_once)

  def score(pairs, done=None):
    # A pair that is too long is cut on the left.
    wholes = [
      [*(context or model.template.start), *continuation][-(cfg.max_length + 1) :]
      for context, continuation in pairs
    ]
    # The last token is only predicted.
    width = batching.bucket(max(map(len, wholes), default=2) - 1, cfg.max_length) + 1
    tokens, mask = encode.right_pad(wholes, width, model.template.pad)
    weights = np.zeros(tokens.shape, np.float32)
    for i, (whole, (_, continuation)) in enumerate(zip(wholes, pairs, strict=True)):
      count = min(len(continuation), len(whole) - 1)
      weights[i, len(whole) - count : len(whole)] = 1.0
    plain = done and (lambda i, found: done(i, (float(found[0]), bool(found[1]))))
    logprobs, greedy = likelihood(model.params, tokens, mask, weights, plain)
    return list(zip(logprobs.tolist(), greedy.tolist(), strict=True))

  return score


def stop_tokens(model: Model, until: Iterable[str]) -> tuple[int, ...]:
  """Returns the model's end tokens and every token whose text contains one of the stop texts.
  Sampling stops at each of them."""
  until = [u for u in until if u]
  ends = {*model.template.ends}
  if until:
    ends |= {i for i in range(model.vocabulary) if any(u in model.decode([i]) for u in until)}
  return tuple(sorted(ends))


def continuations(
  model: Model,
  prompts: list[list[int]],
  *,
  max_tokens: int,
  until: tuple[str, ...] = (),
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  seed: int = 0,
  rows: int = 16,
  cache_bytes: int = 2**30,
  numbers: Sequence[int] | None = None,
  done: Callable[[int, str], None] | None = None,
) -> list[str]:
  """Returns the text that follows each prompt, up to the first of the stop texts. Long prompts are
  cut on the left.

  Args:
    model: the model.
    prompts: token lists.
    max_tokens: the length limit of a continuation in tokens.
    until: the stop texts.
    temperature: the sampling temperature, where 0 is greedy.
    top_k, top_p: truncate the distribution that is sampled (sampling.generate).
    seed: the seed of the samples.
    rows: the largest number of rows together on a device.
    cache_bytes: the largest size of keys and values (as float32) on a device.
    numbers: the numbers of the samples of one prompt (bulk.make_sampler).
    done: an optional callback done(i, text), which is called as texts arrive, which is not in the
      order of the prompts.
  """
  cfg = model.cfg
  room = cfg.max_length - max_tokens
  if room < 1:
    raise ValueError(
      f'max_tokens={max_tokens} leaves no room for a prompt in a context of {cfg.max_length}.'
    )
  shards = model.sharder.row_shards if model.sharder else 1
  slot = 8 * cfg.num_layers * cfg.kv_heads * cfg.head_width

  def at_once(length):
    return shards * max(1, min(rows, cache_bytes // (slot * (length + max_tokens))))

  sample = bulk.make_sampler(
    model.nets,
    model.sharder,
    prompt_length=room,
    max_tokens=max_tokens,
    stop_ids=stop_tokens(model, until),
    pad=model.template.pad,
    rows=at_once,
    top_k=top_k,
    top_p=top_p,
  )
  out: list[str] = [''] * len(prompts)

  def finish(i, made):
    text, _ = model.template.decode_response(made[0])
    for stop in until:
      text = text.split(stop)[0] if stop else text
    out[i] = text
    if done:
      done(i, text)

  sample(model.params, [p[-room:] for p in prompts], seed, temperature, numbers, finish)
  return out
