"""Who may see and send what on the pages of the labeling server, and what they may learn."""

import re

import httpx
import pytest
import sqlalchemy as sa

from alignjax.label import accounts, exchange, history, schema, server
from tests import labeling

TEXT = '# Rules\n\nBe *kind*.'


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """(address, engine, {name: number of the person}), with a task of three items."""
  engine = schema.connect(str(tmp_path_factory.mktemp('site') / 'labels.db'))
  people = labeling.people(
    engine,
    ann='labeler',
    bob='labeler',
    holly=('labeler', 'heldout'),
    rita='researcher',
    adam='admin',
  )
  labeling.task(engine, records=labeling.candidates(20), text=TEXT, overlap=1)
  with labeling.serving(engine) as url:
    yield url, engine, people
  engine.dispose()


def raw(url):
  """A browser without a session."""
  made = httpx.Client(base_url=url, timeout=60)
  labeling.OPEN.append(made)
  return made


def token_of(text):
  return re.search(r'name="token" value="([^"]+)"', text)[1]


def test_a_form_needs_the_token_of_its_own_session(site):
  url, _, _ = site
  ann, bob = labeling.labeler(url, 'ann'), labeling.labeler(url, 'bob')
  other = token_of(bob.http.get('/').text)
  for fields in ({}, {'token': 'x'}, {'token': other}):
    answer = ann.http.post('/tasks/1/next', data=fields)
    assert answer.status_code == 403 and 'another session' in answer.text
  assert ann.next_item(1) is not None


def test_every_form_on_every_page_has_a_token(site):
  url, _, _ = site
  someone = labeling.labeler(url, 'adam')
  someone.next_item(1)
  for path in ('/', '/answers', '/password', '/people', '/review', '/tasks/1/edit', '/inspect/1'):
    text = someone.http.get(path).text
    forms = re.findall(r'<form method="post".*?</form>', text, re.S)
    assert forms and all('name="token"' in form for form in forms), path
    assert '<form' not in re.sub(r'<form method="post"', '', text), path


def test_a_planted_session_is_worth_nothing(site):
  """Who knows the cookie from before the login is not logged in after it."""
  url, _, _ = site
  browser = raw(url)
  page = browser.get('/login')
  planted = browser.cookies[server.COOKIE]
  done = browser.post(
    '/login', data=dict(token=token_of(page.text), name='ann', password=labeling.PASSWORD)
  )
  assert done.status_code == 303 and browser.cookies[server.COOKIE] != planted
  thief = raw(url)
  thief.cookies.set(server.COOKIE, planted)
  assert thief.get('/answers').headers['location'] == '/login'


def test_a_cookie_cannot_be_made_or_changed(site):
  url, _, people = site
  thief = raw(url)
  own = accounts.Sessions('another key')
  row = type('Row', (), {'id': people['adam'], 'epoch': 1})
  mine = labeling.labeler(url, 'bob').http.cookies[server.COOKIE]
  for cookie in (own.write(own.begin(9e9, row)), mine[:-2] + 'xx', 'a' + mine, ''):
    thief.cookies.set(server.COOKIE, cookie)
    assert thief.get('/people').headers.get('location') == '/login'
    thief.cookies.clear()


def test_cookies_are_for_the_server_alone(site, tmp_path):
  url, _, _ = site
  header = raw(url).get('/login').headers['set-cookie'].lower()
  assert 'httponly' in header and 'samesite=lax' in header and 'secure' not in header
  engine = schema.connect(str(tmp_path / 'secure.db'))
  with labeling.serving(engine, secure=True) as secure:
    assert '; secure' in raw(secure).get('/login').headers['set-cookie'].lower()
  engine.dispose()


