"""Rows whose tokens several devices share: the mesh axis 'sequence'.

Each device has an equal part of the columns of every row, in order: of the residual stream, of the
queries, of the inner arrays and of the logits. Attention alone reads other columns. Each device
gathers the keys and values of its rows for it, layer by layer, and in the backward pass their
gradients are summed into the parts again.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

AXIS = 'sequence'  # of the mesh


def lengthened(x: jax.Array, parts: int, left: bool = False) -> jax.Array:
  """x [B,T] with zeros behind it, or before it where `left`, so that T is a multiple of `parts`."""
  rest = -x.shape[1] % parts
  return jnp.pad(x, ((0, 0), (rest, 0) if left else (0, rest))) if rest else x


def without_tokens(constrain: Callable) -> Callable:
  """The `constrain` of transformer.make_networks for arrays whose tokens no devices share."""

  def run(x, *axes):
    return constrain(x, *(None if axis in ('sequence', 'tokens') else axis for axis in axes))

  return run


def of_own_queries(attend: Callable) -> Callable:
  """attention.Attend of one device, whose arguments are its own parts of queries, keys and values
  and the mask [B,S] of whole rows.

  Kernels take a mask that is known when they are compiled, and which columns a device has is not:
  all run one program. The keys are therefore rotated until the device's own columns are the last,
  which makes every device's queries the last ones of their row. The columns that come later, which
  the rotation brings to the front, are hidden as pads.
  """

  def run(q, k, v, mask):
    end = (jax.lax.axis_index(AXIS) + 1) * q.shape[1]  # the column behind the device's own
    earlier = jnp.arange(mask.shape[1]) < end
    k, v = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (k, v))
    k, v, mask = (jnp.roll(x, -end, axis=1) for x in (k, v, mask * earlier[None]))
    return attend(q, k, v, mask)

  return run
