"""Talking to a model: tokens as they are sampled, or the best of n by a reward model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.data import encode
from alignjax.inference import bulk
from alignjax.inference.loading import Model
from alignjax.sampling import generate, sample

LENGTH = 128  # tokens of a response, where the model was not trained with a limit

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
  """Pieces of text of one response, as they come; together they are the response of `generate` with
  the same seed.

  Args:
    model: loading.Model.
    prompt: text, or messages where the template is a chat.
    max_tokens: of the response; None: as many as in training (LENGTH where that is not known), or
      fewer where the prompt leaves fewer of the context. A number that the context has no room for
      is a ValueError.
    starting: called with the size of the cache before the first token; a new size is compiled.
    cut: called with the number of tokens of a response that the limit ended and not the model.
  """
  tokens, mask, slots, most = _padded(model, prompt, max_tokens)
  starting(slots)
  weights, prefill, step = _decoder(model.nets, model.cfg, slots, temperature, top_p, top_k)
  weights = weights(model.params)
  logits, cache = prefill(weights, tokens, mask)
  key, said, shown = jax.random.key(seed), [], ''
  for t in range(most):
    token, logits, cache = step(weights, logits, cache, jax.random.fold_in(key, t))
    said.append(int(token[0]))
    text, ended = model.template.decode_response(said)
    if ended:
      break
    if not text.endswith('\ufffd'):  # half of a character waits for the other
      yield text[len(shown) :]
      shown = text
  if len(text) > len(shown):
    yield text[len(shown) :]
  if not ended:
    cut(most)


@functools.lru_cache(maxsize=8)
def _decoder(nets, cfg, slots: int, temperature: float, top_p, top_k):
  """Compiled once for a number of cache slots; further turns of a conversation use it again."""

  @jax.jit
  def prefill(weights, tokens, mask):
    return nets.decoder.prefill(weights, tokens, mask, slots)

  @functools.partial(jax.jit, donate_argnums=2)
  def step(weights, logits, cache, key):
    token, _ = sample(key, logits, temperature, top_k, top_p)
    return token, *nets.decoder.step(weights, token, jnp.ones(token.shape, bool), cache)

  return jax.jit(nets.decoder.prepare), prefill, step


def _padded(
  model: Model, prompt: Any, max_tokens: int | None
) -> tuple[np.ndarray, np.ndarray, int, int]:
  """(tokens, mask, cache slots, tokens of the response at most): the prompt, left-padded to the
  length of a bucket, so that few lengths are compiled."""
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
  length = bulk.bucket(len(tokens), room, smallest=16)
  return *encode.left_pad([tokens], length, model.template.pad), length + most, most


def best_of(
  model: Model, reward: Model, prompt: Any, n: int, *, cut: Notice = lambda tokens: None, **how: Any
) -> str:
  """The response, of n sampled ones, that the reward model scores highest. The other arguments are
  those of `stream`."""
  texts, scores, ended, most = _sampled(model, reward, prompt, n, **how)
  best = int(np.argmax(scores))
  if not ended[best]:
    cut(most)
  return texts[best]


def ranked(
  model: Model, reward: Model, prompt: Any, n: int, **how: Any
) -> tuple[list[str], np.ndarray]:
  """n sampled responses and their scores, f32[n], read with the reward model's own tokenizer and
  template. how: as of `stream`."""
  return _sampled(model, reward, prompt, n, **how)[:2]


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
  """(responses, scores f32[n], whether each ended by itself, tokens at most)."""
  tokens, mask, slots, most = _padded(model, prompt, max_tokens)
  starting(slots)
  run = jax.jit(
    lambda params: generate(
      model.nets.decoder,
      params,
      tokens,
      mask,
      jax.random.key(seed),
      max_tokens=most,
      stop_ids=model.template.ends,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      samples_per_prompt=n,
    )
  )
  out = jax.tree.map(np.asarray, run(model.params))
  texts, rows = [], []
  for row, live in zip(out.responses, out.mask, strict=True):
    text, ended = model.template.decode_response(row[live])
    texts.append(text)
    rows.append(sum(reward.template.row(prompt, text, ended), []))
  length = max(map(len, rows))
  if length > reward.cfg.max_length:
    raise ValueError(
      f'prompt and response have {length} tokens, the reward model reads {reward.cfg.max_length}.'
    )
  score = bulk.make_scorer(
    reward.nets, reward.sharder, length=reward.cfg.max_length, pad=reward.template.pad
  )
  return texts, score(reward.params, rows), out.ended, most
