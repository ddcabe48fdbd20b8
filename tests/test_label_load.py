"""Many people, and several servers, label at once: every item goes to as many people as it should,
and nothing is lost, also where the server is killed. tests/label_load.py is the same as a program,
with any number of labelers."""

import asyncio
import contextlib
import re
import threading
import time
import types

import pytest
import sqlalchemy as sa

from alignjax.label import accounts, assignment, catalog, exchange, schema, server, submissions
from alignjax.label.schema import answers, drafts, items, leases, tasks
from tests import label_databases, label_load, labeling
from tests.labeling import RANKS, rows, submit, take


@pytest.fixture(scope='module')
def cluster():
  yield from label_databases.cluster()


@pytest.fixture(params=['sqlite', 'postgres'])
def address(request, tmp_path):
  return label_databases.new(request, tmp_path)


@pytest.fixture
def engine(address):
  made = schema.connect(address)
  yield made
  made.dispose()


@pytest.fixture
def servers(address):
  """Two connections to one database, as of two servers."""
  made = schema.connect(address), schema.connect(address)
  yield made
  for one in made:
    one.dispose()


def together(*calls):
  """Runs functions at the same moment, each in a thread, and returns their results in order. An
  error of one is its result."""
  barrier = threading.Barrier(len(calls))
  results = [None] * len(calls)

  def one(i):
    barrier.wait()
    try:
      results[i] = calls[i]()
    except Exception as error:  # noqa: BLE001 it is what the test looks at
      results[i] = error

  threads = [threading.Thread(target=one, args=(i,)) for i in range(len(calls))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return results


# Several at once


def test_two_ask_for_the_last_place_of_an_item(servers):
  """200 times, one of them gets it, and the other one is told that nothing is left."""
  one, two = servers
  ann, bob = labeling.people(one, ann='labeler', bob='labeler').values()
  numbers = single_items(one, 200)
  for number in numbers:
    got = together(lambda n=number: take(one, n, ann), lambda n=number: take(two, n, bob))
    assert sorted(got, key=str) == [number, None]
  assert [row.item_id for row in rows(one, leases)] == numbers


@pytest.mark.parametrize('address', ['postgres'], indirect=True)
def test_an_item_that_was_chosen_is_given_away_before_it_is_locked(servers, monkeypatch):
  """PostgreSQL chooses an item and then locks it. If somebody else gets it in between, it is not
  given a second time."""
  one, two = servers
  ann, bob = labeling.people(one, ann='labeler', bob='labeler').values()
  (number,) = single_items(one, 1)
  normal = assignment._FREE_LOCKED
  slow = normal.where(sa.text('pg_sleep(1) IS NOT NULL'))
  results = []
  thread = threading.Thread(target=lambda: results.append(take(one, number, ann)))
  monkeypatch.setattr(assignment, '_FREE_LOCKED', slow)
  thread.start()
  time.sleep(0.5)
  monkeypatch.setattr(assignment, '_FREE_LOCKED', normal)
  assert take(two, number, bob) == number
  thread.join()
  assert results == [None]


def single_items(engine, count, **options):
  """Makes tasks with one item each, which has the number of the task."""
  with schema.writing(engine) as connection:
    numbers = [
      catalog.add_task(connection, f'task {i}', 'ranking', **options) for i in range(count)
    ]
    for number in numbers:
      catalog.add_items(connection, number, exchange.ranking_items(labeling.candidates(1)))
  return numbers


def test_two_places_and_three_people(servers):
  """An item that one of them is getting at this moment is not yet full for the others."""
  one, two = servers
  people = labeling.people(one, ann='labeler', bob='labeler', cleo='labeler').values()
  for number in single_items(one, 50, overlap=2):
    asked = zip((one, two, one), people, strict=True)
    got = together(*[lambda e=e, n=number, p=p: take(e, n, p) for e, p in asked])
    assert sorted(got, key=str) == [number, number, None]


def test_two_submit_the_same_item(servers):
  """Each counts the answer of the other, so that the item is not given to a third person."""
  one, two = servers
  ann, bob, cleo = labeling.people(one, ann='labeler', bob='labeler', cleo='labeler').values()
  task = labeling.task(one, records=labeling.candidates(50), overlap=2)
  for item in range(1, 51):
    assert take(one, task, ann) == take(one, task, bob) == item
    together(lambda i=item: submit(one, i, ann), lambda i=item: submit(two, i, bob))
  assert [row.answers for row in rows(one, items)] == [2] * 50
  assert take(one, task, cleo) is None


def test_two_admins_deactivate_each_other(servers):
  """At the same moment, 20 times: one of them stays."""
  pairs = list(labeling.people(servers[0], **{f'admin {i}': 'admin' for i in range(2)}).values())

  def deactivate(engine, other, mine):
    with schema.writing(engine) as connection:
      accounts.change_person(connection, other, mine, active=False)

  for _ in range(20):
    ended = together(
      lambda: deactivate(servers[0], *pairs), lambda: deactivate(servers[1], *pairs[::-1])
    )
    assert sorted(type(e) for e in ended if e) == [accounts.Refused]
    with schema.writing(servers[0]) as connection:
      connection.execute(schema.people.update().values(active=True))


def test_a_button_is_pressed_twice(servers):
  """The same person asks three times and gets one item; saves a first draft three times; submits
  three times and has one answer."""
  one, two = servers
  three = (one, two, one)
  (ann,) = labeling.people(one, ann='labeler').values()
  task = labeling.task(one, records=labeling.candidates(30))

  def save(engine, item):
    with schema.writing(engine) as connection:
      submissions.save_draft(connection, item, ann, {'fields': {}})

  for item in range(1, 31):
    assert together(*[lambda e=e: take(e, task, ann) for e in three]) == [item] * 3
    assert together(*[lambda e=e, i=item: save(e, i) for e in three]) == [None] * 3
    assert together(*[lambda e=e, i=item: submit(e, i, ann) for e in three]) == [None] * 3
  found = [(row.item_id, row.version) for row in rows(one, answers)]
  assert found == [(i, 1) for i in range(1, 31)]
  assert rows(one, leases) == rows(one, drafts) == []


def test_an_item_goes_on_to_another_and_comes_back_late(engine):
  """A lease that has ended is not renewed once somebody else has the item; the late answer is kept
  beside theirs, and the item has its answers in the end."""
  ann, bob, cleo = labeling.people(engine, ann='labeler', bob='labeler', cleo='labeler').values()
  task = labeling.task(engine, records=labeling.candidates(1))
  assert take(engine, task, ann, seconds=0.05) == 1
  assert take(engine, task, bob) is None
  time.sleep(0.1)
  assert take(engine, task, bob) == 1
  assert take(engine, task, ann) is None
  submit(engine, 1, ann)
  assert take(engine, task, bob) == 1  # It stays his while his own lease runs.
  assert take(engine, task, cleo) is None
  submit(engine, 1, bob)
  assert [(row.person_id, row.status) for row in rows(engine, answers)] == [
    (ann, 'done'),
    (bob, 'done'),
  ]
  assert rows(engine, items)[0].answers == 2


def test_a_lease_that_has_ended_is_renewed_if_nobody_took_the_item(engine):
  (ann,) = labeling.people(engine, ann='labeler').values()
  task = labeling.task(engine, records=labeling.candidates(2))
  assert take(engine, task, ann, seconds=0.05) == 1
  time.sleep(0.1)
  assert take(engine, task, ann) == 1
  assert rows(engine, leases)[0].expires > time.time() + 3000


def test_an_amended_answer_keeps_its_times(engine):
  """A small correction must not look like an answer that was given in no time."""
  (ann,) = labeling.people(engine, ann='labeler').values()
  task = labeling.task(engine, records=labeling.candidates(1))
  item = take(engine, task, ann)
  time.sleep(0.2)
  for active, payload in ((30.0, RANKS), (2.5, RANKS | {'all_bad': True})):
    with schema.writing(engine) as connection:
      submissions.submit(connection, item, ann, payload, active=active)
  first, second = rows(engine, answers)
  assert first.elapsed == second.elapsed >= 0.2
  assert (first.active, second.active) == (30.0, 32.5)


def test_two_researchers_edit_a_task_at_once(servers):
  """50 times, one of them is told, and every text that was saved is still there."""
  number = labeling.task(servers[0])

  def edit(engine, version, text):
    with schema.writing(engine) as connection:
      catalog.edit_task(connection, number, version, instructions=text)

  saved = ['']
  for version in range(1, 51):
    texts = [f'{version} of Rita', f'{version} of Rob']
    sent = zip(servers, texts, strict=True)
    results = together(*[lambda e=e, v=version, t=t: edit(e, v, t) for e, t in sent])
    assert sorted(type(result).__name__ for result in results) == ['Conflict', 'NoneType']
    saved.append(texts[results.index(None)])
  assert rows(servers[0], tasks)[0].instructions == saved[-1]
  assert [row.markdown for row in rows(servers[0], schema.instructions)] == saved


def test_reading_sees_one_state(engine):
  """What is written in the meantime is not half seen by an export."""
  (ann,) = labeling.people(engine, ann='labeler').values()
  task = labeling.task(engine, records=labeling.candidates(2))
  query = sa.select(sa.func.count()).select_from(leases)
  with schema.reading(engine) as connection:
    assert connection.execute(query).scalar() == 0
    take(engine, task, ann)
    assert connection.execute(query).scalar() == 0
  with schema.reading(engine) as connection:
    assert connection.execute(query).scalar() == 1


def test_servers_start_at_once_on_a_new_database(address):
  """One of them makes the tables, and the others wait for it; so it is with the secret of the
  cookies."""
  made = together(*[lambda: schema.connect(address)] * 6)
  assert [type(m).__name__ for m in made] == ['Engine'] * 6

  def secret(engine):
    with schema.writing(engine) as connection:
      return accounts.secret(connection)

  for _ in range(10):
    found = together(*[lambda e=e: secret(e) for e in made])
    assert len(set(found)) == 1 and isinstance(found[0], str), found
    with schema.writing(made[0]) as connection:
      connection.execute(schema.settings.delete())
  for i, one in enumerate(made):
    labeling.people(one, **{f'p{i}': 'labeler'})
    one.dispose()


def test_two_make_the_same_at_once(servers):
  """The second one is told that the name is taken, or adds no item that is there already."""
  records = exchange.ranking_items(labeling.candidates(20), False)

  def join(engine, i):
    return labeling.people(engine, **{f'ann{i}': 'labeler'})

  def task(engine, i):
    return labeling.task(engine, f'task {i}', records=[])

  def add(engine, i):
    with schema.writing(engine) as connection:
      return catalog.add_items(connection, i + 1, records)

  for i in range(10):
    for call, error in ((join, accounts.Refused), (task, ValueError)):
      ended = together(*[lambda e=e, c=call, i=i: c(e, i) for e in servers])
      assert [type(e) for e in ended if isinstance(e, Exception)] == [error], ended
    added = together(*[lambda e=e, i=i: add(e, i) for e in servers])
    assert sorted(added) == [(0, 20), (20, 0)]


def test_a_page_saves_itself_while_its_form_is_sent(servers):
  """Of two requests of one person neither takes back what the other has kept."""
  labeling.people(servers[0], ann='labeler')
  task = labeling.task(servers[0])
  with contextlib.ExitStack() as stack:
    urls = [stack.enter_context(labeling.serving(engine)) for engine in servers]
    one, two = [labeling.labeler(url, 'ann') for url in urls]
    item = one.next_item(task)
    tokens = [item['token'], two.item(item['item'])['token']]
    for i in range(20):
      sent = [
        dict(labeling.RATING, step=step, token=t, likert=i % 7 + 1)
        for step, t in enumerate(tokens, 1)
      ]
      together(
        lambda sent=sent: one.http.post(f'/items/{item["item"]}', data=sent[0] | {'go': 'next'}),
        lambda sent=sent: two.http.post(f'/items/{item["item"]}/draft', data=sent[1]),
      )
      (kept,) = rows(servers[0], drafts)
      assert {k: v['likert'] for k, v in kept.payload['fields'].items()} == {
        '1': str(i % 7 + 1),
        '2': str(i % 7 + 1),
      }


def test_two_researchers_send_the_same_form(tmp_path):
  """The second one gets a page with both texts (409), and can save again from there."""
  engine = schema.connect(str(tmp_path / 'labels.db'))
  labeling.people(engine, rita='researcher', rob='researcher')
  task = labeling.task(engine, text='first rules')
  with labeling.serving(engine) as url:
    forms = []
    for name in ('rita', 'rob'):
      browser = labeling.labeler(url, name)
      page = browser.http.get(f'/tasks/{task}/edit')
      fields = dict(re.findall(r'name="(token|version)" value="([^"]+)"', page.text))
      fields |= dict(overlap='1', gold_rate='0', pool='training', instructions=f'rules of {name}')
      forms.append((browser, fields))
    (rita, hers), (rob, his) = forms
    assert rita.http.post(f'/tasks/{task}/edit', data=hers).status_code == 200
    refused = rob.http.post(f'/tasks/{task}/edit', data=his)
    assert refused.status_code == 409
    for text in ('rules of rita', 'rules of rob', 'Somebody else has changed this task'):
      assert text in refused.text
    assert rows(engine, tasks)[0].instructions == 'rules of rita'
    again = his | dict(re.findall(r'name="(token|version)" value="([^"]+)"', refused.text))
    assert rob.http.post(f'/tasks/{task}/edit', data=again).status_code == 200
  texts = [row.markdown for row in rows(engine, schema.instructions)]
  assert texts == ['first rules', 'rules of rita', 'rules of rob']
  engine.dispose()


# Turns

PAGE, OTHER, SUBMIT = ('GET', '/items/3'), ('POST', '/tasks/1/next'), ('POST', '/items/3')


def ask(turns, request):
  method, path = request
  return turns.of(types.SimpleNamespace(method=method, url=types.SimpleNamespace(path=path)))


def finish(work):
  """The result of a coroutine, which must come within seconds."""
  return asyncio.run(asyncio.wait_for(work, 20))


async def settle():
  """Lets every task run until it waits."""
  for _ in range(20):
    await asyncio.sleep(0)


def test_submits_go_before_pages():
  """One request at a time: what is handed in goes before pages that were asked for earlier, and
  otherwise the order is that in which they came."""
  came = [PAGE, OTHER, SUBMIT, PAGE, SUBMIT]

  async def run():
    turns, order = server.Turns(1), []

    async def work(i):
      async with ask(turns, came[i]):
        order.append(i)
        await settle()

    async with ask(turns, PAGE):
      tasks = [asyncio.create_task(work(i)) for i in range(len(came))]
      await settle()
      assert order == []
    await asyncio.gather(*tasks)
    return order, turns.free

  assert finish(run()) == ([2, 4, 0, 1, 3], 1)


@pytest.mark.parametrize('count', (1, 3))
def test_no_more_requests_at_once_than_there_are_turns(count):
  async def run():
    turns, now, most = server.Turns(count), 0, 0

    async def work(i):
      nonlocal now, most
      async with ask(turns, (PAGE, SUBMIT)[i % 2]):
        now += 1
        most = max(most, now)
        await settle()
        now -= 1
        if i % 3 == 0:
          raise ValueError('a fault of a page')

    await asyncio.gather(*(work(i) for i in range(12)), return_exceptions=True)
    return most, turns.free

  assert finish(run()) == (count, count)


def test_a_request_that_goes_away_leaves_its_turn_to_others():
  """It may go away while it waits, or after it was given its turn and before it took it."""

  async def run():
    turns, served = server.Turns(1), []

    async def work(i):
      async with ask(turns, PAGE):
        served.append(i)

    async with ask(turns, PAGE):
      tasks = [asyncio.create_task(work(i)) for i in range(3)]
      await settle()
      tasks[0].cancel()  # It waits.
    tasks[1].cancel()  # It has just been given the turn.
    await asyncio.gather(*tasks, return_exceptions=True)
    return served, turns.free

  assert finish(run()) == ([2], 1)


# Processes


@pytest.fixture(params=['sqlite', 'postgres'])
def kind(request):
  if request.param == 'postgres':
    if label_databases.programs() is None:
      pytest.skip('PostgreSQL is not installed: there is no initdb.')
    pytest.importorskip('psycopg', reason='psycopg is not installed.')
  return request.param


def check(made):
  """Asserts that every item has its answers, from as many people as it should, and no more."""
  assert made['errors'] == []
  assert {name: made[name] for name in label_load.ZERO} == dict.fromkeys(label_load.ZERO, 0)


@pytest.mark.slow
def test_labelers_at_two_servers():
  """12 labelers, as fast as they can, half of them at another server with the same SQLite file."""
  made = label_load.run('sqlite', labelers=12, count=24, overlap=2, servers=2)
  check(made)
  assert made['answers'] == 48


@pytest.mark.slow
def test_a_server_that_is_killed(kind):
  """Every answer that was acknowledged is there after the restart, and the labelers go on."""
  made = label_load.run(kind, labelers=12, count=20, overlap=3, kills=1)
  check(made)
  assert made['answers'] == 60 and made['kills'] == 1


@pytest.mark.long
def test_forty_labelers(kind):
  """Each with about a second for a page, which is much faster than people are, and then as fast as
  they can. 95% of the submits take less than 200 ms."""
  for count, pause in ((200, 1.0), (400, 0.0)):
    made = label_load.run(kind, labelers=40, count=count, overlap=2, pause=pause)
    print(label_load.show(made))
    check(made)
    assert made['answers'] == 2 * count and made['submit'][1] < 200


@pytest.mark.long
def test_a_server_that_is_killed_20_times(kind):
  made = label_load.run(kind, labelers=40, count=500, overlap=3, kills=20)
  print(label_load.show(made))
  check(made)
  assert made['answers'] == 1500 and made['kills'] == 20
  assert made['cut'] > 0  # Submits were under way.
