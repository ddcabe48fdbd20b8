"""Only live tokens: rows with pads are read as fewer rows without them.

The episodes of a minibatch end at different tokens, so a batch [N,T] of prompts and responses is
often half pads. `on_live_rows` lays the live tokens of several rows into one row of the same length
T, whose documents are numbered (types.TokenBatch.mask), runs the smallest compiled program that
holds them, and gives back arrays of the shape [N,T]. Losses and rewards see no difference: they
receive networks (types.Networks) that do this inside.

The shapes are static. A program is compiled for each of a few numbers of rows, and which one runs
is decided on the device. Scoring and update of a minibatch make the same arrangement and therefore
run the same program on the same rows, so that the ratio before the first update stays exactly 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignjax.types import Networks


class Arrangement(NamedTuple):
  """Where the live tokens of the rows [N,T] go.

  Attributes:
    mask: bool[N,T], the live tokens.
    index: i32[N,T], the place of each live token among the packed rows, row * T + column, and N * T
      for pads.
    rows: i32[], the number of packed rows that are needed.
  """

  mask: jax.Array
  index: jax.Array
  rows: jax.Array


def arrange(mask: jax.Array) -> Arrangement:
  """First fit, the longest rows first: each goes into the first packed row that has room for it.

  Args:
    mask: bool[N,T]; the live tokens of a row may stand anywhere in it and keep their order.
  """
  count, length = mask.shape
  lengths = jnp.sum(mask, axis=-1, dtype=jnp.int32)
  longest_first = jnp.argsort(-lengths, stable=True)

  def place(free, i):
    row = jnp.argmax(free >= lengths[i])
    start = row * length + length - free[row]
    return free.at[row].add(-lengths[i]), start

  free, starts = jax.lax.scan(place, jnp.full(count, length, jnp.int32), longest_first)
  start = jnp.zeros(count, jnp.int32).at[longest_first].set(starts.astype(jnp.int32))
  index = start[:, None] + jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
  return Arrangement(
    mask=mask,
    index=jnp.where(mask, index, count * length),
    rows=jnp.sum(free < length, dtype=jnp.int32),
  )


def packed(nets: Networks, arrangement: Arrangement, rows: int) -> Networks:
  """Networks whose `logprobs` and `scalar` read the arranged rows as `rows` packed ones.

  They take and return arrays [N,T] like those of `nets`. What they return is 0 at pads, and so is
  the log-probability of the first live token of a row, which nothing precedes. Rows of another
  shape, and rows that are packed already, are read as they are. Rows of the arranged shape under
  another mask give NaN: they were not arranged, and might not fit.

  Args:
    nets: the networks that read packed rows.
    arrangement: of the rows that the networks will be given.
    rows: at least arrangement.rows.
  """
  count, length = arrangement.mask.shape

  def is_arranged(mask):
    return mask.dtype == bool and mask.shape == (count, length)

  def pack(x):
    empty = jnp.zeros(rows * length, x.dtype)
    return empty.at[arrangement.index].set(x, mode='drop').reshape(rows, length)

  def unpack(x, mask):
    x = x.reshape(rows * length).at[arrangement.index].get(mode='fill', fill_value=0)
    return jnp.where(jnp.all(mask == arrangement.mask), x, jnp.nan)

  numbers = jnp.broadcast_to(jnp.arange(1, count + 1, dtype=jnp.int32)[:, None], (count, length))
  documents = pack(numbers)

  def logprobs(params, tokens, mask, temperature=1.0, key=None):
    if not is_arranged(mask):
      return nets.logprobs(params, tokens, mask, temperature=temperature, key=key)
    found = nets.logprobs(params, pack(tokens), documents, temperature=temperature, key=key)
    follows = mask & (jnp.cumsum(mask, axis=-1) > 1)
    return tuple(jnp.where(follows, unpack(x, mask), 0.0) for x in found)

  def scalar(params, tokens, mask):
    if not is_arranged(mask):
      return nets.scalar(params, tokens, mask)
    return unpack(nets.scalar(params, pack(tokens), documents), mask)

  return nets._replace(logprobs=logprobs, scalar=scalar)


def on_live_rows(
  function: Callable[[Networks], Any],
  nets: Networks,
  mask: jax.Array,
  *,
  fractions: Sequence[float],
  shards: int = 1,
) -> Any:
  """function(nets), with networks that leave out the pads of the rows of `mask`.

  Args:
    function: receives the networks. It is traced once for each fraction, and once for the rows as
      they are.
    nets: the networks as pure functions.
    mask: bool[N,T], of the rows that the function passes to the networks.
    fractions: the numbers of packed rows that programs are compiled for, as parts of N. The
      smallest that holds the live tokens is run; where none does, the rows are read as they are.
    shards: the devices that share the rows; every number of rows is a multiple of it.
  """
  sizes = row_counts(mask.shape[0], fractions, shards)
  if not sizes:
    return function(nets)
  arrangement = arrange(mask)

  def on(rows):
    return lambda: function(packed(nets, arrangement, rows))

  fits = jnp.searchsorted(jnp.asarray(sizes), arrangement.rows)
  return jax.lax.switch(fits, [*map(on, sizes), lambda: function(nets)])


def row_counts(rows: int, fractions: Sequence[float], shards: int = 1) -> list[int]:
  """The numbers of packed rows below `rows` that programs are compiled for, in increasing order."""
  counts = {math.ceil(rows * fraction / shards) * shards for fraction in fractions}
  return sorted(count for count in counts if 0 < count < rows)
