"""The labeling database when the clock goes back, when it cannot be written, and when it is of
another version: nothing is lost, and the message says what to do."""

import contextlib
import os
import pathlib
import re
import shutil
import sqlite3
import tempfile
import time

import pytest
import sqlalchemy as sa

from alignjax.label import catalog, client, exchange, history, schema
from alignjax.label.schema import answers, drafts, events, items, leases
from tests import label_databases, labeling
from tests.labeling import rows, submit, take


@pytest.fixture(scope='module')
def cluster():
  yield from label_databases.cluster()


@pytest.fixture(params=['sqlite', 'postgres'])
def address(request, tmp_path):
  return label_databases.new(request, tmp_path)


# The clock


def test_a_clock_that_is_set_back(address, monkeypatch):
  """By a day: leases end as before, people stay logged in, also after a restart, and the times of
  answers are in the order of their numbers. When the clock is right again, so are the times."""
  real, back = time.time, [0.0]
  monkeypatch.setattr(history.time, 'time', lambda: real() - back[0])
  engine = schema.connect(address)
  ann, bob = labeling.people(engine, ann='labeler', bob='labeler').values()
  task = labeling.task(engine, records=labeling.candidates(4), ratings=False)
  with labeling.serving(engine, lease_seconds=0.5) as url:
    browser = labeling.labeler(url, 'ann')
    browser.submit(browser.next_item(task), [1, 2, 3, 4])
    assert browser.next_item(task)['item'] == 2
    back[0] = 86400
    assert browser.http.get('/answers').status_code == 200
    assert take(engine, task, bob) == 3  # Ann's lease of item 2 runs.
    submit(engine, 3, bob)
    time.sleep(0.6)
    assert take(engine, task, bob) == 2  # It has ended.
    submit(engine, 2, bob)
    assert browser.next_item(task)['item'] == 4
    cookies = dict(browser.http.cookies)
  engine.dispose()
  engine = schema.connect(address)
  try:
    with labeling.serving(engine) as url, contextlib.closing(client.Labeler(url)) as browser:
      browser.http.cookies.update(cookies)
      browser.submit(browser.next_item(task), [1, 2, 3, 4])
    found = rows(engine, answers)
    assert [row.item_id for row in found] == [1, 3, 2, 4]
    times = [row.at for row in found]
    assert times == sorted(times) and 0 < times[-1] - times[0] < 600
    assert all(row.elapsed > 0 for row in found)
    back[0] = 0
    with schema.reading(engine) as connection:
      assert abs(history.now(connection) - real()) < 1
  finally:
    engine.dispose()


# A database that cannot be written


@contextlib.contextmanager
def broken(engine, pragma, repair):
  """Sets a pragma on every connection of a server, and afterwards another one."""
  setting = [pragma]

  def set_it(raw, *_):
    raw.cursor().execute(f'PRAGMA {setting[0]}').close()

  sa.event.listen(engine, 'checkout', set_it)
  try:
    yield
  finally:
    setting[0] = repair


@pytest.mark.parametrize(
  'pragma, repair, reason',
  [
    ('max_page_count=1', 'max_page_count=1000000', 'The disk of the server is full'),
    ('query_only=1', 'query_only=0', 'The database cannot be written now'),
  ],
)
def test_a_full_or_read_only_disk(tmp_path, pragma, repair, reason):
  """The page says so with what the person typed (507), nothing is half written, and it works again
  as soon as there is room."""
  engine = schema.connect(str(tmp_path / 'labels.db'))
  (ann,) = labeling.people(engine, ann='labeler').values()
  with schema.writing(engine) as connection:
    task = catalog.add_task(connection, 'write', 'demonstration')
    catalog.add_items(connection, task, exchange.demonstration_items([{'prompt': 'Say hello.'}]))
  # A text that does not fit into what is left of the pages of the file.
  text = 'My long & careful answer. ' * 2000
  with labeling.serving(engine) as url:
    browser = labeling.labeler(url, 'ann')
    item = browser.next_item(task)
    before = [rows(engine, table) for table in (answers, drafts, leases, events, items)]
    fields = dict(token=item['token'], step='1', go='submit', response=text)
    with broken(engine, pragma, repair):
      for path in (f'/items/{item["item"]}', f'/items/{item["item"]}/draft'):
        answer = browser.http.post(path, data=fields)
        assert answer.status_code == 507
        assert reason in answer.text and text.strip().replace('&', '&amp;') in answer.text
      assert [rows(engine, t) for t in (answers, drafts, leases, events, items)] == before
      assert browser.item(item['item'])['prompt'] == 'Say hello.'  # Reading goes on.
    browser.write(item, response=text)
  (answer,) = rows(engine, answers)
  assert answer.payload['response'] == text and answer.person_id == ann
  engine.dispose()


