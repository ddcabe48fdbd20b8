"""What goes into the database and what comes out of it.

Items are made of records of any source that data/sources.py reads. Exports are JSON lines that the
readers of this package read unchanged: comparisons and demonstrations for `c.data`, judgments for
`alignjax preference --judge=file:...`.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from alignjax.data import sources
from alignjax.label import answers as forms
from alignjax.label import figures
from alignjax.label.figures import Answer
from alignjax.label.schema import answers, events, items, people, tasks
from alignjax.runtime import textfiles

Row = dict[str, Any]


def ranking_items(records: Sequence[Mapping[str, Any]], gold: bool = False) -> list[Row]:
  """Returns the items of a ranking or of toxicity labels.

  Args:
    records: {'prompt', 'responses'}, with 'policies' (who wrote each response) where that is known.
      'use_case' and 'priority' are taken over.
    gold: whether the records' 'ranks' (0 is the best) are known answers that labelers are compared
      with. 'ratings', one for each response, are known answers too.

  Raises:
    ValueError: if a record has a wrong number of responses, policies, ranks or ratings.
  """
  low, high = forms.RESPONSES
  made = []
  for number, record in enumerate(records, 1):
    where = sources.place(record, f'record {number}')
    texts = record['responses']
    if not low <= len(texts) <= high:
      raise ValueError(f'{where}: {len(texts)} responses; an item has {low} to {high}.')
    policies = record.get('policies') or [''] * len(texts)
    if not isinstance(policies, list) or len(policies) != len(texts):
      raise ValueError(f"{where}: 'policies' must name the writer of each of the responses.")
    row: Row = dict(
      prompt=record['prompt'],
      use_case=record.get('use_case'),
      responses=[
        dict(text=text, source=str(policy)) for text, policy in zip(texts, policies, strict=True)
      ],
      priority=record.get('priority'),
      extra={k: record[k] for k in ('id', 'user_id', 'round') if record.get(k) is not None},
    )
    if gold:
      row['gold'] = _gold(record, where)
    made.append(row)
  return made


def _gold(record: Mapping[str, Any], where: str) -> Row:
  ranks, ratings = record.get('ranks'), record.get('ratings')
  count = len(record['responses'])
  if ranks is None and ratings is None:
    raise ValueError(f"{where}: a known answer needs 'ranks' (0 is the best) or 'ratings'.")
  if ranks is not None:
    if len(ranks) != count or not all(type(rank) is int and rank >= 0 for rank in ranks):
      raise ValueError(f"{where}: 'ranks' must be a whole number from 0 on for each response.")
    ranks = forms.without_gaps(ranks)
  if ratings is not None and not (
    isinstance(ratings, list)
    and len(ratings) == count
    and all(isinstance(r, dict) and isinstance(r.get('flags', []), list) for r in ratings)
  ):
    raise ValueError(
      f"{where}: 'ratings' must be an object for each response, such as "
      f"{{'likert': 5, 'flags': []}}."
    )
  return dict(ranks=ranks, ratings=ratings, all_bad=False)


def samples(paths: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
  """Reads files samples.jsonl, as training stages write them, and returns (candidates, the number
  of prompts that are left out).

  Responses to one prompt become one candidate, each text once. Its policy is the folder of its file
  and the step. Of more than nine responses the newest stay. A prompt with one response
  is left out.
  """
  found: dict[str, list[dict[str, Any]]] = {}
  for path in paths:
    rows = textfiles.Records(textfiles.read(path, '--source: '), path)
    for where, row in (rows[i] for i in range(len(rows))):
      if not isinstance(row, dict) or not {'step', 'prompt', 'response'} <= row.keys():
        raise ValueError(
          f'{where}: a line of samples.jsonl has step, prompt and response; this one has not.'
        )
      policy = f'{pathlib.Path(path).absolute().parent.name}, step {row["step"]}'
      key = json.dumps(row['prompt'], sort_keys=True)
      found.setdefault(key, []).append(row | dict(policy=policy))
  made = []
  for key, rows in found.items():
    newest = sorted(rows, key=lambda row: -row['step'])
    texts = {row['response']: row for row in reversed(newest)}
    kept = sorted(texts.values(), key=lambda row: -row['step'])[: forms.RESPONSES[1]]
    if len(kept) >= forms.RESPONSES[0]:
      made.append(
        dict(
          prompt=json.loads(key),
          responses=[row['response'] for row in kept],
          policies=[row['policy'] for row in kept],
        )
      )
  return made, len(found) - len(made)


def demonstration_items(
  records: Sequence[Mapping[str, Any]], style: str | None = None, count: int = 0
) -> list[Row]:
  """Returns the items of a demonstration task.

  Args:
    records: of prompts whose response a labeler writes; with style 'user_based', use cases for
      which a labeler writes the prompt too.
    style: None where the prompts are given, otherwise 'plain', 'few_shot' or 'user_based' (paper
      3.2): what the labeler writes.
    count: how many items of style 'plain' or 'few_shot' are made; they have no records.
  """
  if style in ('plain', 'few_shot'):
    return [
      dict(prompt=None, responses=[], extra=dict(style=style, number=i)) for i in range(count)
    ]
  return [
    dict(
      prompt=None if style else record['prompt'],
      use_case=record.get('use_case'),
      responses=[],
      extra=dict(style=style, case=record['prompt'], number=number) if style else {},
    )
    for number, record in enumerate(records)
  ]


def _each(rows: Sequence[Answer], kinds: Mapping[int, str], *wanted: str) -> list[Answer]:
  """The answers of some kinds of tasks that are exported. Items with known answers are for checks,
  and their answers are not exported."""
  return [
    row
    for row in rows
    if row.status == 'done'
    and not row.item.hidden
    and not row.item.is_gold
    and kinds[row.item.task_id] in wanted
  ]


def comparisons(rows: Sequence[Answer], kinds: Mapping[int, str]) -> list[Row]:
  """Returns records for `data.comparisons`: ranks from 0, and with them the policies, the labeler,
  the order in which the responses were shown, ratings, and the pool. Where all responses were bad
  and not ranked, all ranks are equal, which training leaves out as ties."""
  made = []
  for row in _each(rows, kinds, 'ranking', 'toxicity'):
    ranks = row.payload['ranks'] or [1] * len(row.item.responses)
    record: Row = dict(
      prompt=row.item.prompt,
      responses=[r['text'] for r in row.item.responses],
      ranks=[rank - 1 for rank in ranks],
      labeler_id=row.name,
      pool=row.pool,
      shown=row.shown,
      item=row.item.id,
    )
    if any(r['source'] for r in row.item.responses):
      record['policies'] = [r['source'] for r in row.item.responses]
    if row.payload.get('ratings'):
      record['ratings'] = row.payload['ratings']
    if row.payload['all_bad']:
      record['all_bad'] = True
    made.append(record | _known(row))
  return made


def _known(row: Answer) -> Row:
  known = {k: row.item.extra[k] for k in ('user_id', 'round') if k in row.item.extra}
  use_case = row.payload.get('use_case') or row.item.use_case
  return known | ({'use_case': use_case} if use_case else {})


def demonstrations(rows: Sequence[Answer], kinds: Mapping[int, str]) -> list[Row]:
  """Returns records for `data.demonstrations`. An instruction with K examples becomes K of them,
  each with the K - 1 others as its context (paper 3.2)."""
  made = []
  for row in _each(rows, kinds, 'demonstration'):
    more = dict(labeler_id=row.name, pool=row.pool, item=row.item.id) | _known(row)
    given, examples = row.payload['prompt'], row.payload['examples']
    if not examples:
      prompt = row.item.prompt if given is None else given
      made.append(dict(prompt=prompt, response=row.payload['response']) | more)
    for i, (query, response) in enumerate(examples):
      context = [f'{q}\n{a}' for j, (q, a) in enumerate(examples) if j != i]
      made.append(
        dict(prompt='\n\n'.join([str(given), *context, query]), response=response, style='few_shot')
        | more
      )
  return made


def judgments(rows: Sequence[Answer], kinds: Mapping[int, str]) -> list[Row]:
  """Returns rows for `alignjax preference --judge=file:...`: a comparison for every two responses
  of different policies, and a rating for each response that has one."""
  made = []
  for row in _each(rows, kinds, 'ranking', 'toxicity'):
    sources_of = [r['source'] or f'response {i}' for i, r in enumerate(row.item.responses)]
    texts = [r['text'] for r in row.item.responses]
    common = dict(prompt=row.item.prompt, labeler_id=row.name)
    ranks = row.payload['ranks']
    for i, j in itertools.combinations(range(len(texts)), 2) if ranks else ():
      if sources_of[i] != sources_of[j]:
        choice = 'tie' if ranks[i] == ranks[j] else 'a' if ranks[i] < ranks[j] else 'b'
        made.append(
          dict(a=sources_of[i], b=sources_of[j], choice=choice)
          | dict(response_a=texts[i], response_b=texts[j])
          | common
        )
    for source, rating in zip(sources_of, row.payload.get('ratings') or (), strict=False):
      if 'likert' in rating:
        made.append(dict(policy=source, likert=rating['likert'], flags=rating['flags']) | common)
  return made


def everything(connection: sa.Connection) -> list[Row]:
  """Returns every version of every answer, with its item and its labeler, and then every event."""
  rows = connection.execute(
    sa.select(
      answers,
      people.c.name.label('labeler_id'),
      people.c.pool,
      tasks.c.name.label('task'),
      tasks.c.kind,
      items.c.prompt,
      items.c.responses,
      items.c.is_gold,
      items.c.hidden,
    )
    .select_from(
      answers.join(items, items.c.id == answers.c.item_id)
      .join(tasks, tasks.c.id == items.c.task_id)
      .join(people, people.c.id == answers.c.person_id)
    )
    .order_by(answers.c.id)
  )
  logged = connection.execute(sa.select(events).order_by(events.c.id))
  return [dict(row._mapping) for row in rows] + [
    dict(event=row.kind, **{k: v for k, v in row._mapping.items() if k != 'kind'}) for row in logged
  ]


EXPORTS: dict[str, Callable[[Sequence[Answer], Mapping[int, str]], list[Row]]] = dict(
  comparisons=comparisons, demonstrations=demonstrations, judgments=judgments
)
# Whose answers an export has where no pool is named. Held-out labelers make no training data (paper
# 3.4), and candidates of a screening have not been accepted yet.
POOLS: dict[str, tuple[str, ...]] = dict(
  comparisons=('training',), demonstrations=('training',), judgments=('training', 'heldout')
)


def export(
  connection: sa.Connection, what: str, task: int | None = None, pool: str | None = None
) -> list[Row]:
  """Returns the rows of an export.

  Args:
    connection: of a reading transaction.
    what: a name of EXPORTS, or 'answers' for everything there is.
    task: the number of a task; None means all.
    pool: only answers of labelers of this pool. None means the pools of POOLS, 'all' every pool.
  """
  if what == 'answers':
    return everything(connection)
  pools = (pool,) if pool else POOLS[what]
  rows = [row for row in figures.read(connection, task) if pool == 'all' or row.pool in pools]
  kinds = {row.id: row.kind for row in connection.execute(sa.select(tasks.c.id, tasks.c.kind))}
  return EXPORTS[what](rows, kinds)


def task_named(connection: sa.Connection, name: str) -> Any:
  """Returns the row of a task, or raises ValueError with the names that there are."""
  found = connection.execute(sa.select(tasks).where(tasks.c.name == name)).first()
  if found is None:
    names = connection.execute(sa.select(tasks.c.name).order_by(tasks.c.id)).scalars().all()
    raise ValueError(f'there is no task {name!r}; the tasks are: {", ".join(names) or "none yet"}.')
  return found
