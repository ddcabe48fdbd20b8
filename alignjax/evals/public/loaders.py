"""The data of the public tasks: checked records from a local file or from the Hugging Face hub.

A local file is JSONL (.gz) with the fields of the hub's data set, SQuAD's nested JSON, or
TruthfulQA's list. A folder has two files, FOLDER/train.* for the few-shot examples and
FOLDER/validation.* (or test.*, dev.*).
"""

from __future__ import annotations

import itertools
import json
import pathlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from alignjax.data import hub
from alignjax.runtime import files, textfiles

POOL = 1000  # Records of the hub's training split that few-shot examples are drawn from.
# The types of the items of lists with these names.
OF_LISTS = dict(endings=str, questions=str, text=str, texts=list, choices=str, labels=int)
BOUND = 300_000  # Records of a split that are read for a draw.


def local(
  task: str, data: str, fields: Mapping[str, type | tuple]
) -> dict[str, list[dict[str, Any]]]:
  """Returns {'validation': records} of a file, and also 'train' for a folder.

  Args:
    task: the name of the task.
    data: the file or folder.
    fields: {name: type} of the fields, where 'a.b' is the field b of the field a.

  Raises:
    ValueError: A field is missing or has another type. The message names the file, the line and the
      field.
  """
  path = files.folder(data)
  if not path.is_dir():
    return {'validation': _records(path, fields)}
  out = {}
  for split, names in (('train', ('train',)), ('validation', ('validation', 'dev', 'test'))):
    found = [p for name in names for p in sorted(path.glob(f'{name}*.json*'))]
    if not found:
      raise FileNotFoundError(
        f'--data={task}={data}: the folder has no file {" or ".join(f"{n}*.json*" for n in names)}.'
      )
    out[split] = _records(found[0], fields)
  return out


def _records(path: pathlib.Path, fields: Mapping[str, type | tuple]) -> list[dict[str, Any]]:
  records = []
  for where, record in _rows(path, textfiles.read(path)):
    _check(record, fields, where)
    records.append({name: record[name] for name in dict.fromkeys(f.split('.')[0] for f in fields)})
  if not records:
    raise ValueError(f'{path} has no records.')
  return records


def _rows(path: pathlib.Path, text: str) -> Iterator[tuple[str, Any]]:
  """Yields (location, record) from JSONL, a list of records, or SQuAD's articles."""
  try:
    whole = json.loads(text) if text.lstrip()[:1] == '{' else None
  except (ValueError, RecursionError):
    whole = None  # JSONL
  if isinstance(whole, dict) and isinstance(whole.get('data'), list):
    yield from _squad(path, textfiles.parse(text, str(path))['data'])
    return
  for where, record in textfiles.Records(text, path):
    yield where, _lists(record)


def _squad(path: pathlib.Path, articles: list) -> Iterator[tuple[str, Any]]:
  """Yields the questions of SQuAD's nested JSON in the form of the hub's data set."""
  for i, article in enumerate(articles):
    try:
      for paragraph in article['paragraphs']:
        for question in paragraph['qas']:
          texts = [a['text'] for a in question['answers']]
          yield (
            f'{path}, article {i}',
            dict(
              title=article['title'],
              context=paragraph['context'],
              question=question['question'],
              answers=dict(text=texts),
            ),
          )
    except (KeyError, TypeError) as error:
      raise ValueError(
        f'{path}, article {i} does not have the form of SQuAD ({type(error).__name__}: {error}).'
      ) from None


def _lists(record: Any) -> Any:
  """Converts TruthfulQA's {answer: 0 or 1} to the hub's form: {'choices': [...], 'labels': [...]},
  with the true answers first."""
  if not isinstance(record, dict):
    return record
  out = dict(record)
  for name in ('mc1_targets', 'mc2_targets'):
    targets = record.get(name)
    if (
      isinstance(targets, dict)
      and targets
      and all(v in (0, 1) and not isinstance(v, list) for v in targets.values())
    ):
      ordered = sorted(targets.items(), key=lambda item: -item[1])
      out[name] = dict(
        choices=[text for text, _ in ordered], labels=[int(label) for _, label in ordered]
      )
  return out


def _check(record: Any, fields: Mapping[str, type | tuple], where: str) -> None:
  if not isinstance(record, dict):
    raise ValueError(f'{where}: a record must be an object, not {type(record).__name__}.')
  for field, expected in fields.items():
    value = record
    for name in field.split('.'):
      if not isinstance(value, dict) or name not in value:
        raise ValueError(
          f'{where}: field {field!r} is missing; a record has {sorted(fields)}, this one has '
          f'{sorted(record)}.'
        )
      value = value[name]
    if not isinstance(value, expected) or isinstance(value, bool):
      kinds = ' or '.join(
        t.__name__ for t in (expected if isinstance(expected, tuple) else (expected,))
      )
      raise ValueError(f'{where}: field {field!r} must be {kinds}, not {type(value).__name__}.')
    inner = OF_LISTS.get(field.rpartition('.')[2])
    if (
      inner
      and isinstance(value, list)
      and not all(isinstance(x, inner) and not isinstance(x, bool) for x in value)
    ):
      raise ValueError(
        f'{where}: field {field!r} must be a list of {inner.__name__}, not {value!r:.100}.'
      )


def of_hub(
  task: str, config: Mapping[str, Any], fields: Mapping[str, type | tuple], shots: bool, seed: int
) -> dict[str, list[dict[str, Any]]]:
  """Returns the records of the data set that a task file names, in the form of `local`.

  They are the evaluated split and, if `shots` is set, POOL records (or runs of records, see `draw`)
  of the split that the examples come from, drawn by the seed. The data set is read as a stream, so
  that nothing is stored on disk.
  """
  path, name, more = (
    config['dataset_path'],
    config.get('dataset_name'),
    config.get('metadata') or {},
  )
  evaluated = config.get('test_split') or config['validation_split']
  wanted = {'validation': (evaluated, more.get('items'))}
  if shots and config.get('fewshot_split', evaluated) != evaluated:
    wanted['train'] = (config['fewshot_split'], POOL)
  out = {}
  where, instead = f'{task}: the data set {path}', f'; or name a file: --data={task}=FILE'
  for ours, (split, most) in wanted.items():
    rows = hub.load(path, name, split, where=where, instead=instead, streaming=True)
    with hub.reading(where, instead):
      out[ours] = list(rows) if most is None else draw(rows, most, seed, more.get('together') or ())
    for i, record in enumerate(out[ours]):
      _check(record, fields, f'{path}, {split} {i}')
  return out


def draw(
  rows: Iterable[dict[str, Any]], count: int, seed: int, together: Sequence[str] = ()
) -> list[dict[str, Any]]:
  """Draws `count` records with equal probability and returns them in their order. Data sets are
  sorted, so the first records would belong to a few articles.

  The records are read in one pass, of at most the first BOUND records, which is more than any of
  these data sets has, except TL;DR.

  Args:
    rows: the records.
    count: the number of records, or of runs of records.
    seed: the seed of the draw.
    together: fields. Consecutive records that have the same values of these fields, such as the
      questions of a paragraph, form a run and are drawn together.
  """
  rng, chosen = random.Random(seed), []
  number = itertools.count()

  def run(row):
    return [row[name] for name in together] if together else next(number)

  for i, (_, group) in enumerate(itertools.groupby(itertools.islice(rows, BOUND), run)):
    place = i if i < count else rng.randrange(i + 1)
    if place < count:
      chosen[place : place + 1] = [(i, list(group))]
  return [row for _, group in sorted(chosen, key=lambda x: x[0]) for row in group]
