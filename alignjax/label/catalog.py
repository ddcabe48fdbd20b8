"""Tasks and their items: made, added, edited, hidden. Each function runs inside a writing
transaction (schema.writing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from alignjax.label import answers as forms
from alignjax.label.history import add, log
from alignjax.label.schema import instructions, items, tasks, wait_for
from alignjax.runtime import fingerprints


class Conflict(ValueError):
  """Somebody else has changed the same row in the meantime."""


def add_task(
  connection: sa.Connection,
  name: str,
  kind: str,
  *,
  pool: str = 'training',
  overlap: int = 1,
  gold_rate: float = 0.0,
  ratings: bool = True,
  text: str = '',
  person: int | None = None,
) -> int:
  """Makes a task and returns its number.

  Args:
    connection: of a writing transaction.
    name: its name, which labelers see.
    kind: 'ranking', 'toxicity' or 'demonstration'.
    pool: whose labelers see it: 'training', 'heldout', 'screening', or 'all'.
    overlap: how many labelers answer each item.
    gold_rate: the share of gold items, whose answers are known, among those that a labeler gets.
    ratings: whether each response is rated before the ranking.
    text: the instructions in Markdown.
    person: who makes it.
  """
  _check_task(name=name, kind=kind, pool=pool, overlap=overlap, gold_rate=gold_rate)
  wait_for(connection, 'tasks')
  taken = connection.execute(sa.select(tasks.c.id).where(tasks.c.name == name)).scalar()
  if taken:
    raise ValueError(f'there is a task {name!r} already.')
  at = log(connection, 'task', person, name=name, kind=kind)
  number = add(
    connection,
    tasks,
    name=name,
    kind=kind,
    pool=pool,
    overlap=overlap,
    gold_rate=gold_rate,
    ratings=ratings,
    instructions=text,
    version=1,
    created=at,
  )
  connection.execute(instructions.insert().values(task_id=number, version=1, markdown=text, at=at))
  return number


def edit_task(
  connection: sa.Connection, task: int, version: int, person: int | None = None, **changes: Any
) -> None:
  """Changes a task that the editor saw at `version`.

  Raises:
    Conflict: if somebody has changed it since then.
  """
  _check_task(**changes)
  done = connection.execute(
    tasks.update()
    .where(tasks.c.id == task, tasks.c.version == version)
    .values(version=version + 1, **changes)
  )
  if done.rowcount != 1:
    raise Conflict(
      'Somebody else has changed this task since you opened it. Your text is below; theirs is what '
      'is saved. Compare them, and save again.'
    )
  row = connection.execute(sa.select(tasks).where(tasks.c.id == task)).one()
  at = log(connection, 'task edited', person, task=task, **changes)
  connection.execute(
    instructions.insert().values(
      task_id=task, version=version + 1, markdown=row.instructions, at=at
    )
  )


def _check_task(
  name: str = 'x',
  kind: str = 'ranking',
  pool: str = 'all',
  overlap: int = 1,
  gold_rate: float = 0.0,
  **_: Any,
) -> None:
  if not name.strip() or len(name) > 200:
    raise ValueError('the name of a task must have 1 to 200 characters.')
  if kind not in forms.KINDS:
    raise ValueError(f'the kind of a task must be one of {", ".join(forms.KINDS)}, not {kind!r}.')
  if pool not in (*forms.POOLS, 'all'):
    raise ValueError(
      f'the pool of a task must be one of {", ".join(forms.POOLS)} or all, not {pool!r}.'
    )
  if not 1 <= overlap <= 1000:
    raise ValueError(f'overlap={overlap}: each item needs from 1 to 1000 labelers.')
  if not 0 <= gold_rate < 1:
    raise ValueError(f'gold_rate={gold_rate}: the share of gold items must be in [0, 1).')


def key_of(prompt: Any, texts: Sequence[str], extra: Mapping[str, Any]) -> str:
  """Returns the name of an item by its content, so that a second import adds nothing twice."""
  return fingerprints.of_value([prompt, list(texts), extra.get('style'), extra.get('number')])


def add_items(
  connection: sa.Connection, task: int, rows: Sequence[Mapping[str, Any]], person: int | None = None
) -> tuple[int, int]:
  """Adds items and returns (how many were added, how many were there already).

  Args:
    connection: of a writing transaction.
    task: the number of the task.
    rows: of each item {'prompt', 'responses': [{'text', 'source'}], ...}; it may have 'use_case',
      'extra', 'gold' (an answer), 'priority' (the smallest is given first; default: their order)
      and 'overlap'.
    person: who adds them.
  """
  wait_for(connection, f'items of task {task}')
  there = set(connection.execute(sa.select(items.c.key).where(items.c.task_id == task)).scalars())
  first = (
    connection.execute(
      sa.select(sa.func.max(items.c.priority)).where(items.c.task_id == task)
    ).scalar()
    or 0.0
  )
  at = log(connection, 'items', person, task=task, count=len(rows))
  values, seen = [], set(there)
  for number, row in enumerate(rows, 1):
    extra = dict(row.get('extra') or {})
    key = key_of(row['prompt'], [r['text'] for r in row['responses']], extra)
    if key in seen:
      continue
    seen.add(key)
    priority = row.get('priority')
    values.append(
      dict(
        task_id=task,
        key=key,
        prompt=row['prompt'],
        use_case=row.get('use_case'),
        responses=list(row['responses']),
        extra=extra,
        gold=row.get('gold'),
        is_gold=row.get('gold') is not None,
        priority=first + number if priority is None else float(priority),
        overlap=row.get('overlap'),
        hidden=None,
        answers=0,
        created=at,
      )
    )
  if values:
    connection.execute(items.insert(), values)
  return len(values), len(rows) - len(values)


def prioritize(connection: sa.Connection, task: int, priorities: Mapping[int, float]) -> None:
  """Sets which items are given out first: {number of an item: priority}, the smallest first."""
  for item, priority in priorities.items():
    connection.execute(
      items.update()
      .where(items.c.id == item, items.c.task_id == task)
      .values(priority=float(priority))
    )


def hide(connection: sa.Connection, item: int, reason: str, person: int | None = None) -> None:
  """Nobody sees the item from now on. Its answers stay, and are marked in exports."""
  connection.execute(items.update().where(items.c.id == item).values(hidden=reason))
  log(connection, 'hidden', person, item, reason=reason)


def set_gold(
  connection: sa.Connection, item: int, answer: Mapping[str, Any] | None, person: int | None = None
) -> None:
  """Makes an answer the known one of an item, which labelers are compared with. None takes it
  back."""
  connection.execute(
    items.update()
    .where(items.c.id == item)
    .values(gold=sa.null() if answer is None else dict(answer), is_gold=answer is not None)
  )
  log(connection, 'gold', person, item, known=answer is not None)
