"""Interactive generation: tokens as they are sampled, or the best of n responses by a reward
model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from alignjax.data import encode
from alignjax.inference import batching, bulk
from alignjax.inference.loading import Model
from alignjax.sampling import generate, sample
from alignjax.types import Decoder

LENGTH = 128  # The length limit of a response, if the model was trained without one.

Notice = Callable[[int], None]


def stream(
  model: Model,
  prompt: Any,
  *,
  temperature: float = 1.0,
  top_p: float | None = None,
  top_k: int | None = None,
  max_tokens: int | None = None,
  seed: int = 0,
  starting: Notice = lambda slots: None,
  cut: Notice = lambda tokens: None,
) -> Iterator[str]:
  """Yields pieces of text of one response as they are sampled. Together they are the response of
  `generate` with the same seed.

  Args:
    model: a loading.Model.
    prompt: a text, or messages if the template is a chat.
    temperature: the sampling temperature, where 0 is greedy.
    top_p: the probability mass of nucleus sampling, or None.
    top_k: the number of most likely tokens to sample from, or None.
    max_tokens: the length limit of the response in tokens. None means the limit of the training
      (LENGTH if it is unknown), or less if the prompt leaves less of the context. A number that
      exceeds the context is a ValueError.
    seed: the seed of the sample.
    starting: called with the size of the cache before the first token. A new size must be compiled.
    cut: called with the number of tokens of a response that the limit ended and not the model.
  """
  tokens, mask, slots, most = _padded(model, prompt, max_tokens)
  starting(slots)
  weights, prefill, step = _decoder(model.nets, model.cfg, most, temperature, top_p, top_k)
  weights = weights(model.params)
  logits, cache = prefill(weights, tokens, mask)
  key, sampled, shown = jax.random.key(seed), [], ''
  for t in range(most):
    token, logits, cache = step(weights, logits, cache, jax.random.fold_in(key, t))
    sampled.append(int(token[0]))
    text, ended = model.template.decode_response(sampled)
    if ended:
      break
    if not text.endswith('\ufffd'):  # The rest of a character is not sampled yet.
      yield text[len(shown) :]
      shown = text
  if len(text) > len(shown):
    yield text[len(shown) :]
  if not ended:
    cut(most)


@functools.lru_cache(maxsize=8)
def _decoder(nets, cfg, slots: int, temperature: float, top_p, top_k):
  """Returns the functions compiled for a number of cache slots for the response. Further turns of a
  conversation use them again."""

  @jax.jit
  def prefill(weights, tokens, mask):
    logits, cache = nets.decoder.prefill(weights, tokens, mask)
    return logits, cache.with_slots(slots)

  @functools.partial(jax.jit, donate_argnums=2)
  def step(weights, logits, cache, key):
    token, _ = sample(key, logits, temperature, top_k, top_p)
    return token, *nets.decoder.step(weights, token, cache)

  return jax.jit(nets.decoder.prepare), prefill, step


def _padded(
  model: Model, prompt: Any, max_tokens: int | None
) -> tuple[np.ndarray, np.ndarray, int, int]:
  """Returns (tokens, mask, cache slots, length limit of the response). The prompt is left-padded to
  the length of a bucket, so that few lengths are compiled."""
  tokens = model.template.prompt(prompt)
  context = model.cfg.max_length
  most = (
    min(model.response_length or LENGTH, context - len(tokens))
    if max_tokens is None
    else max_tokens
  )
  if most < 1:
    raise ValueError(
      f'the prompt has {len(tokens)} tokens; the context of {context} leaves none for an answer. '
      f'Shorten it.'
    )
  room = context - most
  if len(tokens) > room:
    raise ValueError(
      f'the prompt has {len(tokens)} tokens; with max_tokens={most} the context of {context} '
      f'leaves {max(room, 0)}. '
      'Ask for fewer tokens, or shorten the prompt.'
    )
  length = batching.bucket(len(tokens), room, smallest=16)
  return *encode.left_pad([tokens], length, model.template.pad), length + most, most


def best_of(
  model: Model, reward: Model, prompt: Any, n: int, *, cut: Notice = lambda tokens: None, **how: Any
) -> str:
  """Samples n responses and returns the one that the reward model scores highest. The other
  arguments are those of `stream`."""
  texts, scores, ended, most = _sampled(model, reward, prompt, n, **how)
  best = int(np.argmax(scores))
  if not ended[best]:
    cut(most)
  return texts[best]


def ranked(
  model: Model, reward: Model, prompt: Any, n: int, **how: Any
) -> tuple[list[str], np.ndarray]:
  """Returns n sampled responses and their scores, f32[n], which are computed with the reward
  model's own tokenizer and template. The keyword arguments are those of `stream`."""
  return _sampled(model, reward, prompt, n, **how)[:2]


@functools.lru_cache(maxsize=16)
def _sampler(
  decoder: Decoder,
  max_tokens: int,
  stop_ids: tuple[int, ...],
  temperature: float,
  top_k: int | None,
  top_p: float | None,
  samples_per_prompt: int,
):
  """sampling.generate with its sizes bound, compiled once for each shape of prompts."""
  return jax.jit(
    functools.partial(
      generate,
      decoder,
      max_tokens=max_tokens,
      stop_ids=stop_ids,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      samples_per_prompt=samples_per_prompt,
      segments=1,  # Every new length is compiled, and soon done.
    )
  )


def _sampled(
  model: Model,
  reward: Model,
  prompt: Any,
  n: int,
  *,
  temperature: float = 1.0,
  top_p: float | None = None,
  top_k: int | None = None,
  max_tokens: int | None = None,
  seed: int = 0,
  starting: Notice = lambda slots: None,
):
  """Returns (responses, scores f32[n], whether each response ended by itself, length limit of a
  response)."""
  tokens, mask, slots, most = _padded(model, prompt, max_tokens)
  starting(slots)
  run = _sampler(model.nets.decoder, most, tuple(model.template.ends), temperature, top_k, top_p, n)
  out = jax.tree.map(np.asarray, run(model.params, tokens, mask, jax.random.key(seed)))
  texts, rows = [], []
  for row, live in zip(out.responses, out.mask, strict=True):
    text, ended = model.template.decode_response(row[live])
    texts.append(text)
    rows.append(sum(reward.template.row(prompt, text, ended), []))
  length = max(map(len, rows))
  if length > reward.cfg.max_length:
    raise ValueError(
      f'prompt and response have {length} tokens, but the context of the reward model is '
      f'{reward.cfg.max_length}.'
    )
  score = bulk.make_scorer(
    reward.nets, reward.sharder, length=reward.cfg.max_length, pad=reward.template.pad
  )
  return texts, score(reward.params, rows), out.ended, most
