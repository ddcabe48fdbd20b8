"""A labeling server for tests: its database, people, and items."""

import contextlib
import socket
import threading
import time

import argon2
import httpx
import sqlalchemy as sa
import uvicorn

from alignjax.label import accounts, app, assignment, catalog, client, exchange, schema, submissions

PASSWORD = 'correct horse'
# A real hash takes a tenth of a second on purpose.
accounts._hasher = argon2.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
RANKS = dict(ratings=None, ranks=[1, 2, 2, 3], all_bad=False)  # an answer about four responses
OPEN = []  # the clients that `serving` closes


@contextlib.contextmanager
def serving(engine, **options):
  """Runs the server in a thread and yields its address."""
  made = app.make_app(engine, **options)
  runs = uvicorn.Server(uvicorn.Config(made, port=0, log_level='warning', lifespan='off'))
  thread = threading.Thread(target=runs.run, daemon=True)
  thread.start()
  while not runs.started:
    assert thread.is_alive()
    time.sleep(0.01)
  port = runs.servers[0].sockets[0].getsockname()[1]
  try:
    yield f'http://127.0.0.1:{port}'
  finally:
    while OPEN:
      OPEN.pop().close()
    runs.should_exit = True
    thread.join()


def people(engine, **roles):
  """Makes people, {name: role or (role, pool)}, and returns {name: number}."""
  made = {}
  with schema.writing(engine) as connection:
    for name, role in roles.items():
      role, pool = (role, 'training') if isinstance(role, str) else role
      made[name] = accounts.add_person(connection, name, PASSWORD, role, pool)
  return made


def candidates(count, k=4, sources=('secret-a', 'secret-b')):
  """Records with k responses each."""
  return [
    dict(
      prompt=f'prompt {i}',
      responses=[f'response {i}/{j}' for j in range(k)],
      policies=[sources[j % len(sources)] for j in range(k)],
    )
    for i in range(count)
  ]


def task(engine, name='a task', kind='ranking', records=None, gold=False, **options):
  """Makes a task with items and returns its number."""
  rows = exchange.ranking_items(candidates(3) if records is None else records, gold)
  with schema.writing(engine) as connection:
    number = catalog.add_task(connection, name, kind, **options)
    catalog.add_items(connection, number, rows)
  return number


def take(engine, task, person, seconds=3600):
  with schema.writing(engine) as connection:
    return assignment.next_item(connection, task, person, seconds)


def submit(engine, item, person, payload=RANKS):
  with schema.writing(engine) as connection:
    submissions.submit(connection, item, person, payload)


def rows(engine, table):
  with schema.reading(engine) as connection:
    return connection.execute(sa.select(table).order_by(table.c.id)).all()


def labeler(url, name):
  made = client.Labeler(url)
  OPEN.append(made)
  made.login(name, PASSWORD)
  return made


RATING = {'likert': 4}


def free_port():
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


def wait_for(url, seconds=60):
  """Waits until a server answers."""
  end = time.monotonic() + seconds
  while True:
    try:
      return httpx.get(f'{url}/login')
    except httpx.TransportError:
      assert time.monotonic() < end
      time.sleep(0.05)
