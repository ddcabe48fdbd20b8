"""Pretraining text as rows, and the rows of each batch of a mix.

Documents are distributed over shards: document i belongs to shard i mod n. Each shard has rows of
its own in an order of its own, and a position of the batch always takes from the same shard. A
process, which holds some positions of every batch, therefore reads only the documents of their
shards (and opens only their records of array_record files), and yet the data do not depend on the
number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from alignjax.data import batches, encode
from alignjax.data.sources import Source
from alignjax.types import TokenBatch


def rows_of(
  texts: Sequence[str], document: Callable[[str], list[int]], length: int, pad: int, pack: bool
) -> TokenBatch:
  """Returns rows of `length` tokens.

  Args:
    texts: the documents.
    document: a function of text that returns its tokens, including those that begin and end a
      document (templates.Template.document).
    length: the number of tokens in a row.
    pad: the id that fills rows.
    pack: whether documents do not attend to each other. Otherwise they follow one another in full
      rows, as in GPT-3's training (Brown et al. 2020, appendix B).
  """
  rows = (document(text) for text in texts if text.strip())
  return (
    encode.pack(((row, [1.0] * len(row)) for row in rows), length, pad)
    if pack
    else encode.documents(rows, length)
  )


def shards(documents: int, rows: int, most: int = 64, least: int = 256) -> int:
  """Returns the number of shards for batches of `rows` rows: a power of two that divides the rows,
  at most `most`, with at least `least` documents per shard."""
  n = 1
  while rows % (2 * n) == 0 and 2 * n <= most and documents >= 2 * n * least:
    n *= 2
  return n


def mix(
  source: Source, rows: int, to_rows: Callable[[list[str]], TokenBatch], seed: Sequence[int]
) -> Callable[[int, np.ndarray], TokenBatch]:
  """Returns a function batch(step, positions) that returns the rows at these positions (ascending,
  from 0..rows-1) of batch `step`.

  Args:
    source: the documents.
    rows: the number of rows of a whole batch, over all processes.
    to_rows: a function of texts that returns rows.
    seed: the seed of the order.
  """
  count = source.count
  n = shards(count, rows)
  held: dict[int, TokenBatch] = {}

  def shard(number):
    if number not in held:
      held[number] = to_rows(
        [r['text'] for i in range(number, count, n) for r in source.records(i)]
      )
    return held[number]

  def batch(step, positions):
    size, out = rows // n, []
    for number in np.unique(positions // size).tolist():
      own = positions[positions // size == number] - number * size
      made = shard(number)
      out.append(
        batches.take(made, batches.indices(len(made.tokens), size, step, (*seed, number))[own])
      )
    return jax.tree.map(lambda *parts: np.concatenate(parts), *out)

  return batch
