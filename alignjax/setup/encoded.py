"""The encoded records of a stage, read by index: those of the sandbox, or a random choice from a
source, without what is held out and within the lengths.

A source is encoded once, whole, and kept in memory if it is small and otherwise in the folder
data_cache (data/cache.py). Its key is the fingerprint of everything that decides its tokens: the
source with all of its files, the mapping, the tokenizer, the template and its day, the libraries
that encode, and the version of this code. What a stage takes of it, by seed, number, held-out share
and lengths, is decided at each start from the lengths alone.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from alignjax.data import batches, cache, mappings, rows, sources, text
from alignjax.runtime import files, fingerprints
from alignjax.runtime.versions import VERSIONS
from alignjax.setup import encoders, inputs
from alignjax.setup.objects import Setup, seed_of
from alignjax.setup.records import check_share, none_left, of_sandbox, say
from alignjax.setup.records import records as records_of

EVERY = 5.0  # seconds between two lines about the progress
HELD = 4  # small sources that stay in memory, for the next stage that reads them
_held: dict[str, cache.Rows] = {}


class Records(NamedTuple):
  """All records of a source.

  Attributes:
    rows: the records, encoded.
    own: the records themselves, where the sandbox made them.
  """

  rows: cache.Rows
  own: list[dict] | None = None


def chosen(
  setup: Setup, kind: str, count: int | None, split: str = 'train', none: bool = False
) -> rows.Chosen:
  """`count` records of data.<kind> within the lengths, encoded: those that records.records returns
  and records.encoded encodes. data.too_long says what happens to longer ones.

  Args:
    kind: 'demonstrations', 'comparisons' or 'prompts'.
    count: a number of records, drawn by the seed, or None for all.
    split: see records.records.
    none: whether an empty result is allowed.

  Raises:
    ValueError: with the source and the record.
  """
  found = every(setup, kind, count, split)
  return within(setup, kind, found, choose(setup, kind, found, count, split), none)


def every(setup: Setup, kind: str, count: int | None = None, split: str = 'train') -> Records:
  """All records of data.<kind>; of the sandbox, `count` of a split."""
  data = setup.config.data
  check_share(setup)
  if of_sandbox(setup, kind):
    made = records_of(setup, kind, count, split)
    return Records(_in_memory(setup, kind, made), made)
  setup.read.update(inputs.of_data(f'data.{kind}', data[kind], data.mapping[kind]))
  return Records(_kept(setup, kind))


def choose(
  setup: Setup, kind: str, found: Records, count: int | None, split: str = 'train'
) -> np.ndarray:
  """The numbers of `count` records of a split, ascending; see records.records."""
  if found.own is not None:
    return np.arange(len(found.own))
  share, held = setup.config.data.heldout.share, found.rows.columns['held']
  own = [np.zeros(0, np.int32)]
  for start in range(0, len(held), rows.AT_ONCE):
    places = held.read(start, min(start + rows.AT_ONCE, len(held)))
    own.append((start + np.flatnonzero((places < share) == (split == 'test'))).astype(np.int32))
  index = np.concatenate(own)
  if not len(index) and split == 'train':
    raise none_left(setup, kind, len(held))
  return index[batches.drawn(len(index), count, (setup.config.seed, seed_of(kind)))]


def within(
  setup: Setup, kind: str, found: Records, index: np.ndarray, none: bool = False
) -> rows.Chosen:
  """The rows of these records that are within the lengths of the config; see `chosen`."""
  data = setup.config.data
  limits = rows.Limits(setup.prompt_length, setup.response_length, data.too_long)
  entry = f'data.{kind}'
  what = entry if found.own is None else f'{entry}={data[kind]!r}'
  made, note = rows.within(found.rows, index, limits, what, none, found.own)
  if note:
    say(note)
  return made


def documents(setup: Setup, count: int | None) -> tuple[int, Callable]:
  """`count` raw records of data.pretrain, drawn by the seed (None: all), as (their number, a
  function of (positions among them, length) that returns rows of text.LazyRows)."""
  if of_sandbox(setup, 'pretrain'):
    found = _in_memory(setup, 'pretrain', records_of(setup, 'pretrain', count))
    numbers = np.arange(len(found))
  else:
    data = setup.config.data
    setup.read.update(inputs.of_data('data.pretrain', data.pretrain, data.mapping.pretrain))
    found = _kept(setup, 'pretrain')
    numbers = batches.drawn(len(found), count, (setup.config.seed, seed_of('pretrain')))

  def to_rows(positions: np.ndarray, length: int | None) -> text.LazyRows:
    return text.rows_of(
      found,
      numbers[positions],
      length or setup.config.data.row_length,
      setup.text.template.pad,
      setup.config.data.pack,
    )

  return len(numbers), to_rows


def _in_memory(setup: Setup, kind: str, records: Sequence[dict]) -> cache.Rows:
  """Records that are at hand, encoded. They stay in memory."""
  seed = setup.config.data.heldout.seed
  return cache.in_memory(rows.part([[r] for r in records], kind, setup.text.template, seed))


def folder(setup: Setup) -> files.Folder:
  """The folder of the config's data_cache; by default that of the user's caches, because the runs
  of several seeds read the same source, and a workdir may be in a bucket."""
  named = setup.config.get('data_cache')
  if named:
    return files.absolute(named)
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path('~/.cache').expanduser()
  return pathlib.Path(home) / 'alignjax'


def _kept(setup: Setup, kind: str) -> cache.Rows:
  """The rows of a source, from memory, from the folder, or made now."""
  data, place = setup.config.data, folder(setup)
  known = fingerprints.known(setup.workdir) | fingerprints.known(place)
  version = sources.identity(data[kind], kind)
  if version is None:  # Nothing says whether it is what it was, so that it is encoded anew.
    version = uuid.uuid4().hex
  key = key_of(setup, kind, known, version)
  if key in _held:
    return _held[key]
  entry, source = f'data.{kind}', data[kind]
  config = dict(data=data.to_dict(), world=setup.config.world.to_dict())
  task = encoders.Task(config, kind, data.heldout.seed)

  def make(large: Callable[[], bool]) -> Generator[cache.Part]:
    blocks = sources.blocks(source, kind, data.mapping[kind])
    tell, own = _Progress(entry), encoders.reader(task)
    while not large() and (block := next(blocks, None)) is not None:
      part = encoders.encode(task, block, own, setup.text.template)
      tell.done(block, part, False)
      yield part
    if large():
      count = min(len(os.sched_getaffinity(0)), encoders.MOST)
      for block, part in encoders.parts(task, blocks, count):
        tell.done(block, part, True)
        yield part
    if not tell.records:
      mapping = data.mapping[kind]
      raise ValueError(
        f'{entry}={source!r} has no records'
        + (f' that data.mapping.{kind}={mapping!r} can use.' if mapping else '.')
      )
    if key_of(setup, kind, known, version) != key:
      raise inputs.ChangedInput(
        f'{entry}={source!r} changed while it was read; the same command reads it again.'
      )

  fingerprints.remember(place, known)
  token = np.uint16 if setup.text.vocabulary <= 2**16 else np.int32
  found = cache.kept(place, key, entry, make, token)
  if not found.on_disk:
    for old in list(itertools.islice(_held, max(0, len(_held) + 1 - HELD))):
      del _held[old]
    _held[key] = found
  return found


def key_of(setup: Setup, kind: str, known: dict[str, list], version: str) -> str:
  """The fingerprint of everything that decides the rows of a source.

  Args:
    kind: the kind of record.
    known: hashes of files, which are trusted while size and times are the same
      (fingerprints.of_files).
    version: what else tells versions of the source apart (sources.identity).
  """
  data, before = setup.config.data, dict(known)
  mapping = data.mapping[kind]
  read = inputs.of_data(f'data.{kind}', data[kind], mapping)
  own = [
    fingerprints.of_function(change)
    for name in (mapping or '').split(';')
    if (change := mappings.find(name.strip(), f'data.mapping.{kind}')) is not None
  ]
  if data.tokenizer != 'sandbox:':
    read['data.tokenizer'] = ('tokenizer', data.tokenizer)
  prints = {
    entry: inputs.fingerprint(what, name, setup.workdir, known)
    for entry, (what, name) in read.items()
  }
  if known != before:
    fingerprints.remember(folder(setup), known)
    if jax.process_index() == 0:
      fingerprints.remember(setup.workdir, known)
  day = data.get('template_date') or (
    datetime.date.today().isoformat() if data.template == 'chat' else None
  )
  return fingerprints.of_value(
    [
      VERSIONS['alignjax.data.rows:part'],
      {n: importlib.metadata.version(n) for n in ('tokenizers', 'transformers', 'jinja2')},
      [kind, data[kind], mapping, data.tokenizer, data.template, day, data.heldout.seed],
      [prints, own, version],
    ]
  )


class _Progress:
  """Says on standard error how far the encoding of a large source is."""

  def __init__(self, what: str):
    self._what, self.records = what, 0
    self._start = self._last = time.monotonic()

  def done(self, block: sources.Block, part: cache.Part, large: bool) -> None:
    self.records += len(part['row_ends'])
    now = time.monotonic()
    if not large or now - self._last < EVERY:
      return
    self._last, rate = now, self.records / (now - self._start)
    left = (now - self._start) * (1 - block.share) / max(block.share, 1e-9)
    several = f' of source {block.part + 1}' if block.part else ''
    print(
      f'{self._what}: {self.records:,} records are encoded, {block.share:.0%}{several}, '
      f'{rate:,.0f} records/s, about {left / 60:.0f} min left',
      file=sys.stderr,
      flush=True,
    )
