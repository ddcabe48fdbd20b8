"""Expensive results on disk, with checksums: JSON lines that grow, so that an interrupted call goes
on where it stopped, and whole JSON files. Damaged contents are reported and not read, so that no
figure is ever computed from them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from alignjax.runtime import files, fingerprints

# The last entry of a line: a checksum of the bytes before it.
MARK = ', "crc32": "'


def read(path: files.Folder) -> list[dict[str, Any]]:
  """The rows of a file; [] where there is no file. A last line that a kill left incomplete is cut
  off, so that the next append starts a line of its own. Raises ValueError, with the number of the
  line, where another line is not as `append` wrote it."""
  if not path.exists():
    return []
  raw = path.read_bytes()
  whole = raw[: raw.rfind(b'\n') + 1]
  rows = [_row(path, number, line) for number, line in enumerate(whole.split(b'\n')[:-1], 1)]
  if len(whole) < len(raw):
    with path.open('r+b') as file:
      file.truncate(len(whole))
  return rows


def _row(path: files.Folder, number: int, line: bytes) -> dict[str, Any]:
  mark = MARK.encode()
  body, _, check = line.rpartition(mark)
  if not body or check != f'{zlib.crc32(body):08x}"}}'.encode():
    raise ValueError(
      f'{path}, line {number}: the line is damaged, or another version of alignjax wrote it. '
      'Remove the line to compute it again, or the whole file.'
    )
  return json.loads(body + b'}')


def append(path: files.Folder, rows: Iterable[Mapping[str, Any]]) -> None:
  """Adds rows, on the first process alone. What it has written outlives the process, however that
  ends."""
  if jax.process_index():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  files.append(path, ''.join(map(_line, rows)))


def _line(row: Mapping[str, Any]) -> str:
  if not row:
    raise ValueError('an empty row cannot be kept.')
  body = json.dumps(row, ensure_ascii=False)[:-1]
  try:
    raw = body.encode()
  except UnicodeEncodeError:  # It has half of a surrogate pair, which only JSON can write.
    body = json.dumps(row)[:-1]
    raw = body.encode()
  return f'{body}{MARK}{zlib.crc32(raw):08x}"}}\n'


def write_whole(path: files.Folder, value: Mapping[str, Any]) -> None:
  """Writes a JSON object as a file, whole or not at all, on the first process alone."""
  if jax.process_index():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  value = json.loads(json.dumps(value))  # keys as they come back
  files.write(path, json.dumps({**value, 'fingerprint': fingerprints.of_value(value)}))


def read_whole(path: files.Folder) -> dict[str, Any] | None:
  """The object that `write_whole` wrote, or None where there is no file. Raises ValueError where
  the file is not as it was written."""
  if not path.exists():
    return None
  try:
    value = json.loads(path.read_bytes())
    good = value.pop('fingerprint') == fingerprints.of_value(value)
  except (
    ValueError,
    AttributeError,
    KeyError,
    TypeError,
  ):  # It is no UTF-8, no JSON, no object, or has no checksum.
    good = False
  if not good:
    raise ValueError(
      f'{path} is damaged, or another version of alignjax wrote it. Remove it to compute it again.'
    )
  return value
