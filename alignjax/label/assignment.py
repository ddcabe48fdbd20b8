"""Gives items to labelers.

An item is given by a lease, which ends after some time, so that an item whose labeler has left is
given to somebody else. Leases and answers together never exceed the item's overlap.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import sqlalchemy as sa

from alignjax.label.history import log, now
from alignjax.label.schema import answers, items, leases, tasks

LEASE_SECONDS = 3600


def order_of(item: int, person: int, count: int) -> list[int]:
  """Returns the order in which a person sees the responses of an item, as their numbers. It is the
  same whenever it is computed, and uniform over items and people."""
  digest = hashlib.sha256(f'order/{item}/{person}'.encode()).digest()
  rng = np.random.default_rng(list(digest))
  return rng.permutation(count).tolist()


def next_item(
  connection: sa.Connection, task: int, person: int, seconds: float = LEASE_SECONDS
) -> int | None:
  """Gives an item of a task to a person and returns its number, or None if there is none for them.

  The person's own unfinished item comes first. Then, at the task's gold rate, an item whose answer
  is known, and otherwise the open item with the smallest priority. It has never been given to this
  person before.
  """
  at = now(connection)
  mine = connection.execute(
    sa.select(leases.c.id, leases.c.item_id)
    .join(items, items.c.id == leases.c.item_id)
    .where(leases.c.person_id == person, items.c.task_id == task, items.c.hidden.is_(None))
    .order_by(leases.c.id)
  ).all()
  for lease in mine:
    if _renew(connection, lease.id, lease.item_id, person, at, seconds):
      return lease.item_id
  row = connection.execute(sa.select(tasks).where(tasks.c.id == task)).one()
  number = connection.execute(
    sa.select(sa.func.count())
    .select_from(answers.join(items, items.c.id == answers.c.item_id))
    .where(answers.c.person_id == person, answers.c.version == 1, items.c.task_id == task)
  ).scalar_one()
  draw = np.random.default_rng([task, person, number]).random()
  wanted = draw < row.gold_rate
  for gold in (wanted, not wanted) if row.gold_rate or row.pool == 'screening' else (False,):
    found = _free_item(connection, row, person, at, gold)
    if found is not None:
      count = len(found.responses)
      connection.execute(
        leases.insert().values(
          item_id=found.id,
          person_id=person,
          shown=order_of(found.id, person, count),
          since=at,
          expires=at + seconds,
        )
      )
      log(connection, 'leased', person, found.id)
      return found.id
  return None


def _taken(item: Any, at: float, but: int | None = None) -> Any:
  """The current answers and the running leases of an item, as an expression. but: a person whose
  lease does not count."""
  running = (
    sa.select(sa.func.count())
    .select_from(leases)
    .where(leases.c.item_id == item.id, leases.c.expires > at)
  )
  if but is not None:
    running = running.where(leases.c.person_id != but)
  return item.answers + running.scalar_subquery()


def _free_item(connection: sa.Connection, task: Any, person: int, at: float, gold: bool) -> Any:
  """An item that nobody has to answer any more than `overlap` says, locked until the transaction
  ends. Gold items, and those of a screening, are for everybody."""
  everybody = gold or task.pool == 'screening'
  overlap = sa.func.coalesce(items.c.overlap, task.overlap)
  seen = sa.exists().where(answers.c.item_id == items.c.id, answers.c.person_id == person)
  left = sa.exists().where(leases.c.item_id == items.c.id, leases.c.person_id == person)
  query = (
    sa.select(items)
    .where(items.c.task_id == task.id, items.c.is_gold == gold, items.c.hidden.is_(None))
    .where(~seen, ~left)
    .order_by(items.c.priority, items.c.id)
    .limit(1)
  )
  if not everybody:
    query = query.where(items.c.answers < overlap, _taken(items.c, at) < overlap)
  refused: list[int] = []
  while True:
    found = connection.execute(
      query.where(items.c.id.not_in(refused)).with_for_update(skip_locked=True, of=items)
    ).first()
    if found is None or everybody:
      return found
    # PostgreSQL may have chosen the row before another transaction gave it out; now it is locked.
    taken = connection.execute(
      sa.select(_taken(items.c, at) < overlap).where(items.c.id == found.id)
    ).scalar_one()
    if taken:
      return found
    refused.append(found.id)


def _renew(
  connection: sa.Connection, lease: int, item: int, person: int, at: float, seconds: float
) -> bool:
  """Prolongs a person's lease. It is False where the lease has ended and others have taken the
  item."""
  row = connection.execute(
    sa.select(items, tasks.c.overlap.label('usual'), tasks.c.pool)
    .join(tasks, tasks.c.id == items.c.task_id)
    .where(items.c.id == item)
    .with_for_update(of=items)
  ).one()
  others = connection.execute(
    sa.select(_taken(items.c, at, but=person)).where(items.c.id == item)
  ).scalar_one()
  expired = connection.execute(
    sa.select(leases.c.expires <= at).where(leases.c.id == lease)
  ).scalar_one()
  limited = not (row.is_gold or row.pool == 'screening')
  if expired and limited and others >= (row.overlap or row.usual):
    return False
  connection.execute(leases.update().where(leases.c.id == lease).values(expires=at + seconds))
  return True


def lease_of(connection: sa.Connection, item: int, person: int) -> Any:
  """The lease of an item to a person, running or ended, or None."""
  return connection.execute(
    sa.select(leases).where(leases.c.item_id == item, leases.c.person_id == person)
  ).first()


def current_answer(connection: sa.Connection, item: int, person: int) -> Any:
  """The newest version of a person's answer to an item, or None."""
  return connection.execute(
    sa.select(answers).where(
      answers.c.item_id == item, answers.c.person_id == person, answers.c.current
    )
  ).first()
