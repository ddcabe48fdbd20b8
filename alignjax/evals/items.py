"""The items of a task: read from a file or the hub, drawn by the seed, and what was made for each
of them, kept as it comes."""

from __future__ import annotations

import csv
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from alignjax.data import hub
from alignjax.inference import completions
from alignjax.inference.loading import Model
from alignjax.runtime import journal, textfiles


def read(
  path: str | pathlib.Path,
  columns: Sequence[str] | Mapping[str, type | tuple[type, ...]] = (),
  delimiter: str = ',',
) -> list[dict[str, Any]]:
  """Rows of a .jsonl (or .json), .csv or .tsv file, plain or gzip.

  Args:
    columns: what every row must have, as text or as these types. What is not there is an error with
      file, line and field.
    delimiter: of .csv; .tsv has tabs and no quotes.
  """
  text = textfiles.read(path)
  kind = textfiles.suffix(path)
  if kind in ('jsonl', 'json'):
    rows = [*textfiles.Records(text, path)]
  else:
    rows = _table(
      text,
      str(path),
      '\t' if kind == 'tsv' else delimiter,
      csv.QUOTE_NONE if kind == 'tsv' else csv.QUOTE_MINIMAL,
    )
  types = columns if isinstance(columns, Mapping) else dict.fromkeys(columns, str)
  for where, row in rows:
    missing = [c for c in types if not isinstance(row, dict) or row.get(c) is None]
    if missing:
      has = sorted(row) if isinstance(row, dict) else textfiles.kind(row)
      raise ValueError(f'{where}: no {", ".join(map(repr, missing))}; the row has {has}.')
    for name, expected in types.items():
      if not isinstance(row[name], expected):
        raise ValueError(f'{where}: {name!r} must be text, not {textfiles.kind(row[name])}.')
  if not rows:
    raise ValueError(f'{path}: no rows.')
  return [row for _, row in rows]


def _table(text: str, path: str, delimiter: str, quoting: int) -> list[tuple[str, dict[str, str]]]:
  """('FILE, line N', row) of separated values whose first row is their names; the row ends in line
  N."""
  # This is a setting of the process; by default a cell of 131,073 characters is an error.
  csv.field_size_limit(2**31 - 1)
  reader = csv.reader(
    (f'{line}\n' for line in textfiles.lines(text)),
    delimiter=delimiter,
    quoting=quoting,
    strict=True,
  )
  names, rows = None, []
  try:
    for cells in reader:
      where = f'{path}, line {reader.line_num}'
      if not cells:
        continue
      if names is None:
        names = cells
        if len(set(names)) < len(names):
          raise ValueError(f'{where}: two columns have one name, of {", ".join(map(repr, names))}.')
      elif len(cells) > len(names):
        raise ValueError(
          f'{where}: {len(cells)} cells under {len(names)} names; text with {delimiter!r} in it '
          'stands in quotes.'
        )
      else:
        rows.append((where, dict(zip(names, cells, strict=False))))
  except csv.Error as error:
    raise ValueError(f'{path}, line {reader.line_num}: not separated values ({error}).') from error
  return rows


def of_hub(
  task: str, name: str, config: str | None, split: str, revision: str | None = None
) -> list[dict[str, Any]]:
  """The rows of a data set of the Hugging Face hub. Where it cannot be read, the ValueError says to
  name a file by --data."""
  where, instead = f'{task}: the data set {name}', f'; or name a file: --data={task}=FILE'
  rows = hub.load(name, config, split, where=where, instead=instead, revision=revision)
  with hub.reading(where, instead):
    return list(rows)


def draw(count: int, limit: int | None, seed: int) -> list[int]:
  """Which of `count` items: all, or `limit` of them at random, in order. A pure function, so the
  same for every model."""
  if limit is None or limit >= count:
    return list(range(count))
  return sorted(np.random.default_rng(seed).permutation(count)[:limit].tolist())


def fill(
  path: pathlib.Path,
  names: Sequence[str],
  make: Callable[[list[int]], Iterable[Any]],
  size: int = 64,
  what: str = '',
) -> list[Any]:
  """A value for each name: those that the file has, and the others from `make`, appended to it as
  they come.

  Args:
    path: JSONL of {"item", "value"}. A line that a killed process left torn is not counted, its
      item is made again.
    names: unique, in the order of the result.
    make: places in `names` -> their values, in order; a list, or a generator, whose values are kept
      one by one, so that an error half-way loses none.
    size: places that `make` gets at once.
    what: for the progress line, one every ten seconds.
  """
  done = {row['item']: row['value'] for row in journal.read(path)}
  missing = [i for i, name in enumerate(names) if name not in done]
  last = time.perf_counter()
  for start in range(0, len(missing), size):
    some = missing[start : start + size]
    values, made = iter(make(some)), 0
    for i, value in zip(some, values, strict=False):
      journal.append(path, [{'item': names[i], 'value': value}])
      done[names[i]], made = value, made + 1
    made += len(list(values))
    if made != len(some):
      raise ValueError(
        f'{what or path.stem}: {made} values for {len(some)} items; one each is needed.'
      )
    if time.perf_counter() - last > 10:
      last = time.perf_counter()
      print(f'  {what or path.stem} {start + len(some)}/{len(missing)}', flush=True)
  return [done[name] for name in names]


def first_lines(
  model: Model, path: pathlib.Path, names: Sequence[str], texts: Sequence[str], max_tokens: int
) -> list[str]:
  """The line that a model continues each text with, by greedy decoding.

  Args:
    model: a language model.
    path: keeps the lines as they come, see `fill`.
    names: of the texts, unique.
    texts: each is read as the beginning of a document.
    max_tokens: of a line; the rest of a longer one is not sampled.
  """
  rows = [model.template.text(text) for text in texts]

  def make(some: list[int]) -> list[str]:
    return completions.continuations(
      model, [rows[i] for i in some], max_tokens=max_tokens, until=('\n',)
    )

  return fill(path, names, make, what=path.stem)
