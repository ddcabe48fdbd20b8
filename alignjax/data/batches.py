"""The order of the data. It is a pure function of (seed, step), so that a resumed run needs only
the step.

Every epoch is a new permutation of all rows. A last incomplete batch is completed from the next
epoch, so that no row is dropped and no batch is short. Each process takes its own rows of every
batch (Sharder.local).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


def ordered(count: int, size: int, seed: Sequence[int]) -> Callable[[int], np.ndarray]:
  """Returns a function of a step that returns the rows of its batch, i[size], out of `count` rows,
  one epoch after the other. It remembers the order of the last epoch, which is 4 bytes a row."""
  if count < 1:
    raise ValueError('there are no rows to make batches of.')
  held: dict[int, np.ndarray] = {}

  def order(epoch):
    rows = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    np.random.default_rng([*seed, epoch]).shuffle(rows)
    return rows

  def indices(step):
    nonlocal held
    start, known = step * size, held  # Several threads may ask.
    epochs = range(start // count, (start + size - 1) // count + 1)
    orders = {epoch: known[epoch] if epoch in known else order(epoch) for epoch in epochs}
    held = {epochs[-1]: orders[epochs[-1]]}
    offset = start - epochs[0] * count
    return np.concatenate(list(orders.values()))[offset : offset + size]

  return indices


def bucketed(
  kinds: Sequence[tuple[int, ...]] | np.ndarray, size: int, seed: Sequence[int]
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
  shapes, shape_of = np.unique(np.asarray(kinds), axis=0, return_inverse=True)
  order = rng.permutation(len(shape_of))
  by_shape = order[np.argsort(shape_of.reshape(-1)[order], kind='stable')]
  edges = np.cumsum(np.bincount(shape_of.reshape(-1)))[:-1]
  rows = dict(zip(map(tuple, shapes.tolist()), np.split(by_shape, edges), strict=True))
  out = []
  # In ascending order, a shape that has room for another one comes after it.
  for kind in rows:
    own = rows[kind]
    full = len(own) // size * size
    out += [(kind, own[i : i + size]) for i in range(0, full, size)]
    larger = next(
      (
        other
        for other in rows
        if other > kind and all(a >= b for a, b in zip(other, kind, strict=True))
      ),
      None,
    )
    if larger is not None:
      rows[larger] = np.concatenate([rows[larger], own[full:]])
    elif len(own) > full:
      out.append((kind, own[full:]))
  return [out[i] for i in rng.permutation(len(out))]


def drawn(length: int, count: int | None, seed: Sequence[int]) -> np.ndarray:
  """Returns the numbers of `count` of `length` items, drawn at random by the seed, in their order,
  and all numbers if `count` is None or exceeds them. It does not take the first ones, because a
  file may be sorted."""
  if count is None or count >= length:
    return np.arange(length)
  return np.sort(np.random.default_rng(list(seed)).choice(length, count, replace=False))


def draw(items: Sequence[Any], count: int | None, seed: Sequence[int]) -> list[Any]:
  """Returns the items that are `drawn`."""
  return [items[i] for i in drawn(len(items), count, seed).tolist()]


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