def test_pages_of_labelers_are_their_own(site):
  """Another labeler sees neither the item nor the draft, and cannot answer, skip or withdraw."""
  url, _, _ = site
  ann, bob = labeling.labeler(url, 'ann'), labeling.labeler(url, 'bob')
  item = ann.next_item(1)
  path = f'/items/{item["item"]}'
  ann.http.post(path, data=dict(token=item['token'], step=1, go='save', likert='4'))
  token = token_of(bob.http.get('/').text)
  for suffix in ('', '.json', '?step=2'):
    assert bob.http.get(path + suffix).status_code == 410
  for suffix, fields in (
    ('', dict(step=5, go='submit')),
    ('/draft', dict(step=1)),
    ('/skip', dict(reason='pii')),
    ('/withdraw', {}),
  ):
    assert bob.http.post(path + suffix, data=dict(token=token, **fields)).status_code == 410
  assert ann.http.get(path + '?step=1').status_code == 200
  assert 'value="4" checked' in ann.http.get(path + '?step=1').text


STAFF = (
  '/dashboard',
  '/dashboard/1',
  '/dashboard/1/progress.png',
  '/tasks/1/edit',
  '/inspect/1',
  '/review',
)


@pytest.mark.parametrize(
  'name, allowed, refused',
  [
    ('ann', ('/', '/answers', '/password', '/tasks/1/instructions'), (*STAFF, '/people')),
    ('rita', ('/', *STAFF), ('/people',)),
    ('adam', ('/', *STAFF, '/people'), ()),
  ],
)
def test_roles(site, name, allowed, refused):
  url, _, _ = site
  someone = labeling.labeler(url, name)
  assert {p: someone.http.get(p).status_code for p in allowed} == dict.fromkeys(allowed, 200)
  assert {p: someone.http.get(p).status_code for p in refused} == dict.fromkeys(refused, 403)
  token = token_of(someone.http.get('/').text)
  if name != 'adam':
    for path in ('/people/invite', '/people/1'):
      assert someone.http.post(path, data=dict(token=token, role='admin')).status_code == 403
  if name == 'ann':
    change = someone.http.post('/inspect/1/change', data=dict(token=token, what='hide'))
    assert change.status_code == 403


def test_nobody_sees_a_page_without_a_login(site):
  url, _, _ = site
  for path in ('/', '/answers', '/items/1', '/tasks/1/instructions', *STAFF, '/people'):
    answer = raw(url).get(path)
    assert answer.status_code == 303 and answer.headers['location'] == '/login', path
  assert raw(url).get('/items/1.json').status_code == 401


def test_pools_are_kept_apart(site):
  """A held-out labeler sees no task of the training pool."""
  url, _, _ = site
  holly = labeling.labeler(url, 'holly')
  assert holly.tasks() == {}
  token = token_of(holly.http.get('/').text)
  assert holly.http.post('/tasks/1/next', data=dict(token=token)).status_code == 404
  assert holly.http.get('/tasks/1/instructions').status_code == 404


def test_headers_keep_a_page_within_its_origin(site):
  url, _, _ = site
  for path in ('/login', '/static/label.js', '/static/label.css', '/no/such/page'):
    answer = raw(url).get(path)
    policy = answer.headers['content-security-policy']
    assert "default-src 'none'" in policy and 'unsafe' not in policy and 'http' not in policy
    assert answer.headers['x-content-type-options'] == 'nosniff'
  assert raw(url).get('/login').headers['cache-control'] == 'no-store'


@pytest.mark.parametrize(
  'path',
  [
    '/static/../schema.py',
    '/static/%2e%2e/schema.py',
    '/static/..%2fschema.py',
    '/static//etc/passwd',
    '/static/%2fetc%2fpasswd',
    '/join/../people',
    '/dashboard/1/..%2f..%2fpeople.png',
  ],
)
def test_no_path_leads_out_of_its_folder(site, path):
  url, _, _ = site
  host, port = url.removeprefix('http://').split(':')
  import socket

  with socket.create_connection((host, int(port))) as connection:  # httpx would tidy the path.
    connection.sendall(f'GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n'.encode())
    answer = b''.join(iter(lambda: connection.recv(65536), b''))
  status = int(answer.split()[1])
  assert status in (303, 404, 410), answer[:100]
  assert b'sqlalchemy' not in answer and b'root:' not in answer


