"""The items of a task: read from a file or the hub, drawn by the seed, and what was made for each of them, kept as it comes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from alignjax.evals import kept


def read(path: str | pathlib.Path, columns: Sequence[str] = (), delimiter: str = ',') -> list[dict[str, Any]]:
  """Rows of a .jsonl, .csv or .tsv file, plain or .gz. A row without one of the columns is an error with file and line.

  delimiter: of .csv; .tsv has tabs and no quotes.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(f'{path} is a folder; name the file in it.')
  raw = path.read_bytes()
  try:
    text = (gzip.decompress(raw) if path.suffix == '.gz' else raw).decode('utf-8-sig')
  except (OSError, EOFError, UnicodeDecodeError) as error:
    raise ValueError(f'{path}: not a whole text file in UTF-8, plain or gzip ({error}).') from error
  kind = path.name.removesuffix('.gz').rpartition('.')[2]
  if kind in ('jsonl', 'json'):
    rows = []
    for number, line in enumerate(text.split('\n'), 1):
      if line.strip():
        try:
          rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
          raise ValueError(f'{path}, line {number}: not JSON ({error.msg}).') from error
  else:
    reader = csv.DictReader(io.StringIO(text, newline=''), delimiter='\t' if kind == 'tsv' else delimiter,
                            quoting=csv.QUOTE_NONE if kind == 'tsv' else csv.QUOTE_MINIMAL)
    rows = [(reader.line_num, row) for row in reader]
  for number, row in rows:
    missing = [c for c in columns if not isinstance(row, dict) or row.get(c) is None]
    if missing:
      has = sorted(k for k in row if k) if isinstance(row, dict) else type(row).__name__
      raise ValueError(f'{path}, line {number}: no {", ".join(map(repr, missing))}; the row has {has}.')
  if not rows:
    raise ValueError(f'{path}: no rows.')
  return [row for _, row in rows]


def hub(task: str, name: str, config: str | None, split: str, revision: str | None = None) -> list[dict[str, Any]]:
  """Rows of a data set of the Hugging Face hub; where it cannot be had, an error that says --data."""
  instead = f'or name a file: --data={task}=FILE'
  try:
    import datasets
  except ModuleNotFoundError:
    raise ValueError(f'{task}: the hub needs the datasets library: pip install datasets, {instead}.') from None
  try:
    return list(datasets.load_dataset(name, config, split=split, revision=revision))
  except Exception as error:  # noqa: BLE001 the library and its downloads raise many kinds
    first = (str(error).splitlines() or [''])[0][:300]
    raise ValueError(f'{task}: {name} cannot be read from the hub ({type(error).__name__}: {first}); {instead}.') from error


def draw(count: int, limit: int | None, seed: int) -> list[int]:
  """Which of `count` items: all, or `limit` of them at random, in order. A pure function, so the same for every model."""
  if limit is None or limit >= count:
    return list(range(count))
  return sorted(np.random.default_rng(seed).permutation(count)[:limit].tolist())


def fill(path: pathlib.Path, names: Sequence[str], make: Callable[[list[int]], Iterable[Any]], size: int = 64,
         what: str = '') -> list[Any]:
  """A value for each name: those that the file has, and the others from `make`, appended to it as they come.

  Args:
    path: JSONL of {"item", "value"}. A line that a killed process left torn is not counted, its item is made again.
    names: unique, in the order of the result.
    make: places in `names` -> their values, in order; a list, or a generator, whose values are kept one by one, so that an
      error half-way loses none.
    size: places that `make` gets at once.
    what: for the progress line, one every ten seconds.
  """
  done = {row['item']: row['value'] for row in kept.read(path)}
  missing = [i for i, name in enumerate(names) if name not in done]
  last = time.perf_counter()
  for start in range(0, len(missing), size):
    some = missing[start:start + size]
    values, made = iter(make(some)), 0
    for i, value in zip(some, values, strict=False):
      kept.append(path, [{'item': names[i], 'value': value}])
      done[names[i]], made = value, made + 1
    made += len(list(values))
    if made != len(some):
      raise ValueError(f'{what or path.stem}: {made} values for {len(some)} items; one each is needed.')
    if time.perf_counter() - last > 10:
      last = time.perf_counter()
      print(f'  {what or path.stem} {start + len(some)}/{len(missing)}', flush=True)
  return [done[name] for name in names]
