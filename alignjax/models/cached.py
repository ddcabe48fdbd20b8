"""Attention of one new token of every response, to its prompt and to the tokens before it.

The prompt's keys and values are those of the prefill and are only read: the samples of a prompt
share them, and they are not copied for any. The response's keys and values are updated in place.
With `model.kv_cache='int8'` both are stored as Quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignjax.models.attention import MASKED_LOGIT, capped

CACHE_AXES = ('rows', 'kv_heads', None, None)  # of keys, values and, without the last, scales


class Quantized(NamedTuple):
  """Vectors of H features as whole numbers, each with a scale of its own.

  Attributes:
    values: i8[...,H], from -127 to 127.
    scales: f32[...]; a value times its scale is within half a scale of what was quantized. There
      is no last axis of size 1, which a TPU would lengthen to 128.
  """

  values: jax.Array
  scales: jax.Array


def quantize(x: jax.Array) -> Quantized:
  """x [...,H] with the largest feature of each vector at 127 or -127."""
  x = x.astype(jnp.float32)
  scales = jnp.max(jnp.abs(x), axis=-1) / 127
  values = jnp.round(x / jnp.where(scales > 0, scales, 1.0)[..., None])
  return Quantized(values.astype(jnp.int8), scales)


def kept_of_prompt(x: jax.Array, window: int | None) -> jax.Array:
  """The keys or values [B,G,Q,H] of a prompt that a layer's response can read: with a window those
  of the last tokens. Prompts are padded on the left."""
  return x if window is None else x[:, :, max(x.shape[2] - max(window - 1, 1), 0) :]


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  prompt: tuple[jax.Array, jax.Array],
  response: tuple[jax.Array, jax.Array],
  prompt_mask: jax.Array,
  index: jax.Array,
  *,
  constrain: Callable[..., jax.Array],
  window: int | None = None,
  scale: float | None = None,
  cap: float | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Writes the new keys and values and attends, with one softmax over prompt and response, in
  float32. Row b * n + j is sample j of prompt b.

  Args:
    q: [B*n,1,G,N/G,H].
    k, v: [B*n,G,1,H], of the new tokens.
    prompt: (k, v), each [B,G,P,H] or Quantized: those of the last P tokens (`kept_of_prompt`).
    response: (k, v), each [B*n,G,S,H] or Quantized, as those of the prompt.
    prompt_mask: bool[B,Q].
    index: i32[], the slot of the new tokens. The slots behind it are empty.
    constrain: pins the sharding of an array (sharding.Sharder.constrain).
    window, scale, cap: cfg.window of this layer, cfg.query_scale and cfg.attention_cap.

  Returns:
    (heads [B*n,1,G,N/G,H] in the dtype of v, the response's (k, v) with the new ones).
  """
  quantized = isinstance(response[0], Quantized)

  def write(old, new):
    new = jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=2)
    return constrain(new, *CACHE_AXES[: new.ndim])

  new = (quantize(k), quantize(v)) if quantized else (k, v)
  kept = jax.tree.map(write, response, new)
  rows, _, groups, share, width = q.shape
  prompts, length = len(prompt_mask), jax.tree.leaves(prompt)[0].shape[2]

  def to_prompts(x):  # [B*n,G,N/G,W] -> [B,G,n*N/G,W]
    x = x.reshape(prompts, -1, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(prompts, groups, -1, x.shape[-1])

  def to_rows(x):  # and back
    x = x.reshape(prompts, groups, -1, share, x.shape[-1]).swapaxes(1, 2)
    return x.reshape(rows, groups, share, -1)

  def product(shapes, x, y):
    return jnp.einsum(shapes, x, y.astype(x.dtype), preferred_element_type=jnp.float32)

  def columns(x):  # the scales of the keys or values [B,G,S] beside the weights [B,G,M,S]
    return x.scales[:, :, None]

  def times_keys(q, keys):
    if not quantized:
      return product('bgmh,bgsh->bgms', q, keys)
    return product('bgmh,bgsh->bgms', q, keys.values) * columns(keys)

  def times_values(weights, values):
    if not quantized:
      return product('bgms,bgsh->bgmh', weights.astype(v.dtype), values)
    return product('bgms,bgsh->bgmh', (weights * columns(values)).astype(v.dtype), values.values)

  q = q[:, 0]
  slots = jnp.arange(jax.tree.leaves(kept)[0].shape[2])
  filled = slots <= index
  prompt_mask = prompt_mask[:, prompt_mask.shape[1] - length :]
  if window is not None:  # The prompt's last token is one place before the response's first one.
    filled &= index - slots < window
    prompt_mask &= (length - jnp.arange(length) + index < window)[None]
  visible = jnp.concatenate(
    [
      jnp.repeat(prompt_mask, rows // prompts, axis=0),
      jnp.broadcast_to(filled[None], (rows, len(filled))),
    ],
    axis=1,
  )
  logits = jnp.concatenate(
    [to_rows(times_keys(to_prompts(q), prompt[0])), times_keys(q, kept[0])], axis=-1
  )
  logits = capped(logits * (width**-0.5 if scale is None else scale), cap)
  logits = jnp.where(visible[:, None, None], logits, MASKED_LOGIT)
  # A token sees itself, so that no row of logits is masked as a whole.
  weights = jax.nn.softmax(logits, axis=-1)
  heads = to_rows(times_values(to_prompts(weights[..., :length]), prompt[1]))
  heads = heads + times_values(weights[..., length:], kept[1])
  return heads.astype(v.dtype)[:, None], kept
