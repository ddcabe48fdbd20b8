"""The items of a task: they are read from a file or the hub and drawn by the seed, and the value
that is computed for each item is stored as it arrives."""

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
  """Returns the rows of a .jsonl (or .json), .csv or .tsv file, which may be compressed with gzip.

  Args:
    path: the file.
    columns: the columns that every row must have, either names of text columns or {name: type}.
    delimiter: the delimiter of a .csv file. A .tsv file has tabs and no quotes.

  Raises:
    ValueError: A column is missing or has another type. The message names file, line and column.
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
      raise ValueError(f'{where} lacks {", ".join(map(repr, missing))}; the row has {has}.')
    for name, expected in types.items():
      if not isinstance(row[name], expected):
        allowed = expected if isinstance(expected, tuple) else (expected,)
        kinds = ' or '.join(textfiles.kind(one()) for one in allowed)
        raise ValueError(f'{where}: {name!r} must be {kinds}, not {textfiles.kind(row[name])}.')
  if not rows:
    raise ValueError(f'{path} has no rows.')
  return [row for _, row in rows]


def _table(text: str, path: str, delimiter: str, quoting: int) -> list[tuple[str, dict[str, str]]]:
  """Returns ('FILE, line N', row) for each row of separated values. The first row holds the names
  of the columns, and N is the line in which the row ends."""
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
          raise ValueError(
            f'{where}: two columns have the same name; the names are {", ".join(map(repr, names))}.'
          )
      elif len(cells) > len(names):
        raise ValueError(
          f'{where} has {len(cells)} cells, but there are {len(names)} columns; '
          f'text with {delimiter!r} in it must be quoted.'
        )
      else:
        rows.append((where, dict(zip(names, cells, strict=False))))
  except csv.Error as error:
    raise ValueError(
      f'{path}, line {reader.line_num} cannot be read as separated values ({error}).'
    ) from error
  return rows


def of_hub(
  task: str, name: str, config: str | None, split: str, revision: str | None = None
) -> list[dict[str, Any]]:
  """Returns the rows of a data set of the Hugging Face hub. If it cannot be read, a ValueError says
  how to name a local file by --data.

  A column of class labels holds their names, as a file of the same data does, and not the numbers
  that the hub stores.
  """
  where, instead = f'{task}: the data set {name}', f'; or name a file: --data={task}=FILE'
  rows = hub.load(name, config, split, where=where, instead=instead, revision=revision)
  with hub.reading(where, instead):
    # A feature that is a class label has `int2str`; -1 stands for a missing label.
    features = getattr(rows, 'features', None) or {}
    labels = {k: f for k, f in features.items() if hasattr(f, 'int2str')}

    def named(row):
      words = {k: f.int2str(row[k]) for k, f in labels.items() if row[k] not in (None, -1)}
      return {**row, **words}

    return [named(row) for row in rows]


def draw(count: int, limit: int | None, seed: int) -> list[int]:
  """Returns the numbers of the chosen items in ascending order: all `count` items, or `limit` of
  them drawn at random. The choice depends on the arguments alone, so it is the same for every
  model."""
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
  """Returns a value for each name. Values that the file already holds are reused; the others come
  from `make` and are appended to the file as they arrive.

  Args:
    path: a JSON-lines file of {"item", "value"}. A torn line, left by a killed process, is ignored
      and its value is computed again.
    names: unique names, in the order of the result.
    make: a function that takes positions in `names` and returns their values in order. It may be a
      generator; its values are then stored one by one, so that an error half-way loses none.
    size: the number of positions that `make` gets at once.
    what: the label of the progress line, which is printed every ten seconds.
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
  """Returns the line that the model continues each text with, by greedy decoding.

  Args:
    model: a language model.
    path: the file that stores the lines as they arrive (see `fill`).
    names: unique names of the texts.
    texts: the texts. Each is read as the beginning of a document.
    max_tokens: the length limit of a line in tokens. The rest of a longer line is not sampled.
  """
  rows = [model.template.text(text) for text in texts]

  def make(some: list[int]) -> list[str]:
    return completions.continuations(
      model, [rows[i] for i in some], max_tokens=max_tokens, until=('\n',)
    )

  return fill(path, names, make, what=path.stem)
