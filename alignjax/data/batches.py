"""The order of the data: a pure function of (seed, step), so that a resumed run needs the step and
nothing else.

Every epoch is a fresh permutation of all rows; a last incomplete batch takes the rest from the next
epoch, so no row is dropped and no batch is short. Each process takes its own rows of every batch
(Sharder.local).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


def indices(count: int, size: int, step: int, seed: Sequence[int]) -> np.ndarray:
  """The rows of batch `step`: i64[size] out of `count` rows, epochs one after the other."""
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
  """One epoch of batches of `size` rows, those of a batch with room for the same shape, so that few
  shapes are compiled and little is padding.

  Args:
    kinds: the shape that each row needs, such as (responses, tokens).

  Returns:
    (shape, row numbers) of each batch, in shuffled order; every row is in one batch. What does not
    fill a batch of its shape moves to the next larger one that occurs, so a batch is short only
    where there is none: fill it with weight 0 (`fill`).
  """
  rng = np.random.default_rng(list(seed))
  rows = {kind: [] for kind in sorted(set(kinds))}
  for i in rng.permutation(len(kinds)).tolist():
    rows[kinds[i]].append(i)
  out = []
  # in ascending order: a shape that has room for another comes after it
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
  """`count` of the items, chosen at random by the seed, in their order; None, or more than there
  are: all. Not the first ones, because a file may be sorted."""
  if count is None or count >= len(items):
    return list(items)
  return [
    items[i]
    for i in np.sort(
      np.random.default_rng(list(seed)).choice(len(items), count, replace=False)
    ).tolist()
  ]


def take(batch: Any, rows: np.ndarray) -> Any:
  """Rows of a batch of arrays."""
  return jax.tree.map(lambda x: x[rows], batch)


def fill(batch: Any, size: int) -> Any:
  """Repeats the first row up to `size` rows, with weight 0 in a field named `weights`."""
  missing = size - len(batch.weights)
  if missing == 0:
    return batch
  padded = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[:1], missing, 0)]), batch)
  padded.weights[-missing:] = 0
  return padded
