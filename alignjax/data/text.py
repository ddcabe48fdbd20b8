"""Pretraining text as rows, and the rows of each batch of a mix.

Documents are distributed over shards: document i belongs to shard i mod n. Each shard has rows of
its own in an order of its own, and a position of the batch always takes from the same shard. A
process, which holds some positions of every batch, therefore reads only the documents of their
shards, and yet the data do not depend on the number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from alignjax.data import batches, cache, encode
from alignjax.types import TokenBatch

AT_ONCE = 1 << 18  # records whose lengths are looked at together


class LazyRows(NamedTuple):
  """Rows that are made when they are asked for.

  Attributes:
    count: how many there are.
    take: a function of row numbers that returns them as a batch.
  """

  count: int
  take: Callable[[np.ndarray], TokenBatch]


def rows_of(rows: cache.Rows, numbers: np.ndarray, length: int, pad: int, pack: bool) -> LazyRows:
  """Returns rows of `length` tokens. It keeps 16 bytes a document, and 24 more if they are
  packed.

  Args:
    rows: the documents as pieces of raw records (data/rows.py), each with the tokens that begin and
      end it (templates.Template.document).
    numbers: the raw records whose documents are used, ascending.
    length: the number of tokens in a row.
    pad: the id that fills rows.
    pack: whether documents do not attend to each other. Otherwise they follow one another in full
      rows, as in GPT-3's training (Brown et al. 2020, appendix B), and a last row that is not full
      is dropped.
  """
  starts, sizes = _documents(rows, numbers)
  tokens = rows.columns['tokens']
  if pack:
    plan = encode.packing(sizes.tolist(), length)

    def part(document, first, end):
      start = int(starts[document])
      return tokens.read(start + first, start + end), np.ones(end - first, np.float32)

    return LazyRows(
      len(plan.starts) - 1, lambda which: encode.packed(plan, which, part, length, pad)
    )
  ends = np.cumsum(sizes, out=sizes)
  total = int(ends[-1]) if len(ends) else 0
  if total < length:
    raise ValueError(
      f'{total} tokens of pretraining text do not fill one row of data.row_length={length}.'
    )

  def row(number):
    at, out = number * length, []
    document = int(np.searchsorted(ends, at, side='right'))
    while at < (number + 1) * length:
      end = min(int(ends[document]), (number + 1) * length)
      first = int(starts[document]) + at - (int(ends[document - 1]) if document else 0)
      out.append(tokens.read(first, first + end - at))
      at, document = end, document + 1
    return np.concatenate(out)

  def take(which):
    made = [row(int(number)) for number in which]
    return encode.full_rows(np.array(made, np.int32).reshape(len(made), length))

  return LazyRows(total // length, take)


def _documents(rows: cache.Rows, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(where each document of these raw records begins in the tokens, its length), both i64."""
  starts, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
  for start in range(0, len(rows), AT_ONCE):
    end = min(start + AT_ONCE, len(rows))
    own = numbers[np.searchsorted(numbers, start) : np.searchsorted(numbers, end)]
    if not len(own):
      continue
    ends = rows.columns['row_ends'].read(start, end + 1)
    edges = rows.columns['piece_ends'].read(int(ends[0]), int(ends[-1]) + 1)
    chosen = np.zeros(end - start, bool)
    chosen[own - start] = True
    pieces = np.repeat(chosen, np.diff(ends))
    starts.append(edges[:-1][pieces])
    sizes.append(np.diff(edges)[pieces])
  return np.concatenate(starts), np.concatenate(sizes)


def shards(documents: int, rows: int, most: int = 64, least: int = 256) -> int:
  """Returns the number of shards for batches of `rows` rows: a power of two that divides the rows,
  at most `most`, with at least `least` documents per shard."""
  n = 1
  while rows % (2 * n) == 0 and 2 * n <= most and documents >= 2 * n * least:
    n *= 2
  return n


def mix(
  count: int, rows: int, to_rows: Callable[[np.ndarray], LazyRows], seed: Sequence[int]
) -> Callable[[int, np.ndarray], TokenBatch]:
  """Returns a function batch(step, positions) that returns the rows at these positions (ascending,
  from 0..rows-1) of batch `step`.

  Args:
    count: the number of documents.
    rows: the number of rows of a whole batch, over all processes.
    to_rows: a function of numbers of documents, ascending, that returns their rows.
    seed: the seed of the order.
  """
  n = shards(count, rows)
  size = rows // n

  @functools.cache
  def shard(number):
    made = to_rows(np.arange(number, count, n))
    return made, batches.ordered(made.count, size, (*seed, number))

  def batch(step, positions):
    out = []
    for number in np.unique(positions // size).tolist():
      own = positions[positions // size == number] - number * size
      made, indices = shard(number)
      out.append(made.take(indices(step)[own]))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *out)

  return batch
