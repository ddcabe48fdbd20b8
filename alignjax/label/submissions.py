"""What labelers hand in. An earlier answer to the same item stays as a version, and one that
comes after its lease has ended is kept all the same: no work of a person is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from alignjax.label import answers as forms
from alignjax.label.assignment import current_answer, lease_of
from alignjax.label.catalog import hide
from alignjax.label.history import log, now
from alignjax.label.schema import answers, drafts, instructions, items, leases


class Gone(ValueError):
  """The item is not this person's: it was never given to them, or it is hidden."""


def save_draft(
  connection: sa.Connection, item: int, person: int, payload: Mapping[str, Any]
) -> None:
  """Keeps what a person has filled in so far."""
  _shown(connection, item, person)
  values = dict(payload=dict(payload), at=now(connection))
  key = (drafts.c.item_id == item) & (drafts.c.person_id == person)
  if not connection.execute(drafts.update().where(key).values(**values)).rowcount:
    connection.execute(drafts.insert().values(item_id=item, person_id=person, **values))


def draft_of(connection: sa.Connection, item: int, person: int) -> dict[str, Any]:
  found = connection.execute(
    sa.select(drafts.c.payload).where(drafts.c.item_id == item, drafts.c.person_id == person)
  ).scalar()
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
  """Keeps an answer as the person's newest one. An earlier answer to the item stays as a version.

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
  shown, since = _shown(connection, item, person)
  earlier = current_answer(connection, item, person)
  at = log(connection, status, person, item, **({'amends': earlier.id} if earlier else {}))
  version = connection.execute(
    sa.select(instructions.c.version)
    .join(items, items.c.task_id == instructions.c.task_id)
    .where(items.c.id == item)
    .order_by(instructions.c.version.desc())
    .limit(1)
  ).scalar_one()
  mine = (answers.c.item_id == item) & (answers.c.person_id == person)
  connection.execute(answers.update().where(mine, answers.c.current).values(current=False))
  connection.execute(
    answers.insert().values(
      item_id=item,
      person_id=person,
      version=earlier.version + 1 if earlier else 1,
      current=True,
      status=status,
      payload=dict(payload),
      shown=shown,
      instructions_version=version,
      elapsed=at - since,
      active=active,
      at=at,
    )
  )
  for table in (leases, drafts):
    connection.execute(table.delete().where(table.c.item_id == item, table.c.person_id == person))
  _count(connection, item)


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


def _shown(connection: sa.Connection, item: int, person: int) -> tuple[list[int], float]:
  """(the order in which the person saw the responses, since when), of the lease or of the earlier
  answer."""
  hidden = connection.execute(sa.select(items.c.hidden).where(items.c.id == item)).scalar()
  if hidden:
    raise Gone('This item was taken out, so your answer to it is no longer needed.')
  lease = lease_of(connection, item, person)
  if lease is not None:
    return lease.shown, lease.since
  earlier = current_answer(connection, item, person)
  if earlier is None:
    raise Gone('This item was not given to you.')
  return earlier.shown, now(connection)


def _count(connection: sa.Connection, item: int) -> None:
  done = (
    sa.select(sa.func.count())
    .select_from(answers)
    .where(answers.c.item_id == item, answers.c.current, answers.c.status == 'done')
    .scalar_subquery()
  )
  connection.execute(items.update().where(items.c.id == item).values(answers=done))
