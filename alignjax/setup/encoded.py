"""The encoded records of a stage, read by index: those of the sandbox, or a random choice from a
source, without what is held out and within the lengths.

A source is encoded once, whole, and kept in memory if it is small and otherwise in the folder
data_cache (data/cache.py). Its key is the fingerprint of everything that decides its tokens: the
source with all of its files, the mapping, the tokenizer, the template and its day, the libraries
that encode, and this code. What a stage takes of it, by seed, number, held-out share
and lengths, is decided at each start from the lengths alone.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import sys
import time
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from alignjax.data import batches, cache, chat, rows, sources, text
from alignjax.runtime import files, fingerprints
from alignjax.setup import encoders, inputs
from alignjax.setup.objects import Setup, seed_of
from alignjax.setup.records import check_share, none_left, of_sandbox, say
from alignjax.setup.records import records as records_of

EVERY = 5.0  # seconds between two lines about the progress


class Drawn(NamedTuple):
  """Some of the encoded records of a source.

  Attributes:
    rows: all records, encoded.
    numbers: i[N], those of the chosen ones, ascending.
    own: the records themselves, where the sandbox made them.
  """

  rows: cache.Rows
  numbers: np.ndarray
  own: Sequence[dict] | None = None


def chosen(setup: Setup, kind: str, count: int | None) -> rows.Chosen:
  """`count` records of data.<kind> (see `drawn`) within the lengths; data.too_long says what
  happens to longer ones.

  Raises:
    ValueError: with the source and the record.
  """
  return within(setup, kind, drawn(setup, kind, count))


def drawn(setup: Setup, kind: str, count: int | None, split: str = 'train') -> Drawn:
  """The records that records.records returns, encoded.

  Args:
    kind: 'demonstrations', 'comparisons' or 'prompts'.
    count: a number of records, drawn by the seed, or None for all.
    split: see records.records.
  """
  check_share(setup)
  if of_sandbox(setup, kind):
    made = records_of(setup, kind, count, split)
    return Drawn(_in_memory(setup, kind, made), np.arange(len(made)), made)
  found, share = _kept(setup, kind), setup.config.data.heldout.share
  held, own = found.columns['held'], [np.zeros(0, np.int32)]
  for start in range(0, len(held), rows.AT_ONCE):
    places = held.read(start, min(start + rows.AT_ONCE, len(held)))
    own.append((start + np.flatnonzero((places < share) == (split == 'test'))).astype(np.int32))
  numbers = np.concatenate(own)
  if not len(numbers) and split == 'train':
    raise none_left(setup, kind, len(held))
  seed = (setup.config.seed, seed_of(kind))
  return Drawn(found, numbers[batches.drawn(len(numbers), count, seed)])


def within(setup: Setup, kind: str, found: Drawn, none: bool = False) -> rows.Chosen:
  """The rows of these records that are within the lengths of the config; see `chosen`.

  Args:
    none: whether an empty result is allowed.
  """
  data = setup.config.data
  limits = rows.Limits(setup.prompt_length, setup.response_length, data.too_long)
  made, note = rows.within(found.rows, found.numbers, limits, f'data.{kind}', none, found.own)
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


def folder(setup: Setup) -> pathlib.Path:
  """The folder of the config's data_cache; by default that of the user's caches, because the runs
  of several seeds read the same source, and a workdir may be in a bucket."""
  if named := setup.config.get('data_cache'):
    place = files.absolute(named)
    if files.is_bucket(place):
      raise ValueError(f'data_cache={named!r} must be a folder on a disk.')
    return pathlib.Path(place)
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path('~/.cache').expanduser()
  return pathlib.Path(home) / 'alignjax'


def _kept(setup: Setup, kind: str) -> cache.Rows:
  """The rows of a source, from the folder or made now, and kept there unless they are few."""
  data, place = setup.config.data, folder(setup)
  entry, source, mapping = f'data.{kind}', data[kind], data.mapping[kind]
  setup.read.update(inputs.of_data(entry, source, mapping))
  known = fingerprints.known(setup.workdir) | fingerprints.known(place)
  version = sources.identity(source, kind)
  key = key_of(setup, kind, known, version)

  def make(large: Callable[[], bool]) -> Generator[cache.Part]:
    task = encoders.Task(dict(data=data.to_dict(), world=setup.config.world.to_dict()), kind)
    blocks, count = sources.blocks(source, kind, mapping), 0
    encode = encoders.encoder(task, setup.text.template)
    while not large() and (block := next(blocks, None)) is not None:
      part = encode(block)
      count += len(part['row_ends'])
      yield part
    if large():
      start = last = time.monotonic()
      for block, part in encoders.parts(task, blocks):
        count += len(part['row_ends'])
        if (now := time.monotonic()) > last + EVERY:
          last, which = now, f' of source {block.part + 1}' if block.part else ''
          left = (now - start) * (1 - block.share) / max(block.share, 1e-9)
          print(
            f'{entry}: {count:,} records are encoded, {block.share:.0%}{which}, about '
            f'{left / 60:.0f} min left',
            file=sys.stderr,
            flush=True,
          )
        yield part
    if not count:
      raise sources.no_records(source, kind, mapping)
    if key_of(setup, kind, known, version) != key:
      raise inputs.ChangedInput(
        f'{entry}={source!r} changed while it was read; the same command reads it again.'
      )

  token = np.uint16 if setup.text.vocabulary <= 2**16 else np.int32
  made = cache.kept(place, key, entry, make, token)
  fingerprints.remember(place, known)
  if jax.process_index() == 0:
    fingerprints.remember(setup.workdir, known)
  return made


def key_of(setup: Setup, kind: str, known: dict[str, list], version: str) -> str:
  """The fingerprint of everything that decides the rows of a source.

  Args:
    kind: the kind of record.
    known: hashes of files, which are trusted while size and times are the same
      (fingerprints.of_files).
    version: what else tells versions of the source apart (sources.identity).
  """
  data = setup.config.data
  mapping = data.mapping[kind]
  read = inputs.of_data(f'data.{kind}', data[kind], mapping)
  if data.tokenizer != 'sandbox:':
    read['data.tokenizer'] = ('tokenizer', data.tokenizer)
  prints = {
    entry: inputs.fingerprint(what, name, setup.workdir, known)
    for entry, (what, name) in read.items()
  }
  day = data.get('template_date')
  if day is None and data.template == 'chat' and chat.dated(setup.text.tokenizer):
    day = datetime.date.today().isoformat()
  libraries = {n: importlib.metadata.version(n) for n in ('tokenizers', 'transformers', 'jinja2')}
  return fingerprints.of_value(
    [
      fingerprints.of_function(encoders.encoder),
      libraries,
      [kind, data[kind], mapping, data.tokenizer, data.template, day, data.heldout.seed],
      [prints, version],
    ]
  )
