"""Records as the columns of a cache, and the choice among them that a stage trains on, which reads
a row when it is asked for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.data import cache, encode, fields, hygiene, sources
from alignjax.data.templates import Template

AT_ONCE = 1 << 18  # records whose lengths are looked at together


def part(
  raws: Sequence[Sequence[Mapping[str, Any]]], kind: str, template: Template, seed: int
) -> cache.Part:
  """Returns records as a part of a cache.

  A record that the template refuses is a fault of the part: an error for who chooses it.

  Args:
    raws: our records of each raw record.
    kind: 'pretrain', 'demonstrations', 'comparisons' or 'prompts'.
    template: turns them into tokens.
    seed: that of the held-out prompts.
  """
  pieces: list[list[int]] = []
  counts: list[int] = []
  if kind == 'pretrain':
    for raw in raws:
      made = [template.document(record['text']) for record in raw if record['text'].strip()]
      pieces += made
      counts.append(len(made))
    return dict(tokens=_flat(pieces), piece_ends=_lengths(pieces), row_ends=counts)
  responses = dict(
    demonstrations=lambda record: [record['response']],
    comparisons=lambda record: record['responses'],
    prompts=lambda record: [],
  )[kind]
  ranks, texts, held, faults = [], [], [], {}
  for record in (record for raw in raws for record in raw):
    prompt, said = record['prompt'], responses(record)
    try:
      pairs = [template.row(prompt, response) for response in said]
      made = [template.prompt(prompt), *(tokens for _, tokens in pairs)]
    except ValueError as error:
      faults[len(counts)] = f'({str(prompt)[:80]!r}): {error}'
      made = [[] for _ in range(1 + len(said))]
    pieces += made
    counts.append(len(made))
    if kind == 'comparisons':
      ranks += [-1, *record['ranks']]
    texts.append(json.dumps([sources.place(record, ''), prompt]).encode())
    held.append(hygiene.place(f'held out/{seed}', hygiene.conversation(prompt)))
  return dict(
    tokens=_flat(pieces),
    piece_ends=_lengths(pieces),
    row_ends=counts,
    ranks=ranks,
    texts=np.frombuffer(b''.join(texts), np.uint8),
    text_ends=_lengths(texts),
    held=held,
    faults=faults,
  )


def _flat(pieces: list[list[int]]) -> np.ndarray:
  return np.array([token for piece in pieces for token in piece], np.int32)


def _lengths(pieces: Sequence[Any]) -> np.ndarray:
  return np.array([len(piece) for piece in pieces], np.int64)


class Limits(NamedTuple):
  """The limits of a row; see encode.limit_lengths."""

  prompt: int
  response: int
  too_long: str


class Chosen(Sequence[encode.Row]):
  """Records of a cache within the length limits, as (prompt, responses) in tokens.

  Args:
    rows: the records.
    numbers: i[N], that of each chosen one.
    limits: those of every row.
    records: the records themselves, where they are at hand.
  """

  def __init__(
    self, rows: cache.Rows, numbers: np.ndarray, limits: Limits, records: Sequence[dict] | None
  ):
    self.rows, self.numbers, self.limits, self._records = rows, numbers, limits, records

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, i: int) -> encode.Row:  # pyright: ignore[reportIncompatibleMethodOverride]
    prompt, *responses = self.rows.pieces(int(self.numbers[i]))
    stay = [r[: self.limits.response] for r in responses if self._stays(r)]
    return prompt[-self.limits.prompt :], stay

  def ranks(self, i: int) -> list[int]:
    """The ranks of the responses of row i, from 0 on without a gap."""
    number = int(self.numbers[i])
    pairs = zip(self.rows.pieces(number)[1:], self.rows.ranks(number), strict=True)
    return fields.dense_ranks([rank for piece, rank in pairs if self._stays(piece)])

  def record(self, i: int) -> dict[str, Any]:
    """The record of row i, of which a cache knows the prompt alone."""
    number = int(self.numbers[i])
    return (
      dict(prompt=self.rows.text(number)[1]) if self._records is None else self._records[number]
    )

  def sizes(self) -> Sizes:
    """The sizes of all rows."""
    made = [size for _, size in sizes(self.rows, self.numbers, self.limits)]
    none = [np.zeros(0, np.int64)] * 5 + [np.zeros(0, bool)]
    return Sizes._make(map(np.concatenate, zip(none, *made, strict=True)))

  def take(self, keep: np.ndarray) -> Chosen:
    """The rows of these numbers."""
    return Chosen(self.rows, self.numbers[keep], self.limits, self._records)

  def _stays(self, response: list[int]) -> bool:
    return self.limits.too_long != 'drop' or len(response) <= self.limits.response


class ByTokens(Mapping):
  """The prompts of the latest batches as their records have them, by their tokens.

  Args:
    prompts: all rows.
    numbers: a function of a step that returns the rows of its batch.
    steps: how many batches are remembered.
  """

  def __init__(self, prompts: Chosen, numbers: Callable[[int], np.ndarray], steps: int = 4):
    self._prompts, self._numbers, self._steps = prompts, numbers, steps
    self._found: dict[int, dict[tuple[int, ...], Any]] = {}

  def note(self, step: int) -> None:
    """Remembers the batch of a step, which is read when one of its prompts is asked for."""
    if step not in self._found:
      self._found = {**dict(list(self._found.items())[1 - self._steps :]), step: {}}

  def __getitem__(self, tokens: tuple[int, ...]) -> Any:
    for step, found in self._found.items():
      if not found:
        # A prompt that occurs twice keeps its first record.
        for i in sorted(self._numbers(step).tolist(), reverse=True):
          found[tuple(self._prompts[i][0])] = self._prompts.record(i)['prompt']
      if tokens in found:
        return found[tokens]
    raise KeyError(tokens)

  def __iter__(self) -> Iterator[tuple[int, ...]]:
    return (tokens for found in self._found.values() for tokens in found)

  def __len__(self) -> int:
    return sum(map(len, self._found.values()))


class Sizes(NamedTuple):
  """What is known of rows without reading their tokens.

  Attributes:
    prompts: i64[N], the tokens of each prompt.
    responses: i64[N], how many responses each has.
    over: i64[N], how many of them are too long.
    stay: i64[N], how many of them stay.
    longest: i64[N], the tokens of a prompt and its longest response, as they are cut.
    tied: bool[N], whether all responses that stay have one rank.
  """

  prompts: np.ndarray
  responses: np.ndarray
  over: np.ndarray
  stay: np.ndarray
  longest: np.ndarray
  tied: np.ndarray


def sizes(
  rows: cache.Rows, index: np.ndarray, limits: Limits
) -> Iterator[tuple[np.ndarray, Sizes]]:
  """Yields the records of `index` (ascending) in parts, each with its sizes."""
  for start in range(0, len(rows), AT_ONCE):
    end = min(start + AT_ONCE, len(rows))
    own = index[np.searchsorted(index, start) : np.searchsorted(index, end)]
    if not len(own):
      continue
    ends = rows.columns['row_ends'].read(start, end + 1)
    lengths = np.diff(rows.columns['piece_ends'].read(int(ends[0]), int(ends[-1]) + 1))
    first = ends[:-1] - ends[0]
    over = lengths > limits.response
    stays = ~over if limits.too_long == 'drop' else np.ones(len(lengths), bool)
    over[first] = stays[first] = False
    ranks = rows.columns['ranks'].read(*((int(ends[0]), int(ends[-1])) if ranked(rows) else (0, 0)))
    ranks = ranks if ranked(rows) else np.zeros(len(lengths), np.int32)
    cut = np.where(stays, np.minimum(lengths, limits.response), 0)
    low = np.minimum.reduceat(np.where(stays, ranks, np.iinfo(np.int32).max), first)
    high = np.maximum.reduceat(np.where(stays, ranks, -1), first)
    prompts = lengths[first]
    made = Sizes(
      prompts=prompts,
      responses=np.diff(ends) - 1,
      over=np.add.reduceat(over.astype(np.int64), first),
      stay=np.add.reduceat(stays.astype(np.int64), first),
      longest=np.minimum(prompts, limits.prompt) + np.maximum.reduceat(cut, first),
      tied=low >= high,
    )
    yield own, Sizes(*(x[own - start] for x in made))


def ranked(rows: cache.Rows) -> bool:
  """Whether the rows are comparisons."""
  return len(rows.columns['ranks']) > 0


def within(
  rows: cache.Rows,
  index: np.ndarray,
  limits: Limits,
  what: str,
  none: bool = False,
  records: Sequence[dict] | None = None,
) -> tuple[Chosen, str]:
  """Applies encode.limit_lengths to records of a cache.

  Args:
    rows: the records.
    index: the numbers of the chosen ones, ascending.
    limits: the limits.
    what, none: see encode.limit_lengths.
    records: see Chosen.

  Returns:
    (the rows that stay, what was done, for the user, or '').

  Raises:
    ValueError: a chosen record cannot be encoded, or a row is wrong, or none is left.
  """

  def place(number):
    text = rows.text(number)[0]
    return text or f'{what}, record {np.searchsorted(index, number) + 1}'

  for number in sorted(rows.faults):
    at = np.searchsorted(index, number)
    if at < len(index) and index[at] == number:
      raise ValueError(f'{place(number)} {rows.faults[number]}')
  kept, long_prompts, long_responses = [index[:0]], 0, 0
  for own, size in sizes(rows, index, limits):
    far = size.prompts > limits.prompt
    wrong = size.prompts == 0
    if limits.too_long == 'error':
      wrong |= far | (size.over > 0)
    for number in own[wrong][:1].tolist():
      prompt, *responses = rows.pieces(number)
      encode.limit_lengths([(prompt, responses)], *limits, what, [place(number)])
    long_prompts += int(far.sum())
    long_responses += int(size.over.sum())
    fits = ~far & (size.stay >= np.minimum(size.responses, 2))
    kept.append(own[fits] if limits.too_long == 'drop' else own)
  index, count = np.concatenate(kept), len(index)
  note = encode.note(what, *limits, long_prompts, long_responses, len(index), count)
  if not len(index) and not none:
    raise encode.nothing_left(note or what)
  return Chosen(rows, index, limits, records), note
