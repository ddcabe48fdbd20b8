"""Which rows are computed together: rows of similar length, in few compiled shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
  """The rows of one batch.

  Attributes:
    rows: the positions of the rows in the list, at most `size` of them.
    length: the length of the padded array.
    size: the number of rows of the padded array.
  """

  rows: list[int]
  length: int
  size: int


def bucket(length: int, most: int, smallest: int = 8) -> int:
  """Returns the padded length of a row: a power of two, or the value halfway between two of them,
  but at most `most`."""
  size = smallest
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return min(size, most)


def plan(
  lengths: Sequence[int],
  most: int,
  rows: int | Callable[[int], int],
  *,
  shards: int = 1,
  shape_cost: float = 0,
  batch_cost: float = 0,
  more: int = 0,
) -> list[Batch]:
  """Decides which rows are computed together, in batches that begin with the longest rows.

  It returns the plan with the fewest padded tokens, where a shape costs `shape_cost` tokens and a
  batch costs `batch_cost` tokens. If full batches of the greatest length cost less than one shape,
  it returns those, because the next call can use their only shape again. It is a pure function of
  its arguments.

  Args:
    lengths: the lengths of the rows.
    most: the length that no row exceeds.
    rows: the largest number of rows in a batch, as a number or a function of the padded length.
    shards: the size of a batch is a multiple of it.
    shape_cost: the cost of compiling a shape, in tokens.
    batch_cost: the cost of a batch, in tokens.
    more: the number of tokens that are computed for each row in addition, such as sampled tokens.
  """

  def at_most(length):
    return max(shards, (rows(length) if callable(rows) else rows) // shards * shards)

  full = [at_most(most)] * -(-len(lengths) // at_most(most))
  if sum(full) * (most + more) + len(full) * batch_cost <= shape_cost:
    return _cut(sorted(range(len(lengths)), key=lambda i: -lengths[i]), most, full)
  groups: dict[int, list[int]] = {}
  for i, length in enumerate(lengths):
    groups.setdefault(bucket(length, most), []).append(i)
  sizes = sorted(groups, reverse=True)
  # The best plan of the groups so far: (cost, [(groups, length, sizes of the batches)]).
  best: list[tuple[float, list]] = [(0.0, [])]
  for end in range(1, len(sizes) + 1):
    choices = []
    for begin in range(end):
      length, count = sizes[begin], sum(len(groups[s]) for s in sizes[begin:end])
      cost, cut = _sizes(count, length + more, at_most(length), shards, shape_cost, batch_cost)
      choices.append((best[begin][0] + cost, [*best[begin][1], (sizes[begin:end], length, cut)]))
    best.append(min(choices, key=lambda choice: choice[0]))
  return [
    batch
    for lengths, length, cut in best[-1][1]
    for batch in _cut([i for s in lengths for i in groups[s]], length, cut)
  ]


def _sizes(
  count: int, length: int, most: int, shards: int, shape_cost: float, batch_cost: float
) -> tuple[float, list[int]]:
  """Returns (cost, sizes) of the batches for `count` rows of one length. The number of rows per
  shard is a power of two, and all batches have the same size, except that the last one may be
  smaller."""
  best: tuple[float, list[int]] = (float('inf'), [])
  powers = [shards << p for p in range(most.bit_length()) if shards << p <= most]
  for size in sorted({*powers, most}):
    full, rest = divmod(count, size)
    last = next((p for p in powers if p >= rest), size) if rest else 0
    for cut in ([size] * (full + bool(rest)), [size] * full + [last] * bool(rest)):
      cost = sum(cut) * length + len(set(cut)) * shape_cost + len(cut) * batch_cost
      if cost < best[0]:
        best = cost, cut
  return best


def _cut(order: list[int], length: int, sizes: list[int]) -> list[Batch]:
  starts = np.cumsum([0, *sizes])
  return [
    Batch(order[start : start + size], length, size)
    for start, size in zip(starts, sizes, strict=False)
  ]
