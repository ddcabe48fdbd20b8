"""Gives items to labelers.

An item is given by a lease, which ends after some time, so that an item whose labeler has left is
given to somebody else. Leases and answers together never exceed the item's overlap.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
import sqlalchemy as sa

from alignjax.label.history import log, now
from alignjax.label.schema import answers, items, leases, people, tasks

LEASE_SECONDS = 3600
PATIENCE = 0.5  # Seconds to wait for items that others are getting or submitting at this moment.

# The statements are made once: to make one takes longer than to send it.
_ITEM, _PERSON, _TASK = (
  sa.bindparam(name, type_=sa.Integer) for name in ('item', 'person', 'task')
)
_RUNNING = (
  sa.select(sa.func.count())
  .select_from(leases)
  .where(leases.c.item_id == items.c.id, leases.c.expires > sa.bindparam('at', type_=sa.Float))
  .scalar_subquery()
)
_WANTED = sa.func.coalesce(items.c.overlap, sa.bindparam('overlap', type_=sa.Integer))
# Whether the answers to an item and its running leases are fewer than its overlap.
# everybody: gold items, and those of a screening, have no limit.
_ROOM = sa.bindparam('everybody', type_=sa.Boolean) | (
  (items.c.answers < _WANTED) & (items.c.answers + _RUNNING < _WANTED)
)
_FREE = (
  sa.select(items.c.id)
  .where(
    items.c.task_id == _TASK,
    items.c.is_gold == sa.bindparam('gold', type_=sa.Boolean),
    items.c.hidden.is_(None),
    _ROOM,
    ~sa.exists().where(answers.c.item_id == items.c.id, answers.c.person_id == _PERSON),
    ~sa.exists().where(leases.c.item_id == items.c.id, leases.c.person_id == _PERSON),
  )
  .order_by(items.c.priority, items.c.id)
  .limit(1)
)
_IF_ROOM = sa.select(items).where(items.c.id == _ITEM, _ROOM)
_OWN = (
  sa.select(leases)
  .join(items, items.c.id == leases.c.item_id)
  .where(leases.c.person_id == _PERSON, items.c.task_id == _TASK, items.c.hidden.is_(None))
  .order_by(leases.c.id)
)
_NUMBER = (
  sa.select(sa.func.count())
  .select_from(answers.join(items, items.c.id == answers.c.item_id))
  .where(answers.c.person_id == _PERSON, answers.c.version == 1, items.c.task_id == _TASK)
)
_TASK_ROW = sa.select(tasks).where(tasks.c.id == _TASK)
_CURRENT = sa.select(answers).where(
  answers.c.item_id == _ITEM, answers.c.person_id == _PERSON, answers.c.current
)


def locking(query: sa.Select, table: sa.Table, skip: bool = False) -> sa.Select:
  """A query that locks the rows of a table until the transaction ends, on PostgreSQL. skip: whether
  it passes over those that another transaction has locked, instead of waiting for it."""
  return query.with_for_update(of=table, key_share=True, skip_locked=skip)


_FREE_LOCKED = locking(_FREE, items, skip=True)
_ITEM_LOCKED = locking(sa.select(items.c.is_gold).where(items.c.id == _ITEM), items, skip=True)
_PERSON_LOCKED = locking(sa.select(people.c.id).where(people.c.id == _PERSON), people)


def one_request_at_a_time(connection: sa.Connection, person: int) -> None:
  """Waits until no other writing request of this person is open. On SQLite there is none."""
  if connection.dialect.name == 'postgresql':
    connection.execute(_PERSON_LOCKED, dict(person=person))


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
  asked: dict[str, Any] = dict(task=task, person=person)
  # Two requests of a person at once, as of two windows, get the same item.
  one_request_at_a_time(connection, person)
  mine = connection.execute(_OWN, asked).all()
  row = connection.execute(_TASK_ROW, asked).one()
  asked['overlap'] = row.overlap
  for lease in mine:
    if _renew(connection, row, lease, asked, seconds):
      return lease.item_id
  for gold in _kinds(connection, row, asked):
    found = _free_item(connection, asked | dict(gold=gold, everybody=_everybody(row, gold)))
    if found is not None:
      at = log(connection, 'leased', person, found.id)
      given = dict(
        item_id=found.id,
        person_id=person,
        shown=order_of(found.id, person, len(found.responses)),
        since=at,
        expires=at + seconds,
      )
      connection.execute(leases.insert(), given)
      return found.id
  return None


def _kinds(connection: sa.Connection, task: Any, asked: dict[str, Any]) -> tuple[bool, ...]:
  """Which items are looked for, one after the other: with a known answer (True) or without."""
  if not task.gold_rate and task.pool != 'screening':
    return (False,)
  number = connection.execute(_NUMBER, asked).scalar_one()
  draw = np.random.default_rng([task.id, asked['person'], number]).random()
  return (True, False) if draw < task.gold_rate else (False, True)


def _everybody(task: Any, gold: bool) -> bool:
  """Whether an item is given to everybody, however many have answered it."""
  return gold or task.pool == 'screening'


def _free_item(connection: sa.Connection, asked: dict[str, Any]) -> Any:
  """An item that nobody has to answer any more than `overlap` says, locked until the transaction
  ends, or None."""
  asked, began = asked | dict(at=now(connection)), time.monotonic()
  while True:
    number = connection.execute(_FREE_LOCKED, asked).scalar()
    if number is not None:
      # PostgreSQL may have chosen the item before somebody else got it. It is locked now.
      found = connection.execute(_IF_ROOM, asked | dict(item=number)).first()
      if found is not None:
        return found
    elif connection.dialect.name == 'sqlite' or time.monotonic() > began + PATIENCE:
      return None
    elif connection.execute(_FREE, asked).first() is None:
      return None
    else:
      time.sleep(0.01)  # All that are left are locked: some may be free when that ends.


def _renew(
  connection: sa.Connection, task: Any, lease: Any, asked: dict[str, Any], seconds: float
) -> bool:
  """Prolongs a person's lease. It is False where the lease has ended and others have taken the
  item."""
  item = connection.execute(_ITEM_LOCKED, dict(item=lease.item_id)).first()
  at = now(connection)
  if item is None:  # Somebody is getting or submitting it: let the lease be as it is.
    return lease.expires > at
  if lease.expires <= at:  # Then it does not count any more.
    limit = dict(item=lease.item_id, at=at, everybody=_everybody(task, item.is_gold))
    if connection.execute(_IF_ROOM, asked | limit).first() is None:
      return False
  connection.execute(leases.update().where(leases.c.id == lease.id).values(expires=at + seconds))
  return True


def current_answer(connection: sa.Connection, item: int, person: int) -> Any:
  """The newest version of a person's answer to an item, or None."""
  return connection.execute(_CURRENT, dict(item=item, person=person)).first()
