"""The text files that people hand in, read one way by everything that reads them.

A file is plain or gzip by its content, not by its name, on a disk or in a bucket; `~` is the home
folder; the text is UTF-8 with or without a byte order mark. A line ends at "\\n" or "\\r\\n" and
nowhere else, so that U+2028, U+0085 and a form feed are text. JSON is read strictly: no key twice
in an object, no NaN or Infinity, no integer that is larger than every float, no half of a surrogate
pair, which no tokenizer could read. Every error is a ValueError (FileNotFoundError where there is
no file) that names the file and, as far as there is one, line and field.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from alignjax.runtime import files

OTHERS = {
  b'\xff\xfe\x00\x00': 'UTF-32',
  b'\x00\x00\xfe\xff': 'UTF-32',
  b'\xff\xfe': 'UTF-16',
  b'\xfe\xff': 'UTF-16',
  b'PK\x03\x04': 'a zip archive',
  b'\x28\xb5\x2f\xfd': 'compressed by zstd',
  b'BZh': 'compressed by bzip2',
  b'\xfd7zXZ': 'compressed by xz',
  b'PAR1': 'Parquet',
}
PIECE = 1 << 20  # bytes that are read at a time
SPACE = re.compile(r'[ \t\n\r]*')  # JSON's own
SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')


def read(path: str | os.PathLike, where: str = '') -> str:
  """The text of a file.

  Args:
    path: its name.
    where: stands before the name in errors, such as 'data.prompts: '.
  """
  raw = b''.join(piece for piece, _ in _pieces(path, where))
  return decode(raw, f'{where}{os.fspath(path)}')


def _pieces(path: str | os.PathLike, where: str) -> Iterator[tuple[bytes, int]]:
  """The bytes of a file in pieces, uncompressed, and how many bytes of the file were read so
  far."""
  path, file = os.fspath(path), place(path, where)
  try:
    if file.is_dir():
      raise ValueError(f'{where}{path} is a folder; name the file in it.')
    with file.open('rb') as raw:
      head = raw.read(PIECE)
      if head[:2] != b'\x1f\x8b':
        while head:
          yield head, raw.tell()
          head = raw.read(PIECE)
        return
      raw.seek(0)
      try:
        with gzip.open(raw) as unpacked:
          while piece := unpacked.read(PIECE):
            yield piece, raw.tell()
      except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f'{where}{path}: not a whole gzip file ({error}).') from error
  except FileNotFoundError:
    raise FileNotFoundError(f'{where}{path}: no such file.') from None
  except OSError as error:
    raise ValueError(f'{where}{path} cannot be read ({error.strerror or error}).') from error
  except Exception as error:  # noqa: BLE001 a bucket's client raises many kinds
    if isinstance(error, ValueError) or not files.is_bucket(file):
      raise
    raise ValueError(f'{where}{path} cannot be read ({type(error).__name__}: {error}).') from error


class Block(NamedTuple):
  """Whole lines of a file.

  Attributes:
    raw: their bytes.
    line: the number of the first one, from 1.
    at: the number of the bytes before them.
    read: how many bytes of the file, which may be compressed, were read so far.
  """

  raw: bytes
  line: int
  at: int
  read: int


def blocks(path: str | os.PathLike, where: str = '') -> Iterator[Block]:
  """The lines of a file in blocks, so that it is never whole in memory. A file that begins with a
  '[' is one block, because it may be one array. For the arguments see `read`."""
  rest, line, at, done = b'', 1, 0, 0
  pieces = _pieces(path, where)
  for piece, done in pieces:
    rest += piece
    if not at and rest[:1000].removeprefix(b'\xef\xbb\xbf').lstrip(b' \t\n\r')[:1] == b'[':
      rest = b''.join([rest, *(more for more, done in pieces)])
      break
    end = rest.rfind(b'\n') + 1
    if end:
      yield Block(rest[:end], line, at, done)
      line, at, rest = line + rest.count(b'\n', 0, end), at + end, rest[end:]
  if rest:
    yield Block(rest, line, at, done)


def records(block: Block, path: str | os.PathLike, where: str = '') -> Sequence[tuple[str, Any]]:
  """The records of a block, as those of a file (Records). For path and where see `read`."""
  name = os.fspath(path)
  text = decode(block.raw, f'{where}{name}', block.line, block.at)
  return Records(text, path, block.line)


def place(path: str | os.PathLike, where: str = '') -> files.Folder:
  """The path of a name; for `where` see read."""
  if re.search('[\0\ud800-\udfff]', os.fspath(path)):
    raise ValueError(f'{where}{os.fspath(path)!r} is no name of a file.')
  try:
    return files.folder(path)
  except ValueError as error:
    raise ValueError(f'{where}{error}') from None


def suffix(path: str | os.PathLike) -> str:
  """The kind of file that its name says, compressed or not: 'jsonl' for 'a.b/ITEMS.JSONL.gz'."""
  return os.path.basename(os.fspath(path)).lower().removesuffix('.gz').rpartition('.')[2]


def decode(raw: bytes, where: str, first: int = 1, before: int = 0) -> str:
  """UTF-8 as text, without its byte order mark. Other bytes are an error that names the line and
  what they look like. first: the number of the first line. before: the bytes of the file before
  it."""
  other = next((name for start, name in OTHERS.items() if raw.startswith(start)), None)
  if not before and (other or b'\x00' in raw[:4]):
    raise ValueError(
      f'{where}: {other or "UTF-16 or binary"}, not text in UTF-8; convert it first.'
    )
  try:
    return raw.decode('utf-8' if before else 'utf-8-sig')
  except UnicodeDecodeError as error:
    at = error.start + 3 * (not before and raw.startswith(b'\xef\xbb\xbf'))
    line = raw.count(b'\n', 0, at) + first
    raise ValueError(
      f'{where}: not UTF-8 (byte {before + at}) in line {line}; convert it first.'
    ) from error


def lines(text: str) -> list[str]:
  """The lines, without their ends. What follows the last end is a line unless it is empty."""
  found = [line.removesuffix('\r') for line in text.split('\n')]
  return found if found[-1] else found[:-1]


class Records(Sequence):
  """The records of a file of JSON: one on each line, without the blank ones, or the elements of the
  one array that the file is. records[i] is ('FILE, line N', value); a record is parsed when it is
  asked for, and one that is not JSON is a ValueError then.

  Args:
    text: of the whole file.
    path: its name, for the places and for errors.
    first: the number of the first line, where the text is not the beginning of the file.
  """

  def __init__(self, text: str, path: str | os.PathLike, first: int = 1):
    self._path, found = os.fspath(path), None
    if first == 1 and SPACE.sub('', text[:1000], count=1)[:1] == '[':
      found = _elements(text, self._path)
    if found is None:
      found = [(number, line) for number, line in enumerate(lines(text), first) if line.strip()]
    self._found = found  # (number of the line, JSON)

  def __len__(self) -> int:
    return len(self._found)

  def __getitem__(self, i: int) -> tuple[str, Any]:
    number, text = self._found[i]
    where = f'{self._path}, line {number}'
    return where, parse(text, where)


def _elements(text: str, where: str) -> list[tuple[int, str]] | None:
  """The elements of a file that is one JSON array, over however many lines; None: it is not one,
  but lines."""
  decoder = json.JSONDecoder()

  def skip(at: int) -> int:
    space = SPACE.match(text, at)
    return space.end() if space else at

  at, found, line, counted = skip(skip(0) + 1), [], 1, 0
  try:
    while text[at : at + 1] != ']':
      if found:
        if text[at : at + 1] != ',':
          raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        at = skip(at + 1)
      end = decoder.raw_decode(text, at)[1]
      line, counted = line + text.count('\n', counted, at), at
      found.append((line, text[at:end]))
      at = skip(end)
  except json.JSONDecodeError as error:
    if error.lineno == 1:
      return None  # Read as lines, the first one is an error.
    raise ValueError(
      f'{where}, line {error.lineno}: not JSON ({error.msg} at column {error.colno}).'
    ) from error
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{where}, line {line + text.count(chr(10), counted, at)}: not JSON ({_reason(error)}).'
    ) from error
  after = skip(at + 1)
  if after == len(text):
    return found
  if '\n' not in text[skip(0) : at]:
    return None
  raise ValueError(
    f'{where}, line {text.count(chr(10), 0, after) + 1}: something follows the array that the file '
    'begins with; a file is one array, or a record a line.'
  )


def parse(text: str, where: str) -> Any:
  """The value of a JSON text. where: names file and line in errors."""
  odd = []

  def number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
      odd.append(digits)
    return value

  def integer(digits: str) -> int:
    value = int(digits)
    if abs(value) > sys.float_info.max:
      odd.append(digits)
    return value

  def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
      names = [name for name, _ in pairs]
      raise ValueError(
        f'field {next(n for n in names if names.count(n) > 1)!r} is there twice; leave one out'
      )
    return made

  try:
    value = json.loads(
      text, object_pairs_hook=fields, parse_constant=number, parse_float=number, parse_int=integer
    )
    if odd or SURROGATE.search(text):
      for fault in _faults(value, ''):
        raise ValueError(fault)
  except json.JSONDecodeError as error:
    raise ValueError(f'{where}: not JSON ({error.msg} at column {error.colno}).') from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where}: {_reason(error)}.') from error
  return value


def _reason(error: Exception) -> str:
  if isinstance(error, RecursionError):
    return 'it is nested too deeply'
  return 'a number has too many digits' if 'set_int_max_str_digits' in str(error) else str(error)


def _faults(value: Any, at: str) -> Iterator[str]:
  """What is wrong with the texts and numbers of a value, each with its field."""
  name = f'field {at!r}' if at else 'the value'
  if isinstance(value, str):
    try:
      value.encode()
    except UnicodeEncodeError as error:
      yield (
        f'{name} holds \\u{ord(value[error.start]):04x}, half of a surrogate pair, at character '
        f'{error.start}, which is no text; mend it'
      )
  elif isinstance(value, float) and not math.isfinite(value):
    yield f'{name} is {value}, which is no number of JSON; write null, or leave the record out'
  elif isinstance(value, int) and abs(value) > sys.float_info.max:
    yield f'{name} has {len(str(abs(value)))} digits, more than any number that can be used here'
  elif isinstance(value, dict):
    for key, inner in value.items():
      yield from _faults(key, f'{at}.{key!r}' if at else repr(key))
      yield from _faults(inner, f'{at}.{key}' if at else key)
  elif isinstance(value, list):
    for i, inner in enumerate(value):
      yield from _faults(inner, f'{at}[{i}]')


def kind(value: Any) -> str:
  """What a value is called in JSON, for messages."""
  names = {
    dict: 'an object',
    list: 'a list',
    str: 'text',
    bool: 'true or false',
    type(None): 'null',
    int: 'a number',
    float: 'a number',
  }
  return names.get(type(value), type(value).__name__)
