"""Attention of one new token of every response, to its prompt and to the tokens before it.

The prompt's keys and values are those of the prefill and are only read: the samples of a prompt
share them, and they are not copied for any. The response's keys and values are updated in place.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignjax.models.attention import MASKED_LOGIT


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
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Writes the new keys and values and attends, with one softmax over prompt and response, in
  float32. Row b * n + j is sample j of prompt b.

  Args:
    q: [B*n,1,G,N/G,H].
    k, v: [B*n,G,1,H], of the new tokens.
    prompt: (k, v), each [B,G,Q,H].
    response: (k, v), each [B*n,G,S,H].
    prompt_mask: bool[B,Q].
    index: i32[], the slot of the new tokens. The slots behind it are empty.
    constrain: pins the sharding of an array (sharding.Sharder.constrain).

  Returns:
    (heads [B*n,1,G,N/G,H] in the dtype of v, the response's (k, v) with the new ones).
  """
  kept = tuple(
    constrain(
      jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=2),
      *('batch', 'kv_heads', None, None),
    )
    for old, new in zip(response, (k, v), strict=True)
  )
  rows, _, groups, share, width = q.shape
  prompts, _, length, _ = prompt[0].shape

  def to_prompts(x):  # [B*n,G,N/G,W] -> [B,G,n*N/G,W]
    x = x.reshape(prompts, -1, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(prompts, groups, -1, x.shape[-1])

  def to_rows(x):  # and back
    x = x.reshape(prompts, groups, -1, share, x.shape[-1]).swapaxes(1, 2)
    return x.reshape(rows, groups, share, -1)

  def product(shapes, x, y):
    return jnp.einsum(shapes, x, y, preferred_element_type=jnp.float32)

  q = q[:, 0]
  filled = jnp.arange(kept[0].shape[2]) <= index
  visible = jnp.concatenate(
    [
      jnp.repeat(prompt_mask, rows // prompts, axis=0),
      jnp.broadcast_to(filled[None], (rows, len(filled))),
    ],
    axis=1,
  )
  logits = jnp.concatenate(
    [
      to_rows(product('bgmh,bgsh->bgms', to_prompts(q), prompt[0])),
      product('bgmh,bgsh->bgms', q, kept[0]),
    ],
    axis=-1,
  )
  logits = jnp.where(visible[:, None, None], logits * width**-0.5, MASKED_LOGIT)
  # A token sees itself, so that no row of logits is masked as a whole.
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  heads = to_rows(
    product('bgms,bgsh->bgmh', to_prompts(weights[..., :length]), prompt[1])
  ) + product('bgms,bgsh->bgmh', weights[..., length:], kept[1])
  return heads.astype(v.dtype)[:, None], kept
