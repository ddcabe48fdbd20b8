"""What labelers hand in. An earlier answer to the same item stays as a version, and one that
comes after its lease has ended is kept all the same: no work of a person is lost.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from alignjax.label import answers as forms
from alignjax.label.assignment import current_answer, locking
from alignjax.label.catalog import hide
from alignjax.label.history import log, now
from alignjax.label.schema import answers, drafts, items, leases, tasks

# The statements are made once: to make one takes longer than to send it.
_ITEM, _PERSON = (sa.bindparam(name, type_=sa.Integer) for name in ('item', 'person'))
_GIVEN = (
  sa.select(items, tasks, leases, answers, drafts)
  .select_from(items)
  .join(tasks, tasks.c.id == items.c.task_id)
  .outerjoin(leases, (leases.c.item_id == items.c.id) & (leases.c.person_id == _PERSON))
  .outerjoin(
    answers,
    (answers.c.item_id == items.c.id) & (answers.c.person_id == _PERSON) & answers.c.current,
  )
  .outerjoin(drafts, (drafts.c.item_id == items.c.id) & (drafts.c.person_id == _PERSON))
  .where(items.c.id == _ITEM)
  .set_label_style(sa.LABEL_STYLE_TABLENAME_PLUS_COL)
)
_LOCKED = locking(sa.select(items.c.id).where(items.c.id == _ITEM), items)
_ROWS = [namedtuple(t.name, t.c.keys()) for t in (items, tasks, leases, answers, drafts)]
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

NOT_GIVEN = 'This item was not given to you.'


class Gone(ValueError):
  """The item is not this person's: it was never given to them, or it is hidden."""


class Given(NamedTuple):
  """An item that was given to a person.

  Attributes:
    item, task: their rows.
    lease: the person's lease of the item, running or ended, or None where there is an answer.
    answer: the newest version of their answer, or None: it takes the place of the lease.
    draft: what they have filled in since (save_draft), {} where that is nothing.
  """

  item: Any
  task: Any
  lease: Any
  answer: Any
  draft: dict[str, Any]


def given(connection: sa.Connection, item: int, person: int, lock: bool = False) -> Given:
  """Looks up an item that was given to a person, by one query.

  Args:
    connection: of a transaction.
    item: the number of the item.
    person: the number of the person.
    lock: whether others who submit the same item, or ask for it, wait until the transaction ends:
      each then sees the answer of the one before.

  Raises:
    Gone: if the item was never given to this person, or is hidden.
  """
  asked = dict(item=item, person=person)
  if lock and connection.dialect.name == 'postgresql':
    # By a statement of its own: a query that waits for a lock reads only the locked row again.
    connection.execute(_LOCKED, asked)
  joined = connection.execute(_GIVEN, asked).first()
  if joined is None:
    raise Gone(NOT_GIVEN)
  found, task, lease, answer, draft = _rows(joined)
  if not (lease or answer):
    raise Gone(NOT_GIVEN)
  if found.hidden:
    raise Gone('This item was taken out, so your answer to it is no longer needed.')
  return Given(found, task, lease, None if lease else answer, dict(draft.payload) if draft else {})


def _rows(joined: Sequence[Any]) -> list[Any]:
  """The rows of the tables that a query joins, None where there is none. A row's number, its first
  column, is never null."""
  rows, begin = [], 0
  for row in _ROWS:
    end = begin + len(row._fields)
    rows.append(None if joined[begin] is None else row(*joined[begin:end]))
    begin = end
  return rows


def save_draft(
  connection: sa.Connection, item: int, person: int, payload: Mapping[str, Any]
) -> None:
  """Keeps what a person has filled in so far of an item that was given to them."""
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
  _, task, lease, earlier, _ = given(connection, item, person, lock=True)
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
    instructions_version=task.version,
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
