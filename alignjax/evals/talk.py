"""Talking to a model: tokens as they are sampled, or the best of n by a reward model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import ops
from alignjax.data import encode
from alignjax.sampling import generate, sample


def stream(model: Any, prompt: Any, *, temperature: float = 1.0, top_p: float | None = None, top_k: int | None = None,
           max_tokens: int = 128, seed: int = 0) -> Iterator[str]:
  """Pieces of text of one response, as they come; together they are the response of `generate` with the same seed.

  model: stages.finished.Model. prompt: text, or messages where the template is a chat.
  """
  tokens, mask, slots = _padded(model, prompt, max_tokens)
  weights, prefill, step = _decoder(model.nets, model.cfg, slots, temperature, top_p, top_k)
  weights = weights(model.params)
  logits, cache = prefill(weights, tokens, mask)
  key, said, shown = jax.random.key(seed), [], ''
  for t in range(max_tokens):
    token, logits, cache = step(weights, logits, cache, jax.random.fold_in(key, t))
    token = int(token[0])
    if token in model.template.ends:
      break
    said.append(token)
    text = model.decode(said)
    if not text.endswith('\ufffd'):  # half of a character waits for the other
      yield text[len(shown):]
      shown = text
  rest = model.decode(said)[len(shown):]
  if rest:
    yield rest


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


def _padded(model: Any, prompt: Any, max_tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
  """The prompt, left-padded to a power of two, so that few lengths are compiled."""
  tokens = model.template.prompt(prompt)
  room = model.cfg.max_length - max_tokens
  if len(tokens) > room:
    raise ValueError(f'the prompt has {len(tokens)} tokens; with max_tokens={max_tokens} the context of '
                     f'{model.cfg.max_length} leaves {max(room, 0)}.')
  length = min(max(16, 1 << (len(tokens) - 1).bit_length()), room)
  return *encode.left_pad([tokens], length, model.template.pad), length + max_tokens


def best_of(model: Any, reward: Any, prompt: Any, n: int, *, temperature: float = 1.0, top_p: float | None = None,
            top_k: int | None = None, max_tokens: int = 128, seed: int = 0) -> str:
  """The response, of n sampled ones, that the reward model scores highest."""
  texts, scores = ranked(model, reward, prompt, n, temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens,
                         seed=seed)
  return texts[int(np.argmax(scores))]


def ranked(model: Any, reward: Any, prompt: Any, n: int, *, temperature: float = 1.0, top_p: float | None = None,
           top_k: int | None = None, max_tokens: int = 128, seed: int = 0) -> tuple[list[str], np.ndarray]:
  """n sampled responses and their scores, f32[n], read with the reward model's own tokenizer and template."""
  tokens, mask, _ = _padded(model, prompt, max_tokens)
  run = jax.jit(lambda params: generate(
      model.nets.decoder, params, tokens, mask, jax.random.key(seed), max_tokens=max_tokens,
      stop_ids=model.template.ends, temperature=temperature, top_k=top_k, top_p=top_p, samples_per_prompt=n))
  out = jax.tree.map(np.asarray, run(model.params))
  texts, rows = [], []
  for row, live in zip(out.responses, out.mask, strict=True):
    text, ended = model.template.said(row[live])
    texts.append(text)
    rows.append(sum(reward.template.row(prompt, text, ended), []))
  length = max(map(len, rows))
  if length > reward.cfg.max_length:
    raise ValueError(f'prompt and response have {length} tokens, the reward model reads {reward.cfg.max_length}.')
  padded = encode.right_pad(rows, length, reward.template.pad)
  scores = jax.jit(lambda p, tokens, mask: ops.last_live(reward.nets.scalar(p, tokens, mask), mask))(reward.params, *padded)
  return texts, np.asarray(scores)
