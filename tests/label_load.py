"""Many people label at once, against a server that is a process of its own.

  python -m tests.label_load --database=sqlite --labelers=40 --items=150 --overlap=2
  python -m tests.label_load --database=postgres --pause=1
  python -m tests.label_load --database=sqlite --kills=20
  python -m tests.label_load --database=sqlite --servers=2

Each labeler is a thread that sends what a browser sends, waits for `pause` seconds on average
before each page, and stops when nothing is left. Meanwhile the server is killed and started again
`kills` times, in the middle of what it does. Then the database is compared with what the labelers
were told: a line says how many items had more labelers than their overlap, how many answers were
lost, and how long a submit (the last page of an item) and a whole item took.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa

from alignjax.label import catalog, exchange, schema
from alignjax.label.schema import answers, events, items, leases, people
from tests import label_databases, labeling

ROOT = pathlib.Path(__file__).parents[1]
RESPONSES = 4
RANKS = [1, 2, 2, 3]  # of the responses 0 to 3 of every item


class Process:
  """`alignjax label serve` as a process that can be killed and started again on the same port."""

  def __init__(self, address: str, log: pathlib.Path):
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      self.port = free.getsockname()[1]
    self.log = log
    code = 'from alignjax.commands.main import main; main()'
    self.command = [sys.executable, '-c', code, 'label', 'serve', f'--port={self.port}']
    self.command.append(f'--database={address}')
    self.start()

  def start(self) -> None:
    with open(self.log, 'ab') as log:
      self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=ROOT)

  def wait(self) -> None:
    """Waits until it answers."""
    while True:
      try:
        socket.create_connection(('127.0.0.1', self.port), timeout=5).close()
        return
      except OSError:
        if self.process.poll() is not None:
          raise RuntimeError(f'the server has ended:\n{self.log.read_text()}') from None
        time.sleep(0.02)

  def kill(self) -> None:
    self.process.kill()
    self.process.wait()


class Answer(NamedTuple):
  status: int
  location: str
  text: str


class Browser:
  """A person's browser: it keeps its cookie and its connection, and where the server is away it
  sends the same again until there is an answer. `cut` counts the requests that were sent and got
  none."""

  def __init__(self, port: int, patience: float = 60):
    self.patience, self.cookie, self.cut = patience, '', 0
    self.line = http.client.HTTPConnection('127.0.0.1', port, timeout=patience)

  def send(self, method: str, path: str, fields: dict[str, Any] | None = None) -> Answer:
    body = None if fields is None else urllib.parse.urlencode(fields, doseq=True)
    headers = {'cookie': self.cookie}
    if body is not None:
      headers['content-type'] = 'application/x-www-form-urlencoded'
    until = time.monotonic() + self.patience
    while True:
      sent = False
      try:
        self.line.request(method, path, body, headers)
        sent = True
        found = self.line.getresponse()
        text = found.read().decode()
        break
      except (OSError, http.client.HTTPException):
        self.line.close()
        self.cut += sent
        if time.monotonic() > until:
          raise
        time.sleep(0.05)
    if cookie := found.getheader('set-cookie'):
      self.cookie = cookie.partition(';')[0]
    return Answer(found.status, found.getheader('location') or '', text)

  def login(self, name: str) -> None:
    page = self.send('GET', '/login')
    fields = dict(token=token_of(page.text), name=name, password=labeling.PASSWORD)
    answer = self.send('POST', '/login', fields)
    if answer.status != 303:
      raise RuntimeError(f'{name} cannot log in: {answer.status} {answer.text}')


def token_of(text: str) -> str:
  found = re.search(r'name="token" value="([^"]+)"', text)
  if not found:
    raise RuntimeError(f'there is no form in {text}')
  return found[1]


class Record:
  """What one labeler was told: the items whose last page the server has accepted, what it answered
  instead, the seconds that submits and whole items took (waiting for the server only), and how many
  submits got no answer at first."""

  def __init__(self):
    self.accepted: list[int] = []
    self.errors: list[str] = []
    self.submits: list[float] = []
    self.whole: list[float] = []
    self.cut = 0


def work(browser: Browser, task: int, pause: float, record: Record) -> None:
  """Labels until nothing is left."""
  chance = random.Random(browser.cookie)

  def wait() -> None:
    time.sleep(chance.expovariate(1 / pause) if pause else 0)

  try:
    token = token_of(browser.send('GET', '/').text)
    location = ''
    while True:
      if not re.fullmatch(r'/items/\d+', location):
        wait()
        answer = browser.send('POST', f'/tasks/{task}/next', dict(token=token))
        if answer.status == 200 and 'Nothing is left' in answer.text:
          return
        if answer.status != 303:
          raise RuntimeError(f'next: {answer.status} {answer.text}')
        location = answer.location
      location = label(browser, location, wait, record)
  except Exception as error:  # noqa: BLE001 it is reported by the run
    record.errors.append(f'{type(error).__name__}: {error}')


def label(browser: Browser, path: str, wait: Any, record: Record) -> str:
  """Rates and ranks an item, and returns where the server sends its labeler then."""
  number, spent, location = int(path.rpartition('/')[2]), 0.0, path
  while True:
    began = time.perf_counter()
    page = browser.send('GET', location)
    spent += time.perf_counter() - began
    step = re.search(r'name="step" value="(\d+)"', page.text)
    if not step:
      raise RuntimeError(f'GET {location}: {page.status} {page.text}')
    responses = [int(r) for r in re.findall(r'>response \d+/(\d+)<', page.text)]
    fields: dict[str, Any] = dict(token=token_of(page.text), step=step[1], seconds='1.5')
    last = len(responses) == RESPONSES
    if last:
      fields |= {f'rank_{place}': RANKS[r] for place, r in enumerate(responses, 1)}
      fields |= {'go': 'submit'}
    else:
      fields |= dict(likert=1 + responses[0], go='next', flags=['hallucination'])
    wait()
    began, cut = time.perf_counter(), browser.cut
    answer = browser.send('POST', path, fields)
    took = time.perf_counter() - began
    spent += took
    if answer.status != 303:
      raise RuntimeError(f'POST {path}: {answer.status} {answer.text}')
    location = answer.location
    if last:
      record.accepted.append(number)
      record.submits.append(took)
      record.whole.append(spent)
      record.cut += browser.cut > cut
      return location


def prepare(address: str, labelers: int, count: int, overlap: int) -> int:
  """Makes people p0, p1, ... and a task, and returns the number of the task."""
  engine = schema.connect(address)
  try:
    labeling.people(engine, p0='labeler')
    with schema.writing(engine) as connection:
      first = connection.execute(sa.select(people)).one()._asdict()
      del first['id']
      more = [first | dict(name=f'p{i}') for i in range(1, labelers)]
      if more:
        connection.execute(people.insert(), more)
      task = catalog.add_task(connection, 'load', 'ranking', overlap=overlap, text='Be *kind*.')
      catalog.add_items(
        connection, task, exchange.ranking_items(labeling.candidates(count, RESPONSES))
      )
    return task
  finally:
    engine.dispose()


class Watch(threading.Thread):
  """Looks for items with more running leases and answers than their overlap, again and again."""

  def __init__(self, engine: sa.Engine, overlap: int):
    super().__init__(daemon=True)
    self.engine, self.overlap = engine, overlap
    self.over: set[int] = set()
    self.ended = threading.Event()

  def run(self) -> None:
    running = (
      sa.select(sa.func.count())
      .where(leases.c.item_id == items.c.id, leases.c.expires > sa.bindparam('at'))
      .scalar_subquery()
    )
    done = (
      sa.select(sa.func.count())
      .where(answers.c.item_id == items.c.id, answers.c.current, answers.c.status == 'done')
      .scalar_subquery()
    )
    query = sa.select(items.c.id).where(running + done > self.overlap)
    while not self.ended.wait(0.25):
      with schema.reading(self.engine) as connection:
        self.over |= set(connection.execute(query, dict(at=time.time())).scalars())


def run(
  kind: str,
  labelers: int = 40,
  count: int = 100,
  overlap: int = 2,
  pause: float = 0.0,
  kills: int = 0,
  servers: int = 1,
) -> dict[str, Any]:
  """Lets labelers work until nothing is left, and returns what came of it (check)."""
  with label_databases.database(kind) as address, contextlib.ExitStack() as stack:
    task = prepare(address, labelers, count, overlap)
    folder = pathlib.Path(tempfile.mkdtemp(prefix='label-log-'))
    stack.callback(shutil.rmtree, folder)
    started = []
    for i in range(servers):
      started.append(Process(address, folder / f'log-{i}'))
      stack.callback(started[-1].kill)
    for server in started:
      server.wait()
    engine = schema.connect(address)
    stack.callback(engine.dispose)
    browsers = [Browser(started[i % servers].port) for i in range(labelers)]
    for i, browser in enumerate(browsers):
      stack.callback(browser.line.close)
      browser.login(f'p{i}')
    records = [Record() for _ in browsers]
    watch = Watch(engine, overlap)
    watch.start()
    began = time.monotonic()
    threads = [
      threading.Thread(target=work, args=(browser, task, pause, record), daemon=True)
      for browser, record in zip(browsers, records, strict=True)
    ]
    for thread in threads:
      thread.start()
    killed = 0
    while killed < kills and any(thread.is_alive() for thread in threads):
      time.sleep(random.uniform(0.3, 1.0))
      for server in started:
        server.kill()
        server.start()
        server.wait()
      killed += 1
    for thread in threads:
      thread.join()
    seconds = time.monotonic() - began
    watch.ended.set()
    watch.join()
    errors = [e for record in records for e in record.errors]
    for server in started:
      errors += re.findall(r'.*(?:Traceback|locked|Error).*', server.log.read_text())
    submits = np.concatenate([record.submits for record in records])
    whole = np.concatenate([record.whole for record in records])
    return dict(
      database=kind,
      labelers=labelers,
      items=count,
      kills=killed,
      cut=sum(record.cut for record in records),
      **check(engine, records, overlap),
      watched=len(watch.over),
      errors=errors,
      seconds=seconds,
      submit=[1000 * float(x) for x in np.percentile(submits, (50, 95, 99))],
      whole=[1000 * float(x) for x in np.percentile(whole, (50, 95, 99))],
    )


def check(engine: sa.Engine, records: list[Record], overlap: int) -> dict[str, Any]:
  """Compares the database with what the labelers were told.

  Returns:
    `answers`; `over`: items that were given to more people than their overlap (no lease ends during
    the run); `short`: the answers that are missing in the end; `lost`: accepted answers that are
    not there; `twice`: how often a person got an item again; `wrong`: answers that are not what was
    sent, versions that nobody made, and items whose own count is wrong.
  """
  with schema.reading(engine) as connection:
    rows = connection.execute(
      sa.select(answers, people.c.name).join(people, people.c.id == answers.c.person_id)
    ).all()
    stored = {
      (row.name, row.item_id): row.payload for row in rows if row.current and row.status == 'done'
    }
    leased = connection.execute(
      sa.select(events.c.item_id, events.c.person_id).where(events.c.kind == 'leased')
    ).all()
    counts = connection.execute(sa.select(items.c.id, items.c.answers)).all()
  given = Counter(item for item, _ in leased)
  done = Counter(item for _, item in stored)
  sent = dict(
    ratings=[dict(likert=1 + r, flags=['hallucination']) for r in range(RESPONSES)],
    ranks=RANKS,
    all_bad=False,
  )
  wrong = sum(payload != sent for payload in stored.values()) + len(rows) - len(stored)
  return dict(
    answers=len(stored),
    over=sum(n > overlap for n in given.values()),
    short=sum(max(overlap - done[item], 0) for item, _ in counts),
    lost=sum(
      (f'p{i}', item) not in stored for i, r in enumerate(records) for item in set(r.accepted)
    ),
    twice=sum(n - 1 for n in Counter(leased).values()),
    wrong=wrong + sum(n != done[item] for item, n in counts),
  )


COLUMNS = ('database', 'labelers', 'items', 'kills', 'cut', 'answers')
ZERO = ('over', 'watched', 'short', 'lost', 'twice', 'wrong')


def show(made: dict[str, Any]) -> str:
  """Returns the result of a run as a table in Markdown."""
  row = {name: str(made[name]) for name in (*COLUMNS, *ZERO)}
  row['errors'] = str(len(made['errors']))
  for name, label in (('submit', 'submit'), ('whole', 'item')):
    row[f'{label} p50/p95/p99 ms'] = '/'.join(f'{x:.0f}' for x in made[name])
  row['s'] = f'{made["seconds"]:.1f}'
  return '\n'.join('| ' + ' | '.join(r) + ' |' for r in (row, ['---'] * len(row), row.values()))


def main() -> None:
  parser = argparse.ArgumentParser(description='Many people label at once.')
  parser.add_argument('--database', default='sqlite', choices=('sqlite', 'postgres'))
  parser.add_argument('--labelers', type=int, default=40)
  parser.add_argument('--items', type=int, default=100)
  parser.add_argument('--overlap', type=int, default=2)
  parser.add_argument('--pause', type=float, default=0.0, help='seconds before each page')
  parser.add_argument('--kills', type=int, default=0)
  parser.add_argument('--servers', type=int, default=1)
  o = parser.parse_args()
  before = os.getloadavg()[0]
  made = run(o.database, o.labelers, o.items, o.overlap, o.pause, o.kills, o.servers)
  print(show(made))
  print(f'load of the machine: {before:.1f} before, {os.getloadavg()[0]:.1f} after')
  for error in made['errors'][:10]:
    print(error[:2000])


if __name__ == '__main__':
  main()
