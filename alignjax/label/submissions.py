"""What labelers hand in. An earlier answer to the same item stays as a version, and one that
comes after its lease has ended is kept all the same: no work of a person is lost.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from alignjax.label import answers as forms
from alignjax.label.assignment import current_answer, lease_of, locking
from alignjax.label.catalog import hide
from alignjax.label.history import log, now
from alignjax.label.schema import answers, drafts, items, leases, tasks

# The statements are made once: to make one takes longer than to send it.
_ITEM, _PERSON = (sa.bindparam(name, type_=sa.Integer) for name in ('item', 'person'))
_STATE = (
  sa.select(items.c.hidden, tasks.c.version)
  .join(tasks, tasks.c.id == items.c.task_id)
  .where(items.c.id == _ITEM)
)
_LOCKED_STATE = locking(_STATE, items)
_DRAFT = sa.select(drafts.c.payload).where(drafts.c.item_id == _ITEM, drafts.c.person_id == _PERSON)
_ENDED = [
  table.delete().where(table.c.item_id == _ITEM, table.c.person_id == _PERSON)
  for table in (leases, drafts)
]
_DONE = (
  sa.select(sa.func.count())
  .select_from(answers)
  .where(answers.c.item_id == _ITEM, answers.c.current, answers.c.status == 'done')
)
_COUNT = items.update().where(items.c.id == _ITEM).values(answers=_DONE.scalar_subquery())


class Gone(ValueError):
  """The item is not this person's: it was never given to them, or it is hidden."""


def save_draft(
  connection: sa.Connection, item: int, person: int, payload: Mapping[str, Any]
) -> None:
  """Keeps what a person has filled in so far."""
  _given(connection, item, person)
  values = dict(item_id=item, person_id=person, payload=dict(payload), at=now(connection))
  connection.execute(_save(connection.dialect.name), values)


@functools.cache
def _save(dialect: str) -> Any:
  # A page saves itself while its form is sent, so two requests may make the first draft at once.
  insert = (postgresql.insert if dialect == 'postgresql' else sqlite.insert)(drafts)
  return insert.on_conflict_do_update(
    index_elements=['item_id', 'person_id'],
    set_=dict(payload=insert.excluded.payload, at=insert.excluded.at),
  )


def draft_of(connection: sa.Connection, item: int, person: int) -> dict[str, Any]:
  found = connection.execute(_DRAFT, dict(item=item, person=person)).scalar()
  return dict(found or {})


def submit(
  connection: sa.Connection,
  item: int,
  person: int,
  payload: Mapping[str, Any],
  *,
  status: str = 'done',
  active: float | None = None,
) -> None:
  """Keeps an answer as the person's newest one. An earlier answer to the item stays as a version,
  whose times are added to those of the new one. The same answer again, as when somebody presses a
  button twice, changes nothing.

  Args:
    connection: of a writing transaction.
    item: the number of the item.
    person: the number of the person.
    payload: the answer (answers.py), {'reason'} of a skipped item, {} of a withdrawn one.
    status: 'done', 'skipped' or 'withdrawn'.
    active: the seconds in which the page was visible and used, where they are known.

  Raises:
    Gone: if the item was never given to this person, or is hidden.
  """
  version, lease, earlier = _given(connection, item, person, lock=True)
  ended = dict(item=item, person=person)
  for statement in _ENDED:
    connection.execute(statement, ended)
  if earlier and (earlier.status, earlier.payload) == (status, payload):
    return
  at = log(connection, status, person, item, **({'amends': earlier.id} if earlier else {}))
  if earlier:
    if earlier.active is not None:
      active = earlier.active + (active or 0.0)
    connection.execute(answers.update().where(answers.c.id == earlier.id).values(current=False))
  row = dict(
    item_id=item,
    person_id=person,
    version=earlier.version + 1 if earlier else 1,
    current=True,
    status=status,
    payload=dict(payload),
    shown=(lease or earlier).shown,
    instructions_version=version,
    elapsed=at - lease.since if lease else earlier.elapsed,
    active=active,
    at=at,
  )
  connection.execute(answers.insert(), row)
  connection.execute(_COUNT, ended)


def skip(connection: sa.Connection, item: int, person: int, reason: str) -> None:
  """Skips an item for a reason of answers.SKIPS. Personal data hides it from everybody."""
  if reason not in forms.SKIPS:
    raise forms.FormError('Say why you skip the item.')
  submit(connection, item, person, {'reason': reason}, status='skipped')
  if reason == 'pii':
    hide(connection, item, 'pii', person)


def withdraw(connection: sa.Connection, item: int, person: int) -> None:
  """Takes an answer back. Its earlier versions stay, and the item is open to somebody else."""
  earlier = current_answer(connection, item, person)
  if earlier is None or earlier.status == 'withdrawn':
    raise Gone('There is no answer of yours to withdraw.')
  submit(connection, item, person, {}, status='withdrawn')


def _given(
  connection: sa.Connection, item: int, person: int, lock: bool = False
) -> tuple[int, Any, Any]:
  """(the version of the instructions, the person's lease of the item, their answer to it). One of
  the last two is None: an answer takes the place of the lease.

  Args:
    connection: of a transaction.
    item: the number of the item.
    person: the number of the person.
    lock: whether others who submit the same item, or ask for it, wait until the transaction ends:
      each then sees the answer of the one before.

  Raises:
    Gone: if the item was never given to this person, or is hidden.
  """
  row = connection.execute(_LOCKED_STATE if lock else _STATE, dict(item=item)).first()
  lease = lease_of(connection, item, person)
  earlier = None if lease else current_answer(connection, item, person)
  if row is None or not (lease or earlier):
    raise Gone('This item was not given to you.')
  if row.hidden:
    raise Gone('This item was taken out, so your answer to it is no longer needed.')
  return row.version, lease, earlier
