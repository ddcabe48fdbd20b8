"""The order of the data: a pure function of (seed, step), so that a resumed run needs the step and nothing else.

Every epoch is a fresh permutation of all rows; a last incomplete batch takes the rest from the next epoch, so no row is
dropped and no batch is short. Each process takes its own rows of every batch (Sharder.local).
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
  order = np.concatenate([np.random.default_rng([*seed, epoch]).permutation(count) for epoch in epochs])
  offset = start - epochs[0] * count
  return order[offset:offset + size]


def bucketed(buckets: Sequence[int], sizes: dict[int, int], seed: Sequence[int]) -> list[np.ndarray]:
  """One epoch of batches in which all rows have the same bucket, so that few shapes are compiled and little is padding.

  Args:
    buckets: the bucket of each row.
    sizes: bucket -> rows a batch.

  Returns:
    Row numbers of each batch, in shuffled order. A bucket's last batch may be short: fill it with weight 0 (`fill`).
  """
  rng = np.random.default_rng(list(seed))
  buckets = np.asarray(buckets)
  out = []
  for bucket, size in sizes.items():
    rows = rng.permutation(np.flatnonzero(buckets == bucket))
    out += [rows[i:i + size] for i in range(0, len(rows), size)]
  return [out[i] for i in rng.permutation(len(out))]


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
