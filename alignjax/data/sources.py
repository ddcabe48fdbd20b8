"""Records by name: 'jsonl:FILE' (plain or .gz), or 'sandbox:' (stages/setup.py fills that in from the embedded world).

One record format each, a JSON object a line:
  demonstrations  {"prompt": str, "response": str}                        [, "user_id", "use_case"]
  comparisons     {"prompt": str, "responses": [str, ...], "ranks": [int, ...]}   [, "labeler_id", "user_id"]
                  ranks: 0 best, equal = tie
  prompts         {"prompt": str}                                         [, "user_id", "use_case"]
  pretrain        {"text": str}                                           [, "kind"]
"""

from __future__ import annotations

import gzip
import json
from typing import Any

from etils import epath

FIELDS = dict(
    demonstrations=dict(prompt=str, response=str),
    comparisons=dict(prompt=str, responses=list, ranks=list),
    prompts=dict(prompt=str),
    pretrain=dict(text=str),
)


def read_jsonl(path: str, kind: str) -> list[dict[str, Any]]:
  """All records of a file, checked. Errors name the file, the line and the field.

  Args:
    path: local or gs://, plain or .gz.
    kind: 'demonstrations', 'comparisons', 'prompts' or 'pretrain'.
  """
  file = epath.Path(path)
  if not file.exists():
    raise FileNotFoundError(f'data.{kind}=jsonl:{path}: no such file.')
  raw = file.read_bytes()
  text = (gzip.decompress(raw) if str(path).endswith('.gz') else raw).decode('utf-8')
  records = [parse(line, kind, f'{path}, line {number}') for number, line in enumerate(text.splitlines(), 1)
             if line.strip()]
  if not records:
    raise ValueError(f'{path}: no records.')
  return records


def parse(line: str, kind: str, where: str) -> dict[str, Any]:
  """One checked record."""
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f'{where}: not JSON ({error.msg} at column {error.colno}).') from error
  if not isinstance(record, dict):
    raise ValueError(f'{where}: a record is an object with {sorted(FIELDS[kind])}, not {type(record).__name__}.')
  for field, expected in FIELDS[kind].items():
    if field not in record:
      raise ValueError(f'{where}: field {field!r} is missing; a record of {kind} has {sorted(FIELDS[kind])}, '
                       f'this one has {sorted(record)}.')
    if not isinstance(record[field], expected):
      raise ValueError(f'{where}: field {field!r} must be {expected.__name__}, not {type(record[field]).__name__}.')
  if kind == 'comparisons':
    check_comparison(record, where)
  return record


def check_comparison(record: dict[str, Any], where: str) -> None:
  responses, ranks = record['responses'], record['ranks']
  if len(responses) != len(ranks):
    raise ValueError(f'{where}: {len(responses)} responses but {len(ranks)} ranks.')
  if len(responses) < 2:
    raise ValueError(f'{where}: a comparison needs at least two responses, not {len(responses)}.')
  if not all(isinstance(r, str) for r in responses):
    raise ValueError(f"{where}: every entry of 'responses' must be a string.")
  if not all(isinstance(r, int) and not isinstance(r, bool) and r >= 0 for r in ranks):
    raise ValueError(f"{where}: 'ranks' must be integers from 0 (best) on, equal ones for ties; got {ranks}.")
