"""Records by name. A source of c.data.KIND is one of

  jsonl:FILE                       plain or .gz, local or gs:// (etils)
  text:FILE                        pretraining text, one document a file; several with *
  tfds:NAME[/CONFIG]:SPLIT         tensorflow-datasets, random access, no TensorFlow; or tfds:PREPARED_FOLDER:SPLIT
  hf:NAME[/CONFIG]:SPLIT           the datasets library, if installed
  sandbox:                         the embedded world (stages/setup.py)

or several of them with ';' between: all records of the first, then of the second. c.data.mapping.KIND says how their fields
become ours (mappings.py), one mapping for all or one for each, again with ';' between; without one they must have our names:

  demonstrations  {"prompt", "response"}                                  [, "user_id", "use_case"]
  comparisons     {"prompt", "responses": [str, ...], "ranks": [int, ...]}   [, "labeler_id", "user_id", "use_case"]
                  or pairs {"prompt", "chosen", "rejected"}; ranks: 0 best, equal = tie
  prompts         {"prompt"}                                              [, "user_id", "use_case"]
  pretrain        {"text"}                                                [, "kind"]

A prompt is a string, or a list of messages {"role", "content"} for the chat template.
"""

from __future__ import annotations

import bisect
import functools
import glob
import gzip
import inspect
import itertools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from alignjax import files
from alignjax.data import mappings

FIELDS = dict(
    demonstrations=dict(prompt=(str, list), response=str),
    comparisons=dict(prompt=(str, list), responses=list, ranks=list),
    prompts=dict(prompt=(str, list)),
    pretrain=dict(text=str),
)
FORMS = 'jsonl:FILE, text:FILE, tfds:NAME[/CONFIG]:SPLIT, hf:NAME[/CONFIG]:SPLIT or sandbox:'


class Source(NamedTuple):
  """count: raw records; records(i): those of ours that the i-th of them becomes, checked, read when asked for: of an
  array_record file that one alone, so that a process reads its share."""
  count: int
  records: Callable[[int], list[dict[str, Any]]]


def read(source: str, kind: str, mapping: str | None = None, most: int | None = None) -> list[dict[str, Any]]:
  """The records of a source, all or the first `most`. Errors name the file and line (or the source and index) and the field.

  Args:
    source: see the top of this file.
    kind: 'demonstrations', 'comparisons', 'prompts' or 'pretrain'.
    mapping: c.data.mapping.KIND.
  """
  opened = open_source(source, kind, mapping)
  records = list(itertools.islice((r for i in range(opened.count) for r in opened.records(i)), most))
  if not records:
    raise ValueError(f'data.{kind}={source!r}: no records' + (f' left by data.mapping.{kind}={mapping!r}.' if mapping else '.'))
  return records


def open_source(source: str, kind: str, mapping: str | None = None) -> Source:
  """A source to read from by index."""
  names, changes = ([part.strip() for part in text.split(';')] for text in (source, mapping or ''))
  if len(changes) not in (1, len(names)):
    raise ValueError(f'data.mapping.{kind}={mapping!r} has {len(changes)} mappings for the {len(names)} sources of '
                     f'data.{kind}={source!r}: one for all or one for each.')
  changes = changes * len(names) if len(changes) == 1 else changes
  parts = [_open_one(name, kind, change) for name, change in zip(names, changes, strict=True)]
  starts = list(itertools.accumulate((part.count for part in parts), initial=0))

  def records(i):
    which = bisect.bisect_right(starts, i) - 1
    return parts[which].records(i - starts[which])

  return Source(starts[-1], records)


def _open_one(source: str, kind: str, mapping: str) -> Source:
  form, _, rest = source.partition(':')
  readers = dict(jsonl=_jsonl, text=_text, tfds=_tfds, hf=_datasets)
  if form not in readers or not rest:
    raise ValueError(f'data.{kind}={source!r}: a source is {FORMS}.')
  change = mappings.find(mapping, f'data.mapping.{kind}')
  folder = (files.folder if form == 'jsonl' else pathlib.Path)(rest).parent
  if change is not None and 'beside' in inspect.signature(change).parameters:
    change = functools.partial(change, beside=folder)
  count, get = readers[form](rest, kind)

  def records(i):
    where, raw = get(i)
    return convert(raw, kind, where, change)

  return Source(count, records)


def convert(raw: Any, kind: str, where: str, change: Callable | None = None) -> list[dict[str, Any]]:
  """Our records of a raw one, checked."""
  if not isinstance(raw, dict):
    raise ValueError(f'{where}: a record is an object with {sorted(FIELDS[kind])}, not {type(raw).__name__}.')
  made = [raw]
  if change is not None:
    try:
      made = change(raw)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
      name = mapping_name(change)
      raise ValueError(f'{where}: the mapping {name!r} does not fit this record, which has {sorted(raw)} '
                       f'({type(error).__name__}: {error}).') from error
  return [check(record, kind, where) for record in made]


def mapping_name(change: Callable) -> str:
  change = getattr(change, 'func', change)
  return 'ours=theirs' if change is mappings.rename else change.__name__