def test_logins_are_rate_limited(site, monkeypatch):
  url, engine, _ = site
  browser = raw(url)
  token = token_of(browser.get('/login').text)

  def login(name, password):
    fields = dict(token=token, name=name, password=password)
    return browser.post('/login', data=fields).status_code

  codes = [login('Rita', f'wrong {i}') for i in range(accounts.PER_NAME + 1)]
  assert codes == [401] * accounts.PER_NAME + [429]
  assert login('rita', labeling.PASSWORD) == 429  # The right one does not help either.
  assert login('nobody at all', 'wrong') == 401
  now = history.time.time()
  monkeypatch.setattr(history.time, 'time', lambda: now + accounts.WINDOW + 1)
  token = token_of(browser.get('/login').text)
  assert login('rita', labeling.PASSWORD) == 303
  with schema.writing(engine) as connection:
    connection.execute(schema.attempts.delete())


def test_sessions_end(site):
  """By a logout, a new password and a deactivation, on every device."""
  url, engine, people = site
  labeling.people(engine, eve='labeler')
  one, two = labeling.labeler(url, 'eve'), labeling.labeler(url, 'eve')
  one._post('/logout', token_of(one.http.get('/').text))
  assert two.http.get('/answers').url.path == '/login'
  one, two = labeling.labeler(url, 'eve'), labeling.labeler(url, 'eve')
  token = token_of(one.http.get('/password').text)
  wrong = one.http.post('/password', data=dict(token=token, old='wrong', new='another password'))
  assert wrong.status_code == 422
  one._post('/password', token, old=labeling.PASSWORD, new='another password')
  assert two.http.get('/answers').url.path == '/login'
  one.login('eve', 'another password')
  adam = labeling.labeler(url, 'adam')
  with schema.reading(engine) as connection:
    number = connection.execute(
      sa.select(schema.people.c.id).where(schema.people.c.name == 'eve')
    ).scalar_one()
  adam._post(f'/people/{number}', token_of(adam.http.get('/people').text), active='no')
  assert one.http.get('/answers').url.path == '/login'
  with pytest.raises(ValueError, match='wrong'):
    one.login('eve', 'another password')


def test_the_last_admin_stays(site):
  url, _, people = site
  adam = labeling.labeler(url, 'adam')
  token = token_of(adam.http.get('/people').text)
  answer = adam.http.post(f'/people/{people["adam"]}', data=dict(token=token, active='no'))
  assert answer.status_code == 422 and 'last admin' in answer.text
  assert adam.http.get('/people').status_code == 200


def test_invitations_through_the_pages(site):
  url, _, _ = site
  adam = labeling.labeler(url, 'adam')
  token = token_of(adam.http.get('/people').text)
  page = adam._post('/people/invite', token, role='labeler', pool='heldout').text
  link = re.search(r'http://[^<\s]+/join/[\w-]+', page)[0]
  new = labeling.client.Labeler(url)
  labeling.OPEN.append(new)
  new.join(link, 'newcomer', labeling.PASSWORD)
  assert new.http.get('/answers').status_code == 200
  assert raw(url).get(link).status_code == 410  # It was for one person.