def test_a_database_that_goes_away(tmp_path):
  """The page says so with what the person typed, also where it cannot be known who they are."""
  engine = schema.connect(str(tmp_path / 'labels.db'))
  labeling.people(engine, ann='labeler')
  task = labeling.task(engine)
  away = []

  def refuse(*_):
    if away:
      raise sqlite3.OperationalError('unable to open database file')

  sa.event.listen(engine, 'do_connect', refuse)
  with labeling.serving(engine) as url:
    browser = labeling.labeler(url, 'ann')
    item = browser.next_item(task)
    away.append(True)
    engine.dispose()
    fields = dict(token=item['token'], step='1', go='next', likert='5', note='my careful words')
    answer = browser.http.post(f'/items/{item["item"]}', data=fields)
    assert answer.status_code == 507 and 'my careful words' in answer.text
    away.clear()
    assert browser.http.get(f'/items/{item["item"]}').status_code == 200  # Still logged in.
  engine.dispose()


def test_a_database_that_may_not_be_written(tmp_path_factory):
  """Refused at the start, in two sentences."""
  # A folder that others may pass, and without the rights of root, who may write everything.
  folder = pathlib.Path(tempfile.mkdtemp(prefix='label-'))
  try:
    folder.chmod(0o755)
    schema.connect(str(folder / 'labels.db')).dispose()
    (folder / 'labels.db').chmod(0o444)
    folder.chmod(0o555)
    with without_rights():
      check_refused(folder / 'labels.db', 'cannot be used: .+Check that it is')
  finally:
    folder.chmod(0o755)
    shutil.rmtree(folder)


@contextlib.contextmanager
def without_rights():
  if os.geteuid() != 0:
    yield
    return
  os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(0)


def check_refused(database, message, upgrade=False):
  """Asserts that the database is refused and that nothing is changed."""
  before = database.read_bytes()
  with pytest.raises(ValueError, match=message) as caught:
    schema.connect(str(database), upgrade)
  assert len(re.findall(r'[.;](?: |$)', str(caught.value))) >= 2
  assert database.read_bytes() == before


# Other files and versions


def test_files_that_are_no_database_of_ours(tmp_path):
  database = tmp_path / 'labels.db'
  for content in (b'hello', b'hello ' * 10_000):
    database.write_bytes(content)
    check_refused(database, 'cannot be used: file is not a database. Check that')
  database.unlink()
  with contextlib.closing(sqlite3.connect(database)) as other:
    other.execute('CREATE TABLE recipes(name)')
    other.execute('PRAGMA journal_mode=WAL')
  check_refused(database, r'not those of alignjax label \(recipes, ...\). Choose another')
  good = tmp_path / 'good.db'
  schema.connect(str(good)).dispose()
  damaged = bytearray(good.read_bytes())
  damaged[4096 : 4096 * 4] = bytes(4096 * 3)
  database.write_bytes(damaged)
  check_refused(database, 'cannot be used: .*malformed. Check that')


