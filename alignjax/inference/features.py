"""The last layer of a network at the end of rows of tokens, as the features of a linear reward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from alignjax import ops
from alignjax.inference import bulk
from alignjax.sharding import Sharder
from alignjax.types import Networks


def make_features(
  nets: Networks,
  sharder: Sharder | None,
  *,
  length: int,
  pad: int,
  rows: int | Callable[[int], int] = 256,
) -> Callable:
  """Returns a function features(params, sequences) -> f32[N,D], what the scalar head multiplies
  with its kernel at the last token of each row. Rows have at most `length` tokens."""
  return bulk.at_last(_last_layer(nets), sharder, length=length, pad=pad, rows=rows)


@functools.lru_cache(maxsize=32)
def _last_layer(nets: Networks) -> Callable:
  """Returns the compiled function. The score is linear in the kernel of the head, so the features
  are the scores under the kernels (1, 0, ...), (0, 1, 0, ...), ... and no bias; the layers below do
  not depend on the kernel and are computed once."""

  @jax.jit
  def run(params, tokens, mask):
    kernel = params['final']['score']['kernel']

    def under(unit):
      head = {'kernel': unit[:, None], 'bias': jnp.zeros(1, kernel.dtype)}
      scores = nets.scalar({**params, 'final': {**params['final'], 'score': head}}, tokens, mask)
      return ops.last_live(scores, mask)

    return jax.vmap(under, out_axes=-1)(jnp.eye(len(kernel), dtype=kernel.dtype))

  return run
