"""JSON lines that grow while something dear is computed, so that an interrupted call goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from alignjax import files


def read(path: files.Folder) -> list[dict[str, Any]]:
  """The whole lines of a file, none where there is no file. A last line that a kill left torn is cut off the file, so that the
  next append starts a line of its own."""
  if not path.exists():
    return []
  raw = path.read_bytes()
  whole = raw[:raw.rfind(b'\n') + 1]
  if len(whole) < len(raw):
    with path.open('r+b') as file:
      file.truncate(len(whole))
  try:
    return [json.loads(line) for line in whole.decode().split('\n') if line.strip()]
  except ValueError as error:  # not UTF-8, or not JSON
    raise ValueError(f'{path} is damaged ({error}); move it away to compute it again.') from error


def append(path: files.Folder, rows: Iterable[Mapping[str, Any]]) -> None:
  """Adds rows, on the first process alone; what it wrote outlives the process, however that ends."""
  if jax.process_index():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  files.append(path, ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))
