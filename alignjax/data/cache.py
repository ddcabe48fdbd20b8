"""Encoded records, each encoded once, and read by index by the process that needs the row.

    rows = cache.kept(folder, key, 'data.prompts', make)
    rows.pieces(7)          # the tokens of record 7: its prompt, then its responses

Few records stay in memory. Once they take more than SMALL bytes, they are written to FOLDER/KEY:
one file for each column (Rows), and rows.json, which is written last and says that all are whole.
A maker that is killed leaves no rows.json, and the next one begins again. One process makes the
rows under the lock of the folder, and the others wait for it and then read the same files.

Rows are read by position (pread) and not through a memory map: a map of a file that is cut while
it is in use, or on a disk that fails, ends the process with a signal, and its pages count as memory
of the process. What is read is compared with a checksum of each BLOCK bytes, which stands at the
end of the file. A damaged folder is made again at the next start.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import json
import os
import pathlib
import sys
import time
import weakref
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import numpy as np

from alignjax.runtime import files, fingerprints, lock

SMALL = 8 << 20  # bytes
BLOCK = 8192  # bytes
MARK = 'rows.json'
WAIT = 1.0  # seconds between two looks at a lock that another process holds
COLUMNS: dict[str, Any] = dict(
  tokens=np.int32,
  piece_ends=np.int64,
  row_ends=np.int64,
  ranks=np.int32,
  texts=np.uint8,
  text_ends=np.int64,
  held=np.float64,
)
Part = Mapping[str, Any]  # the columns of some records, with lengths in place of ends


class Damaged(ValueError):
  """A file of kept rows is not what was written."""


class Column:
  """An array in memory or in a file, of which parts are read.

  Args:
    dtype: of its numbers.
    data: the bytes, or the file that holds them.
    size: the number of bytes in the file.
    sums: u32[blocks], the checksums of its blocks.
  """

  def __init__(self, dtype: Any, data: Any, size: int = 0, sums: Any = None):
    self.dtype, self._data, self._sums = np.dtype(dtype), data, sums
    self._size = len(data) if sums is None else size
    if sums is not None:
      self._file = os.open(data, os.O_RDONLY)
      weakref.finalize(self, os.close, self._file)

  def __len__(self) -> int:
    return self._size // self.dtype.itemsize

  def read(self, start: int, end: int) -> np.ndarray:
    """Returns the numbers start..end-1. Raises Damaged if their blocks have changed."""
    width = self.dtype.itemsize
    if self._sums is None:
      return np.frombuffer(self._data, self.dtype, end - start, start * width)
    first, last = start * width // BLOCK, -(-end * width // BLOCK)
    left = min(last * BLOCK, self._size) - first * BLOCK
    raw = os.pread(self._file, left, first * BLOCK) if left > 0 else b''
    for i in range(first, last):
      if zlib.crc32(raw[(i - first) * BLOCK :][:BLOCK]) != self._sums[i]:
        with contextlib.suppress(OSError):
          (self._data.parent / MARK).unlink()
        raise Damaged(
          f'{self._data} is damaged in its block of {BLOCK} bytes at byte {i * BLOCK}. It holds '
          'encoded records, which the next start makes again.'
        )
    return np.frombuffer(raw, self.dtype, end - start, start * width - first * BLOCK)


class Rows:
  """The encoded records of a source.

  A record is one or more pieces of tokens: a prompt and its responses, or the documents of a raw
  record of pretraining text.

  Attributes:
    columns: tokens: those of all pieces, one after the other. piece_ends: where each piece begins
      in tokens, and the end of the last one. row_ends: the same for the pieces of a record. ranks:
      that of each piece of a comparison. texts, text_ends: the place and the prompt of each record,
      as JSON. held: hygiene.place of its prompt.
    faults: {number of a record: why it cannot be encoded}.
  """

  def __init__(self, columns: Mapping[str, Column], faults: Mapping[int, str]):
    self.columns, self.faults = columns, dict(faults)

  def __len__(self) -> int:
    return len(self.columns['row_ends']) - 1

  def pieces(self, i: int) -> list[list[int]]:
    """The tokens of each piece of record i."""
    start, end = self.columns['row_ends'].read(i, i + 2).tolist()
    ends = self.columns['piece_ends'].read(start, end + 1).tolist()
    flat = self.columns['tokens'].read(ends[0], ends[-1]).tolist()
    return [flat[a - ends[0] : b - ends[0]] for a, b in itertools.pairwise(ends)]

  def ranks(self, i: int) -> list[int]:
    """The rank of each response of record i."""
    start, end = self.columns['row_ends'].read(i, i + 2).tolist()
    return self.columns['ranks'].read(start + 1, end).tolist()

  def text(self, i: int) -> tuple[str, Any]:
    """The place of record i in its source, and its prompt."""
    start, end = self.columns['text_ends'].read(i, i + 2).tolist()
    place, prompt = json.loads(self.columns['texts'].read(start, end).tobytes())
    return place, prompt


def in_memory(part: Part) -> Rows:
  """Returns the rows of a part, which stay in memory."""
  writer = _Writer(pathlib.Path(), COLUMNS)
  writer.add(part)
  return writer.finish()


def kept(
  folder: pathlib.Path,
  key: str,
  what: str,
  make: Callable[[Callable[[], bool]], Generator[Part]],
  token: Any = np.int32,
) -> Rows:
  """Returns the rows of a key: those of the folder, or those that are made now.

  Args:
    folder: the folder of all keys, on a disk.
    key: the fingerprint of everything that decides the rows.
    what: what is made, for messages.
    make: a function of `large`, which says whether the rows are too many for memory, that yields
      the rows in parts. A part has the columns' names, with the lengths of pieces, rows and texts
      under the names of their ends, and 'faults'.
    token: the dtype in which tokens are kept.

  Raises:
    OSError: with the name of the file that cannot be written.
  """
  place = folder / key
  found = _open(place)
  if found is not None:
    return found
  writer = _Writer(place, COLUMNS | dict(tokens=token))
  with contextlib.closing(make(lambda: writer.on_disk)) as parts, contextlib.ExitStack() as stack:
    try:
      for part in parts:
        writer.add(part)
        if writer.on_disk or writer.size <= SMALL:
          continue
        stack.enter_context(_alone(place, what))
        found = _open(place)  # Another process may have made them meanwhile.
        if found is not None:
          return found
        writer.spill()
      return writer.finish()
    finally:
      writer.close()  # While the lock is held, as the names of the files are the same for all.


@contextlib.contextmanager
def _alone(place: pathlib.Path, what: str) -> Iterator[None]:
  """Waits for the lock of a folder, which is made, and holds it."""
  with _advice(place):
    place.mkdir(parents=True, exist_ok=True)
  waiting = False
  with contextlib.ExitStack() as stack:
    while True:
      try:
        with _advice(place):
          stack.enter_context(lock.held(place))
        break
      except lock.Busy:
        if not waiting:
          print(f'{what}: waits for the process that encodes it in {place}', flush=True)
        waiting = True
        time.sleep(WAIT)
    yield


@contextlib.contextmanager
def _advice(path: pathlib.Path) -> Iterator[None]:
  """Names the file in an OSError, and what can be done."""
  try:
    yield
  except OSError as error:
    raise type(error)(
      error.errno,
      f'{error.strerror}; encoded records are kept there, and --config.data_cache=FOLDER chooses '
      f'another place',
      os.fspath(path),
    ) from error


class _Writer:
  """Collects parts in memory, or in files once `spill` was called."""

  def __init__(self, place: pathlib.Path, dtypes: Mapping[str, Any]):
    self.on_disk, self._place, self._dtypes = False, place, dtypes
    self._waiting = {name: bytearray() for name in COLUMNS}
    self._sums = {name: array.array('I') for name in COLUMNS}
    self._written = dict.fromkeys(COLUMNS, 0)
    self._ends = {name: 0 for name in COLUMNS if name.endswith('_ends')}
    self._files: dict[str, Any] = {}
    self._faults: dict[int, str] = {}
    self._count = 0
    for name in self._ends:
      self._waiting[name] += np.zeros(1, COLUMNS[name]).tobytes()

  @property
  def size(self) -> int:
    """The number of bytes in memory."""
    return sum(map(len, self._waiting.values()))

  def add(self, part: Part) -> None:
    for name, dtype in self._dtypes.items():
      values = part.get(name)
      if values is None:
        continue
      if name in self._ends:
        values = self._ends[name] + np.cumsum(values, dtype=dtype)
        self._ends[name] = int(values[-1]) if len(values) else self._ends[name]
      self._waiting[name] += np.ascontiguousarray(values, dtype).tobytes()
    self._faults |= {self._count + i: text for i, text in part.get('faults', {}).items()}
    self._count += len(part['row_ends'])
    if self.on_disk:
      self._flush(1 << 20)

  def spill(self) -> None:
    self.on_disk = True
    for name in COLUMNS:
      path = self._partial(name)
      with _advice(path):
        self._files[name] = path.open('wb')
    self._flush(1 << 20)

  def finish(self) -> Rows:
    """Returns the rows, which are whole from now on."""
    if not self.on_disk:
      columns = {n: Column(self._dtypes[n], bytes(raw)) for n, raw in self._waiting.items()}
      return Rows(columns, self._faults)
    self._flush(1)
    made = {}
    for name, sums in self._sums.items():
      with _advice(self._partial(name)):
        self._files[name].write(sums.tobytes())
        self._files[name].close()
      dtype = np.dtype(self._dtypes[name]).str
      made[name] = [dtype, self._written[name], zlib.crc32(sums.tobytes())]
    for name in COLUMNS:
      os.replace(self._partial(name), self._place / name)
    found = dict(columns=made, faults=list(self._faults.items()))
    with _advice(self._place / MARK):
      files.write(
        self._place / MARK, json.dumps({**found, 'checksum': fingerprints.of_value(found)})
      )
    rows = _open(self._place)
    if rows is None:
      raise Damaged(f'{self._place} was changed by another program while it was written.')
    return rows

  def close(self) -> None:
    """Removes what is not whole."""
    for name, file in self._files.items():
      with contextlib.suppress(OSError):  # A full disk refuses what the file still holds.
        file.close()
      self._partial(name).unlink(missing_ok=True)

  def _partial(self, name: str) -> pathlib.Path:
    return self._place / f'{name}.partial'

  def _flush(self, least: int) -> None:
    """Writes the whole blocks of columns with at least `least` bytes; with 1, all bytes."""
    for name, waiting in self._waiting.items():
      if len(waiting) < least:
        continue
      end = len(waiting) if least == 1 else len(waiting) // BLOCK * BLOCK
      view = bytes(waiting[:end])
      self._sums[name].extend(
        zlib.crc32(view[at : at + BLOCK]) for at in range(0, len(view), BLOCK)
      )
      with _advice(self._partial(name)):
        self._files[name].write(view)
      self._written[name] += end
      del waiting[:end]


def _open(place: pathlib.Path) -> Rows | None:
  """Returns the rows of a folder, or None if it holds none that are whole."""
  try:
    if not (place / MARK).exists():
      return None
    found = json.loads((place / MARK).read_bytes())
    if found.pop('checksum') != fingerprints.of_value(found):
      raise Damaged(f'{place / MARK} is damaged')
    columns = {}
    for name in COLUMNS:
      dtype, size, of_sums = found['columns'][name]
      path = place / name
      with path.open('rb') as file:
        file.seek(size)
        sums = file.read()
      if zlib.crc32(sums) != of_sums:
        raise Damaged(f'{path} is damaged, or not whole')
      columns[name] = Column(dtype, path, size, array.array('I', sums))
    return Rows(columns, {int(i): text for i, text in found['faults']})
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    print(f'{place / MARK}: {error}: the records are encoded again', file=sys.stderr, flush=True)
    return None
