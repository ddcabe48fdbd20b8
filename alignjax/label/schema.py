"""The tables of the labeling database, and the connection to it.

The database is SQLite (one file, in WAL mode) or PostgreSQL. Answers are never overwritten or
deleted: an amended or withdrawn answer is a new version, and `current` marks the newest one.
`events` logs what happened. All times are seconds since 1970.
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import threading
import time
import weakref
from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy import Boolean, Column, Float, ForeignKey, Index, Integer, String, Text, event, exc

BUSY_SECONDS = 30  # A writer waits this long for another one before SQLite gives up.

MIGRATIONS = pathlib.Path(__file__).parent / 'migrations'

metadata = sa.MetaData()

# SQLite lets one transaction write at a time. The threads of a process wait for each other here:
# SQLite itself would try again after ever longer pauses, so that some wait for very long.
_turns: weakref.WeakKeyDictionary[sa.Engine, threading.Lock] = weakref.WeakKeyDictionary()


def _table(name: str, *columns: sa.schema.SchemaItem) -> sa.Table:
  return sa.Table(name, metadata, Column('id', Integer, primary_key=True), *columns)


def _of(table: str, nullable: bool = False) -> Column:
  """Returns a column that refers to a row of another table, such as item_id for 'items'."""
  name = {'people': 'person'}.get(table, table.removesuffix('s'))
  return Column(f'{name}_id', Integer, ForeignKey(f'{table}.id'), nullable=nullable)


# One kind of work, with its instructions and its rules. pool: whose labelers see its items,
# 'training', 'heldout', 'screening' or 'all'. version: rises with each change of the row, so that
# of two people who edit it at once the second is told.
tasks = _table(
  'tasks',
  Column('name', String(200), nullable=False, unique=True),
  Column('kind', String(20), nullable=False),
  Column('pool', String(20), nullable=False),
  Column('overlap', Integer, nullable=False),
  Column('gold_rate', Float, nullable=False),
  Column('ratings', Boolean, nullable=False),
  Column('instructions', Text, nullable=False),
  Column('version', Integer, nullable=False),
  Column('created', Float, nullable=False),
)
# The instructions of a task at each version: an answer names the version that its labeler saw.
instructions = _table(
  'instructions',
  _of('tasks'),
  Column('version', Integer, nullable=False),
  Column('markdown', Text, nullable=False),
  Column('at', Float, nullable=False),
  sa.UniqueConstraint('task_id', 'version'),
)
# A prompt and its responses, [{'text', 'source'}]. gold: a researcher's answer, or null.
# hidden: why nobody sees the item any more, or null. answers: the number of current answers.
items = _table(
  'items',
  _of('tasks'),
  Column('key', String(64), nullable=False),
  Column('prompt', sa.JSON, nullable=False),
  Column('use_case', String(200)),
  Column('responses', sa.JSON, nullable=False),
  Column('extra', sa.JSON, nullable=False),
  Column('gold', sa.JSON),
  Column('is_gold', Boolean, nullable=False),
  Column('priority', Float, nullable=False),
  Column('overlap', Integer),
  Column('hidden', String(200)),
  Column('answers', Integer, nullable=False),
  Column('created', Float, nullable=False),
  sa.UniqueConstraint('task_id', 'key'),
  # It holds all that the search for an open item looks at, so that this reads no texts.
  Index('items_open', 'task_id', 'is_gold', 'hidden', 'priority', 'id', 'answers', 'overlap'),
)
people = _table(
  'people',
  Column('name', String(100), nullable=False, unique=True),
  Column('role', String(20), nullable=False),
  Column('pool', String(20), nullable=False),
  Column('password', String(200), nullable=False),
  Column('epoch', Integer, nullable=False),  # A session of an earlier epoch has ended.
  Column('active', Boolean, nullable=False),
  Column('created', Float, nullable=False),
)
invites = _table(
  'invites',
  Column('digest', String(64), nullable=False, unique=True),
  Column('role', String(20), nullable=False),
  Column('pool', String(20), nullable=False),
  Column('expires', Float, nullable=False),
  _of('people', nullable=True),  # who used it
)
leases = _table(
  'leases',
  _of('items'),
  _of('people'),
  Column('shown', sa.JSON, nullable=False),  # the numbers of the responses, in the order shown
  Column('since', Float, nullable=False),
  Column('expires', Float, nullable=False),
  sa.UniqueConstraint('item_id', 'person_id'),
  Index('leases_person', 'person_id'),
)
drafts = _table(
  'drafts',
  _of('items'),
  _of('people'),
  Column('payload', sa.JSON, nullable=False),
  Column('at', Float, nullable=False),
  sa.UniqueConstraint('item_id', 'person_id'),
)
# status: 'done', 'skipped' or 'withdrawn'. active: the seconds in which the page was visible and
# used, where the browser ran our script.
answers = _table(
  'answers',
  _of('items'),
  _of('people'),
  Column('version', Integer, nullable=False),
  Column('current', Boolean, nullable=False),
  Column('status', String(20), nullable=False),
  Column('payload', sa.JSON, nullable=False),
  Column('shown', sa.JSON, nullable=False),
  Column('instructions_version', Integer, nullable=False),
  Column('elapsed', Float, nullable=False),
  Column('active', Float),
  Column('at', Float, nullable=False),
  sa.UniqueConstraint('item_id', 'person_id', 'version'),
  Index('answers_person', 'person_id', 'current'),
)
# A researcher's score of a demonstration, 1 to 7 (paper B.1).
reviews = _table(
  'reviews',
  _of('answers'),
  _of('people'),
  Column('score', Integer, nullable=False),
  Column('at', Float, nullable=False),
)
events = _table(
  'events',
  Column('at', Float, nullable=False),
  Column('kind', String(40), nullable=False),
  _of('people', nullable=True),
  _of('items', nullable=True),
  Column('details', sa.JSON, nullable=False),
  Index('events_at', 'at'),
)
attempts = _table(
  'attempts',
  Column('name', String(100), nullable=False),
  Column('address', String(100), nullable=False),
  Column('at', Float, nullable=False),
  Index('attempts_at', 'at'),
)
settings = sa.Table(
  'settings',
  metadata,
  Column('name', String(40), primary_key=True),
  Column('value', Text, nullable=False),
)


def url_of(database: str) -> sa.URL:
  """Returns the address of a database for SQLAlchemy. A path is a SQLite file."""
  scheme, found, rest = database.partition('://')
  if not found:
    path = pathlib.Path(database).expanduser().absolute()
    return sa.URL.create('sqlite', database=str(path))
  if scheme not in ('postgresql', 'postgres'):
    raise ValueError(
      f'--database={scheme}://... is of a kind that is not known. Name the path of a SQLite file, '
      f'or postgresql://USER@HOST/NAME.'
    )
  try:
    return sa.make_url(f'postgresql+psycopg://{rest}')
  except (ValueError, exc.ArgumentError):
    raise ValueError(
      '--database=postgresql://... cannot be understood. Write it as '
      'postgresql://USER:PASSWORD@HOST:PORT/NAME.'
    ) from None


def connect(database: str, upgrade: bool = False) -> sa.Engine:
  """Opens the database, and makes its tables if there are none.

  Args:
    database: the path of a SQLite file, or the address of a PostgreSQL database.
    upgrade: whether the tables of an older version may be changed to those of this one. Of a SQLite
      file a copy is made first.

  Raises:
    ValueError: if it cannot be opened, or its tables are those of another version, or not ours.
  """
  url = url_of(database)
  if url.get_backend_name() == 'sqlite':
    engine = _sqlite(url)
    place, advice = f'--database={database}', 'is a database of alignjax label, and yours to write'
  else:
    engine = _postgres(url)
    address = url.set(drivername='postgresql').render_as_string()  # It hides the password.
    place, advice = f'--database={address}', 'is the address of a server that runs, and lets you in'
  try:
    _check_version(engine, place, upgrade)
  except exc.DatabaseError as error:
    engine.dispose()
    reason = ' '.join(str(error.orig).split()).rstrip('.')
    raise ValueError(f'{place} cannot be used: {reason}. Check that it {advice}.') from None
  except BaseException:
    engine.dispose()
    raise
  return engine


def _sqlite(url: sa.URL) -> sa.Engine:
  folder = pathlib.Path(str(url.database)).parent
  if not folder.is_dir():
    raise ValueError(f'--database: there is no folder {folder}. Make it, or name another one.')
  engine = sa.create_engine(
    url, connect_args={'timeout': BUSY_SECONDS}, pool_size=20, max_overflow=20
  )
  event.listen(engine, 'connect', _set_up_sqlite)
  event.listen(engine, 'begin', _begin_sqlite)
  _turns[engine] = threading.Lock()
  return engine


def _postgres(url: sa.URL) -> sa.Engine:
  try:
    import psycopg  # noqa: F401
  except ModuleNotFoundError:
    raise ValueError(
      "a PostgreSQL database needs psycopg: pip install 'alignjax[label-postgres]'."
    ) from None
  return sa.create_engine(url, pool_size=20, max_overflow=20, pool_pre_ping=True)


def _set_up_sqlite(connection, _) -> None:
  connection.isolation_level = None  # Transactions begin where _begin_sqlite says so.
  cursor = connection.cursor()
  for pragma in (
    f'busy_timeout={BUSY_SECONDS * 1000}',
    'journal_mode=WAL',
    'synchronous=FULL',
    'foreign_keys=ON',
  ):
    cursor.execute(f'PRAGMA {pragma}')
  cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
  # A transaction that reads first and writes later fails where another one has written between.
  options = connection.get_execution_options()
  if not options.get('single'):
    connection.exec_driver_sql('BEGIN IMMEDIATE' if options.get('writes') else 'BEGIN')


def _connected(database: sa.Engine | sa.Connection) -> contextlib.AbstractContextManager:
  """An open connection stays open."""
  if isinstance(database, sa.Connection):
    return contextlib.nullcontext(database)
  return database.connect()


@contextlib.contextmanager
def reading(database: sa.Engine | sa.Connection, single: bool = False) -> Iterator[sa.Connection]:
  """A transaction that only reads, and so sees one state of the database. It is made on the
  connection that is given, or on a new one. single: whether it has one query, which sees one state
  by itself, so that the database need not begin and end a transaction."""
  with _connected(database) as connection:
    connection.execution_options(writes=False, single=single)
    if connection.dialect.name == 'postgresql':
      level = 'AUTOCOMMIT' if single else 'REPEATABLE READ'
      connection.execution_options(isolation_level=level)
    with connection.begin():
      yield connection


@contextlib.contextmanager
def writing(database: sa.Engine | sa.Connection) -> Iterator[sa.Connection]:
  """A transaction that writes, made as by `reading`. On SQLite there is one at a time, and the
  others wait."""
  with _turns.get(database.engine, contextlib.nullcontext()):
    with _connected(database) as connection:
      connection.execution_options(writes=True, single=False)
      if connection.dialect.name == 'postgresql':
        # What is locked is looked at again by a statement of its own (assignment.py), which must
        # see what others have committed by then.
        connection.execution_options(isolation_level='READ COMMITTED')
      with connection.begin():
        yield connection


@contextlib.contextmanager
def explained(place: str) -> Iterator[None]:
  """Raises OSError, with what to do, where a database cannot be read or written. place: what names
  it, such as --database=labels.db."""
  try:
    yield
  except exc.OperationalError as error:
    raise OSError(
      f'{place}: {error.orig}. The action that failed has saved nothing. Make room there or mend '
      'it, and give the same command again.'
    ) from error


def wait_for(connection: sa.Connection, what: str) -> None:
  """Waits until no other transaction that waited for the same is open, so that what this one looks
  up before it inserts is still true when it does. On SQLite writing transactions do so anyway."""
  if connection.dialect.name == 'postgresql':
    number = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], signed=True)
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))


def _check_version(engine: sa.Engine, place: str, upgrade: bool) -> None:
  from alembic import command, config, script
  from alembic.runtime import migration

  settings = config.Config()
  settings.set_main_option('script_location', str(MIGRATIONS))
  directory = script.ScriptDirectory.from_config(settings)
  newest = directory.get_current_head()
  with reading(engine) as connection:
    found = migration.MigrationContext.configure(connection).get_current_revision()
    names = sa.inspect(connection).get_table_names()
  if found == newest:
    return
  if found is None and set(names) - {'alembic_version'}:
    raise ValueError(
      f'{place} has tables that are not those of alignjax label '
      f'({", ".join(sorted(names)[:3])}, ...). Choose another database.'
    )
  if found is not None and found not in {s.revision for s in directory.walk_revisions()}:
    raise ValueError(
      f'{place} was made by a newer version of alignjax: its tables are of revision {found}, and '
      f'this version knows those up to {newest}. Use that version; nothing was changed.'
    )
  if found is not None and not upgrade:
    raise ValueError(
      f'{place} was made by an older version of alignjax: its tables are of revision {found}, and '
      f'this version needs {newest}. Stop its server, and let `alignjax label serve --upgrade` '
      f'change them; of a SQLite file it keeps a copy.'
    )
  if found is not None and engine.dialect.name == 'sqlite':
    copy = f'{engine.url.database}.before-{newest}-{time.strftime("%Y%m%dT%H%M%S")}'
    with contextlib.closing(engine.raw_connection()) as raw:
      raw.cursor().execute('VACUUM INTO ?', (copy,))
  with writing(engine) as connection:
    wait_for(connection, 'tables')
    # If another process has made the tables while this one waited, nothing is left to do.
    settings.attributes['connection'] = connection
    command.upgrade(settings, 'head')