@pytest.mark.parametrize(
  'database, message',
  [
    ('mysql://me:secret@host/x', '--database=mysql://... is of a kind that is not known. Name'),
    ('postgresql://me:secret@host:port/x', 'cannot be understood. Write it as'),
    ('postgresql://me:secret@/x?host=/nowhere', r'postgresql://me:\*\*\*@/x.* Check that it is'),
    ('nowhere/labels.db', 'there is no folder .*nowhere. Make it'),
  ],
)
def test_addresses_that_cannot_be_used(database, message):
  """No message shows a password."""
  if 'nowhere' in database and database.startswith('postgres'):
    pytest.importorskip('psycopg', reason='psycopg is not installed.')
  with pytest.raises(ValueError, match=message) as caught:
    schema.connect(database)
  assert 'secret' not in str(caught.value) and '\n' not in str(caught.value)


def test_a_path_may_have_any_name(tmp_path):
  database = tmp_path / 'my labels? #1 100%.db'
  engine = schema.connect(str(database))
  labeling.people(engine, ann='labeler')
  engine.dispose()
  assert database.exists()


NEWER = """
import sqlalchemy as sa
from alembic import op

revision = '0002'
down_revision = '0001'


def upgrade():
  op.add_column('people', sa.Column('email', sa.String(200)))
  BREAK
"""


@pytest.fixture
def newer(tmp_path, monkeypatch):
  """Makes this version of the package one that has a second migration. Its argument is what the
  migration does last."""

  def make(last='pass'):
    folder = tmp_path / 'migrations'
    shutil.copytree(schema.MIGRATIONS, folder, dirs_exist_ok=True)
    (folder / 'versions' / '0002_test.py').write_text(NEWER.replace('BREAK', last))
    monkeypatch.setattr(schema, 'MIGRATIONS', folder)

  return make


def columns(address):
  engine = sa.create_engine(schema.url_of(address))
  try:
    return [column['name'] for column in sa.inspect(engine).get_columns('people')]
  finally:
    engine.dispose()


def test_an_older_version_is_upgraded_when_asked(address, newer, monkeypatch, tmp_path):
  """Otherwise it is refused. Of a SQLite file a copy stays beside it, and a version that does not
  know the new tables refuses them."""
  engine = schema.connect(address)
  labeling.people(engine, ann='labeler')
  engine.dispose()
  known = schema.MIGRATIONS
  newer()
  with pytest.raises(ValueError, match='older version .*0001.* needs 0002. .*serve --upgrade'):
    schema.connect(address)
  assert 'email' not in columns(address)
  engine = schema.connect(address, upgrade=True)
  try:
    assert 'email' in columns(address)
    assert rows(engine, schema.people)[0].name == 'ann'
  finally:
    engine.dispose()
  schema.connect(address).dispose()
  monkeypatch.setattr(schema, 'MIGRATIONS', known)
  with pytest.raises(ValueError, match='newer version .*0002.* up to 0001. Use that version'):
    schema.connect(address, upgrade=True)
  copies = list(tmp_path.glob('labels.db.before-0002-*'))
  assert len(copies) == (0 if '://' in address else 1)
  for copy in copies:
    engine = schema.connect(str(copy))
    assert rows(engine, schema.people)[0].name == 'ann' and 'email' not in columns(str(copy))
    engine.dispose()


def test_an_upgrade_that_fails_changes_nothing(address, newer):
  schema.connect(address).dispose()
  known = schema.MIGRATIONS
  newer('raise RuntimeError("a power cut")')
  with pytest.raises(RuntimeError, match='a power cut'):
    schema.connect(address, upgrade=True)
  assert 'email' not in columns(address)
  with pytest.raises(ValueError, match='older version'):
    schema.connect(address)
  schema.MIGRATIONS = known
  schema.connect(address).dispose()


def test_the_migrations_make_the_tables(address):
  """Those that the code names, with the same columns and indices."""
  from alembic import autogenerate
  from alembic.runtime import migration

  engine = schema.connect(address)
  try:
    with engine.connect() as connection:
      context = migration.MigrationContext.configure(connection, opts={'compare_type': True})
      assert autogenerate.compare_metadata(context, schema.metadata) == []
  finally:
    engine.dispose()
