"""Turns token lists into numpy rows of a fixed shape. Masks and weights are made here, from
lengths, and travel with the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from alignjax.types import ComparisonBatch, PreferenceBatch, TokenBatch

TOO_LONG = ('error', 'drop', 'truncate')
Row = tuple[list[int], list[list[int]]]  # a prompt and its responses, as tokens


class LimitedRows(NamedTuple):
  """The rows that are within the length limits.

  Attributes:
    rows: the rows that remain.
    index: the number of each among the input rows.
    kept: which of its responses each has.
    note: what was done, for the user, or ''.
  """

  rows: list[Row]
  index: list[int]
  kept: list[list[int]]
  note: str


def limit_lengths(
  rows: Sequence[Row],
  prompt_length: int,
  response_length: int,
  too_long: str,
  what: str,
  places: Sequence[str] | None = None,
  none: bool = False,
) -> LimitedRows:
  """Applies the length limits to prompts and responses.

  A row whose prompt has no token is an error, because its response would be predicted from nothing.

  Args:
    rows: prompts and their responses, as tokens.
    prompt_length, response_length: the limits in tokens.
    too_long: 'error' raises. 'drop' drops prompts and responses that are too long, and a row that
      is left with no response, or with one where it had several. 'truncate' keeps the last tokens
      of a prompt and the first ones of a response, which then has no end token, like a response
      that was sampled up to the limit.
    what: the name of the data, for messages.
    places: where each row comes from, for errors; None numbers them from 1.
    none: whether an empty result is allowed.

  Raises:
    ValueError: a row is wrong, or none is left.
  """
  out, index, kept = [], [], []
  long_prompts = long_responses = 0
  for i, (prompt, responses) in enumerate(rows):
    over = [len(r) > response_length for r in responses]
    place = places[i] if places else f'{what}, record {i + 1}'
    if not prompt:
      raise ValueError(f'{place}: its prompt has no tokens.')
    if too_long == 'error':
      check_length(prompt, prompt_length, f'{place}: its prompt', 'data.prompt_length')
      for r in responses:
        check_length(r, response_length, f'{place}: a response', 'data.response_length')
    long_prompts += len(prompt) > prompt_length
    long_responses += sum(over)
    stay = [j for j, far in enumerate(over) if too_long != 'drop' or not far]
    if too_long == 'drop' and (len(prompt) > prompt_length or len(stay) < min(len(responses), 2)):
      continue
    out.append((prompt[-prompt_length:], [responses[j][:response_length] for j in stay]))
    index.append(i)
    kept.append(stay)
  note = ''
  if long_prompts or long_responses:
    done = {'drop': 'dropped', 'truncate': 'truncated'}[too_long]
    note = (
      f'{what}: {long_prompts} prompts over {prompt_length} tokens and {long_responses} responses '
      f'over {response_length} {done}; {len(out)} of {len(rows)} records stay'
    )
  if not out and not none:
    raise ValueError(
      f'{note or what}: nothing is left. Raise data.prompt_length and data.response_length, or set '
      "data.too_long='truncate'."
    )
  return LimitedRows(out, index, kept, note)


def left_pad(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns prompts as (tokens i32[N,length], mask bool[N,length]), with the real tokens at the
  right. A longer row is an error, and so is a row without tokens, because nothing can be sampled
  after it (templates.Template.text gives an empty text the start of a document)."""
  tokens = np.full((len(rows), length), pad, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    check_length(row, length, f'prompt {i}', 'data.prompt_length')
    if not len(row):
      raise ValueError(f'prompt {i} has no tokens; a response needs at least one before it.')
    tokens[i, -len(row) :], mask[i, -len(row) :] = row, True
  return tokens, mask


def right_pad(
  rows: Sequence[Sequence[int]], length: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns rows as (tokens i32[N,length], mask bool[N,length]), with the real tokens at the left.
  A longer row is an error."""
  tokens = np.full((len(rows), length), pad, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    check_length(row, length, f'row {i}', 'data.prompt_length or data.response_length')
    tokens[i, : len(row)], mask[i, : len(row)] = row, True
  return tokens, mask


def demonstrations(
  pairs: Iterable[tuple[Sequence[int], Sequence[int]]],
  length: int,
  pad: int,
  prompt_weight: float = 0.0,
) -> TokenBatch:
  """Returns (prompt, response) token lists as rows, with weight 1 on the response and its end
  token, and prompt_weight on the prompt.

  The prompt [5, 6] and the response [7, 1] become the tokens [5, 6, 7, 1, pad] with the weights [0,
  0, 1, 1, 0]. The end token 1 has a weight, because a model that is not trained on it never stops
  (docs/pitfalls.md, 3, 28). The first column has weight 0, because it is predicted from nothing.
  """
  pairs = list(pairs)
  tokens, mask = right_pad([[*p, *r] for p, r in pairs], length, pad)
  weights = np.zeros(tokens.shape, np.float32)
  for i, (p, r) in enumerate(pairs):
    weights[i, : len(p)] = prompt_weight
    weights[i, len(p) : len(p) + len(r)] = 1.0
  weights[:, 0] = 0.0
  return TokenBatch(tokens, mask, weights)


def documents(texts: Iterable[Sequence[int]], length: int) -> TokenBatch:
  """Returns pretraining rows: the documents (templates.Template.document) one after the other, cut
  into full rows of `length` tokens.

  Every token but the first of a row has weight 1. A last row that is not full is dropped.
  """
  stream: list[int] = []
  for text in texts:
    stream.extend(text)
  rows = len(stream) // length
  if rows == 0:
    raise ValueError(
      f'{len(stream)} tokens of pretraining text do not fill one row of data.row_length={length}.'
    )
  tokens = np.asarray(stream[: rows * length], np.int32).reshape(rows, length)
  weights = np.ones(tokens.shape, np.float32)
  weights[:, 0] = 0.0
  return TokenBatch(tokens, np.ones(tokens.shape, bool), weights)


def pack(
  rows: Iterable[tuple[Sequence[int], Sequence[float]]], length: int, pad: int
) -> TokenBatch:
  """Returns rows of several documents each. The mask is i32 and holds the number of each token's
  document (types.TokenBatch).

  A document goes into the first row that has room for it (first fit over the last 64 open rows, in
  the given order). A document that is longer than `length` is cut into pieces. The first token of
  each piece has weight 0, because it is predicted from nothing.

  Args:
    rows: (tokens, weights) of each document.
    length: the number of tokens in a row.
    pad: the id that fills rows.
  """
  packed: list[list[tuple[Sequence[int], Sequence[float]]]] = []
  room: list[int] = []
  for tokens, weights in rows:
    for start in range(0, len(tokens), length):
      piece = tokens[start : start + length], weights[start : start + length]
      size = len(piece[0])
      row = next((i for i in range(max(0, len(room) - 64), len(room)) if room[i] >= size), None)
      if row is None:
        packed.append([])
        room.append(length)
        row = len(room) - 1
      packed[row].append(piece)
      room[row] -= size
  if not packed:
    raise ValueError('there is nothing to pack into rows.')
  tokens = np.full((len(packed), length), pad, np.int32)
  mask, weights = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, np.float32)
  for i, pieces in enumerate(packed):
    at = 0
    for number, (ids, w) in enumerate(pieces, 1):
      end = at + len(ids)
      tokens[i, at:end], mask[i, at:end], weights[i, at:end] = ids, number, w
      weights[i, at] = 0.0
      at = end
  return TokenBatch(tokens, mask, weights)


def comparisons(
  prompts: Sequence[Sequence[int]],
  responses: Sequence[Sequence[Sequence[int]]],
  ranks: Sequence[Sequence[int]],
  length: int,
  k: int,
  pad: int,
) -> ComparisonBatch:
  """Returns ranked responses as i32[N,k,length].

  Responses are used as they are: a sampled response that was cut at the length limit has no end
  token, and the reward model reads its last token whatever it is (docs/pitfalls.md, 7). Prompts
  with fewer than k responses have absent ones with rank -1.

  Args:
    prompts: [i], token lists.
    responses: [i][j], token lists with or without an end token.
    ranks: [i][j], where 0 is the best.
    length: the number of tokens in a row.
    k: the number of responses in a row.
    pad: the id that fills rows.
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
      check_length(
        row, length, f'comparison {i}, response {j}', 'data.prompt_length or data.response_length'
      )
      tokens[i, j, : len(row)], mask[i, j, : len(row)], out[i, j] = row, True, order[j]
  return ComparisonBatch(tokens, mask, out, np.ones(n, np.float32))


def preferences(
  prompts: Sequence[Sequence[int]],
  responses: Sequence[Sequence[Sequence[int]]],
  ranks: Sequence[Sequence[int]],
  length: int,
  k: int,
  pad: int,
) -> PreferenceBatch:
  """Returns the rows of `comparisons`, and which of their tokens belong to the response."""
  made = comparisons(prompts, responses, ranks, length, k, pad)
  first = np.array([len(p) for p in prompts])[:, None, None]
  return PreferenceBatch(
    made.tokens,
    made.mask,
    made.ranks,
    made.weights,
    response_mask=made.mask & (np.arange(length) >= first),
  )


def check_length(row: Sequence[int], length: int, what: str, key: str) -> None:
  """Raises ValueError if a row is too long. `key` is the config entry that limits its length."""
  if len(row) > length:
    raise ValueError(
      f'{what} has {len(row)} tokens, more than the {length} that {key} leaves; raise it or '
      "set data.too_long='drop'."
    )
