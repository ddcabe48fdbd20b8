"""Rankings of the items of a round (alignjax/rounds.py) in a given order: by the sandbox's
labelers, directly or as clients of the labeling server, or by people.

An item is {'prompt', 'responses', 'policies', 'round', 'number'}, with 'use_case' and 'user_id'
where they are known and, in the sandbox, 'features', what its labelers see of each response. No two
responses of an item are the same, and no two items.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alignjax import sandbox

if TYPE_CHECKING:
  import sqlalchemy as sa

Row = dict[str, Any]
# What a ranking has in the file of a round, wherever it comes from.
FIELDS = (
  'prompt',
  'responses',
  'ranks',
  'policies',
  'round',
  'labeler_id',
  'use_case',
  'user_id',
  'ratings',
  'all_bad',
)


class Missing(Exception):
  """People have not made all rankings yet. The message says how many are missing."""


def by_sandbox(
  items: Sequence[Row], labels: int, labelers: sandbox.Labelers, seed: int
) -> list[Row]:
  """Returns rankings of the first `labels` items. The training labelers take items in turn."""
  made = []
  for position, item in enumerate(items[:labels]):
    labeler = int(labelers.train[position % len(labelers.train)])
    ranks = _ranks(item, labeler, labelers, seed)
    made.append(_shared(dict(item, ranks=ranks, labeler_id=_name(labeler))))
  return made


def _shared(row: Row) -> Row:
  return {field: row[field] for field in FIELDS if row.get(field) is not None}


def _name(labeler: int) -> str:
  return f'labeler-{labeler}'


def _ranks(item: Row, labeler: int, labelers: sandbox.Labelers, seed: int) -> list[int]:
  """The ranks that a labeler of the sandbox gives, whenever and however they are asked."""
  rng = np.random.default_rng([seed, item['round'], item['number'], labeler])
  return labelers.rank(np.asarray(item['features']), labeler, rng).tolist()


def by_people(engine: sa.Engine, task: str, items: Sequence[Row], labels: int) -> list[Row]:
  """Puts the first `labels` items into the labeling database, for training labelers, and returns
  their rankings once they are there.

  The order of the items is their priority, and of more rankings the first in this order count. For
  every item that somebody has skipped, or that no longer can be ranked, another call adds the next
  one, so that people rank hardly more than what is used. When the round has its rankings, the items
  that nobody has answered or holds are taken out.

  Args:
    engine: the database (schema.connect).
    task: the name of the task, which labelers see.
    items: in the order in which they are to be labelled.
    labels: how many rankings are wanted.

  Raises:
    Missing: rankings are missing.
    ValueError: the task has other items, or too few are left.
  """
  from alignjax.label import catalog, schema

  with schema.writing(engine) as connection:
    number, made = _task(connection, task, items, ratings=True)
    catalog.add_items(connection, number, made[:labels])
    lost = max(0, _touched(connection, number) - len(_answered(connection, number)))
    catalog.add_items(connection, number, made[labels : labels + lost])
    rows, left = _answered(connection, number), _open(connection, number)
    if len(rows) >= labels:
      _close(connection, number)
      return rows[:labels]
  if len(rows) + left < labels:
    raise ValueError(
      f'{task!r} has {len(rows)} of {labels} rankings, and only {left} items that can still be '
      f'ranked. Lower rounds.labels of this round, or let a researcher put items back.'
    )
  raise Missing(
    f'{len(rows)} of the {labels} rankings of {task!r} are there, {labels - len(rows)} are missing.'
  )


def by_clients(
  engine: sa.Engine,
  task: str,
  items: Sequence[Row],
  labels: int,
  labelers: sandbox.Labelers,
  seed: int,
) -> list[Row]:
  """Returns the rankings of `by_sandbox`, made over HTTP: the labelers of the sandbox log in to a
  server on this machine and answer what it gives them."""
  from alignjax.label import catalog, client, schema

  ids = [int(labeler) for labeler in labelers.train]
  with schema.writing(engine) as connection:
    number, made = _task(connection, task, items, ratings=False)
    catalog.add_items(connection, number, made)
    done = len(_answered(connection, number))
    passwords = _accounts(connection, [_name(labeler) for labeler in ids])
  with contextlib.ExitStack() as stack:
    url = stack.enter_context(_serving(engine))
    sessions: dict[int, client.Labeler] = {}
    # The server gives the next item to whoever has handed one in. So when all of them hold one,
    # in turn, they go on in turn.
    for labeler in [ids[(done + i) % len(ids)] for i in range(len(ids))]:
      sessions[labeler] = client.Labeler(url)
      stack.callback(sessions[labeler].http.close)
      sessions[labeler].login(_name(labeler), passwords[_name(labeler)])
      sessions[labeler].next_item(number)
    for position in range(done, labels):
      labeler, item = ids[position % len(ids)], items[position]
      page = sessions[labeler].next_item(number)
      if page is None or sorted(page['responses']) != sorted(item['responses']):
        raise ValueError(
          f'the server gave {_name(labeler)} another item than number {position + 1} of {task!r}: '
          f'somebody else has answered items of this task. Use another rounds.database.'
        )
      ranks = dict(zip(item['responses'], _ranks(item, labeler, labelers, seed), strict=True))
      sessions[labeler].submit(page, [ranks[text] + 1 for text in page['responses']])
  with schema.writing(engine) as connection:
    rows = _answered(connection, number)
    _close(connection, number)
  return rows[:labels]


def _task(
  connection: sa.Connection, name: str, items: Sequence[Row], ratings: bool
) -> tuple[int, list[Row]]:
  """Returns (the number of the task, which has no other items than these, the items as
  catalog.add_items takes them, in their order). A task that is not there yet is added."""
  import sqlalchemy as sa

  from alignjax.label import catalog, exchange, schema

  rows = exchange.ranking_items([dict(item, priority=i) for i, item in enumerate(items)])
  keys = {
    catalog.key_of(row['prompt'], [r['text'] for r in row['responses']], row['extra'])
    for row in rows
  }
  found = connection.execute(sa.select(schema.tasks).where(schema.tasks.c.name == name)).first()
  if found is None:
    number = catalog.add_task(connection, name, 'ranking', pool='training', ratings=ratings)
  else:
    number = found.id
    there = connection.execute(
      sa.select(schema.items.c.key).where(schema.items.c.task_id == number)
    ).scalars()
    if found.kind != 'ranking' or set(there) - keys:
      raise ValueError(
        f'the labeling database has a task {name!r} with other items than those of this round. '
        f'Set rounds.task, the name of the tasks of this run, or use another rounds.database.'
      )
  return number, rows


def _answered(connection: sa.Connection, task: int) -> list[Row]:
  """The rankings of a task by training labelers, in the order of its items."""
  import sqlalchemy as sa

  from alignjax.label import exchange
  from alignjax.label.schema import items

  found = connection.execute(sa.select(items.c.id, items.c.priority).where(items.c.task_id == task))
  priority = {row.id: row.priority for row in found}
  rows = exchange.export(connection, 'comparisons', task, 'training')
  return [_shared(row) for row in sorted(rows, key=lambda row: priority[row['item']])]


def _unanswered(task: int) -> Any:
  """The condition of the items that can still be answered."""
  from alignjax.label.schema import items

  return (items.c.task_id == task) & items.c.hidden.is_(None) & (items.c.answers == 0)


def _open(connection: sa.Connection, task: int) -> int:
  import sqlalchemy as sa

  from alignjax.label.schema import items

  return connection.execute(
    sa.select(sa.func.count()).select_from(items).where(_unanswered(task))
  ).scalar_one()


def _touched(connection: sa.Connection, task: int) -> int:
  """The number of items that were answered in any way, skipped, or taken out."""
  import sqlalchemy as sa

  from alignjax.label.schema import answers, items

  said = sa.exists().where(answers.c.item_id == items.c.id)
  found = (items.c.task_id == task) & (items.c.hidden.is_not(None) | said)
  return connection.execute(sa.select(sa.func.count()).select_from(items).where(found)).scalar_one()


def _close(connection: sa.Connection, task: int) -> None:
  """Takes out the items that nobody has answered and nobody works on."""
  import sqlalchemy as sa

  from alignjax.label import catalog
  from alignjax.label.schema import items, leases

  held = sa.exists().where(leases.c.item_id == items.c.id)
  for item in connection.execute(sa.select(items.c.id).where(_unanswered(task), ~held)).scalars():
    catalog.hide(connection, item, 'the round has ended')


def _accounts(connection: sa.Connection, names: Sequence[str]) -> dict[str, str]:
  """Makes the accounts of programs that label, or gives them new passwords: {name: password}."""
  import sqlalchemy as sa

  from alignjax.label import accounts
  from alignjax.label.schema import people

  made = {}
  for name in names:
    made[name] = secrets.token_urlsafe(16)
    number = connection.execute(sa.select(people.c.id).where(people.c.name == name)).scalar()
    if number is None:
      accounts.add_person(connection, name, made[name], 'labeler')
    else:
      accounts.set_password(connection, number, made[name])
  return made


@contextlib.contextmanager
def _serving(engine: sa.Engine) -> Iterator[str]:
  """Runs the labeling server in a thread, for this machine alone, and yields its address."""
  import uvicorn

  from alignjax.label import app

  config = uvicorn.Config(app.make_app(engine), port=0, log_level='warning', lifespan='off')
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run, name='labeling server', daemon=True)
  thread.start()
  while not server.started:
    if not thread.is_alive():
      raise OSError('the labeling server did not start; its message stands above.')
    time.sleep(0.01)
  try:
    yield f'http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}'
  finally:
    server.should_exit = True
    thread.join()
