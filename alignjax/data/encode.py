"""Turns token lists into numpy rows of a fixed shape. Masks and weights are made here, from
lengths, and travel with the tokens."""

from __future__ import annotations

import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

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
  made = note(
    what,
    prompt_length,
    response_length,
    too_long,
    long_prompts,
    long_responses,
    len(out),
    len(rows),
  )
  if not out and not none:
    raise nothing_left(made or what)
  return LimitedRows(out, index, kept, made)


def note(
  what: str,
  prompt_length: int,
  response_length: int,
  too_long: str,
  long_prompts: int,
  long_responses: int,
  stay: int,
  count: int,
) -> str:
  """Returns what limit_lengths did, for the user, or ''."""
  if not long_prompts and not long_responses:
    return ''
  done = {'drop': 'dropped', 'truncate': 'truncated'}[too_long]
  return (
    f'{what}: {long_prompts} prompts over {prompt_length} tokens and {long_responses} responses '
    f'over {response_length} {done}; {stay} of {count} records stay'
  )


def nothing_left(note: str) -> ValueError:
  """Returns the error of limits that leave no row. note: what they did."""
  return ValueError(
    f'{note}: nothing is left. Raise data.prompt_length and data.response_length, or set '
    "data.too_long='truncate'."
  )


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


def full_rows(tokens: np.ndarray) -> TokenBatch:
  """Returns rows of text, i32[N,T], in which every token but the first has weight 1."""
  weights = np.ones(tokens.shape, np.float32)
  weights[:, 0] = 0.0
  return TokenBatch(tokens, np.ones(tokens.shape, bool), weights)


class Packing(NamedTuple):
  """Where pieces of documents go, in the order of the rows.

  Attributes:
    starts: i64[rows + 1], the first piece of each row, and the number of all pieces.
    documents: i64[pieces], the document of each.
    first: i64[pieces], where it begins in its document.
    sizes: i64[pieces], the number of its tokens.
  """

  starts: np.ndarray
  documents: np.ndarray
  first: np.ndarray
  sizes: np.ndarray


def packing(lengths: Iterable[int], length: int) -> Packing:
  """Returns where documents of these lengths go in rows of `length` tokens.

  A document goes into the first row that has room for it (first fit over the last 64 open rows, in
  the given order). A document that is longer than `length` is cut into pieces.
  """
  found, room = [array.array('q') for _ in range(4)], []
  closed = 0  # rows that take nothing more
  for document, whole in enumerate(lengths):
    for start in range(0, whole, length):
      size = min(length, whole - start)
      row = next((i for i, free in enumerate(room) if free >= size), None)
      if row is None:
        row = len(room)
        room.append(length)
      room[row] -= size
      for column, value in zip(found, (closed + row, document, start, size), strict=True):
        column.append(value)
      if len(room) > 64:
        del room[0]
        closed += 1
  if not found[0]:
    raise ValueError('there is nothing to pack into rows.')
  row, *rest = (np.frombuffer(column, np.int64) for column in found)
  order = np.argsort(row, kind='stable')
  starts = np.searchsorted(row[order], np.arange(closed + len(room) + 1))
  return Packing(starts, *(column[order] for column in rest))


def packed(
  plan: Packing,
  numbers: Iterable[int],
  part: Callable[[int, int, int], tuple[Any, Any]],
  length: int,
  pad: int,
) -> TokenBatch:
  """Returns rows of several documents each. The mask is i32 and holds the number of each token's
  document (types.TokenBatch). The first token of each piece has weight 0, because it is predicted
  from nothing.

  Args:
    plan: where the documents go.
    numbers: the rows.
    part: (document, start, end) -> (tokens, weights) of that part of a document.
    length: the number of tokens in a row.
    pad: the id that fills rows.
  """
  numbers = list(numbers)
  tokens = np.full((len(numbers), length), pad, np.int32)
  mask, weights = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, np.float32)
  for i, row in enumerate(numbers):
    at = 0
    for number, piece in enumerate(range(plan.starts[row], plan.starts[row + 1]), 1):
      first, size = int(plan.first[piece]), int(plan.sizes[piece])
      end = at + size
      tokens[i, at:end], weights[i, at:end] = part(int(plan.documents[piece]), first, first + size)
      mask[i, at:end] = number
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