def check(record: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
  """The record, if every field is there and of its type. {"chosen", "rejected"} becomes a ranking of two."""
  if kind == 'comparisons' and 'chosen' in record and 'rejected' in record and 'responses' not in record:
    rest = {k: v for k, v in record.items() if k not in ('chosen', 'rejected')}
    record = {**rest, 'responses': [record['chosen'], record['rejected']], 'ranks': [0, 1]}
  for field, expected in FIELDS[kind].items():
    if field not in record:
      raise ValueError(f'{where}: field {field!r} is missing; a record of {kind} has {sorted(FIELDS[kind])}, '
                       f'this one has {sorted(record)}. Other names: data.mapping.{kind}.')
    if not isinstance(record[field], expected):
      names = ' or '.join(t.__name__ for t in (expected if isinstance(expected, tuple) else (expected,)))
      raise ValueError(f'{where}: field {field!r} must be {names}, not {type(record[field]).__name__}.')
  if isinstance(record.get('prompt'), list):
    messages = record['prompt']
    if not messages or not all(isinstance(m, dict) and isinstance(m.get('content'), str) and m.get('role') in
                               ('system', 'user', 'assistant') for m in messages):
      raise ValueError(f"{where}: 'prompt' as a list must hold messages {{'role': 'system' | 'user' | 'assistant', "
                       "'content': str}.")
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


def read_text(path: str, where: str = '') -> str:
  """A whole text file, plain or .gz, local or gs://. What is not one is an error that names it, after `where`."""
  file = files.folder(path)
  if not file.exists():
    raise FileNotFoundError(f'{where}{path}: no such file.')
  raw = file.read_bytes()
  try:
    return (gzip.decompress(raw) if str(path).endswith('.gz') else raw).decode('utf-8')
  except (OSError, EOFError) as error:
    raise ValueError(f'{path}: not a whole gzip file ({error}).') from error
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: not UTF-8 (byte {error.start}).') from error


Raw = tuple[int, Callable[[int], tuple[str, Any]]]  # how many, and the i-th with where it stands


def _jsonl(path: str, kind: str) -> Raw:
  lines = [(n, line) for n, line in enumerate(read_text(path, f'data.{kind}: ').split('\n'), 1) if line.strip()]

  def get(i):
    where = f'{path}, line {lines[i][0]}'
    try:
      return where, json.loads(lines[i][1])
    except json.JSONDecodeError as error:
      raise ValueError(f'{where}: not JSON ({error.msg} at column {error.colno}).') from error

  return len(lines), get


def _text(pattern: str, kind: str) -> Raw:
  if kind != 'pretrain':
    raise ValueError(f'data.{kind}=text:{pattern}: plain text is a source of pretraining documents only.')
  folder = files.folder(pattern)
  if '*' in pattern and files.is_bucket(folder):
    fixed = next(p for p in folder.parents if '*' not in str(p))
    paths = sorted(str(p) for p in fixed.glob(folder.relative_to(fixed).as_posix()))
  else:
    paths = sorted(glob.glob(pattern)) if '*' in pattern else [pattern]
  return len(paths), lambda i: (paths[i], {'text': read_text(paths[i], f'data.{kind}: ')})


def _name_and_split(text: str, where: str) -> tuple[str, str]:
  """'NAME:train[:5%]+test' -> ('NAME', 'train[:5%]+test')."""
  part = r'[\w.-]+(?:\[[^\]]*\])?'
  found = re.fullmatch(rf'(.+):({part}(?:\+{part})*)', text)
  if not found:
    raise ValueError(f'{where}:{text}: say which split, as in {where.partition("=")[2]}:{text}:train.')
  return found[1], found[2]


def _tfds(name: str, kind: str) -> Raw:
  name, split = _name_and_split(name, f'data.{kind}=tfds')
  import tensorflow_datasets as tfds

  from alignjax.data.records import records_dataset_builder
  try:
    if '/' in name and pathlib.Path(name).is_dir():
      builder = tfds.builder_from_directory(name)
    else:
      builder = tfds.builder(name, file_format='array_record')
      builder.download_and_prepare()
    rows = builder.as_data_source(split)
    change = records_dataset_builder.restore if 'messages' in builder.info.features else lambda row: row
  except Exception as error:  # noqa: BLE001 tfds and its downloads raise many kinds
    raise ValueError(f'data.{kind}=tfds:{name}:{split} cannot be read ({type(error).__name__}: '
                     f'{str(error).splitlines()[0][:300]}).') from error
  return len(rows), lambda i: (f'tfds:{name}:{split}, record {i}', change(_plain(rows[i])))


def _plain(x: Any) -> Any:
  """numpy and bytes, as tfds gives them, to what JSON would give."""
  if isinstance(x, dict):
    return {k: _plain(v) for k, v in x.items()}
  if isinstance(x, np.ndarray):
    return _plain(x.tolist())
  if isinstance(x, np.generic):
    return _plain(x.item())
  if isinstance(x, (list, tuple)):
    return [_plain(v) for v in x]
  return x.decode('utf-8') if isinstance(x, bytes) else x


def _datasets(name: str, kind: str) -> Raw:
  name, split = _name_and_split(name, f'data.{kind}=hf')
  try:
    import datasets
  except ModuleNotFoundError:
    raise ValueError(f'data.{kind}=hf:{name}:{split} needs the datasets library: pip install datasets.') from None
  owner, _, rest = name.partition('/')
  repository, _, config = rest.partition('/')
  try:
    rows = datasets.load_dataset(f'{owner}/{repository}' if repository else owner, config or None, split=split)
  except Exception as error:  # noqa: BLE001
    raise ValueError(f'data.{kind}=hf:{name}:{split} cannot be read ({type(error).__name__}: '
                     f'{str(error).splitlines()[0][:300]}).') from error
  return len(rows), lambda i: (f'hf:{name}:{split}, record {i}', rows[i])