def test_a_score_counts_once(site):
  """However often the button is pressed."""
  url, engine, people = site
  with schema.writing(engine) as connection:
    task = labeling.catalog.add_task(connection, 'write', 'demonstration')
    rows = exchange.demonstration_items([{'prompt': 'Say hello.'}])
    labeling.catalog.add_items(connection, task, rows)
  ann, rita = labeling.labeler(url, 'ann'), labeling.labeler(url, 'rita')
  ann.write(ann.next_item(task), response='Hello.')
  page = rita.http.get('/review').text
  answer = re.search(r'name="answer" value="(\d+)"', page)[1]
  assert 'Hello.' in page and 'ann' not in page
  for score in (6, 6, 2):
    rita._post('/review', token_of(page), answer=answer, score=score)
  with schema.reading(engine) as connection:
    assert connection.execute(sa.select(schema.reviews.c.score)).scalars().all() == [6]
  refused = rita.http.post('/review', data=dict(token=token_of(page), answer=answer, score=8))
  assert refused.status_code == 422
  assert 'no demonstration' in rita.http.get('/review').text


def test_a_page_too_large_is_refused(site):
  url, _, _ = site
  ann = labeling.labeler(url, 'ann')
  item = ann.next_item(1)
  answer = ann.http.post(
    f'/items/{item["item"]}/draft',
    files=[('token', (None, item['token'])), ('note', (None, 'x' * (server.LARGEST_FORM + 1)))],
  )
  assert answer.status_code == 400


# Blindness


def test_no_source_is_shown_to_a_labeler(tmp_path):
  """Neither in pages, cookies, addresses and headers nor in JSON, at any step of the work."""
  engine = schema.connect(str(tmp_path / 'blind.db'))
  records = [
    r
    | dict(
      policies=['secret-a', 'secret-b', 'secret-c', 'secret-d'], user_id='secret-u', id='secret-i'
    )
    for r in labeling.candidates(3)
  ]
  task = labeling.task(engine, records=records)
  with schema.writing(engine) as connection:
    known = records[0] | dict(prompt='a fourth', ranks=[0, 1, 2, 3])
    gold = exchange.ranking_items([known], gold=True)
    labeling.catalog.add_items(connection, task, gold)
  labeling.people(engine, ann='labeler')
  seen = []
  with labeling.serving(engine) as url:
    ann = labeling.labeler(url, 'ann')
    ann.http.event_hooks['response'].append(lambda r: seen.append((r, r.read())))
    while (item := ann.next_item(task)) is not None:
      path = f'/items/{item["item"]}'
      for step in range(1, item['steps'] + 1):
        ann.http.get(f'{path}?step={step}')
      ann.http.post(path, data=dict(token=item['token'], step=5, go='submit'))  # refused
      ann.submit(item, [1, 2, 3, 4], [labeling.RATING] * 4)
      ann.http.get(path)
    for page in ('/', '/answers', f'/tasks/{task}/instructions'):
      ann.http.get(page)
    cookies = str(dict(ann.http.cookies))
  engine.dispose()
  assert len(seen) > 50
  for response, body in seen:
    for where in (str(response.url), str(response.headers), body.decode(), cookies):
      assert 'secret' not in where.lower(), response.url
      assert 'gold' not in where, response.url


def test_known_answers_look_like_all_others(tmp_path):
  """The page of an item with a known answer differs from another only by its texts and numbers."""
  engine = schema.connect(str(tmp_path / 'gold.db'))
  record = dict(prompt='the prompt', responses=['one', 'two'])
  task = labeling.task(engine, records=[record | dict(ranks=[0, 1])], gold=True, gold_rate=0.5)
  with schema.writing(engine) as connection:
    rows = exchange.ranking_items([record | dict(prompt='the prompt ')])
    labeling.catalog.add_items(connection, task, rows)
  labeling.people(engine, ann='labeler')
  pages = []
  with labeling.serving(engine) as url:
    ann = labeling.labeler(url, 'ann')
    while (item := ann.next_item(task)) is not None:
      text = ann.http.get(f'/items/{item["item"]}?step=1').text
      text = re.sub(r'the prompt ?|value="[^"]{20,}"|/items/\d+|data-item="\d+"|one|two', '', text)
      pages.append(text)
      ann.submit(item, [1, 2], [labeling.RATING] * 2)
  engine.dispose()
  assert len(pages) == 2 and pages[0] == pages[1]
