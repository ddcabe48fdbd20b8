"""The order of the data. It is a pure function of (seed, step), so that a resumed run needs only
the step.

Every epoch is a new permutation of all rows. A last incomplete batch is completed from the next
epoch, so that no row is dropped and no batch is short. Each process takes its own rows of every
batch (Sharder.local).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def indices(count: int, size: int, step: int, seed: Sequence[int]) -> np.ndarray:
  """Returns the rows of batch `step`, i64[size], out of `count` rows, one epoch after the other."""
  if count < 1:
    raise ValueError('there are no rows to make batches of.')
  start = step * size
  epochs = range(start // count, (start + size - 1) // count + 1)
  order = np.concatenate(
    [np.random.default_rng([*seed, epoch]).permutation(count) for epoch in epochs]
  )
  offset = start - epochs[0] * count
  return order[offset : offset + size]


def bucketed(
  kinds: Sequence[tuple[int, ...]], size: int, seed: Sequence[int]
) -> list[tuple[tuple[int, ...], np.ndarray]]:
  """Returns one epoch of batches of `size` rows. The rows of a batch fit the same shape, so that
  few shapes are compiled and there is little padding.

  Args:
    kinds: the shape that each row needs, such as (responses, tokens).
    size: the number of rows in a batch.
    seed: the seed of the order.

  Returns:
    (shape, row numbers) of each batch, in shuffled order; every row is in one batch. Rows that do
      not fill a batch of their shape move to the next larger shape that occurs. A batch is
      therefore short only where there is no larger shape; `fill` completes it with rows of weight
      0.
  """
  rng = np.random.default_rng(list(seed))
  rows = {kind: [] for kind in sorted(set(kinds))}
  for i in rng.permutation(len(kinds)).tolist():
    rows[kinds[i]].append(i)
  out = []
  # In ascending order, a shape that has room for another one comes after it.
  for kind, own in rows.items():
    full = len(own) // size * size
    out += [(kind, np.array(own[i : i + size])) for i in range(0, full, size)]
    larger = next(
      (
        other
        for other in rows
        if other > kind and all(a >= b for a, b in zip(other, kind, strict=True))
      ),
      None,
    )
    if larger is not None:
      rows[larger] += own[full:]
    elif own[full:]:
      out.append((kind, np.array(own[full:])))
  return [out[i] for i in rng.permutation(len(out))]


def draw(items: Sequence[Any], count: int | None, seed: Sequence[int]) -> list[Any]:
  """Returns `count` of the items, drawn at random by the seed, in their order. It returns all items
  if `count` is None or exceeds their number. It does not take the first items, because a file may
  be sorted."""
  if count is None or count >= len(items):
    return list(items)
  return [
    items[i]
    for i in np.sort(
      np.random.default_rng(list(seed)).choice(len(items), count, replace=False)
    ).tolist()
  ]


def take(batch: Any, rows: np.ndarray) -> Any:
  """Returns the given rows of a batch of arrays."""
  return jax.tree.map(lambda x: x[rows], batch)


def fill(batch: Any, size: int) -> Any:
  """Repeats the first row up to `size` rows, with weight 0 in a field named `weights`."""
  missing = size - len(batch.weights)
  if missing == 0:
    return batch
  padded = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[:1], missing, 0)]), batch)
  padded.weights[-missing:] = 0
  return padded
