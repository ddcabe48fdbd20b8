"""Token lists to fixed-shape numpy rows. Masks and weights are made here, from lengths, and travel with the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from alignjax.types import ComparisonBatch, TokenBatch


def left_pad(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as (tokens i32[N,length], mask bool[N,length]), real tokens at the right. A longer row is an error."""
  tokens = np.full((len(rows), length), pad, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    check_length(row, length, f'prompt {i}', 'data.prompt_length')
    if len(row):
      tokens[i, -len(row):], mask[i, -len(row):] = row, True
  return tokens, mask


def right_pad(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows as (tokens i32[N,length], mask bool[N,length]), real tokens at the left. A longer row is an error."""
  tokens = np.full((len(rows), length), pad, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    check_length(row, length, f'row {i}', 'data.prompt_length or data.response_length')
    tokens[i, :len(row)], mask[i, :len(row)] = row, True
  return tokens, mask


def demonstrations(pairs: Iterable[tuple[Sequence[int], Sequence[int]]], length: int, pad: int,
                   prompt_weight: float = 0.0) -> TokenBatch:
  """(prompt, response) token lists as rows: weight 1 on the response and its end token, prompt_weight on the prompt.

  prompt [5, 6], response [7, 1] -> tokens [5, 6, 7, 1, pad], weights [0, 0, 1, 1, 0]. The end token 1 is weighted:
  a model that is not trained on it never stops (CHECKLIST 3, 28). The first column predicts from nothing: weight 0.
  """
  pairs = list(pairs)
  tokens, mask = right_pad([[*p, *r] for p, r in pairs], length, pad)
  weights = np.zeros(tokens.shape, np.float32)
  for i, (p, r) in enumerate(pairs):
    weights[i, :len(p)] = prompt_weight
    weights[i, len(p):len(p) + len(r)] = 1.0
  weights[:, 0] = 0.0
  return TokenBatch(tokens, mask, weights)


def documents(texts: Iterable[Sequence[int]], length: int, separator: int) -> TokenBatch:
  """Pretraining rows: the documents one after the other, each after a separator, cut into full rows of `length`.

  Every token but a row's first is weighted. The last row is dropped if it is not full.
  """
  stream: list[int] = []
  for text in texts:
    stream.append(separator)
    stream.extend(text)
  rows = len(stream) // length
  if rows == 0:
    raise ValueError(f'{len(stream)} tokens of pretraining text do not fill one row of data.row_length={length}.')
  tokens = np.asarray(stream[:rows * length], np.int32).reshape(rows, length)
  weights = np.ones(tokens.shape, np.float32)
  weights[:, 0] = 0.0
  return TokenBatch(tokens, np.ones(tokens.shape, bool), weights)


def comparisons(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]],
                ranks: Sequence[Sequence[int]], length: int, k: int, pad: int) -> ComparisonBatch:
  """Prompts i, their responses [i][j] (token lists, with or without an end token) and ranks [i][j] as i32[N,k,length].

  Responses are taken as they are: a sampled one that was cut at the length limit has no end token, and the reward model
  reads its last token whatever it is (CHECKLIST 7). Absent ones (fewer than k) have rank -1.
  """
  n = len(prompts)
  tokens = np.full((n, k, length), pad, np.int32)
  mask = np.zeros((n, k, length), bool)
  out = np.full((n, k), -1, np.int32)
  for i, (prompt, answers, order) in enumerate(zip(prompts, responses, ranks, strict=True)):
    if len(answers) > k:
      raise ValueError(f'comparison {i} has {len(answers)} responses, more than {k}.')
    for j, answer in enumerate(answers):
      row = [*prompt, *answer]
      check_length(row, length, f'comparison {i}, response {j}', 'data.prompt_length or data.response_length')
      tokens[i, j, :len(row)], mask[i, j, :len(row)], out[i, j] = row, True, order[j]
  return ComparisonBatch(tokens, mask, out, np.ones(n, np.float32))


def check_length(row: Sequence[int], length: int, what: str, key: str) -> None:
  if len(row) > length:
    raise ValueError(f'{what} has {len(row)} tokens, more than the {length} that {key} leaves; raise it or drop the '
                     'record.')
